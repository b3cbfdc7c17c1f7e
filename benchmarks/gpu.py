"""The whole check of the GPU kernels, in one command of under nine minutes: are they right, and how fast are they?

    python -m benchmarks.gpu [--minutes 8.5] [--out DIR] [--only checks decode ...]

Needs torch with CUDA (and NVRTC, which comes with it) and this directory; nothing has to be installed. Where the kernels on sparse
tensor cores do not run, on AMD's GPUs say, what runs there is measured. Sections run in the
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
from benchmarks.gpu_table import render
from benchmarks.gpu_timing import (
    DTYPE,
    Call,
    Weights,
    captured,
    cycled,
    host_microseconds,
    seconds,
    stream,
    summary,
    times,
)
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
        "cuda": torch.version.cuda or f"none, HIP {torch.version.hip}",
        "nvrtc": _nvrtc(),
        "python": platform.python_version(),
        "system": _output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"
        ),
    }


def _nvrtc() -> str:
    try:
        return ".".join(map(str, compiler.version()))
    except compiler.CompilerError as error:
        return f"none ({error})"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


# --- Sections -------------------------------------------------------------------------------------------------------


def checks(run: Run) -> None:
    """Right or wrong."""
    began = time.monotonic()
    gpu_checks.loaded(DTYPE)
    run.document["first_load_seconds"] = time.monotonic() - began
    _check(run, *gpu_checks.CHECKS)


def _check(run: Run, *some: Callable[[], None]) -> None:
    began = time.monotonic()
    for name, wrong in gpu_checks.run(some):
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


COPIES = 4
"""Of a weight, for many rows."""


def prefill(run: Run) -> None:
    """Many rows. ``2:4``: halve's operator, which passes over the weight some times, and for more rows expands it and multiplies
    densely; ``expanded``: that from the first row on. ``cusparselt``: its product with the algorithm that its search found, on a
    weight in its own form. ``cusparselt from ours``: the same from the weight as decoding has it, expanded and compressed anew at each
    call, so that only one form is kept. ``torch``: its own operator.
    """
    kernels = gpu_checks.loaded(DTYPE)
    library = _cusparselt(run)
    for n, k in SHAPES[:4]:
        if not run.has_time(f"prefill {n}x{k}", 10):
            continue
        weights = Weights(n, k)
        dense = weights.dense[0]
        semi = _attempt(
            run, "torch", lambda w=dense: [torch.sparse.to_sparse_semi_structured(w) for _ in range(COPIES)]
        )
        compressed: list[Tensor] = []
        if library is not None:
            first = _attempt(run, "cusparselt", lambda w=dense: library.compress(w, stream()))
            compressed = [] if first is None else [first, *(first.clone() for _ in range(COPIES - 1))]
        for rows in (2048, 8192, 128, 256, 512):
            x = gpu_checks.random_input(rows, k, DTYPE)
            sides = {"2:4": weights.sparse_calls(x)[:COPIES], "dense": weights.dense_calls(x)[:COPIES]}
            if rows <= 2 * plan.MOST_PASSES * plan.MOST_ROWS:

                def expanded(w: Tensor, x: Tensor = x, n: int = n, k: int = k) -> Tensor:
                    kernels.expand(w, to := x.new_empty(n, k), stream())
                    return functional.linear(x, to)

                sides["expanded"] = [lambda w=w, f=expanded: f(w) for w in cycled(weights.prepared)[:COPIES]]
            if semi is not None:
                sides["torch"] = [lambda x=x, w=w: functional.linear(x, w) for w in semi]
            if library is not None and compressed:
                sides |= _by_cusparselt(run, library, kernels, weights, compressed, x)
            for name in [name for name in sides if name not in ("2:4", "dense")]:
                if _attempt(run, f"{name} in a graph", lambda calls=sides[name]: captured(calls)) is None:
                    del sides[name]
            run.add("prefill", {"n": n, "k": k, "rows": rows, **summary(times(sides, 7))})
        del weights, dense, semi, compressed


def _by_cusparselt(
    run: Run,
    library: cusparselt.CusparseLt,
    kernels: backend.Kernels,
    weights: Weights,
    compressed: list[Tensor],
    x: Tensor,
) -> dict[str, list[Call]]:
    """The two ways to multiply by the library, once their results were right."""
    n, dense = weights.n, weights.dense[0]
    scratch = torch.empty_like(dense)

    def ready(w: Tensor) -> Tensor:
        return library.multiply(x, w, None, n, stream())

    def from_ours(w: Tensor) -> Tensor:
        kernels.expand(w, scratch, stream())
        return library.multiply(x, library.compress(scratch, stream()), None, n, stream())

    if _attempt(run, "cusparselt", lambda: library.search(x, compressed[0], n, stream())) is None:
        return {}
    sides: dict[str, list[Call]] = {}
    for name, call, copies in (
        ("cusparselt", ready, compressed),
        ("cusparselt from ours", from_ours, cycled(weights.prepared)[:COPIES]),
    ):
        y = _attempt(run, name, lambda call=call, w=copies[0]: call(w))
        if y is not None:
            gpu_checks.check(y[:16], x[:16], dense, None, f"{name}, {len(x)} rows, [{n}, {weights.k}]")
            sides[name] = [lambda w=w, call=call: call(w) for w in copies]
    return sides


def triton(run: Run) -> None:
    """The fallback's kernels: right or wrong, few rows and many, and how long a call keeps the processor."""
    if refusal := triton_backend.why_not(torch.device("cuda"), DTYPE):
        run.document["broken"]["triton"] = refusal
        return
    _check(run, gpu_checks.in_triton)
    for n, k in SHAPES[:4]:
        if not run.has_time(f"triton {n}x{k}", 6):
            continue
        weights = Weights(n, k)
        prepared = triton_backend.prepare(backend.restore(weights.prepared[0]))
        copies = [prepared, *(prepared.clone() for _ in weights.prepared[1:])]
        for rows in (1, 16, 64, 256, 512, 2048):
            x = gpu_checks.random_input(rows, k, DTYPE)
            calls = [lambda w=w, x=x, n=n: ops.sparse24_linear(x, w, None, n) for w in cycled(copies)]
            found = summary(times({"triton": calls, "dense": weights.dense_calls(x)}, 7))
            run.add("triton", {"n": n, "k": k, "rows": rows, **found})
        del weights, copies
    small = triton_backend.prepare(gpu_checks.random_weight(256, 256, DTYPE))
    x = gpu_checks.random_input(1, 256, DTYPE)
    run.add("host", {"microseconds": {"triton": host_microseconds(lambda: ops.sparse24_linear(x, small, None, 256))}})


