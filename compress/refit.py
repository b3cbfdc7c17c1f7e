"""The best weights for a given mask: all rows at once by conjugate gradients, never a factorization a row.

For one row w of the dense weight and the set of its kept columns, the weights that come closest to the dense output,

    min over v with v_j = 0 where pruned   (v − w) (H + λI) (v − w)ᵀ,      H = XᵀX,

solve ``[v (H + λI)]_kept = [w (H + λI)]_kept``. The ridge pulls towards the dense weights, not to zero. It is APT's
multiple removal (arXiv 2410.15567, the set of all pruned weights of a row at once), and by kept or by pruned set the
same solution. A factorization costs K³/24 for every row, as every row has its own set; conjugate gradients share one
product with H among all rows and need few steps once H is scaled to a unit diagonal (ALPS, arXiv 2406.07831).

Axes: ``N`` output features, ``K`` input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Refit:
    """``weight`` [N, K], zero where pruned; ``steps`` taken; ``last_gain`` the share of the damped error that the last step
    took away, 0 where none was taken."""

    weight: Tensor
    steps: int
    last_gain: float


def joint_refit(
    dense: Tensor,
    mask: Tensor,
    gram: Tensor,
    *,
    damping: float,
    start: Tensor | None = None,
    steps: int = 30,
    tolerance: float = 1e-3,
) -> Refit:
    """The kept weights that reproduce the dense output best.

    Args:
        dense: W [N, K].
        mask: [N, K], True where a weight is kept.
        gram: H [K, K], symmetric.
        damping: λ as a share of the mean of H's diagonal.
        start: weights [N, K] to start from (what is not kept of them is ignored); left out: the dense ones.
        steps: at most so many; 10 to 50 suffice.
        tolerance: stop after a step that lowers the damped error of the whole layer by less than this share of it. (The
            residual would be no measure: where few inputs or tokens are far louder than the rest, it is small
            long before the rest is fitted.)

    An input that never was anything but zero (H_jj = 0) keeps its dense weight where the mask keeps it: only the ridge
    sees it.
    """
    mean = gram.diagonal().mean()
    ridge = damping * (mean if float(mean) > 0 else torch.ones_like(mean))
    scale = (gram.diagonal() + ridge).sqrt()  # [K]
    hessian = gram / scale / scale[:, None]
    hessian.diagonal().fill_(1)
    kept = mask.to(dense.dtype)
    target = dense * scale
    solution = (dense if start is None else start) * kept * scale
    missing = target - solution
    residual = missing @ hessian
    error = float((missing * residual).sum(dtype=torch.float64))
    residual.mul_(kept)
    direction = residual.clone()
    energy = residual.square().sum(dim=1, keepdim=True)  # [N, 1]
    taken, gain = 0, 0.0
    while taken < steps and bool(energy.any()):
        image = (direction @ hessian).mul_(kept)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, 0)  # rows that are solved stay as they are
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        taken += 1
        lowered = float((step * energy).sum(dtype=torch.float64))
        gain, error = lowered / error if error > 0 else 0.0, error - lowered
        if gain < tolerance:
            break
        before, energy = energy, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(before > 0, energy / before, 0)).add_(residual)
    return Refit(solution / scale, taken, gain)
