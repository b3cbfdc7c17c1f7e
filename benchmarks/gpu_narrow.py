"""Many rows of x that are rounded to values of 8 bits: what `benchmarks.gpu` checks and times of products of bytes."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_problems
from benchmarks.gpu_block import asking
from benchmarks.gpu_problems import WrongError
from benchmarks.gpu_run import MANY_SHAPES, Run, dense_sides, enough
from benchmarks.gpu_timing import DTYPE, Call, Weights, copies, cycled, stream, times
from compress.packed import PackedWeight, unpack
from serve import support
from serve.kernels import narrow, ops
from serve.kernels.cuda import backend, cusparselt, prefill
from serve.kernels.proof import LOST, lost_by
from serve.kernels.triton import rounding

CHECKED = ((16, 16), (208, 528), (96, 1056), (1024, 14336))
"""Weights [N, K]."""
COUNTS = (257, 1000, 2049)
"""Rows of x that are checked, and"""
ROWS = (2048, 8192, 512)
"""that are timed."""


def of_bytes() -> None:
    """Rows that are multiplied as bytes: the expanded values to the bit, and products by torch and, where it is there, by cuSPARSELt."""
    device = torch.device("cuda")
    for values, dtype in itertools.product(gpu_problems.SCALED, gpu_problems.DTYPES):
        kernels, what = gpu_problems.loaded(dtype, values), f"{values} by itself, for x in {dtype}"
        if narrow.scale_on(device, values, dtype) is None:
            if support.bytes_refusal(str(values).removeprefix("torch."), torch.cuda.get_device_capability()):
                continue
            raise WrongError(f"{what}: multiplied as 16-bit numbers; the log says why")
        for n, k in CHECKED:
            weight = replace(gpu_problems.random_scaled(n, k, values, n), quantizes_x=True)
            prepared = backend.prepare(weight)
            own, scales = kernels.expand_values(prepared, n, k, stream())
            right = unpack(PackedWeight(weight.values.view(torch.uint8), weight.mask))
            assert weight.scale is not None
            if not (torch.equal(own.view(torch.uint8), right) and torch.equal(scales, weight.scale.flatten())):
                raise WrongError(f"the values of [{n}, {k}], {values}, are expanded wrongly")
            for wish in ("dense", "cusparselt"):
                with asking(prefill=wish):
                    _products(prepared, weight, dtype, f"{what}, {wish}")


def _products(prepared: Tensor, weight: PackedWeight, dtype: torch.dtype, what: str) -> None:
    """By the operator: some numbers of rows, rows that are not finite, the same result every time, also from a graph."""
    (n, k), values = weight.shape, weight.values.dtype
    dense, bias, lost = gpu_problems.exact(weight), gpu_problems.random_input(1, n, dtype)[0], lost_by(values)
    for count in COUNTS:
        x, added = gpu_problems.uneven_input(count, k, dtype, count), bias if count % 2 else None
        gpu_problems.poison(count * n, dtype)
        y = ops.sparse24_linear(x, prepared, added, n, True)
        shown = f"{count} rows, [{n}, {k}], {what}"
        if not narrow.takes(x.device, values, dtype, n, k):
            raise WrongError(f"{shown}: multiplied as 16-bit numbers; the log says why")
        gpu_problems.check(
            y, gpu_problems.rounded_input(x, values), dense, added, shown, lost=0.0 if lost == LOST else lost
        )
        if not torch.equal(y, ops.sparse24_linear(x, prepared, added, n, True)):
            raise WrongError(f"{shown}: another result than before")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.sparse24_linear(x, prepared, added, n, True)
        graph.replay()
        if not torch.equal(y, captured):
            raise WrongError(f"{shown}: another result from a graph")
        x[7, 1], x[count - 1, 0] = torch.inf, torch.nan
        rows = ops.sparse24_linear(x, prepared, added, n, True).isnan()
        if rows.any(1).nonzero().flatten().tolist() != [7, count - 1] or not bool(rows[[7, count - 1]].all()):
            raise WrongError(f"{shown}: a row of x that is not finite gives numbers, or another row does not")


def measure(run: Run) -> None:
    """All of halve's way, x rounded, the weight expanded, multiplied and scaled (``int8``), by torch's dense product, and by cuSPARSELt
    (``int8 by cusparselt``), beside 2:4 and the faster dense product in 16 bits. ``int8 dense`` and ``int8 sparse`` are products of bytes that are
    there, by torch (of float8 also with the scales inside) and by cuSPARSELt after its search. ``parts``: what halve's way does besides."""
    library = run.attempt("cusparselt", lambda: cusparselt.on_device(torch.cuda.current_device()))
    for n, k in MANY_SHAPES[:3]:
        if not run.has_time(f"narrow {n}x{k}", 20):
            continue
        weights = Weights(n, k)
        packed = {
            values: replace(gpu_problems.random_scaled(n, k, values), quantizes_x=True)
            for values in gpu_problems.SCALED
        }
        for rows in ROWS:
            what, x = f"narrow {n}x{k}, {rows} rows", gpu_problems.random_input(rows, k, DTYPE)
            sides = {"2:4": enough(weights.sparse_calls(x), x), **dense_sides(weights, x)}
            parts: dict[str, float] = {}
            for values, weight in packed.items():
                name = str(values).removeprefix("torch.")
                found = run.attempt(f"{what}, {name}", lambda w=weight, x=x: _sides(run, w, x, library))
                if found is not None:
                    sides |= {f"{name}{side}": calls for side, calls in found[0].items()}
                    parts |= {f"{name}, {part}": us for part, us in found[1].items()}
            row = {"n": n, "k": k, "rows": rows, **run.compare(what, sides, 7)}
            run.add("narrow", {**row, "parts": parts})
        del weights, packed


