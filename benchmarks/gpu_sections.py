"""The sections of `benchmarks.gpu`, run in a process that may not survive them. `benchmarks.gpu` starts it."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    gpu,
    gpu_block,
    gpu_checks,
    gpu_checks_scaled,
    gpu_checks_triton,
    gpu_narrow,
    gpu_problems,
    gpu_variants,
)
from benchmarks.gpu_prefill import libraries, prefill
from benchmarks.gpu_run import ROWS, SHAPES, Run, dense_sides, enough
from benchmarks.gpu_timing import (
    DTYPE,
    Call,
    Weights,
    copies,
    cycled,
    host_microseconds,
    seconds,
    stream,
    times,
)
from compress import fused
from compress.columns import prune_columns
from compress.errors import one_line
from compress.linalg import inverse_factor
from compress.packed import PATTERN
from serve.kernels import dispatch, ops, plain, ways
from serve.kernels.cuda import backend, cusparselt, plan
from serve.kernels.triton import backend as triton_backend
from serve.kernels.triton import rounding
from serve.measure import settling

# --- Sections -------------------------------------------------------------------------------------------------------


COPIED_BYTES = 1 << 30
SETTLING_SECONDS = 6.0
"""For one shape."""
MANY_OF_8_BITS = 2048
"""Rows of x: of a prompt, where values are of 8 bits."""
PRUNED = ((6144, 4096), (28672, 4096), (4096, 14336))
"""[N, K]"""


def proof(run: Run) -> None:
    """Compiles and loads the kernels of both dtypes, which prove themselves; how long that takes."""
    for dtype in gpu_problems.DTYPES:
        began = time.monotonic()
        if refusal := backend.why_not(torch.device("cuda"), dtype):
            run.document["refused"] = refusal
            run.document["broken"]["cuda"] = refusal
            return
        kernels = gpu_problems.loaded(dtype)
        row = {"dtype": str(dtype), "seconds": round(time.monotonic() - began, 2), "overlap": kernels.overlap}
        run.add("proof", row)


def checks(run: Run) -> None:
    """Right or wrong: the checks that are done soon."""
    _check(run, gpu_checks.FIRST)


def rest(run: Run) -> None:
    """The checks that take longer."""
    done = (*gpu_checks.FIRST, gpu_checks_scaled.of_8_bits, gpu_checks_scaled.rounded_x)
    _check(run, [check for check in gpu_checks.CHECKS if check not in done])


def _check(run: Run, some: Iterable[Callable[[], None]]) -> None:
    for one in some:
        if run.has_time(f"check {one.__name__}", 20):
            began = time.monotonic()
            for name, wrong in gpu_checks.run([one]):
                run.add("checks", {"name": name, "wrong": wrong, "seconds": round(time.monotonic() - began, 1)})


def bandwidth(run: Run) -> None:
    """What a copy of 1 GB within the memory reaches, both ways counted."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds = statistics.median(times({"copy": [lambda: target.copy_(source)] * 4})["copy"])
    run.document["copy_gigabytes_per_second"] = 2 * source.nbytes / 1e3 / microseconds
    run.write()


def decode(run: Run) -> None:
    """Few rows, against the faster dense product; ``waiting``: launches that do not overlap."""
    kernels = gpu_problems.loaded(DTYPE)
    for weights in _in_turn(run, "decode"):
        for rows in ROWS:
            _few_rows(run, "decode", weights, rows, kernels if kernels.overlap else None)


def tuned(run: Run) -> None:
    """The same by the ways that are found to be the fastest, as `halve tune` does it. The sections that follow take them, too."""
    choices = dispatch.CUDA.choices
    assert choices is not None
    for weights in _in_turn(run, "tuned"):
        layers = [lambda x, w=w, n=weights.n: ops.sparse24_linear(x, w, None, n) for w in weights.prepared]
        product = settling.Product(torch.device("cuda"), DTYPE, DTYPE, weights.n, weights.k)
        began = time.monotonic()
        found = settling.settle(dispatch.CUDA, product, layers, choices.rows, began + SETTLING_SECONDS)
        run.document.setdefault("ways", []).extend([weights.n, weights.k, one.rows, one.way] for one in found)
        took = round(time.monotonic() - began, 2)
        for rows in ROWS:
            most = next(most for most in choices.rows if rows <= most)
            one = next((one for one in found if one.rows == most), None)
            way = {} if one is None else {"way": one.way, "gain": one.gain}
            _few_rows(run, "tuned", weights, rows, more={"settling_seconds": took, **way})


