"""What the GPU kernels compute of weights with values of 8 bits, and of x that is rounded to such, against float64, on the GPU itself."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_problems import (
    DTYPES,
    SCALED,
    WrongError,
    check,
    exact,
    loaded,
    poison,
    product,
    random_input,
    random_scaled,
    rounded_input,
    uneven_input,
)
from compress.packed import PackedWeight
from serve.kernels import narrow, ops, plain
from serve.kernels.cuda import backend, layout, plan
from serve.kernels.proof import lost_by
from serve.kernels.triton import rounding

DEEP = (1000, 4104)
ODD = ((1, 8), (65, 72), (130, 520), (257, 2056))
"""Weights with values of 8 bits [N, K] for every kernel, and for the operator."""
ROUNDED = ((1, 8), (70, 264), (300, 14336), (2048, 4096))
"""x that is rounded to values of 8 bits [rows, K]."""


def of_8_bits() -> None:
    """Values of 8 bits: prepared on the GPU as on the processor, every kernel in every cluster, odd shapes, all ways through the operator,
    and the expanded weight to the bit."""
    for values, dtype in itertools.product(SCALED, DTYPES):
        kernels, what = loaded(dtype, values), f"{values}, x in {dtype}"
        n, k = DEEP
        weight = random_scaled(n, k, values)
        prepared = backend.prepare(weight)
        assert weight.scale is not None
        on_cpu = PackedWeight(weight.values.cpu(), weight.mask.cpu(), weight.scale.cpu())
        if not torch.equal(prepared.cpu(), layout.prepare(on_cpu)):
            raise WrongError(f"{what}: a weight that is prepared on the GPU is another than on the processor")
        dense = exact(weight)
        for form, clusters in kernels.active.items():
            x = random_input(8 * form.tiles, k, dtype)
            for splits in clusters:
                how = {"form": form, "splits": splits}
                first = product(kernels, x, prepared, None, n, **how)
                check(first, x, dense, None, f"{form.name}, {splits} splits, {what}")
                if not torch.equal(first, product(kernels, x, prepared, None, n, **how)):
                    raise WrongError(f"{form.name}, {splits} splits, {what}: another result than before")
        for n, k in ODD:
            weight = random_scaled(n, k, values, n)
            prepared, dense, bias = backend.prepare(weight), exact(weight), random_input(1, n, dtype)[0]
            for count in (1, 9, 17, 64, 65, 256):
                x, added = random_input(count, k, dtype, count), bias if count % 2 else None
                poison(count * n, dtype)
                check(ops.sparse24_linear(x, prepared, added, n), x, dense, added, f"{count} rows, [{n}, {k}], {what}")
            expanded = torch.full((n, k), float("nan"), dtype=dtype, device="cuda")
            kernels.expand(prepared, expanded, torch.cuda.current_stream().cuda_stream)
            if not torch.equal(expanded, plain.expand(weight, dtype)):
                raise WrongError(f"the expanded weight [{n}, {k}], {what}, is wrong")


def rounding_of_x() -> None:
    """x rounded to values of 8 bits: the Triton kernel, and torch's operators on the GPU, have the bits of torch's on the processor."""
    for values, dtype in itertools.product(SCALED, DTYPES):
        module = rounding.kernel_for(torch.device("cuda"), values)
        if module is None:
            raise WrongError("Triton's kernel that rounds x cannot be used; the log says why")
        inputs = [rounding.hard_rows(k, dtype, values).to("cuda") for k in (8, 264, rounding.BLOCK + 8)]
        inputs += [uneven_input(rows, k, dtype) for rows, k in ROUNDED]
        for x, form in itertools.product(inputs, rounding.Form):
            right, what = (
                rounding.by_torch(x.cpu(), values, form),
                f"x {list(x.shape)} in {dtype}, rounded to {values}, {form.name}",
            )
            poison(x.numel(), dtype)
            found = {"Triton": rounding.launch(module, x, values, form), "torch": rounding.by_torch(x, values, form)}
            for name, pair in found.items():
                if not all(rounding.is_same(own.cpu(), one) for own, one in zip(pair, right, strict=True)):
                    raise WrongError(f"{what}: {name} on the GPU has other bits than torch on the processor")


def rounded_x() -> None:
    """Products of x that is rounded to values of 8 bits: every kernel in every cluster, and all ways through the operator, also from a graph
    and for rows that are not finite."""
    for values, dtype in itertools.product(SCALED, DTYPES):
        kernels, what = loaded(dtype, values), f"values and x in {values}, {dtype}"
        n, k = DEEP
        weight = replace(random_scaled(n, k, values), quantizes_x=True)
        prepared, dense = backend.prepare(weight), exact(weight)
        for form, clusters in kernels.active.items():
            x = uneven_input(8 * form.tiles, k, dtype)
            numbers, scales = rounding.round_rows(x, values)
            for splits in clusters:
                how = {"form": form, "splits": splits, "x_scales": scales}
                y = product(kernels, numbers, prepared, None, n, **how)
                check(y, rounded_input(x, values), dense, None, f"{form.name}, {splits} splits, {what}")
        for n, k in ODD:
            weight = replace(random_scaled(n, k, values, n), quantizes_x=True)
            prepared, bias = backend.prepare(weight), random_input(1, n, dtype)[0]
            for count in (1, 9, 17, 64, 65, 256, 257, 1000):
                x, added = uneven_input(count, k, dtype, count), bias if count % 2 else None
                poison(count * n, dtype)
                _check_rounded(x, prepared, weight, added, f"{count} rows, [{n}, {k}], {what}")
        x = uneven_input(9, k, dtype)
        x[2, 1], x[5, 0] = torch.inf, torch.nan
        bad = torch.tensor([row in (2, 5) for row in range(9)], device="cuda")
        y = ops.sparse24_linear(x, prepared, None, n, True)
        if not torch.equal(y.isnan(), bad[:, None].expand_as(y)):
            raise WrongError(f"{what}: a row of x that is not finite gives numbers, or another row does not")
        for count in (9, 300):
            x = uneven_input(count, k, dtype)
            once = ops.sparse24_linear(x, prepared, None, n, True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = ops.sparse24_linear(x, prepared, None, n, True)
            graph.replay()
            torch.cuda.synchronize()
            if not torch.equal(y, once):
                raise WrongError(f"{count} rows, {what}: another result from a graph")


def _check_rounded(x: Tensor, prepared: Tensor, weight: PackedWeight, bias: Tensor | None, what: str) -> None:
    """One product of the operator; of many rows, whose products of values and scales are rounded, torch's of these."""
    y = ops.sparse24_linear(x, prepared, bias, weight.shape[0], True)
    values = weight.values.dtype
    few = len(x) <= plan.MOST_PASSES * plan.MOST_ROWS
    if few or narrow.takes(x.device, values, x.dtype, *weight.shape):
        lost = 0.0 if few or values == torch.int8 else lost_by(values)
        return check(y, rounded_input(x, values), exact(weight), bias, what, lost)
    inputs = rounding.by_torch(x, weight.values.dtype, rounding.Form.PRODUCTS)[0]
    if not torch.equal(y, functional.linear(inputs, plain.expand(replace(weight, quantizes_x=False), x.dtype), bias)):
        raise WrongError(f"{what}: not the dense product of values times scales")
    return None
