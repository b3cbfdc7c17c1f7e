"""ALPS: the mask by ADMM with a penalty that rises as long as the mask still moves, then conjugate gradients on it.

Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (NeurIPS
2024, arXiv 2406.07831). A ridge of ``mask_damping`` times the mean of the diagonal is put on H = XᵀX, and then inputs
are scaled to a unit diagonal, n_j = sqrt(H_jj), W ← W n, H ← H / nnᵀ. From D = the pattern's best of W and multipliers
V = 0, at ρ = 0.1, each iteration takes

    B = (W H − V + ρ D) (H + ρ I)⁻¹,   D = the pattern's best of B + V / ρ,   V ← V + ρ (B − D).

Every third one looks at s, the entries of the support of D that changed since the last look, as a share of the k kept:
above 0.1, ρ grows by 1.3; above 0.005 by 1.2; else by 1.1, or, where it never grew by more, it was too large from the start, and
all begins anew with ρ / 5. It ends when the support stays, or after 30 iterations when less than 0.0003 of it moves.
The mask is the pattern's best of B, and it is refitted (`compress.held_out`; the paper takes ten such steps at its own
damping).

H = QΛQᵀ is decomposed once for all layers that read the same input, so that another ρ costs one product. Where the
support does not move under any ρ (inputs that do not hang together), the restarts are limited, which the paper leaves to
its 300 iterations. Where a metric gives a mask, D starts from that mask.

Axes: ``N`` output features, ``K`` input features.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from compress.held_out import RefitOptions, layer_problem, refitted
from compress.layer_statistics import LayerStatistics
from compress.methods import Pruning, Reconstructed, Reconstruction

LOOK = 3
"""Iterations between two looks at the support."""
GROWTH = ((0.1, 1.3), (0.005, 1.2))
"""If more than this share of the support moved, rho grows by this factor."""
SLOW_GROWTH = 1.1
SHRINK = 5
MAX_RESTARTS = 5
MAX_RHO = 1e6
SETTLED = 3e-4
"""Share of the support that may still move at the end, after ``SETTLED_AFTER`` iterations."""
SETTLED_AFTER = 30
EXACT_WIDTH = 2048
"""Inputs up to which the decomposition is made in float64; it takes 20 times as long as a product of that size."""


class ALPSOptions(RefitOptions):
    max_iterations: int = Field(300, ge=1, le=10000, description="of the alternation")
    rho: float = Field(0.1, gt=0, description="penalty to start with")
    mask_damping: float = Field(
        0.01, gt=0, le=10, description="ridge of the alternation, as a share of the Gram matrix's mean diagonal"
    )


def alps(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: ALPSOptions) -> Reconstructed:
    """Prunes ``weight`` [N, K], and gives a layer that has a bias another one."""
    problem = layer_problem(statistics)
    key = ("alps", problem.has_bias, options.mask_damping)
    if key not in statistics.factors:
        statistics.factors[key] = _decompose(problem.whole, options.mask_damping)
    scale, hessian, values, vectors = cast(tuple[Tensor, Tensor, Tensor, Tensor], statistics.factors[key])
    scaled, mask, iterations = alternate(weight * scale, hessian, values, vectors, pruning, options)
    done = refitted(weight, mask, scaled / scale, statistics, options)
    done.notes["iterations"] = iterations
    return done


def _decompose(gram: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scale n [K], the damped and scaled H [K, K], its eigenvalues Λ [K] and eigenvectors Q [K, K]."""
    mean = gram.diagonal().mean()
    ridge = damping * (mean if float(mean) > 0 else torch.ones_like(mean))
    scale = (gram.diagonal() + ridge).sqrt()
    hessian = gram / scale / scale[:, None]
    hessian.diagonal().fill_(1)
    exact = torch.float64 if len(gram) <= EXACT_WIDTH else torch.float32
    values, vectors = torch.linalg.eigh(hessian.to(exact))
    return scale, hessian, values.clamp(min=0).to(gram.dtype), vectors.to(gram.dtype)


def alternate(
    dense: Tensor, hessian: Tensor, values: Tensor, vectors: Tensor, pruning: Pruning, options: ALPSOptions
) -> tuple[Tensor, Tensor, int]:
    """The iteration in scaled weights: ``dense`` [N, K] -> B where kept, the mask [N, K], and the iterations taken."""
    pattern, group = pruning.pattern, pruning.group
    target = dense @ hessian
    first = pattern.mask(dense.abs(), group) if pruning.mask is None else pruning.mask
    support = seen = first
    sparse, multipliers = dense * first, torch.zeros_like(dense)
    rho, grew, restarts = options.rho, False, 0
    inverse = (vectors / (values + rho)) @ vectors.T
    current = dense
    iteration = 0
    for iteration in range(1, options.max_iterations + 1):
        current = (target - multipliers + rho * sparse) @ inverse
        shifted = current + multipliers / rho
        support = pattern.mask(shifted.abs(), group)
        sparse = shifted * support
        multipliers = rho * (shifted - sparse)  # V + ρ (B - D)
        if iteration % LOOK:
            continue
        moved, kept = int((support ^ seen).sum()), int(support.sum())
        seen = support
        growth = next((factor for share, factor in GROWTH if moved > share * kept), SLOW_GROWTH)
        if growth > SLOW_GROWTH:
            grew = True
        elif not grew and restarts < MAX_RESTARTS:
            restarts += 1
            growth = 1 / SHRINK
            support = seen = first
            sparse, multipliers = dense * first, torch.zeros_like(dense)
        elif moved == 0 or (iteration >= SETTLED_AFTER and moved < SETTLED * kept):
            break
        rho = min(rho * growth, MAX_RHO)
        inverse = (vectors / (values + rho)) @ vectors.T
    mask = pattern.mask(current.abs(), group)
    return current * mask, mask, iteration


ALPS = Reconstruction(
    name="alps",
    run=alps,
    paper="Meng et al. 2024, ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for LLMs (arXiv 2406.07831)",
    cost="one eigendecomposition an input (about 20 K³), and K² N for each of some 50 to 150 iterations, with a product "
    "K³ every third; four matrices [K, K] in memory",
    needs=frozenset({"split_gram"}),
    own_metric=True,
    group="layer",
    options=ALPSOptions,
    corrects_bias=True,
)