def take_ways(run: Run) -> None:
    """Those that another process has found."""
    for n, k, rows, way in run.document.get("ways", []):
        ways.of("cuda", settling.index_of(torch.device("cuda")), DTYPE, DTYPE).take(rows, n, k, way)


def _in_turn(run: Run, section: str) -> Iterator[Weights]:
    """Of each of `SHAPES` that there is time for."""
    for n, k in SHAPES:
        if run.has_time(f"{section} {n}x{k}", 8):
            yield Weights(n, k)


def _few_rows(
    run: Run,
    section: str,
    weights: Weights,
    rows: int,
    waiting: backend.Kernels | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """A row of a section; ``waiting``: kernels whose launches are also timed without overlap."""
    n, k = weights.n, weights.k
    x = gpu_problems.random_input(rows, k, DTYPE)
    what, sides = f"{section} {n}x{k}, {rows} rows", dense_sides(weights, x)
    calls = weights.sparse_calls(x)
    if run.right(f"{what}, 2:4", calls[0], x, weights.dense[0]):
        sides = {"2:4": calls, **sides}
        if waiting is not None:
            sides["2:4 waiting"] = weights.direct_calls(waiting, x, overlap=False)
    found = run.compare(what, sides)
    rates = {name: weights.bytes[name.split()[0]] / 1e3 / us for name, us in found["microseconds"].items()}
    copy = run.document.get("copy_gigabytes_per_second")
    share = rates["2:4"] / copy if copy and "2:4" in rates else None
    shown = {"gigabytes_per_second": rates, "of_copy": share, **(more or {})}
    run.add(section, {"n": n, "k": k, "rows": rows, **found, **shown})


def scaled(run: Run) -> None:
    """Rows by weights with values of 8 bits, x as it is (``int8``) and rounded to such values, too (``int8, x too``), beside those with 16 and
    the faster dense product: first whether they are right."""
    _check(run, [gpu_checks_scaled.of_8_bits, gpu_checks_scaled.rounding_of_x, gpu_checks_scaled.rounded_x])
    for n, k in SHAPES[:3]:
        if not run.has_time(f"scaled {n}x{k}", 15):
            continue
        weights = Weights(n, k)
        prepared, rights = {}, {}
        for values in gpu_problems.SCALED:
            weight = gpu_problems.random_scaled(n, k, values)
            prepared[values], rights[values] = copies(backend.prepare(weight)), plain.expand(weight)
            rounding.prove(torch.device("cuda"), values)
        for rows in (*ROWS[:3], MANY_OF_8_BITS):
            x = gpu_problems.random_input(rows, k, DTYPE)
            what, sides = f"scaled {n}x{k}, {rows} rows", dense_sides(weights, x)
            sides = {"2:4": enough(weights.sparse_calls(x), x), **sides}
            # (What is expanded is multiplied by torch, whose roundings are not ours to judge.)
            passes = rows <= plan.MOST_PASSES * plan.MOST_ROWS
            for (values, own), too in itertools.product(prepared.items(), (False, True)):
                calls: list[Call] = [
                    lambda w=w, x=x, n=n, too=too: ops.sparse24_linear(x, w, None, n, too) for w in cycled(own)
                ]
                inputs = gpu_problems.rounded_input(x, values) if too else x
                name = str(values).removeprefix("torch.") + (", x too" if too else "")
                if not passes or run.right(f"{what}, {name}", calls[0], inputs, rights[values]):
                    sides[name] = enough(calls, x)
            run.add("scaled", {"n": n, "k": k, "rows": rows, **run.compare(what, sides, 7)})
        del weights, prepared, rights


def narrow(run: Run) -> None:
    """Many rows that are rounded to values of 8 bits: first whether their products are right."""
    _check(run, [gpu_narrow.of_bytes])
    gpu_narrow.measure(run)


def variants(run: Run) -> None:
    """Every kernel in every cluster, beside the plan's choice."""
    for row in gpu_variants.measured(SHAPES[:5], (1, 16, 64, 32), lambda what: run.has_time(what, 20)):
        run.add("variants", row)


def triton(run: Run) -> None:
    """The fallback's kernels: right or wrong, few rows and many, and how long a call keeps the processor."""
    if refusal := triton_backend.why_not(torch.device("cuda"), DTYPE):
        run.document["broken"]["triton"] = refusal
        return
    for n, k in SHAPES[:4]:
        if not run.has_time(f"triton {n}x{k}", 10):
            continue
        weights = Weights(n, k)
        prepared = copies(triton_backend.prepare(weights.packed))
        for rows in (1, 16, 64, 256, 512, 2048):
            x = gpu_problems.random_input(rows, k, DTYPE)
            calls: list[Call] = [lambda w=w, x=x, n=n: ops.sparse24_linear(x, w, None, n) for w in cycled(prepared)]
            what, sides = f"triton {n}x{k}, {rows} rows", dense_sides(weights, x)
            if rows > triton_backend.MOST_ROWS or run.right(what, calls[0], x, weights.dense[0]):
                sides = {"triton": enough(calls, x), **sides}
            run.add("triton", {"n": n, "k": k, "rows": rows, **run.compare(what, sides, 7)})
        del weights, prepared
    small = triton_backend.prepare(gpu_problems.random_weight(256, 256, DTYPE))
    x = gpu_problems.random_input(1, 256, DTYPE)
    run.add("host", {"microseconds": {"triton": host_microseconds(lambda: ops.sparse24_linear(x, small, None, 256))}})
    _check(run, [gpu_checks_triton.in_triton, gpu_checks_triton.in_triton_of_8_bits])


def pruning(run: Run) -> None:
    """SparseGPT of the layers of an 8B model, the factorization and the columns, with the fused kernel and with torch's operators."""
    kernels = fused.on(torch.device("cuda"), "columns")
    if kernels is None:
        run.document["broken"]["pruning"] = "there are no fused kernels; the log says why"
    for n, k in PRUNED:
        if not run.has_time(f"pruning {n}x{k}", 20):
            continue
        columns, gram, upper = gpu_checks_triton.pruning_problem(n, k)
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
        _check(run, [gpu_checks_triton.pruning])


def host(run: Run) -> None:
    """How long a call keeps the processor, without graphs, on a layer so small that the GPU keeps up: halve's operator, the launch
    alone, torch's dense linear, the library's product, and the plan that it needs for each number of rows that is new."""
    kernels = gpu_problems.loaded(DTYPE)
    weights = Weights(256, 256)
    library = run.attempt("cusparselt", lambda: cusparselt.on_device(torch.cuda.current_device()))
    for rows in (1, 300, 2048):
        x = gpu_problems.random_input(rows, 256, DTYPE)
        sides = {"operator": weights.sparse_calls(x)[0], "dense": weights.dense_calls(x)[0]}
        if rows <= plan.MOST_ROWS:
            sides["launch"] = weights.direct_calls(kernels, x)[0]
        elif library is not None:
            own = run.attempt("cusparselt", lambda: library.compress(weights.dense[0], stream()))
            if own is not None:
                sides["cusparselt"] = lambda x=x, own=own: library.multiply(x, own, None, 256, stream())
                padded = rows + -rows % cusparselt.row_multiple(DTYPE)
                sides["cusparselt's plan"] = lambda rows=padded: _plan_made(library, rows)
        found = {
            name: run.attempt(f"host, {name}", lambda call=call: host_microseconds(call))
            for name, call in sides.items()
        }
        shown = {f"{name}, {rows} rows": us for name, us in found.items() if us is not None}
        run.add("host", {"microseconds": shown})


def _plan_made(library: cusparselt.CusparseLt, rows: int) -> None:
    cusparselt.Plan(library, rows, 256, 256, DTYPE, None, None).destroy()


def block(run: Run) -> None:
    """Whole decoder blocks, as many of them in a row as exceed the second cache."""
    for case in gpu_block.CASES:
        gpu_block.measure(run, case, {"2:4": "2:4"})


SECTIONS: dict[str, Callable[[Run], None]] = {
    one.__name__: one
    for one in (
        proof,
        checks,
        bandwidth,
        decode,
        tuned,
        block,
        prefill,
        libraries,
        host,
        scaled,
        variants,
        narrow,
        pruning,
        triton,
        rest,
    )
}


def works() -> bool:
    """Whether the GPU still does anything for this process. A kernel that faulted ends that, and whoever asks next is told: the
    driver, torch, cuBLAS, Triton, each by an error of its own kind."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> int:
    directory, until, *names = sys.argv[1:]
    if not torch.cuda.is_available():
        print("error: no GPU to measure: torch finds none that it can use", file=sys.stderr)
        return gpu.NO_GPU
    torch.backends.cuda.matmul.allow_tf32 = False
    run = Run(Path(directory), float(until))
    take_ways(run)
    with torch.inference_mode():
        for name in names:
            if run.unproven and name not in gpu.ON_ANY_GPU:
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
                if not works():
                    return 3  # nothing will in this process; the next one goes on
            run.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
