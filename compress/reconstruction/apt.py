"""APT: prune several weights of a row at once, with the exact optimum for the set instead of one weight after the other.

Zhao et al. 2024, "Pruning Foundation Models for High Accuracy without Retraining" (Findings of EMNLP 2024, arXiv
2410.15567). For one row w, the set P of its pruned columns and K = (H + λI)⁻¹, the multiple removal problem has the
optimum

    δw = −w_P (K_PP)⁻¹ K_P:        with the loss   ½ w_P (K_PP)⁻¹ w_Pᵀ,

of which SparseGPT's step is the case of one weight. It gives two choices, single (S) or multiple (M), for the mask and
for the compensation. A mask S ranks weights by their loss one at a time, w_j² / K_jj; a mask M chooses among all subsets of
an N:M group (six for 2:4) by the loss of the set. ``SS`` is SparseGPT itself, which takes for K_jj the inverse of the columns
from j on, where ``SM`` takes that of the columns from the group on, which is the loss of the paper. The paper uses SM where a subset cannot be enumerated
(unstructured patterns), and so does ``auto`` here.

The columns are walked from left to right like SparseGPT's. Of the columns from g on, the inverse is U_g:ᵀ U_g: with
U the upper Cholesky factor of K, so no inverse is ever made again: with the small upper triangle U_b of the group,
K_PP is a part of U_bᵀ U_b, and the update of all columns from g on is −(λ U_bᵀ) U_g: for the multipliers
λ = w_P (K_PP)⁻¹. After the walk, M compensation solves the same problem for all pruned weights of a row together
(`compress.refit`), which the paper does only within blocks of columns for its cost.

No code of the paper is published. Axes: ``N`` output features, ``K`` input features; inside, the weight is transposed
([K, N]) so that a column is contiguous; ``S`` subsets of a group of ``m`` columns.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.damping import Damping, chosen_damping
from compress.errors import RecipeError
from compress.layer_statistics import LayerStatistics
from compress.linalg import shared_factor
from compress.methods import Options, Pruning, Reconstructed, Reconstruction
from compress.patterns import NMPattern, Pattern
from compress.reconstruction.sparsegpt import SparseGPTOptions, sparsegpt
from compress.refit import joint_refit

Variant = Literal["SS", "SM", "MS", "MM"]
MAX_SUBSETS = 128
"""Of a group, that are enumerated: 2:4 has 6, 4:8 has 70."""
MAX_GROUP = 16
"""Members of a group whose subsets are enumerated: they are looked up by a bit for each."""
PANEL = 4
"""Columns that are removed together at most where the pattern has no groups that can be enumerated; 16 subsets."""


class APTOptions(Options):
    variant: Literal["auto", "SS", "SM", "MS", "MM"] = Field(
        "auto",
        description="single (S) or multiple (M) removal for the mask and for the compensation; auto: MM, or SM where the "
        "subsets of a group cannot be enumerated",
    )
    damping: float | None = Damping
    block_size: int = Field(128, ge=1, description="columns whose errors are carried to the rest of the matrix at once")
    refit_steps: int = Field(
        30, ge=0, le=1000, description="conjugate gradient steps of the joint refit at most; 0: none"
    )
    refit_tolerance: float = Field(
        1e-3, gt=0, lt=1, description="the refit stops after a step that lowers the error by less than this share"
    )

    def check(self, pattern: Pattern) -> None:
        unused = [name for name in ("refit_steps", "refit_tolerance") if name in self.model_fields_set]
        if unused and not self.resolve(pattern).endswith("M"):
            raise RecipeError(
                f"{unused[0]} is of the joint refit, which apt makes after multiple compensation, and variant {self.variant} "
                f"compensates for one weight at a time; leave {unused[0]} out, or use variant SM or auto"
            )
        if self.variant in ("MS", "MM") and not can_enumerate(pattern):
            raise RecipeError(
                f"variant {self.variant} of apt compares all subsets of a group, and pattern {str(pattern)!r} has "
                f"{'no groups' if not isinstance(pattern, NMPattern) else 'too many of them, or too long groups'}; use variant SM or auto"
            )

    def resolve(self, pattern: Pattern) -> Variant:
        """The variant for a pattern."""
        if self.variant != "auto":
            return self.variant
        return "MM" if can_enumerate(pattern) else "SM"


def can_enumerate(pattern: Pattern) -> bool:
    """Whether the pattern has groups of few subsets."""
    if not isinstance(pattern, NMPattern) or pattern.m > MAX_GROUP:
        return False
    return math.comb(pattern.m, pattern.keep_n) <= MAX_SUBSETS


def apt(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: APTOptions) -> Reconstructed:
    """Prunes ``weight`` [N, K] by the given mask, or by the loss of sets of weights where the mask is None.

    Dead inputs (always zero) are pruned to zero first, as SparseGPT does.
    """
    variant = options.resolve(pruning.pattern)
    if variant == "SS":
        single = SparseGPTOptions(damping=options.damping, block_size=options.block_size)
        done = sparsegpt(weight, pruning, statistics, single)
        return Reconstructed(done.weight, done.mask, notes=_said(variant, pruning) | done.notes)
    damping, notes = chosen_damping(options.damping, statistics)
    factor, more = shared_factor(statistics, damping)
    notes = _said(variant, pruning) | notes | more

    columns = weight.T.clone(memory_format=torch.contiguous_format)  # [K, N]
    columns[factor.dead] = 0
    dense = columns.T.clone(memory_format=torch.contiguous_format)  # (of one row, the transpose is contiguous as it is)
    given = None if pruning.mask is None else pruning.mask.T.contiguous()
    pruned, mask = _walk(columns, factor.upper, pruning, given, variant, options.block_size)
    result, mask = pruned.T.contiguous(), mask.T.contiguous()
    if variant.endswith("M") and options.refit_steps:
        refit = joint_refit(
            dense,
            mask,
            statistics.gram,
            damping=factor.damping,
            start=result,
            steps=options.refit_steps,
            tolerance=options.refit_tolerance,
        )
        result = refit.weight
        notes |= {"refit_steps": refit.steps, "refit_last_gain": refit.last_gain}
    return Reconstructed(result, mask, notes=notes)


def _said(variant: Variant, pruning: Pruning) -> dict[str, Any]:
    """For the report: how the mask was chosen and how pruned weights are made up for; a given mask is not apt's."""
    removal = {"S": "single removal", "M": "multiple removal"}
    mask = "given" if pruning.mask is not None else removal[variant[0]]
    return {"mask": mask, "compensation": removal[variant[1]]}


