"""ADMM: mask and weights of a layer together, by alternating between the two constraints that they have to meet.

Boža 2024, "Fast and Effective Weight Update for Pruned Large Language Models" (TMLR 2024, arXiv 2401.02938). The layer
problem, min ‖X (V − W)ᵀ‖² for a V that is zero where pruned, is split in two: an unconstrained V, and a Z that has the
pattern, pulled together by the scaled multipliers U. With inputs scaled to a unit diagonal, H = XᵀX / nnᵀ for
n_j = ‖X_:j‖ and W ← W n, each iteration takes

    Z = (V + U) ∘ mask,   U ← U + V − Z,   V = (W H + ρ (Z − U)) (H + ρ I)⁻¹,

and the result is Z / n. In the first ``selections`` iterations the mask is chosen anew from |V + U|, at a sparsity that
rises to the pattern's, s (1 − (1 − t / selections)³) in iteration t = 1, 2, ...: of an N:M group the N largest are
protected, and the smallest of all others in the layer go first. The matrix is damped after the scaling, so that each
input is damped by a share of itself, and the target W H by the damped matrix: the ridge pulls to the dense weights.
One factorization serves all rows and iterations, and all layers that read the same input.

Where a metric gives a mask, the iteration starts from that mask at the full sparsity and improves it (``selections=0``
keeps it: the paper's update for a given mask). The mask that is found is then refitted (`compress.held_out`).

The paper's code, at the time of writing, differs in what are mistakes there: where weights compete over the whole layer,
it computes the rising sparsity but prunes at the final one from the start; a group is always 2:4; and an input that was
always zero is divided by almost zero. Here the schedule holds for every group and pattern, and such an input keeps the
dense weights that the mask lets it keep.

Axes: ``N`` output features, ``K`` input features.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from compress.held_out import RefitOptions, layer_problem, refitted
from compress.layer_statistics import LayerStatistics
from compress.linalg import normalised
from compress.methods import Pruning, Reconstructed, Reconstruction
from compress.patterns import UnstructuredPattern


class ADMMOptions(RefitOptions):
    iterations: int = Field(20, ge=1, le=1000, description="of the alternation")
    selections: int = Field(15, ge=0, le=1000, description="iterations, the first ones, that choose the mask anew")
    rho: float = Field(1.0, gt=0, description="penalty that pulls weights and pattern together")
    mask_damping: float = Field(
        0.1, gt=0, le=10, description="ridge of the alternation, as a share of each input's own diagonal entry"
    )


def admm(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: ADMMOptions) -> Reconstructed:
    """Prunes ``weight`` [N, K], and gives a layer that has a bias another one."""
    problem = layer_problem(statistics)
    key = ("admm", problem.has_bias, options.mask_damping, options.rho)
    if key not in statistics.factors:
        statistics.factors[key] = _factor(problem.whole, options.mask_damping, options.rho)
    scale, hessian, inverse = cast(tuple[Tensor, Tensor, Tensor], statistics.factors[key])
    result, mask = alternate(weight * scale, hessian, inverse, pruning, options)
    start = torch.where(scale > 0, result / scale, weight * mask)
    return refitted(weight, mask, start, statistics, options)


def _factor(gram: Tensor, damping: float, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """The scale n [K], the scaled and damped Gram matrix H [K, K], and (H + ρ I)⁻¹."""
    scale, hessian = normalised(gram)
    hessian.diagonal().add_(damping)
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    # The smallest eigenvalue is above rho + damping, the largest below K + rho + damping: float32 has the digits for it.
    return scale, hessian, torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def alternate(
    dense: Tensor, hessian: Tensor, inverse: Tensor, pruning: Pruning, options: ADMMOptions
) -> tuple[Tensor, Tensor]:
    """The iteration in scaled weights: ``dense`` [N, K] -> Z and its mask, [N, K] each."""
    selections = min(options.selections, options.iterations)
    # Without any selection the pattern's best of the dense weights stands.
    mask = pruning.pattern.mask(dense.abs(), pruning.group) if pruning.mask is None else pruning.mask
    target = dense @ hessian @ inverse
    multipliers = torch.zeros_like(dense)
    current = dense.clone()
    for iteration in range(options.iterations):
        current += multipliers  # V + U
        if iteration < selections:
            if pruning.mask is None:
                mask = _gradual(current.abs(), pruning, iteration + 1, selections)
            elif iteration > 0:
                mask = pruning.pattern.mask(current.abs(), pruning.group)
        kept = current * mask
        multipliers = current - kept  # U + V - Z
        torch.addmm(target, kept - multipliers, inverse, alpha=options.rho, out=current)
    return (current + multipliers) * mask, mask


def _gradual(scores: Tensor, pruning: Pruning, step: int, steps: int) -> Tensor:
    """The mask [N, K] of ``scores`` [N, K] at the sparsity of a step of the schedule; of the last, the pattern's own."""
    pattern = pruning.pattern
    share = 1 - (1 - step / steps) ** 3
    if isinstance(pattern, UnstructuredPattern):
        return UnstructuredPattern(pattern.sparsity * share).mask(scores, pruning.group)
    mask = pattern.mask(scores)
    return mask if step == steps else mask | _above(scores, mask, share)


def _above(scores: Tensor, protected: Tensor, share: float) -> Tensor:
    """True but for the given share of the entries outside of ``protected``, the smallest ones (and those equal to
    the largest of them)."""
    others = scores[~protected]
    count = round(share * len(others))
    if count == 0:
        return torch.ones_like(protected)
    return scores > others.kthvalue(count).values


ADMM = Reconstruction(
    name="admm",
    run=admm,
    paper="Boža 2024, Fast and Effective Weight Update for Pruned Large Language Models (arXiv 2401.02938)",
    cost="one factorization K³ an input, and K² N for each of 20 iterations and some 20 to 30 steps of the refit; "
    "three Gram matrices [K, K] in memory",
    needs=frozenset({"split_gram"}),
    own_metric=True,
    group="layer",
    options=ADMMOptions,
    corrects_bias=True,
)
