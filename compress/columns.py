"""The loop of SparseGPT over the columns of a weight (`compress.reconstruction.sparsegpt` has the formulas).

The reference code walks over all columns in Python and touches the whole rest of the block each time, which is
bound by launches everywhere. Rows are independent given U, and an update may wait until its column is read,
so here updates wait on three levels: rank-one updates inside of a panel of a few columns (an N:M group), one
matmul of the panel's errors for the rest of the block, one of the block's errors for the rest of the matrix. The
arithmetic is the reference's up to the order of additions.

Axes: ``N`` output features, ``K`` input features. Inside, the weight is transposed ([K, N]) so that a column is
contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress import fused
from compress.patterns import Group, NMPattern, Pattern

PANEL = 8
"""Columns that are updated one by one before a matmul carries their errors on; an N:M group is a panel."""


def fitting(
    kernels: fused.Kernels | None, pattern: Pattern, given: Tensor | None, block_size: int
) -> fused.Kernels | None:
    """The kernels where they do blocks of that many columns, with that pattern where no mask is given; else None."""
    if kernels is None or block_size > fused.MOST_COLUMNS:
        return None
    if given is None and isinstance(pattern, NMPattern) and not kernels.takes(pattern.m):
        return None
    return kernels


def prune_columns(
    columns: Tensor,
    upper: Tensor,
    pattern: Pattern,
    competing: Group,
    given: Tensor | None,
    block_size: int,
    kernels: fused.Kernels | None,
) -> tuple[Tensor, Tensor]:
    """The loop over blocks, panels and columns. ``columns`` [K, N] is overwritten and returned, with the mask [K, N].

    Args:
        upper: U [K, K].
        competing: of an unstructured pattern, which weights of a block of columns compete.
        given: a mask [K, N], or None.
        kernels: that do all panels of a block at once; what `fitting` gave, or None.
    """
    grouped = isinstance(pattern, NMPattern)
    panel = pattern.m if grouped else PANEL
    block_size = max(block_size // panel, 1) * panel
    width = len(columns)
    own = pattern if given is None and isinstance(pattern, NMPattern) else None
    inverse_diagonal = upper.diagonal().reciprocal()  # [K]
    mask = torch.empty_like(columns, dtype=torch.bool) if given is None else given

    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        if given is None and not grouped:
            scores = (columns[start:stop] * inverse_diagonal[start:stop, None]).square_()
            # Inside of this loop the block of columns is the whole that competes.
            mask[start:stop] = pattern.mask(scores.T, "row" if competing == "row" else "layer").T
        errors = torch.empty_like(columns[start:stop])  # [block, N]
        if kernels is not None:
            keep_n, together = (own.keep_n, own.m) if own else (None, PANEL)
            kernels.prune_block(columns, upper, inverse_diagonal, mask, errors, start, keep_n, together)
            if stop < width:
                columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
            continue
        for first in range(start, stop, panel):
            last = min(first + panel, stop)
            current = columns[first:last]  # [panel, N]
            diagonal = inverse_diagonal[first:last, None]
            if given is None and grouped:
                kept = pattern.keep((current * diagonal).square_().unbind())
                torch.stack(kept, out=mask[first:last])
            weight_to_error = diagonal * ~mask[first:last]  # zero where the weight stays
            panel_errors = errors[first - start : last - start]
            for i in range(last - first):
                torch.mul(current[i], weight_to_error[i], out=panel_errors[i])
                if i + 1 < last - first:
                    row = upper[first + i, first + i + 1 : last, None]
                    current[i + 1 :].addcmul_(row, panel_errors[i], value=-1)
            if last < stop:
                columns[last:stop].addmm_(upper[first:last, last:stop].T, panel_errors, alpha=-1)
        if stop < width:
            columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return columns.masked_fill_(~mask, 0), mask
