"""What runs on GPUs where the kernels on sparse tensor cores do not, too, checked there: Triton's kernels, and those that prune."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.gpu_problems import (
    DTYPES,
    SCALED,
    WrongError,
    check,
    exact,
    random_input,
    random_scaled,
    random_weight,
    rounded_input,
    uneven_input,
)
from compress import fused
from compress.columns import prune_columns
from compress.linalg import inverse_factor
from compress.packed import PATTERN
from compress.patterns import UnstructuredPattern
from serve.kernels import ops, plain
from serve.kernels.triton import backend as triton


def in_triton_of_8_bits() -> None:
    """The Triton kernels for values of 8 bits, by both dtypes of x, as it is and rounded to such values."""
    for values in SCALED:
        if refusal := triton.why_not(torch.device("cuda"), values):
            raise WrongError(f"the triton backend cannot be used: {refusal}")
        for n, k in ((1, 8), (129, 264), (1024, 4096)):
            weight = random_scaled(n, k, values)
            prepared, dense = triton.prepare(weight), exact(weight)
            for dtype, count in itertools.product(DTYPES, (1, 17, 64, 200)):
                x, bias = random_input(count, k, dtype, count), random_input(1, n, dtype)[0]
                y = ops.sparse24_linear(x, prepared, bias, n)
                what = f"Triton, {count} rows, weight [{n}, {k}] in {values}, x in {dtype}"
                check(y, x, dense, bias, what)
                x = uneven_input(count, k, dtype, count)
                y = ops.sparse24_linear(x, prepared, bias, n, True)
                check(y, rounded_input(x, values), dense, bias, f"{what}, rounded")


def in_triton() -> None:
    """The Triton kernels, through their operator, with every tile: odd shapes, the same result every time, also from a graph."""
    for dtype in DTYPES:
        if refusal := triton.why_not(torch.device("cuda"), dtype):
            raise WrongError(f"the triton backend cannot be used: {refusal}")
        for n, k in ((1, 8), (129, 264), (4096, 4096), (1024, 14336)):
            weight = random_weight(n, k, dtype)
            prepared, dense, bias = triton.prepare(weight), plain.expand(weight), random_input(1, n, dtype)[0]
            for count in (1, 15, 16, 17, 40, 64, 65, 200, triton.MOST_ROWS + 1):
                x, added = random_input(count, k, dtype, count), bias if count % 2 else None
                y = ops.sparse24_linear(x, prepared, added, n)
                check(y, x, dense, added, f"Triton, {count} rows, weight [{n}, {k}], {dtype}")
                if not torch.equal(y, ops.sparse24_linear(x, prepared, added, n)):
                    raise WrongError(f"Triton, {count} rows, weight [{n}, {k}], {dtype}: another result than before")
                if count in (16, 200):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        captured = ops.sparse24_linear(x, prepared, added, n)
                    captured.fill_(float("nan"))
                    graph.replay()
                    if not torch.equal(y, captured):
                        raise WrongError(
                            f"Triton, {count} rows, weight [{n}, {k}], {dtype}: another result from a graph"
                        )


def pruning_problem(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight transposed [k, n], the Gram matrix of inputs that hang together [k, k] and the factor of its inverse [k, k]."""
    mixing = random_input(k, k, torch.float32) / k**0.5
    x = random_input(4 * k, k, torch.float32, 2) @ (torch.eye(k, device="cuda") + mixing)
    gram = x.T @ x
    return random_input(k, n, torch.float32, 3), gram, inverse_factor(gram, 0.01).upper


def pruning() -> None:
    """The fused kernels of pruning are used, and lose as little as the loop over columns with its own roundings does."""
    kernels, masks = (fused.on(torch.device("cuda"), kind) for kind in ("columns", "masks"))
    if kernels is None or masks is None:
        raise WrongError("the fused kernels cannot be used; the log says why")
    scores = random_input(999, 4096, torch.float32)
    if not torch.equal(masks.keep_largest(scores, 2, 4).cpu(), PATTERN.mask(scores.cpu())):
        raise WrongError("the fused mask is not that of the processor")
    for n, k in ((1000, 1024), (4096, 4096)):
        columns, gram, upper = pruning_problem(n, k)
        for pattern in (PATTERN, UnstructuredPattern(0.5)):
            losses = []
            for how in (None, kernels):
                pruned, mask = prune_columns(columns.clone(), upper, pattern, "block", None, 128, how)
                change = (pruned - columns).double()
                losses.append(float((change * (gram.double() @ change)).sum()))
            if not abs(losses[1] / losses[0] - 1) < 1e-3 or bool(pruned[~mask].any()):
                raise WrongError(
                    f"SparseGPT of [{n}, {k}], {pattern}: the loss is {losses[1]:.6g} instead of {losses[0]:.6g}"
                )
