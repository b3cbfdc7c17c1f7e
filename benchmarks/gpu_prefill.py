"""Many rows: the sections of `benchmarks.gpu` that compare what may multiply them."""

from __future__ import annotations

import itertools
import statistics

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import gpu_block, gpu_problems
from benchmarks.gpu_run import MANY_SHAPES, Run, dense_sides, enough
from benchmarks.gpu_timing import DTYPE, Call, Weights, cycled, stream, times
from serve.kernels.cuda import backend, cusparselt, plan

ROWS = (2048, 8192, 128, 256, 512)


def prefill(run: Run) -> None:
    """halve's own ways. ``2:4``: its operator, which passes over the weight some times, and for more rows expands it and multiplies
    densely; ``expanded``: that from the first row on."""
    kernels = gpu_problems.loaded(DTYPE)
    for n, k in MANY_SHAPES:
        if not run.has_time(f"prefill {n}x{k}", 10):
            continue
        weights = Weights(n, k)
        for rows in ROWS:
            x, what = gpu_problems.random_input(rows, k, DTYPE), f"prefill {n}x{k}, {rows} rows"
            sides, calls = dense_sides(weights, x), weights.sparse_calls(x)
            # (What is expanded is multiplied by torch, whose roundings are not ours to judge.)
            passes = rows <= plan.MOST_PASSES * plan.MOST_ROWS
            if not passes or run.right(f"{what}, 2:4", calls[0], x, weights.dense[0]):
                sides = {"2:4": enough(calls, x), **sides}
            if rows <= 2 * plan.MOST_PASSES * plan.MOST_ROWS:

                def expanded(w: Tensor, x: Tensor = x, n: int = n, k: int = k) -> Tensor:
                    kernels.expand(w, to := x.new_empty(n, k), stream())
                    return functional.linear(x, to)

                sides["expanded"] = enough([lambda w=w, f=expanded: f(w) for w in cycled(weights.prepared)], x)
            run.add("prefill", {"n": n, "k": k, "rows": rows, **run.compare(what, sides, 7)})
        del weights


def libraries(run: Run) -> None:
    """What others have. ``cusparselt``: its product with the algorithm that its search found, on a weight in its own form; ``cusparselt
    unsearched``: with the library's first. ``cusparselt from ours``: from the weight as decoding has it, expanded and compressed
    anew at each call, so that only one form is kept. ``torch``: its own operator. Then a block of a prompt by the library, from either.
    """
    kernels = None if run.unproven else gpu_problems.loaded(DTYPE)
    library = run.attempt("cusparselt", lambda: cusparselt.on_device(torch.cuda.current_device()))
    if library is not None:
        run.document["cusparselt"] = ".".join(map(str, library.version()))
    for n, k in MANY_SHAPES[:4]:
        _by_libraries(run, library, kernels, n, k)
    if library is not None and kernels is not None:
        for case in gpu_block.CASES:
            if case.tokens > 1:
                kinds = {"2:4 by cusparselt": "asked", "2:4, both kept": "kept", "compressed": "compressed"}
                gpu_block.measure(run, case, kinds, library)
    for n, k in MANY_SHAPES[4:]:
        _by_libraries(run, library, kernels, n, k)


def _by_libraries(
    run: Run, library: cusparselt.CusparseLt | None, kernels: backend.Kernels | None, n: int, k: int
) -> None:
    """One weight [n, k]."""
    if not run.has_time(f"libraries {n}x{k}", 15):
        return
    weights, what = Weights(n, k), f"libraries {n}x{k}"
    dense, count = weights.dense[0], len(weights.prepared)
    compressed: list[Tensor] = []
    if library is not None:
        first = run.attempt(f"{what}, cusparselt", lambda: library.compress(dense, stream()))
        compressed = [] if first is None else [first, *(first.clone() for _ in range(count - 1))]
    semi = run.attempt(f"{what}, torch", lambda: [torch.sparse.to_sparse_semi_structured(dense) for _ in range(count)])
    launches = len(cycled(weights.prepared))
    inputs = {rows: gpu_problems.random_input(rows, k, DTYPE) for rows in ROWS}
    if library is not None and compressed:
        for rows, x in inputs.items():  # all of them before any search, which changes what is done with other rows, too
            _unsearched(run, f"{what}, {rows} rows", library, weights, compressed, x)
    for rows, x in inputs.items():
        sides = dense_sides(weights, x)
        if library is not None and compressed:
            sides |= _by_cusparselt(run, f"{what}, {rows} rows", library, kernels, weights, compressed, x)
        if semi is not None:
            copies = itertools.islice(itertools.cycle(semi), launches)
            by_torch: list[Call] = [lambda x=x, w=w: functional.linear(x, w) for w in copies]
            if run.right(f"{what}, {rows} rows, torch", by_torch[0], x, dense):
                sides["torch"] = enough(by_torch, x)
        run.add("libraries", {"n": n, "k": k, "rows": rows, **run.compare(f"{what}, {rows} rows", sides, 7)})


def _unsearched(
    run: Run, what: str, library: cusparselt.CusparseLt, weights: Weights, compressed: list[Tensor], x: Tensor
) -> None:
    """Notes how long the library's first algorithm takes."""
    name = f"{what}, cusparselt unsearched"
    calls: list[Call] = [lambda w=w: library.multiply(x, w, None, weights.n, stream()) for w in cycled(compressed)]
    if not run.right(name, calls[0], x, weights.dense[0]):
        return
    if (found := run.attempt(name, lambda: times({"it": enough(calls, x)}, 5)["it"])) is not None:
        row = {"n": weights.n, "k": weights.k, "rows": len(x), "microseconds": statistics.median(found)}
        run.document.setdefault("unsearched", []).append(row)


def _by_cusparselt(
    run: Run,
    what: str,
    library: cusparselt.CusparseLt,
    kernels: backend.Kernels | None,
    weights: Weights,
    compressed: list[Tensor],
    x: Tensor,
) -> dict[str, list[Call]]:
    """The ways to multiply by the library whose results are right, after its search."""
    n, dense = weights.n, weights.dense[0]
    scratch = torch.empty_like(dense)

    def ready(w: Tensor) -> Tensor:
        return library.multiply(x, w, None, n, stream())

    def from_ours(w: Tensor) -> Tensor:
        assert kernels is not None
        kernels.expand(w, scratch, stream())
        return library.multiply(x, library.compress(scratch, stream()), None, n, stream())

    run.attempt(f"{what}, cusparselt's search", lambda: library.search(x, compressed[0], n, stream()))
    sides: dict[str, list[Call]] = {}
    if run.right(f"{what}, cusparselt", lambda: ready(compressed[0]), x, dense):
        sides["cusparselt"] = enough([lambda w=w: ready(w) for w in cycled(compressed)], x)
    if kernels is not None and run.right(
        f"{what}, cusparselt from ours", lambda: from_ours(weights.prepared[0]), x, dense
    ):
        sides["cusparselt from ours"] = enough([lambda w=w: from_ours(w) for w in cycled(weights.prepared)], x)
    return sides