def pruning(run: Run) -> None:
    """SparseGPT of the layers of an 8B model, the factorization and the columns, with the fused kernel and with torch's operators."""
    kernels = fused.on(torch.device("cuda"), "columns")
    if kernels is None:
        run.document["broken"]["pruning"] = "there are no fused kernels; the log says why"
    else:
        _check(run, gpu_checks.pruning)
    for n, k in ((6144, 4096), (28672, 4096), (4096, 14336)):
        if not run.has_time(f"pruning {n}x{k}", 20):
            continue
        columns, gram, upper = gpu_checks.pruning_problem(n, k)
        torch.cuda.reset_peak_memory_stats()
        found = {"factorization": seconds(lambda gram=gram: inverse_factor(gram, 0.01))}
        for name, how in (("fused", kernels), ("torch", None)):
            if name == "torch" or kernels is not None:
                found[name] = seconds(
                    lambda how=how, c=columns, u=upper: prune_columns(c.clone(), u, PATTERN, "block", None, 128, how)
                )
        run.add("pruning", {"n": n, "k": k, "seconds": found, "peak_bytes": torch.cuda.max_memory_allocated()})
        del columns, gram, upper


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
    run.add("host", {"microseconds": {name: host_microseconds(call) for name, call in sides.items()}})


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
    for one in (checks, bandwidth, decode, block, host, prefill, triton, pruning, splits, forms, tests)
}
ON_ANY_GPU = ("bandwidth", "triton", "pruning", "tests")
"""The sections that do not need the kernels on sparse tensor cores."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU to measure: torch finds none that it can use", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    run = Run(arguments.out, arguments.minutes)
    names = [name for name in SECTIONS if name in arguments.only]
    refusals = [backend.why_not(torch.device("cuda"), dtype) for dtype in gpu_checks.DTYPES]
    if refusal := next(filter(None, refusals), None):
        run.document["broken"]["cuda"] = refusal
        names = [name for name in names if name in ON_ANY_GPU]
    with torch.inference_mode():
        for name in names:
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
