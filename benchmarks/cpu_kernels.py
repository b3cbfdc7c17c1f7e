"""The kernels of this processor: 2:4 against the best dense product there is, for one layer.

    python -m benchmarks.cpu_kernels [--threads 1 2] [--dtype bfloat16] [--value-dtype int8] [--quantize-x]
        [--rows 1 2 4 ...] [--shapes 4096x4096 ...] [--smoke]

Sides, one call each in every round, in turn:

- ``2:4``: halve's kernels, what a packed layer runs, with kept values of ``--value-dtype``, and with ``--quantize-x`` rows of x rounded to
  these, too;
- ``weights``: with ``--quantize-x``, the same values by x as it is;
- ``values``: the same with kept values in the dtype of x, where that is another one;
- ``bytes``: with ``--quantize-x`` and int8, torch's product of dense int8 numbers, of x that somebody else has rounded and without scales: what a
  dense layer with activations of 8 bits could take at least. It is not one of the dense products of which the best is compared with;
- ``dense``: halve's own dense kernel, for as many rows as it is used for;
- ``eager``: ``torch.nn.functional.linear``, what a dense layer of plain transformers runs;
- ``frozen``: the operator that torch.compile with ``freezing`` calls (`frozen_operator` looks it up in a compiled
  module's code), on weights that it packed before, on processors for which it does so;
- ``wide``: the weight widened to float32 at each call and multiplied so, where the processor has no 16-bit products: what a
  dense layer of halve runs there (`compress.wide`).

Each side has copies of the weight of 512 MB in all, and takes the next one at each call, so no weight is in a cache. Figures
are medians over the rounds; a ratio is the median of the ratios within a round, with the quartiles. One process a number of
threads. ``HALVE_CPU_PATH`` chooses another code path; to compare with torch as it is on such a processor, set
``ATEN_CPU_CAPABILITY`` and ``ONEDNN_MAX_CPU_ISA`` too, and ``--name``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress import wide
from compress.packed import PackedWeight, bytes_of, pack, quantize
from compress.patterns import NMPattern
from serve.kernels import ops, plain
from serve.kernels.cpu import backend
from serve.linear import StreamedLinear
from serve.measure.environment import environment
from serve.measure.speed import ratio

RESULTS = Path(__file__).parent / "results"
SHAPES = ("4096x4096", "14336x4096", "4096x14336")
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
COPIES_BYTES = 512 << 20
DENSE = {"dense": "halve's dense", "eager": "torch eager", "frozen": "torch frozen", "wide": "float32"}
OTHERS = {"weights": "2:4 with x as it is", "values": "2:4 in the dtype of x", **DENSE, "bytes": "dense int8"}

Side = Callable[[Tensor], Tensor]


def frozen_operator() -> str:
    """Which operator a compiled and frozen bfloat16 linear calls here."""
    import torch._inductor.config as inductor
    from torch._inductor.utils import run_and_get_code

    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).eval().requires_grad_(False)
    with inductor.patch(freezing=True), torch.no_grad():
        _, code = run_and_get_code(torch.compile(layer), torch.randn(1, 64, dtype=torch.bfloat16))
    calls = [name for name in ("mkldnn._linear_pointwise", "mkl._mkl_linear", "extern_kernels.mm") if name in code[0]]
    return calls[0] if calls else "a kernel of its own"


class Weights:
    """Copies of one 2:4 weight [n, k] in every form, enough of them that none is in a cache when its turn comes."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, value_dtype: torch.dtype, quantizes_x: bool = False) -> None:
        weight = torch.randn(n, k)
        weight *= NMPattern(2, 4).mask(weight.abs())
        weight = weight.to(dtype)
        self.n, self.k, self.dtype, self.value_dtype = n, k, dtype, value_dtype
        self.copies = max(3, -(-COPIES_BYTES // weight.nbytes))
        packed = pack(weight)
        self.all: list[Tensor] = []
        self.values = self._prepared(packed)
        scaled = packed if value_dtype == dtype else quantize(packed, value_dtype)
        self.weights = self.values if value_dtype == dtype else self._prepared(scaled)
        self.quantizes_x = quantizes_x
        self.prepared = self._prepared(replace(scaled, quantizes_x=True)) if quantizes_x else self.weights
        dense = [weight.clone() for _ in range(self.copies)]
        for copy in dense:
            backend.gather_into_huge_pages(copy)  # as prepared weights are, and as a served model's dense layers
        self.dense = itertools.cycle(dense)
        self.all = [*self.all, *dense]
        self.bytes: Iterator[Tensor] | None = None
        if quantizes_x and value_dtype == torch.int8:
            whole = plain.expand(PackedWeight(scaled.values, scaled.mask))
            of_bytes = [whole.clone() for _ in range(2 * self.copies)]
            self.bytes, self.all = itertools.cycle(of_bytes), [*self.all, *of_bytes]

    def _prepared(self, packed: PackedWeight) -> Iterator[Tensor]:
        # (smaller ones are more of them)
        count = max(self.copies, -(-COPIES_BYTES // packed.nbytes)) if packed.scale is not None else self.copies
        prepared = [backend.prepare(packed) for _ in range(count)]
        self.all += prepared
        return itertools.cycle(prepared)

    def wake(self) -> None:
        """Touches every page of every copy: what nobody read for seconds, while others were made, the system may have put away."""
        for copy in self.all:
            copy.view(-1).view(torch.uint8)[::4096].sum()

    def sides(self, rows: int) -> dict[str, Side]:
        """The products to compare, x [rows, k] -> [rows, n]."""
        result: dict[str, Side] = {"2:4": lambda x: ops.sparse24_linear(x, next(self.prepared), None, self.n)}
        if self.quantizes_x:
            result["weights"] = lambda x: ops.sparse24_linear(x, next(self.weights), None, self.n)
        if self.value_dtype != self.dtype:
            result["values"] = lambda x: ops.sparse24_linear(x, next(self.values), None, self.n)
        if rows <= StreamedLinear.MOST_ROWS and backend.path() != "portable":
            result["dense"] = lambda x: ops.dense_linear(x, next(self.dense), None)
        result["eager"] = lambda x: functional.linear(x, next(self.dense))
        if self.dtype == torch.bfloat16 and (packed := self._frozen(rows)):
            frozen = itertools.cycle(packed)
            result["frozen"] = lambda x: torch.ops.mkldnn._linear_pointwise(x, next(frozen), None, "none", [], "")
        if wide.is_emulated(self.dtype, torch.device("cpu")):
            result["wide"] = lambda x: wide.linear(x, next(self.dense), None)
        if (of_bytes := self.bytes) is not None:
            rounded = torch.randint(-127, 128, (rows, self.k), dtype=torch.int8)
            result["bytes"] = lambda x: torch.ops.aten._int_mm(rounded, next(of_bytes).T)
        return result

    def _frozen(self, rows: int) -> list[Tensor]:
        """Copies of the weight as torch's frozen linear packs them; none where it refuses the processor, as it does without AVX-512."""
        weight = next(self.dense)
        try:
            return [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for _ in range(self.copies)]
        except RuntimeError as error:
            if "cpu support" not in str(error):
                raise
            return []

    def bytes_of(self, side: str) -> int:
        """What a side reads of the weight."""
        if side in DENSE:
            return self.n * self.k * self.dtype.itemsize
        if side == "bytes":
            return self.n * self.k
        return bytes_of(self.n, self.k, self.dtype if side == "values" else self.value_dtype)


def measure(weights: Weights, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round for each side, and how much faster 2:4 is."""
    n, k = weights.n, weights.k
    x = torch.randn(rows, k).to(weights.dtype)
    every = weights.sides(rows)
    outputs = {name: side(x) for name, side in every.items()}  # warm-up
    for name, output in outputs.items():
        off = (output.float() - outputs["eager"].float()).norm() / outputs["eager"].float().norm()
        if name != "bytes" and not off < 0.06:  # (rounding both sides to float8 is off by 0.04)
            raise AssertionError(f"{name} computes something else than torch at {n}x{k}, {rows} rows")
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for turn in range(rounds):
        for name in list(every) if turn % 2 else reversed(every):
            started = time.perf_counter()
            every[name](x)
            seconds[name].append(time.perf_counter() - started)
    middle = {name: statistics.median(samples) for name, samples in seconds.items()}
    return {
        "n": n,
        "k": k,
        "rows": rows,
        "milliseconds": {name: 1e3 * value for name, value in middle.items()},
        "gigabytes_per_second": {name: weights.bytes_of(name) / 1e9 / value for name, value in middle.items()},
        "speedup": {name: ratio(seconds["2:4"], samples) for name, samples in seconds.items() if name != "2:4"},
        "samples": seconds,
    }


def prepare_milliseconds(n: int, k: int, dtype: torch.dtype, rounds: int = 7) -> list[float]:
    """How long it takes to bring a packed weight into the order of the kernels."""
    weight = torch.randn(n, k)
    packed = pack((weight * NMPattern(2, 4).mask(weight.abs())).to(dtype))
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        backend.prepare(packed)
        samples.append(1e3 * (time.perf_counter() - started))
    return samples


def run(
    threads: int,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
    quantizes_x: bool,
    shapes: list[str],
    rows: list[int],
    rounds: int,
) -> dict[str, Any]:
    """All measurements of one number of threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results = []
    with torch.inference_mode():
        for shape in shapes:
            n, k = map(int, shape.split("x"))
            weights = Weights(n, k, dtype, value_dtype, quantizes_x)
            weights.wake()
            for m in rows:
                results.append(measure(weights, m, rounds if m <= 64 else max(5, rounds * 64 // m)))
                print(_line(threads, results[-1]), file=sys.stderr, flush=True)
        n, k = map(int, shapes[-1].split("x"))
        preparing = prepare_milliseconds(n, k, dtype)
    return {"threads": threads, "layers": results, "prepare": {"shape": [n, k], "milliseconds": preparing}}


def _line(threads: int, result: dict[str, Any]) -> str:
    gains = ", ".join(f"{name} {value['median']:.2f}" for name, value in result["speedup"].items())
    return f"{threads} threads, {result['n']}x{result['k']}, {result['rows']} rows: {result['milliseconds']['2:4']:.3f} ms; {gains}"


def render(document: dict[str, Any]) -> str:
    """Two tables: the range over the layers for each number of rows, and every layer."""
    sides = [
        name
        for name in OTHERS
        if any(name in layer["speedup"] for run_ in document["runs"] for layer in run_["layers"])
    ]
    than = " | ".join(f"than {OTHERS[name]}" for name in sides)
    lines = [
        f"# 2:4{_values(document)} against dense, {document['dtype']}, {document['path']} kernels",
        "",
        "How many times faster one 2:4 layer is, weights from memory: medians over the rounds, and of these the range over "
        f"{len({(layer['n'], layer['k']) for layer in document['runs'][0]['layers']})} layers. Best: the fastest of the dense products for that layer.",
        "",
        f"| threads | rows of x | than the best dense | {than} |",
        "|---:|---:|---:|" + "---:|" * len(sides),
    ]
    for run_ in document["runs"]:
        for rows in dict.fromkeys(layer["rows"] for layer in run_["layers"]):
            gains = [_gains(layer) for layer in run_["layers"] if layer["rows"] == rows]
            cells = [_range([gain[name] for gain in gains if name in gain]) for name in ("best", *sides)]
            lines.append(f"| {run_['threads']} | {rows} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Every layer; GB/s counts the bytes of the weight in its own form, quartiles and samples are in the JSON.",
        "",
        f"| threads | layer | rows of x | 2:4, ms | {than} | 2:4, GB/s | best dense, GB/s |",
        "|---:|---|---:|---:|" + "---:|" * (len(sides) + 2),
    ]
    for run_ in document["runs"]:
        for layer in run_["layers"]:
            gains = _gains(layer)
            cells = [f"{gains[name]:.2f}" if name in gains else "" for name in sides]
            rates = layer["gigabytes_per_second"]
            dense = max(rate for name, rate in rates.items() if name in DENSE)
            lines.append(
                f"| {run_['threads']} | {layer['n']} x {layer['k']} | {layer['rows']} | {layer['milliseconds']['2:4']:.3f} | "
                + " | ".join(cells)
                + f" | {rates['2:4']:.1f} | {dense:.1f} |"
            )
    lines.append("")
    for run_ in document["runs"]:
        n, k = run_["prepare"]["shape"]
        took = statistics.median(run_["prepare"]["milliseconds"])
        lines.append(f"Preparing a {n} x {k} weight at load, {run_['threads']} threads: {took:.1f} ms.")
    env = document["environment"]
    lines += [
        "",
        f"torch's frozen linear calls {document['frozen_operator']}. {env['machine']}, {env['cores']} cores, torch "
        f"{env['versions']['torch']}, {env['date']}.",
    ]
    return "\n".join(lines) + "\n"


def _gains(layer: dict[str, Any]) -> dict[str, float]:
    """How much faster than each dense side, and than the best one."""
    gains = {name: value["median"] for name, value in layer["speedup"].items()}
    return {**gains, "best": min(gain for name, gain in gains.items() if name in DENSE)}


def _values(document: dict[str, Any]) -> str:
    stored = document.get("value_dtype", document["dtype"])
    values = "" if stored == document["dtype"] else f" with values in {stored}"
    return f"{values} and x rounded to it" if document.get("quantizes_x") else values


def _range(values: list[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.2f}" if len(values) == 1 else f"{low:.2f} to {high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--value-dtype", choices=["int8", "float8_e4m3fn"], help="of the kept values; left out: --dtype"
    )
    parser.add_argument("--quantize-x", action="store_true", help="rows of x are rounded to --value-dtype, too")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--name", default="cpu_kernels", help="of the results files")
    parser.add_argument("--smoke", action="store_true", help="small layers, printed and not kept: does it run?")
    parser.add_argument("--render", action="store_true", help="only write the tables again from the results")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.render:
        document = json.loads((RESULTS / f"{arguments.name}.json").read_text())
        (RESULTS / f"{arguments.name}.md").write_text(render(document))
        return
    if arguments.smoke:
        arguments.shapes, arguments.rows, arguments.rounds = ["256x512"], [1, 8, 64], 3
    if arguments.quantize_x and arguments.value_dtype is None:
        parser.error("--quantize-x needs --value-dtype")
    dtype = getattr(torch, arguments.dtype)
    value_dtype = getattr(torch, arguments.value_dtype or arguments.dtype)
    if arguments.child:
        what = (dtype, value_dtype, arguments.quantize_x, arguments.shapes, arguments.rows, arguments.rounds)
        print(json.dumps(run(arguments.child, *what)))
        return
    runs = []
    for threads in arguments.threads:
        command = [sys.executable, "-m", "benchmarks.cpu_kernels", *sys.argv[1:], "--child", str(threads)]
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    document = {
        "dtype": arguments.dtype,
        "value_dtype": arguments.value_dtype or arguments.dtype,
        "quantizes_x": arguments.quantize_x,
        "path": backend.path(),
        "frozen_operator": frozen_operator(),
        "environment": environment(),
        "runs": runs,
    }
    text = render(document)
    if not arguments.smoke:
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(document) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
