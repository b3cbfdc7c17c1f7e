"""SparseGPT: prune column by column and let the columns to the right make up for each error.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv
2301.00774), algorithm 1. With (H + λI)⁻¹ = UᵀU, U upper triangular, column j is pruned as

    e = (w_j − v_j) / U_jj,      w_k ← w_k − e · U_jk   for all k > j,

and the weights with the smallest w_j² / U_jj² go: of each N:M group when its first column is reached, or of
the whole block of columns at its start for an unstructured pattern.

The loop is `compress.columns.prune_columns`.

Axes: ``N`` output features, ``K`` input features.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress import fused
from compress.columns import fitting, prune_columns
from compress.damping import Damping, chosen_damping
from compress.layer_statistics import LayerStatistics
from compress.linalg import shared_factor
from compress.methods import Options, Pruning, Reconstructed, Reconstruction


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
    kernels = fitting(fused.on(columns.device, "columns"), pruning.pattern, given, options.block_size)
    pruned, mask = prune_columns(
        columns, factor.upper, pruning.pattern, pruning.group, given, options.block_size, kernels
    )

    by = {} if kernels is None else {"columns_by": "triton"}
    return Reconstructed(pruned.T.contiguous(), mask.T.contiguous(), notes=notes | more | by)


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
