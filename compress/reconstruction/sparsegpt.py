"""SparseGPT: prune column by column and let the columns to the right make up for each error.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv
2301.00774), algorithm 1. With (H + λI)⁻¹ = UᵀU, U upper triangular, column j is pruned as

    e = (w_j − v_j) / U_jj,      w_k ← w_k − e · U_jk   for all k > j,

and the weights with the smallest w_j² / U_jj² go: of each N:M group when its first column is reached, or of
the whole block of columns at its start for an unstructured pattern.

The reference walks over all columns in Python and touches the whole rest of the block each time, which is
bound by launches everywhere. Rows are independent given U, and an update may wait until its column is read,
so here updates wait on three levels: rank-one updates inside of a panel of a few columns (an N:M group), one
matmul of the panel's errors for the rest of the block, one of the block's errors for the rest of the matrix. The
arithmetic is the reference's up to the order of additions.

Axes: ``N`` output features, ``K`` input features. Inside, the weight is transposed ([K, N]) so that a column is
contiguous.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.linalg import Damping, chosen_damping, shared_factor
from compress.methods import Options, Pruning, Reconstructed, Reconstruction
from compress.patterns import NMPattern

PANEL = 8
"""Columns that are updated one by one before a matmul carries their errors on; an N:M group is a panel."""


class SparseGPTOptions(Options):
    damping: float | None = Damping
    block_size: int = Field(128, ge=1, description="columns whose errors are carried to the rest of the matrix at once")


def sparsegpt(
    weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: SparseGPTOptions
) -> Reconstructed:
    """Prunes ``weight`` [N, K] by the given mask, or by SparseGPT's own metric where the mask is None.

    Inputs that were always zero (dead) are pruned to zero first, as the paper's code does: their weights
    never had an effect. The layers that read one input share one factorization of its Gram matrix.
    """
    damping, notes = chosen_damping(options.damping, statistics)
    factor, more = shared_factor(statistics, damping)
    # A copy in any case: the transpose of a Conv1D's weight, or of a single row, is contiguous as it is.
    columns = weight.T.clone(memory_format=torch.contiguous_format)  # [K, N]
    columns[factor.dead] = 0
    given = None if pruning.mask is None else pruning.mask.T.contiguous()
    pruned, mask = _prune_columns(columns, factor.upper, pruning, given, options.block_size)

    return Reconstructed(pruned.T.contiguous(), mask.T.contiguous(), notes=notes | more)


def _prune_columns(
    columns: Tensor, upper: Tensor, pruning: Pruning, given: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """The loop over blocks, panels and columns. ``columns`` [K, N] is overwritten and returned, with the mask [K, N]."""
    pattern = pruning.pattern
    grouped = isinstance(pattern, NMPattern)
    panel = pattern.m if grouped else PANEL
    block_size = max(block_size // panel, 1) * panel
    width = len(columns)
    inverse_diagonal = upper.diagonal().reciprocal()  # [K]
    mask = torch.empty_like(columns, dtype=torch.bool) if given is None else given

    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        if given is None and not grouped:
            scores = (columns[start:stop] * inverse_diagonal[start:stop, None]).square_()
            # Inside of this loop the block of columns is the whole that competes.
            mask[start:stop] = pattern.mask(scores.T, "row" if pruning.group == "row" else "layer").T
        errors = torch.empty_like(columns[start:stop])  # [block, N]
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


SPARSEGPT = Reconstruction(
    name="sparsegpt",
    run=sparsegpt,
    paper="Frantar & Alistarh 2023, SparseGPT (arXiv 2301.00774)",
    cost="one Cholesky factorization per distinct input, K² N per layer; float32 Gram matrix [K, K] in memory",
    needs=frozenset({"gram"}),
    own_metric=True,
    group="block",
    options=SparseGPTOptions,
)
