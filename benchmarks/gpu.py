"""The whole check of the GPU kernels, in one command of under nine minutes: are they right, and how fast are they?

    python -m benchmarks.gpu [--minutes 8.5] [--out DIR] [--only checks decode ...]

Needs torch with CUDA (and NVRTC, which comes with it) and this directory; nothing has to be installed. Sections run in the
order of `SECTIONS`, what matters most first, and ``gpu.json`` and ``gpu.md`` are written anew after each figure, so what was
measured stays whatever happens then. Exit codes: 0, 1 a check failed or a section broke, 2 there is no GPU.

Every time is that of one launch in a replayed CUDA graph, of at least 16 launches that go through copies of the weight of 256 MB
and more in all, so that none comes from the second cache. Sides take turns in each round; a ratio is the median over the
rounds of the ratio within a round. GB/s counts the bytes of the weight in its own form.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import gpu_checks
from compress import fused
from compress.columns import prune_columns
from compress.linalg import inverse_factor
from compress.packed import PATTERN
from serve.kernels import ops, plain
from serve.kernels.cuda import backend, compiler, cusparselt, driver, plan
from serve.kernels.cuda.plan import Form
from serve.kernels.triton import backend as triton_backend

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672))
"""Llama-3-8B's and 70B's: [N, K]."""
ROWS = (1, 8, 16, 64, 32, 4)
COPIES_BYTES = 256 << 20
DTYPE = torch.bfloat16

Call = Callable[[], Any]


class Run:
    """The document that grows, the files it goes to, and the time that is left."""

    def __init__(self, directory: Path, minutes: float) -> None:
        self.directory, self.deadline = directory, time.monotonic() + 60 * minutes
        self.document: dict[str, Any] = {"environment": environment(), "left_out": [], "broken": {}}

    def has_time(self, what: str, seconds: float = 3) -> bool:
        """Whether something that takes so long can still be begun; what cannot is noted."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.document["left_out"].append(what)
        return False

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Puts a figure into the document and onto the disk."""
        self.document.setdefault(section, []).append(row)
        print(section, json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, text in (("gpu.json", json.dumps(self.document) + "\n"), ("gpu.md", render(self.document))):
            temporary = self.directory / f"{name}.partial"
            temporary.write_text(text)
            temporary.replace(self.directory / name)


def environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvrtc": ".".join(map(str, compiler.version())),
        "python": platform.python_version(),
        "system": _output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"
        ),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


# --- Timing ---------------------------------------------------------------------------------------------------------


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """A graph of calls, each of which ran before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def times(sides: dict[str, list[Call]], rounds: int = 15) -> dict[str, list[float]]:
    """Microseconds of one call, for each side and round."""
    graphs = {name: captured(calls) for name, calls in sides.items()}
    for graph in graphs.values():
        graph.replay()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 else reversed(sides):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            found[name].append(1e3 * start.elapsed_time(end) / len(sides[name]))
    return found


