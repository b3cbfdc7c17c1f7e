"""Many rows: the section of `benchmarks.gpu` that compares what may multiply them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import gpu_checks
from benchmarks.gpu_run import COPIES, MANY_SHAPES, Run, dense_sides
from benchmarks.gpu_timing import DTYPE, Call, Weights, cycled, stream, summary, times
from serve.kernels.cuda import backend, cusparselt, plan

ROWS = (2048, 8192, 128, 256, 512)


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
    for n, k in MANY_SHAPES:
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
        for rows in ROWS:
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