def _walk(
    columns: Tensor, upper: Tensor, pruning: Pruning, given: Tensor | None, variant: Variant, block_size: int
) -> tuple[Tensor, Tensor]:
    """From left to right over the panels. ``columns`` [K, N] is overwritten and returned, with the mask [K, N]."""
    pattern = pruning.pattern
    grouped = isinstance(pattern, NMPattern)
    if isinstance(pattern, NMPattern) and can_enumerate(pattern):
        panel, subsets = pattern.m, _subsets(pattern.m, pattern.m - pattern.keep_n)
    else:
        # Of a group that is too large, the largest part that divides it.
        panel = next(
            size for size in range(PANEL, 0, -1) if not isinstance(pattern, NMPattern) or pattern.m % size == 0
        )
        subsets = _subsets(panel, None)
    unit = pattern.m if grouped else panel
    block_size = max(block_size // unit, 1) * unit  # whole groups, and whole panels
    width = len(columns)
    tables = _inverses(upper, panel, subsets)  # [panels, S, m, m]
    numbers = _numbers(subsets, columns.device)
    mask = torch.empty_like(columns, dtype=torch.bool) if given is None else given

    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        errors = torch.zeros_like(columns[start:stop])  # [block, N]
        if given is None and not grouped:
            scores = _single_scores(columns[start:stop], upper[start:stop, start:stop])
            mask[start:stop] = pattern.mask(scores.T, "row" if pruning.group == "row" else "layer").T
        for first in range(start, stop, panel):
            last = min(first + panel, stop)
            current = columns[first:last]  # [m, N]
            triangle = upper[first:last, first:last]
            if given is None and grouped and (first % pattern.m == 0) and variant.startswith("S"):
                group = slice(first, first + pattern.m)
                scores = _single_scores(columns[group], upper[group, group])
                torch.stack(pattern.keep(scores.unbind()), out=mask[group])
            table = tables[first // panel][:, : last - first, : last - first]
            multipliers = (table.flatten(0, 1) @ current).unflatten(0, (len(table), -1))  # [S, m, N]
            if given is None and variant.startswith("M"):
                best = (multipliers * current).sum(dim=1).argmin(dim=0)  # [N], by twice the loss
                mask[first:last] = ~subsets.to(mask.device)[best].T
            else:
                best = _which(mask[first:last], numbers)
            if variant.endswith("M"):
                chosen = multipliers.gather(0, best.expand(1, last - first, -1))[0]
                error = triangle @ chosen
            else:
                error = _one_by_one(current.clone(), triangle, mask[first:last])
            errors[first - start : last - start] = error
            columns[first:stop].addmm_(upper[first:last, first:stop].T, error, alpha=-1)
        if stop < width:
            columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return columns.masked_fill_(~mask, 0), mask


def _subsets(m: int, size: int | None) -> Tensor:
    """The sets of pruned columns of a panel as rows [S, m] bool: those of one size, or all."""
    sizes = range(m + 1) if size is None else (size,)
    chosen = [set(subset) for count in sizes for subset in itertools.combinations(range(m), count)]
    return torch.tensor([[column in subset for column in range(m)] for subset in chosen])


def _inverses(upper: Tensor, panel: int, subsets: Tensor) -> Tensor:
    """(K_PP)⁻¹ for every panel and subset, zero outside of P: [panels, S, m, m].

    K is the inverse restricted to the columns from the panel on; its corner is U_bᵀ U_b. A last panel that is not full
    is filled up by columns that no other depends on.
    """
    width = len(upper)
    count = -(-width // panel)
    blocks = torch.eye(panel, dtype=torch.float64, device=upper.device).repeat(count, 1, 1)
    for index in range(count):
        block = upper[index * panel : (index + 1) * panel, index * panel : (index + 1) * panel]
        blocks[index, : len(block), : len(block)] = block.double()
    corner = blocks.mT @ blocks  # [panels, m, m]
    inside = subsets.to(upper.device)
    both = inside[:, :, None] & inside[:, None, :]  # [S, m, m]
    identity = torch.eye(panel, dtype=torch.float64, device=upper.device)
    # With ones on the diagonal outside of P the matrix falls into (K_PP)⁻¹ and an identity.
    embedded = torch.where(both, corner[:, None], identity)
    return (torch.linalg.inv(embedded) * both).to(upper.dtype)


def _numbers(subsets: Tensor, device: torch.device) -> Tensor:
    """Where in ``subsets`` the set of pruned columns with a given bit pattern is, [2^m]."""
    m = subsets.shape[1]
    bits = 1 << torch.arange(m)
    where = torch.zeros(1 << m, dtype=torch.int64)
    where[(subsets * bits).sum(dim=1)] = torch.arange(len(subsets))
    return where.to(device)


def _which(mask: Tensor, numbers: Tensor) -> Tensor:
    """The number of each column's set of pruned members, [N], from the mask [m, N]."""
    bits = 1 << torch.arange(len(mask), device=mask.device)
    return numbers[((~mask) * bits[:, None]).sum(dim=0)]


def _single_scores(columns: Tensor, triangle: Tensor) -> Tensor:
    """w_j² / K_jj with the inverse K of the columns from the first of these on; ``columns`` and result [columns, N]."""
    return columns.square() / triangle.square().sum(dim=0)[:, None]


def _one_by_one(columns: Tensor, triangle: Tensor, mask: Tensor) -> Tensor:
    """SparseGPT's errors [m, N] of one panel: each column makes up for those to its left only."""
    errors = torch.zeros_like(columns)
    for i in range(len(columns)):
        errors[i] = columns[i] / triangle[i, i] * ~mask[i]
        columns[i + 1 :].addcmul_(triangle[i, i + 1 :, None], errors[i], value=-1)
    return errors


APT = Reconstruction(
    name="apt",
    run=apt,
    paper="Zhao et al. 2024, Pruning Foundation Models for High Accuracy without Retraining (arXiv 2410.15567)",
    cost="SparseGPT's, and K² N for each conjugate gradient step of the joint refit",
    needs=frozenset({"gram"}),
    own_metric=True,
    group="block",
    options=APTOptions,
)
