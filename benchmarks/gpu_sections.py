"""The sections of `benchmarks.gpu`, run in a process that may not survive them. `benchmarks.gpu` starts it."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import gpu, gpu_block, gpu_checks, gpu_variants
from benchmarks.gpu_timing import (
    DTYPE,
    LIBRARIES,
    Call,
    Weights,
    captured,
    cycled,
    faster_dense,
    host_microseconds,
    seconds,
    stream,
    summary,
    times,
)
from compress import fused
from compress.columns import prune_columns
from compress.errors import one_line
from compress.linalg import inverse_factor
from compress.packed import PATTERN
from serve.kernels import ops
from serve.kernels.cuda import backend, compiler, cusparselt, plan
from serve.kernels.triton import backend as triton_backend

SHAPES = ((4096, 4096), (28672, 4096), (6144, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672))
"""Llama-3-8B's and 70B's: [N, K]."""
ROWS = (1, 16, 64, 8, 32, 4)
COPIES = 4
"""Of a weight, for many rows."""


class Run:
    """The document that grows on the disk, and the time that is left."""

    def __init__(self, directory: Path, until: float) -> None:
        self.directory, self.until = directory, until
        self.document: dict[str, Any] = {"left_out": [], "broken": {}, **gpu.read(directory)}
        self.document.setdefault("environment", environment())

    @property
    def unproven(self) -> bool:
        """Whether the kernels on sparse tensor cores refused to run, or took their process with them."""
        return "refused" in self.document or "proof" in self.document["broken"]

    def has_time(self, what: str, needed: float = 3) -> bool:
        """Whether something that takes so many seconds can still be begun; what cannot is noted."""
        if time.time() + needed < self.until:
            return True
        self.document["left_out"].append(what)
        return False

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Puts a figure into the document and onto the disk."""
        self.document.setdefault(section, []).append(row)
        print(section, json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        gpu.write(self.directory, self.document)

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """What a call gives, or None, and then it is noted under that name why."""
        try:
            return call()
        except Exception as error:
            self.document["broken"][name] = f"{type(error).__name__}: {one_line(error)}"
            return None

    def times(self, what: str, sides: dict[str, list[Call]], rounds: int = 15) -> dict[str, list[float]]:
        """`times`, without the sides that break; those of `LIBRARIES` become ``dense``."""
        sound = {
            name: calls
            for name, calls in sides.items()
            if self.attempt(f"{what}, {name}", lambda calls=calls: captured(calls)) is not None
        }
        samples = times(sound, rounds)
        if any(name in samples for name in LIBRARIES):
            faster_dense(samples)
        return samples


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


def dense_sides(weights: Weights, x: Tensor, most: int | None = None) -> dict[str, list[Call]]:
    """cuBLAS and cublasLt."""
    return {name: weights.dense_calls(x, name)[:most] for name in LIBRARIES}


# --- Sections -------------------------------------------------------------------------------------------------------


def proof(run: Run) -> None:
    """Compiles and loads the kernels of both dtypes, which prove themselves; how long that takes."""
    for dtype in gpu_checks.DTYPES:
        began = time.monotonic()
        if refusal := backend.why_not(torch.device("cuda"), dtype):
            run.document["refused"] = refusal
            run.document["broken"]["cuda"] = refusal
            return
        kernels = gpu_checks.loaded(dtype)
        row = {"dtype": str(dtype), "seconds": round(time.monotonic() - began, 2), "overlap": kernels.overlap}
        run.add("proof", row)


def checks(run: Run) -> None:
    """Right or wrong: the checks that are done soon."""
    _check(run, gpu_checks.FIRST)


def rest(run: Run) -> None:
    """The checks that take longer."""
    _check(run, [check for check in gpu_checks.CHECKS if check not in gpu_checks.FIRST])


def _check(run: Run, some: Iterable[Callable[[], None]]) -> None:
    for one in some:
        if run.has_time(f"check {one.__name__}", 20):
            began = time.monotonic()
            for name, wrong in gpu_checks.run([one]):
                run.add("checks", {"name": name, "wrong": wrong, "seconds": round(time.monotonic() - began, 1)})


def bandwidth(run: Run) -> None:
    """What a copy of 1 GB within the memory reaches, both ways counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds = statistics.median(times({"copy": [lambda: target.copy_(source)] * 4})["copy"])
    run.document["copy_gigabytes_per_second"] = 2 * source.nbytes / 1e3 / microseconds
    run.write()


def decode(run: Run) -> None:
    """Few rows, against the faster dense product; ``waiting``: launches that do not overlap."""
    kernels = gpu_checks.loaded(DTYPE)
    for n, k in SHAPES:
        if not run.has_time(f"decode {n}x{k}", 8):
            continue
        weights = Weights(n, k)
        for rows in ROWS:
            x = gpu_checks.random_input(rows, k, DTYPE)
            sides = {"2:4": weights.sparse_calls(x), **dense_sides(weights, x)}
            if kernels.overlap:
                sides["2:4 waiting"] = weights.direct_calls(kernels, x, overlap=False)
            found = summary(run.times(f"decode {n}x{k}, {rows} rows", sides))
            rates = {name: weights.bytes[name.split()[0]] / 1e3 / us for name, us in found["microseconds"].items()}
            copy = run.document.get("copy_gigabytes_per_second")
            share = rates["2:4"] / copy if copy else None
            run.add("decode", {"n": n, "k": k, "rows": rows, **found, "gigabytes_per_second": rates, "of_copy": share})
        del weights


def variants(run: Run) -> None:
    """Every kernel in every cluster, beside the plan's choice."""
    for row in gpu_variants.measured(SHAPES[:5], (1, 16, 64, 32), lambda what: run.has_time(what, 20)):
        run.add("variants", row)


def prefill(run: Run) -> None:
    """Many rows. ``2:4``: halve's operator, which passes over the weight some times, and for more rows expands it and multiplies
    densely; ``expanded``: that from the first row on. ``cusparselt``: its product with the algorithm that its search found, on a
    weight in its own form; ``cusparselt unsearched``: with the library's first. ``cusparselt from ours``: from the weight as decoding
    has it, expanded and compressed anew at each call, so that only one form is kept. ``torch``: its own operator.
    """
    kernels = None if run.unproven else gpu_checks.loaded(DTYPE)
    library = run.attempt("cusparselt", lambda: cusparselt.on_device(torch.cuda.current_device()))
    if library is not None:
        run.document["cusparselt"] = ".".join(map(str, library.version()))
    for n, k in (*SHAPES[:4], (8192, 8192), (57344, 8192)):
        if not run.has_time(f"prefill {n}x{k}", 15):
            continue
        weights, what = Weights(n, k), f"prefill {n}x{k}"
        dense = weights.dense[0]
        semi = run.attempt(
            f"{what}, torch", lambda w=dense: [torch.sparse.to_sparse_semi_structured(w) for _ in range(COPIES)]
        )
        compressed: list[Tensor] = []
        if library is not None:
            first = run.attempt(f"{what}, cusparselt", lambda w=dense: library.compress(w, stream()))
            compressed = [] if first is None else [first, *(first.clone() for _ in range(COPIES - 1))]
        for rows in (2048, 8192, 128, 256, 512):
            x = gpu_checks.random_input(rows, k, DTYPE)
            sides = dense_sides(weights, x, COPIES)
            if kernels is not None:
                sides = {"2:4": weights.sparse_calls(x)[:COPIES], **sides}
                if rows <= 2 * plan.MOST_PASSES * plan.MOST_ROWS:

                    def expanded(w: Tensor, x: Tensor = x, n: int = n, k: int = k, kernels: Any = kernels) -> Tensor:
                        kernels.expand(w, to := x.new_empty(n, k), stream())
                        return functional.linear(x, to)

                    sides["expanded"] = [lambda w=w, f=expanded: f(w) for w in cycled(weights.prepared)[:COPIES]]
            if semi is not None:
                sides["torch"] = [lambda x=x, w=w: functional.linear(x, w) for w in semi]
            if library is not None and compressed:
                sides |= _by_cusparselt(run, f"{what}, {rows} rows", library, kernels, weights, compressed, x)
            found = run.times(f"{what}, {rows} rows", sides, 7)
            run.add("prefill", {"n": n, "k": k, "rows": rows, **summary(found)})
        del weights, dense, semi, compressed


def _by_cusparselt(
    run: Run,
    what: str,
    library: cusparselt.CusparseLt,
    kernels: backend.Kernels | None,
    weights: Weights,
    compressed: list[Tensor],
    x: Tensor,
) -> dict[str, list[Call]]:
    """The ways to multiply by the library whose results are right. The first comes before the search, which changes what follows."""
    n, dense = weights.n, weights.dense[0]
    scratch = torch.empty_like(dense)

    def ready(w: Tensor) -> Tensor:
        return library.multiply(x, w, None, n, stream())

    def from_ours(w: Tensor) -> Tensor:
        assert kernels is not None
        kernels.expand(w, scratch, stream())
        return library.multiply(x, library.compress(scratch, stream()), None, n, stream())

    def right(name: str, call: Callable[[Tensor], Tensor], w: Tensor) -> bool:
        def checked() -> bool:
            gpu_checks.check(call(w)[:16], x[:16], dense, None, f"{name}, {len(x)} rows, [{n}, {weights.k}]")
            return True

        return bool(run.attempt(f"{what}, {name}", checked))

    sides: dict[str, list[Call]] = {}
    if right("cusparselt unsearched", ready, compressed[0]):
        calls: list[Call] = [lambda w=w: ready(w) for w in compressed]
        if (found := run.attempt(f"{what}, cusparselt unsearched", lambda: times({"it": calls}, 5)["it"])) is not None:
            run.document.setdefault("unsearched", []).append(
                {"n": n, "k": weights.k, "rows": len(x), "microseconds": statistics.median(found)}
            )
    run.attempt(f"{what}, cusparselt's search", lambda: library.search(x, compressed[0], n, stream()))
    if right("cusparselt", ready, compressed[0]):
        sides["cusparselt"] = [lambda w=w: ready(w) for w in compressed]
    if kernels is not None and right("cusparselt from ours", from_ours, weights.prepared[0]):
        sides["cusparselt from ours"] = [lambda w=w: from_ours(w) for w in cycled(weights.prepared)[:COPIES]]
    return sides


def triton(run: Run) -> None:
    """The fallback's kernels: right or wrong, few rows and many, and how long a call keeps the processor."""
    if refusal := triton_backend.why_not(torch.device("cuda"), DTYPE):
        run.document["broken"]["triton"] = refusal
        return
    for n, k in SHAPES[:4]:
        if not run.has_time(f"triton {n}x{k}", 10):
            continue
        weights = Weights(n, k)
        prepared = triton_backend.prepare(weights.packed)
        copies = [prepared, *(prepared.clone() for _ in weights.dense[1:])]
        for rows in (1, 16, 64, 256, 512, 2048):
            x = gpu_checks.random_input(rows, k, DTYPE)
            calls: list[Call] = [lambda w=w, x=x, n=n: ops.sparse24_linear(x, w, None, n) for w in cycled(copies)]
            found = run.times(f"triton {n}x{k}, {rows} rows", {"triton": calls, **dense_sides(weights, x)}, 7)
            run.add("triton", {"n": n, "k": k, "rows": rows, **summary(found)})
        del weights, copies
    small = triton_backend.prepare(gpu_checks.random_weight(256, 256, DTYPE))
    x = gpu_checks.random_input(1, 256, DTYPE)
    run.add("host", {"microseconds": {"triton": host_microseconds(lambda: ops.sparse24_linear(x, small, None, 256))}})
    _check(run, [gpu_checks.in_triton])


def pruning(run: Run) -> None:
    """SparseGPT of the layers of an 8B model, the factorization and the columns, with the fused kernel and with torch's operators."""
    kernels = fused.on(torch.device("cuda"), "columns")
    if kernels is None:
        run.document["broken"]["pruning"] = "there are no fused kernels; the log says why"
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
    if kernels is not None:
        _check(run, [gpu_checks.pruning])


def host(run: Run) -> None:
    """How long a call keeps the processor, without graphs, on a layer so small that the GPU keeps up: halve's operator, the launch
    alone, torch's dense linear, and the library's product."""
    kernels = gpu_checks.loaded(DTYPE)
    weights = Weights(256, 256)
    library = run.attempt("cusparselt", lambda: cusparselt.on_device(torch.cuda.current_device()))
    for rows in (1, 300, 2048):
        x = gpu_checks.random_input(rows, 256, DTYPE)
        sides = {"operator": weights.sparse_calls(x)[0], "dense": weights.dense_calls(x)[0]}
        if rows <= plan.MOST_ROWS:
            sides["launch"] = weights.direct_calls(kernels, x)[0]
        elif library is not None:
            own = run.attempt("cusparselt", lambda: library.compress(weights.dense[0], stream()))
            if own is not None:
                sides["cusparselt"] = lambda x=x, own=own: library.multiply(x, own, None, 256, stream())
        found = {
            name: run.attempt(f"host, {name}", lambda call=call: host_microseconds(call))
            for name, call in sides.items()
        }
        shown = {f"{name}, {rows} rows": us for name, us in found.items() if us is not None}
        run.add("host", {"microseconds": shown})


def block(run: Run) -> None:
    """Whole decoder blocks, as many of them in a row as exceed the second cache."""
    library = run.attempt("cusparselt", lambda: cusparselt.on_device(torch.cuda.current_device()))
    for case in gpu_block.CASES:
        if not run.has_time(f"block, {case.name}", 12):
            continue
        sides = {}
        for name, kind in gpu_block.kinds(case, library).items():
            calls = run.attempt(
                f"block, {case.name}, {name}", lambda kind=kind, case=case: gpu_block.calls(kind, case, library)
            )
            if calls is not None:
                sides[name] = calls
        found = run.times(f"block, {case.name}", sides, 9)
        run.add("block", {"name": case.name, **summary(found)})


SECTIONS: dict[str, Callable[[Run], None]] = {
    one.__name__: one
    for one in (proof, checks, bandwidth, decode, block, prefill, host, variants, pruning, triton, rest)
}


def main() -> int:
    directory, until, *names = sys.argv[1:]
    if not torch.cuda.is_available():
        print("error: no GPU to measure: torch finds none that it can use", file=sys.stderr)
        return gpu.NO_GPU
    torch.backends.cuda.matmul.allow_tf32 = False
    run = Run(Path(directory), float(until))
    with torch.inference_mode():
        for name in names:
            if run.unproven and name not in (*gpu.ON_ANY_GPU, "prefill"):
                run.document["left_out"].append(name)
                run.write()
                continue
            run.document["running"] = name
            run.write()
            try:
                SECTIONS[name](run)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                traceback.print_exc()
                run.document["broken"][name] = f"{type(error).__name__}: {one_line(error)}"
                run.write()
                if isinstance(error, torch.AcceleratorError):
                    return 3  # nothing works in this process any more; the next one goes on
            run.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