def summary(samples: dict[str, list[float]], dense: str = "dense") -> dict[str, Any]:
    """Medians, and how many times faster than the dense side each one is, with quartiles."""
    gains = {}
    for name, values in samples.items():
        if name != dense and dense in samples:
            ratios = [slow / fast for slow, fast in zip(samples[dense], values, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            gains[name] = {"median": middle, "p25": low, "p75": high}
    return {"microseconds": {name: statistics.median(values) for name, values in samples.items()}, "speedup": gains}


class Weights:
    """Copies of one 2:4 weight [n, k], prepared and dense, more of them than the second cache holds."""

    def __init__(self, n: int, k: int, dtype: torch.dtype = DTYPE) -> None:
        self.n, self.k = n, k
        packed = gpu_checks.random_weight(n, k, dtype)
        self.bytes = {"2:4": packed.nbytes, "dense": n * k * dtype.itemsize}
        prepared, dense = backend.prepare(packed), plain.expand(packed)
        self.prepared = [prepared, *(prepared.clone() for _ in range(max(1, COPIES_BYTES // prepared.nbytes)))]
        self.dense = [dense, *(dense.clone() for _ in range(max(1, COPIES_BYTES // dense.nbytes)))]
        torch.cuda.synchronize()

    def dense_calls(self, x: Tensor) -> list[Call]:
        return [lambda w=w: functional.linear(x, w) for w in _cycled(self.dense)]

    def sparse_calls(self, x: Tensor) -> list[Call]:
        return [lambda w=w: ops.sparse24_linear(x, w, None, self.n) for w in _cycled(self.prepared)]

    def direct_calls(self, kernels: backend.Kernels, x: Tensor, **how: Any) -> list[Call]:
        """The kernel itself, as it is told to."""
        y = x.new_empty(len(x), self.n)

        def call(w: Tensor) -> None:
            kernels.multiply(x, w, None, y, _stream(), **how)

        return [lambda w=w: call(w) for w in _cycled(self.prepared)]


def _cycled(copies: list[Tensor]) -> list[Tensor]:
    """All copies in turn, at least 16 launches."""
    rounds = -(-16 // len(copies))
    return list(itertools.chain.from_iterable([copies] * rounds))


# --- Sections -------------------------------------------------------------------------------------------------------


def checks(run: Run) -> None:
    """Right or wrong."""
    began = time.monotonic()
    gpu_checks.loaded(DTYPE)
    run.document["first_load_seconds"] = time.monotonic() - began
    for name, wrong in gpu_checks.run():
        run.add("checks", {"name": name, "wrong": wrong, "seconds": round(time.monotonic() - began, 1)})
        began = time.monotonic()


def bandwidth(run: Run) -> None:
    """What a copy of 1 GB within the memory reaches, both ways counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds = statistics.median(times({"copy": [lambda: target.copy_(source)] * 4})["copy"])
    run.document["copy_gigabytes_per_second"] = 2 * source.nbytes / 1e3 / microseconds
    run.write()


def decode(run: Run) -> None:
    """Few rows, against cuBLAS; ``overlap`` is programmatic dependent launch, which is not the default."""
    kernels = gpu_checks.loaded(DTYPE)
    overlaps = plan.has_clusters(kernels.device.capability)
    for n, k in SHAPES:
        if not run.has_time(f"decode {n}x{k}", 6):
            continue
        weights = Weights(n, k)
        for rows in ROWS:
            x = gpu_checks.random_input(rows, k, DTYPE)
            sides = {"2:4": weights.sparse_calls(x), "dense": weights.dense_calls(x)}
            if overlaps:
                sides["2:4 overlap"] = weights.direct_calls(kernels, x, overlap=True)
            found = summary(times(sides))
            rates = {name: weights.bytes[name.split()[0]] / 1e3 / us for name, us in found["microseconds"].items()}
            copy = run.document.get("copy_gigabytes_per_second")
            share = rates["2:4"] / copy if copy else None
            run.add("decode", {"n": n, "k": k, "rows": rows, **found, "gigabytes_per_second": rates, "of_copy": share})
        del weights


def splits(run: Run) -> None:
    """Every cut along K, beside the one that `plan.splits` chose."""
    kernels = gpu_checks.loaded(DTYPE)
    for n, k in SHAPES[:5]:
        if not run.has_time(f"splits {n}x{k}", 4):
            continue
        weights = Weights(n, k)
        for rows in (1, 16, 64):
            form = plan.form_for(tuple(kernels.most_splits), rows)
            x, most = gpu_checks.random_input(rows, k, DTYPE), kernels.most_splits[form]
            sides = {str(s): weights.direct_calls(kernels, x, splits=s) for s in (1, 2, 4, 8) if s <= most}
            chosen = plan.splits(form, n, k, kernels.device.processors, most)
            found = {name: statistics.median(values) for name, values in times(sides, 9).items()}
            run.add("splits", {"n": n, "k": k, "rows": rows, "chosen": chosen, "microseconds": found})
        del weights


ALTERNATIVES = {
    1: (Form(1, 1, 4, 4, 2), Form(1, 1, 8, 4, 1), Form(1, 1, 4, 3, 3), Form(1, 1, 2, 4, 4), Form(1, 2, 2, 4, 2), Form(1, 1, 4, 8, 1)),
    16: (Form(2, 1, 4, 4, 2), Form(2, 2, 2, 4, 2), Form(2, 1, 8, 3, 1), Form(2, 1, 2, 4, 4)),
    64: (Form(8, 2, 2, 3, 2), Form(8, 1, 4, 4, 1), Form(8, 2, 4, 3, 1), Form(8, 4, 1, 3, 2), Form(8, 4, 2, 3, 1), Form(8, 1, 2, 4, 2)),
}  # fmt: skip
"""By rows of x: the form of `plan.forms` on Hopper first, then what else might be faster there."""


def forms(run: Run) -> None:
    """Other forms of the kernels, each with its best cut along K, on one square and one wide weight."""
    device = gpu_checks.loaded(DTYPE).device
    for rows, candidates in ALTERNATIVES.items():
        for n, k in ((4096, 4096), (28672, 4096)):
            if not run.has_time(f"forms {rows} rows {n}x{k}", 15):
                continue
            weights, x = Weights(n, k), gpu_checks.random_input(rows, k, DTYPE)
            for form in candidates:
                try:
                    kernels = backend.load(device, DTYPE, driver.default(), (form,))
                except (driver.DriverError, compiler.CompilerError) as error:
                    run.add("forms", {"n": n, "k": k, "rows": rows, "form": str(form), "refused": str(error)})
                    continue
                most = kernels.most_splits[form]
                sides = {str(s): weights.direct_calls(kernels, x, splits=s) for s in (1, 2, 4, 8) if s <= most}
                found = {name: statistics.median(values) for name, values in times(sides, 7).items()}
                run.add("forms", {"n": n, "k": k, "rows": rows, "form": str(form), "microseconds": found})
            del weights


def prefill(run: Run) -> None:
    """Many rows. ``2:4``: halve's operator, which passes over the weight some times, and for more rows expands it and multiplies
    densely; ``expanded``: that from the first row on. ``cusparselt``: its product with
    the algorithm that its search found, on a weight in its own form. ``cusparselt from ours``: the same from the weight as
    decoding has it, expanded and compressed anew at each call, so that only one form is kept. ``torch``: its own operator.
    """
    kernels = gpu_checks.loaded(DTYPE)
    library = _cusparselt(run)
    for n, k in SHAPES[:4]:
        if not run.has_time(f"prefill {n}x{k}", 10):
            continue
        weights = Weights(n, k)
        prepared, dense = weights.prepared[0], weights.dense[0]
        semi = _attempt(run, "torch", lambda w=dense: torch.sparse.to_sparse_semi_structured(w))
        compressed = None
        if library is not None:
            compressed = _attempt(run, "cusparselt", lambda w=dense: library.compress(w, _stream()))
        for rows in (2048, 8192, 128, 256, 512):
            x = gpu_checks.random_input(rows, k, DTYPE)
            sides = {"2:4": weights.sparse_calls(x)[:4], "dense": weights.dense_calls(x)[:4]}
            if rows <= 2 * plan.MOST_PASSES * plan.MOST_ROWS:

                def expanded(x: Tensor = x, w: Tensor = prepared, n: int = n, k: int = k) -> Tensor:
                    kernels.expand(w, to := x.new_empty(n, k), _stream())
                    return functional.linear(x, to)

                sides["expanded"] = [expanded] * 4
            if semi is not None:
                sides["torch"] = [lambda x=x, w=semi: functional.linear(x, w)] * 4
            if library is not None and compressed is not None:
                scratch = torch.empty_like(dense)

                def ready(x: Tensor = x, w: Tensor = compressed, n: int = n) -> Tensor:
                    return library.multiply(x, w, None, n, _stream())

                def from_ours(x: Tensor = x, w: Tensor = prepared, to: Tensor = scratch, n: int = n) -> Tensor:
                    kernels.expand(w, to, _stream())
                    return library.multiply(x, library.compress(to, _stream()), None, n, _stream())

                found = _attempt(run, "cusparselt", lambda x=x, w=compressed, n=n: library.search(x, w, n, _stream()))
                for name, call in (("cusparselt", ready), ("cusparselt from ours", from_ours)):
                    y = _attempt(run, name, call) if found is not None else None
                    if y is not None:
                        gpu_checks.check(y[:16], x[:16], dense, None, f"{name}, {rows} rows, [{n}, {k}]")
                        sides[name] = [call] * 4
            for name in [name for name in sides if name not in ("2:4", "dense")]:
                if _attempt(run, f"{name} in a graph", lambda calls=sides[name]: captured(calls)) is None:
                    del sides[name]
            run.add("prefill", {"n": n, "k": k, "rows": rows, **summary(times(sides, 7))})
        del weights, prepared, dense, semi, compressed


def triton(run: Run) -> None:
    """The fallback's kernels, for few rows and many."""
    if refusal := triton_backend.why_not(torch.device("cuda"), DTYPE):
        run.document["broken"]["triton"] = refusal
        return
    for n, k in SHAPES[:4]:
        if not run.has_time(f"triton {n}x{k}", 6):
            continue
        weights = Weights(n, k)
        packed = backend.restore(weights.prepared[0])
        copies = [triton_backend.prepare(packed) for _ in weights.prepared]
        for rows in (1, 16, 64, 256, 2048):
            x = gpu_checks.random_input(rows, k, DTYPE)
            calls = [lambda w=w, x=x, n=n: ops.sparse24_linear_triton(x, w, None, n) for w in _cycled(copies)]
            found = summary(times({"triton": calls, "dense": weights.dense_calls(x)}, 7))
            run.add("triton", {"n": n, "k": k, "rows": rows, **found})
        del weights, copies


def pruning(run: Run) -> None:
    """SparseGPT of the layers of an 8B model, the factorization and the columns, with the fused kernel and with torch's operators."""
    kernels = fused.on(torch.device("cuda"))
    for n, k in ((6144, 4096), (28672, 4096), (4096, 14336)):
        if not run.has_time(f"pruning {n}x{k}", 20):
            continue
        columns, gram, upper = gpu_checks.pruning_problem(n, k)
        torch.cuda.reset_peak_memory_stats()
        found = {"factorization": _seconds(lambda gram=gram: inverse_factor(gram, 0.01))}
        for name, how in (("fused", kernels), ("torch", None)):
            if name == "torch" or kernels is not None:
                found[name] = _seconds(
                    lambda how=how, c=columns, u=upper: prune_columns(c.clone(), u, PATTERN, "block", None, 128, how)
                )
        run.add("pruning", {"n": n, "k": k, "seconds": found, "peak_bytes": torch.cuda.max_memory_allocated()})
        del columns, gram, upper


def _seconds(call: Call) -> float:
    """Of the second of two calls."""
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _cusparselt(run: Run) -> cusparselt.CusparseLt | None:
    library = _attempt(run, "cusparselt", lambda: cusparselt.on_device(torch.cuda.current_device()))
    if library is not None:
        run.document["cusparselt"] = ".".join(map(str, library.version()))
    return library


def _attempt(run: Run, name: str, call: Callable[[], Any]) -> Any:
    """What a call gives, or None, and then it is noted why."""
    try:
        return call()
    except (RuntimeError, ValueError, cusparselt.CusparseLtError) as error:
        run.document["broken"][name] = f"{type(error).__name__}: {error}"
        return None


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def host(run: Run) -> None:
    """How long a call keeps the processor, without graphs: the operator, the launch alone, and torch's dense linear."""
    kernels = gpu_checks.loaded(DTYPE)
    n = k = 256  # so small that the GPU keeps up
    weights = Weights(n, k)
    x = gpu_checks.random_input(1, k, DTYPE)
    sides = {
        "operator": weights.sparse_calls(x)[0],
        "launch": weights.direct_calls(kernels, x)[0],
        "dense": weights.dense_calls(x)[0],
    }
    found = {}
    for name, call in sides.items():
        samples = []
        for _ in range(20):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(100):
                call()
            samples.append(1e4 * (time.perf_counter() - began))
        found[name] = statistics.median(samples)
    run.add("host", {"microseconds": found})


class Block:
    """A decoder block of Llama-3-8B's shape with random weights: fused projections, 32 heads of which 8 have keys."""

    SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))

    def __init__(self, sparse: bool, cached: int) -> None:
        packed = [gpu_checks.random_weight(n, k, DTYPE, seed) for seed, (n, k) in enumerate(self.SHAPES)]
        self.weights: list[Tensor] = [backend.prepare(w) if sparse else plain.expand(w) for w in packed]
        self.sparse = sparse
        self.norm = torch.ones(4096, device="cuda", dtype=DTYPE)
        self.keys, self.values = (torch.randn(1, 8, cached, 128, device="cuda", dtype=DTYPE) for _ in range(2))

    def linear(self, index: int, x: Tensor) -> Tensor:
        weight = self.weights[index]
        if self.sparse:
            return ops.sparse24_linear(x, weight, None, self.SHAPES[index][0])
        return functional.linear(x, weight)

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, 4096] -> the same; one token attends to the cache, several to each other."""
        tokens = len(x)
        hidden = self.linear(0, functional.rms_norm(x, (4096,), self.norm))
        query, key, value = hidden.view(1, tokens, 48, 128).transpose(1, 2).split((32, 8, 8), dim=1)
        if tokens == 1:
            key, value = self.keys, self.values
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, enable_gqa=True)
        x = x + self.linear(1, mixed.transpose(1, 2).reshape(tokens, 4096))
        gate, up = self.linear(2, functional.rms_norm(x, (4096,), self.norm)).split(14336, dim=-1)
        return x + self.linear(3, functional.silu(gate) * up)


def block(run: Run) -> None:
    """Whole decoder blocks, as many of them in a row as exceed the second cache."""
    for tokens, count in ((1, 8), (16, 8), (4096, 2)):
        if not run.has_time(f"block {tokens} tokens", 8):
            continue
        sides = {}
        x = torch.randn(tokens, 4096, device="cuda", dtype=DTYPE)
        for name, sparse in (("2:4", True), ("dense", False)):
            blocks = [Block(sparse, 1024) for _ in range(count)]
            sides[name] = [lambda b=b, x=x: b(x) for b in blocks]
        run.add("block", {"tokens": tokens, **summary(times(sides, 9))})


def tests(run: Run) -> None:
    """The tests marked gpu through pytest, where it and what the tests import are there."""
    missing = [name for name in ("pytest", "hypothesis", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        run.document["tests"] = f"not run: {', '.join(missing)} missing; the checks above are the same ones"
    elif run.has_time("tests", 90):
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/serve", "-q", "-o", "addopts="]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        run.document["tests"] = done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr[-300:]
        if done.returncode:
            run.document["broken"]["tests"] = run.document["tests"]
    run.write()


SECTIONS: dict[str, Callable[[Run], None]] = {
    one.__name__: one
    for one in (checks, bandwidth, decode, block, host, prefill, splits, forms, triton, pruning, tests)
}


# --- The table ------------------------------------------------------------------------------------------------------


def render(document: dict[str, Any]) -> str:
    """What was measured so far, as Markdown."""
    env = document["environment"]
    lines = [
        f"# 2:4 on {env['gpu']}",
        "",
        f"{env['date']}, compute capability {env['capability']}, torch {env['torch']}, CUDA {env['cuda']}, "
        f"NVRTC {env['nvrtc']}. bfloat16; medians, graph replay, weights from memory.",
    ]
    found = document.get("checks", [])
    wrong = [check for check in found if check["wrong"]]
    lines += ["", f"Checks against float64: {len(found) - len(wrong)} of {len(found)} right."]
    lines += [f"- WRONG {check['name']}: {check['wrong']}" for check in wrong]
    if "tests" in document:
        lines.append(f"Tests marked gpu: {document['tests']}.")
    if copy := document.get("copy_gigabytes_per_second"):
        lines.append(f"A copy within the memory reaches {copy:.0f} GB/s (both ways counted).")
    if "decode" in document:
        lines += [
            "",
            "| layer | rows of x | 2:4, us | cuBLAS, us | faster | quartiles | with overlap | 2:4, GB/s | of a copy | cuBLAS, GB/s |",
            "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
        ]
        for row in document["decode"]:
            us, gain, rate = row["microseconds"], row["speedup"], row["gigabytes_per_second"]
            overlap = f"{gain['2:4 overlap']['median']:.2f}" if "2:4 overlap" in gain else ""
            share = f"{row['of_copy']:.0%}" if row["of_copy"] else ""
            lines.append(
                f"| {row['n']} x {row['k']} | {row['rows']} | {us['2:4']:.2f} | {us['dense']:.2f} | "
                f"{gain['2:4']['median']:.2f} | {gain['2:4']['p25']:.2f} to {gain['2:4']['p75']:.2f} | {overlap} | "
                f"{rate['2:4']:.0f} | {share} | {rate['dense']:.0f} |"
            )
    for section, title in (
        ("block", "decoder block of Llama-3-8B's shape"),
        ("prefill", "many rows"),
        ("triton", "Triton"),
    ):
        if section in document:
            sides = list(dict.fromkeys(name for row in document[section] for name in row["microseconds"]))
            lines += ["", "| " + " | ".join([title, *(f"{side}, us" for side in sides), "faster than dense"]) + " |"]
            lines.append("|---|" + "---:|" * (len(sides) + 1))
            for row in document[section]:
                name = (
                    f"{row['tokens']} tokens" if section == "block" else f"{row['n']} x {row['k']}, {row['rows']} rows"
                )
                cells = [f"{row['microseconds'][side]:.1f}" if side in row["microseconds"] else "" for side in sides]
                gains = ", ".join(f"{side} {gain['median']:.2f}" for side, gain in row["speedup"].items())
                lines.append(f"| {name} | " + " | ".join([*cells, gains]) + " |")
    if "pruning" in document:
        lines += ["", "Pruning a layer by SparseGPT, 2:4:", ""]
        for row in document["pruning"]:
            shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in row["seconds"].items())
            lines.append(f"- {row['n']} x {row['k']}: {shown}; peak memory {row['peak_bytes'] / 1e9:.1f} GB")
    for row in document.get("host", []):
        shown = ", ".join(f"{name} {us:.1f} us" for name, us in row["microseconds"].items())
        lines += ["", f"Time of the processor for a call, without a graph: {shown}."]
    for section in ("splits", "forms"):
        if section in document:
            lines += ["", f"{section.capitalize()}, microseconds by the number of blocks that share a sum:", ""]
            for row in document[section]:
                what = row.get("form") or f"chosen {row['chosen']}"
                shown = row.get("refused") or ", ".join(f"{s}: {us:.2f}" for s, us in row["microseconds"].items())
                lines.append(f"- {row['n']} x {row['k']}, {row['rows']} rows, {what}: {shown}")
    lines += ["", *(f"Broken: {name}: {said}" for name, said in document["broken"].items())]
    if document["left_out"]:
        lines.append(f"Left out for want of time: {', '.join(document['left_out'])}.")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    arguments = parser.parse_args()
    for dtype in gpu_checks.DTYPES:
        if refusal := backend.why_not(torch.device("cuda"), dtype):
            print(f"error: no GPU to measure: {refusal}", file=sys.stderr)
            return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    run = Run(arguments.out, arguments.minutes)
    with torch.inference_mode():
        for name in SECTIONS:
            if name not in arguments.only:
                continue
            try:
                SECTIONS[name](run)
            except Exception as error:
                traceback.print_exc()
                run.document["broken"][name] = f"{type(error).__name__}: {error}"
            run.write()
            torch.cuda.empty_cache()
    print(f"written: {os.path.relpath(arguments.out / 'gpu.md')}")
    return 1 if run.document["broken"] or any(check["wrong"] for check in run.document.get("checks", [])) else 0


if __name__ == "__main__":
    sys.exit(main())