def _compressed(library: cusparselt.CusparseLt, dense: Tensor, rows: int) -> Tensor:
    """The weight in the library's own form, where it multiplies so many rows by it. Raises WrongError: torch would do it instead."""
    with asking(prefill="cusparselt"):
        if prefill.library_for(dense, rows) is None:
            raise WrongError("halve does not multiply by it; the log says why")
    return library.compress(dense, stream())


def _sides(
    run: Run, weight: PackedWeight, x: Tensor, library: cusparselt.CusparseLt | None
) -> tuple[dict[str, list[Call]], dict[str, float]]:
    """What is compared for one weight, by the ends of their names; and microseconds of the parts."""
    (n, k), values = weight.shape, weight.values.dtype
    name = f"{str(values).removeprefix('torch.')}, {len(x)} rows, [{n}, {k}]"
    prepared, kernels = backend.prepare(weight), gpu_problems.loaded(DTYPE, values)
    of_all = copies(prepared)

    def whole(w: Tensor, wish: str) -> Tensor:
        with asking(prefill=wish):
            return ops.sparse24_linear(x, w, None, n, True)

    sides = {"": enough([lambda w=w: whole(w, "dense") for w in cycled(of_all)], x)}
    scale = narrow.scale_on(x.device, values, DTYPE)
    if scale is None:
        return sides, {}
    bytes_, scales = kernels.expand_values(prepared, n, k, stream())
    rounded, x_scales = rounding.round_rows(x, values, rounding.Form.BYTES)
    dense = copies(bytes_)
    sides[" dense"] = enough([lambda w=w: narrow.multiply(rounded, w) for w in cycled(dense)], x)
    if values != torch.int8:
        of_rows: dict[str, Any] = {"scale_a": x_scales[:, None], "scale_b": scales[None, :], "out_dtype": DTYPE}
        by_rows = torch.ops.aten._scaled_mm.default
        sides[" dense, scaled by rows"] = enough(
            [lambda w=w: by_rows(rounded, w.t(), **of_rows) for w in cycled(dense)], x
        )
    if library is not None and len(x) >= prefill.LEAST_ROWS:
        first = run.attempt(f"{name}, cusparselt", lambda: _compressed(library, bytes_, len(x)))
        if first is not None:
            run.attempt(f"{name}, cusparselt's search", lambda: library.search(rounded, first, n, stream()))
            calls: list[Call] = [
                lambda w=w, own=library: own.multiply(rounded, w, None, n, stream()) for w in cycled(copies(first))
            ]
            sides[" sparse"] = enough(calls, x)
            sides[" by cusparselt"] = enough([lambda w=w: whole(w, "cusparselt") for w in cycled(of_all)], x)
    sums = torch.ones(len(x), n, device="cuda", dtype=cusparselt.RESULTS[values])
    y = torch.empty(len(x), n, device="cuda", dtype=DTYPE)
    steps: dict[str, list[Call]] = {
        "rounding x": [lambda: rounding.round_rows(x, values, rounding.Form.BYTES)] * 4,
        "expanding": enough([lambda w=w: kernels.expand_values(w, n, k, stream()) for w in cycled(of_all)], x),
        "scaling": [lambda: scale(sums, x_scales, scales, None, y)] * 4,
    }
    taken = run.attempt(f"{name}, parts", lambda: times(steps, 5)) or {}
    return sides, {step: statistics.median(found) for step, found in taken.items()}
