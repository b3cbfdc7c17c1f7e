"""DSnoT: exchange pruned and kept weights, pair by pair, until each row's mean output is that of the dense row.

Zhang et al. 2024, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs" (arXiv 2310.08915). With
D_ij = W_ij · s_j, where s_j is the mean over the calibration samples of Σ_tokens x_j, the expected error of row i is

    ε_i = Σ_{j pruned} D_ij.

Each cycle grows one weight of a row and prunes one other (section 3 of the paper, in the form of its code):

- Grow, of the pruned weights whose return moves ε to zero (D of the sign of ε), that with the largest |D_ij| / Var_j^p.
- Prune, unstructured: of the kept weights whose removal moves ε to zero (D of the other sign), that with the
  smallest score of the metric that made the mask (Wanda in the paper). N:M: of the kept weights in the group of the
  grown one, that with the smallest score, whatever its D.
- ε ← ε + D_pruned − D_grown. A row stops for good when |ε| ≤ ``threshold``, when it has no candidate left, or when ε
  would change the sign it had at first (N:M always; unstructured only where ``overshoot`` is off).

A weight changes at most once: only what the given mask pruned is grown, only what it kept is pruned. Of equal
candidates the lower column goes first. The weights themselves never change.

Every layer is altered here unless ``skip`` names it. The published code skips the layers of the MLP unless told otherwise
(its ``--skip_layer`` is "mlp" by default): that is ``skip=mlp`` for Llama and most others, ``skip=fc`` for OPT. By name, as
there: what is attention and what is not, no graph tells for all families.

Where else this differs from the published code: when its candidates run out, it "grows" kept
weights and so loses count, here a row stops, and in N:M a grown weight whose group has no kept weight left to give is
passed over (the cycle counts). Its variance is the mean of the variances of the samples, here it is that of all
tokens. The sum over the tokens makes ε, and with it ``threshold``, proportional to the length of a sample.

Axes: ``N`` output features, ``K`` input features, ``C`` candidates of a row, at most one a cycle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.layer_statistics import LayerStatistics
from compress.methods import Options, Pruning, Reconstructed, Reconstruction
from compress.patterns import NMPattern, Pattern

AT_ONCE = 2**22
"""Weights whose candidates are sorted at once; bounds the memory beside the weight."""
VARIANCE_FLOOR = 1e-12
"""Share of the largest variance that every variance is raised to: constant inputs are all but certain, not infinitely."""


class DSnoTOptions(Options):
    max_cycles: int = Field(50, ge=0, description="exchanges in a row at most (the code's max_cycle_time)")
    threshold: float = Field(
        0.1, ge=0, description="expected error, summed over a sample, that is good enough (the code's update_threshold)"
    )
    variance_power: float = Field(
        1.0, ge=0, le=4, description="power of the input's variance that growing divides by (pow_of_var_regrowing)"
    )
    overshoot: bool = Field(
        True,
        description="whether the expected error of a row may change its sign; unstructured only (without_same_sign)",
    )
    skip: str = Field(
        "",
        description="linear layers whose name has this text in it keep the mask that they are given; the published setting "
        "is mlp (skip_layer), or what the family calls it; left out: none",
    )

    @property
    def named_layers(self) -> Mapping[str, str]:
        return {"skip": self.skip} if self.skip else {}

    def check(self, pattern: Pattern) -> None:
        if isinstance(pattern, NMPattern) and "overshoot" in self.model_fields_set:
            raise RecipeError(
                f"overshoot is of unstructured patterns: in {pattern} the expected error of a row never changes its sign; "
                "leave overshoot out"
            )


def dsnot(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: DSnoTOptions) -> Reconstructed:
    """A better mask for the same ``weight`` [N, K]. The pattern N:M stays exact; in an unstructured pattern each row
    keeps as many weights as before, whatever the comparison group was (a "block" of columns may change its share).
    """
    assert pruning.scores is not None, "the pipeline gives the scores to every method without a metric of its own"
    growing = (weight * growth_scale(statistics, options)).abs_()
    return exchange(weight, pruning, statistics, options, growing, pruning.scores)


def sample_sum(statistics: LayerStatistics) -> Tensor:
    """s [K] float64: the mean over the samples of the sum of the input over a sample's tokens."""
    return statistics.moments.mean * (statistics.count / statistics.windows)


def growth_scale(statistics: LayerStatistics, options: DSnoTOptions) -> Tensor:
    """s_j / Var_j^p, [K] float32 and finite. Without any variance, as with a single token, it is s_j."""
    variance = statistics.moments.variance
    largest = float(variance.max())
    variance = variance.clamp(min=VARIANCE_FLOOR * largest) if largest > 0 else torch.ones_like(variance)
    scale = sample_sum(statistics) / variance.pow(options.variance_power)
    return scale.clamp(-1e30, 1e30).float()


def exchange(
    weight: Tensor,
    pruning: Pruning,
    statistics: LayerStatistics,
    options: DSnoTOptions,
    growing: Tensor,
    staying: Tensor,
) -> Reconstructed:
    """The cycles, for any criteria: the pruned weight with the largest ``growing`` [N, K] is grown first, the kept one
    with the smallest ``staying`` [N, K] is pruned first, among those that the sign of ε allows."""
    assert pruning.mask is not None, "the pipeline gives a mask to every method without a metric of its own"
    mask = pruning.mask.clone()
    if options.skip and options.skip in statistics.name:
        return Reconstructed(weight.masked_fill(~mask, 0), mask, notes={"skipped": f"by skip={options.skip}"})
    total = sample_sum(statistics)
    swaps = changed = 0
    rows = max(AT_ONCE // weight.shape[1], 1)
    for first in range(0, len(weight), rows):
        part = slice(first, first + rows)
        contribution = weight[part].double() * total  # D, [n, K]
        done = _cycles(contribution, mask[part], growing[part], staying[part], pruning.pattern, options)
        swaps += int(done.sum())
        changed += int((done > 0).sum())
    return Reconstructed(weight.masked_fill(~mask, 0), mask, notes={"swaps": swaps, "rows_changed": changed})


class _Queue(NamedTuple):
    """Candidates of each row in the order in which they are taken: [n, 2, C]; of axis 1 first those with D < 0."""

    column: Tensor
    contribution: Tensor
    length: Tensor
    """[n, 2]: how many of the C places are filled."""


def _queue(priority: Tensor, candidates: Tensor, contribution: Tensor, most: int) -> _Queue:
    """The ``most`` first candidates on either side, the largest ``priority`` [n, K] first, then the lower column.

    Selecting a few is much faster than sorting a row. Priority and column in one integer leave no ties: float32
    values are ordered like their bits, read as an integer, with the bits of negative ones turned round.
    """
    width = priority.shape[1]
    bits = (priority.float() + 0.0).view(torch.int32)  # + 0.0 makes −0.0 equal to 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    keys = (ordered << 32) + torch.arange(width - 1, -1, -1, device=bits.device)
    nothing = torch.iinfo(torch.int64).min
    sides = [candidates & (contribution < 0), candidates & (contribution > 0)]
    column = torch.stack([keys.masked_fill(~side, nothing).topk(most, dim=1).indices for side in sides], dim=1)
    length = torch.stack([side.sum(dim=1).clamp(max=most) for side in sides], dim=1)
    return _Queue(column, contribution.gather(1, column.flatten(1)).view_as(column), length)


def _cycles(
    contribution: Tensor, mask: Tensor, growing: Tensor, staying: Tensor, pattern: Pattern, options: DSnoTOptions
) -> Tensor:
    """Alters ``mask`` [n, K] and returns the number of exchanges in each row [n]."""
    n, width = mask.shape
    most = min(options.max_cycles, width)
    grow = _queue(growing, ~mask, contribution, most)
    prune = None if isinstance(pattern, NMPattern) else _queue(-staying, mask, contribution, most)
    left = staying.masked_fill(~mask, torch.inf)  # what N:M may still prune
    error = contribution.masked_fill(mask, 0).sum(dim=1)  # ε, [n]
    sign = error.sign()
    row = torch.arange(n, device=mask.device)
    taken_grow, taken_prune = torch.zeros_like(grow.length), torch.zeros_like(grow.length)
    swaps = torch.zeros_like(row)

    for _ in range(options.max_cycles):
        before = error[row]
        side = (before > 0).long()
        alive = (before.abs() > options.threshold) & (taken_grow[row, side] < grow.length[row, side])
        if prune is not None:
            alive &= taken_prune[row, 1 - side] < prune.length[row, 1 - side]
        row, side, before = row[alive], side[alive], before[alive]
        if not len(row):
            break
        place = (row, side, taken_grow[row, side])
        taken_grow[row, side] += 1
        grown = grow.column[place]
        if prune is not None:
            other = (row, 1 - side, taken_prune[row, 1 - side])
            taken_prune[row, 1 - side] += 1
            pruned = prune.column[other]
            possible = torch.ones_like(pruned, dtype=torch.bool)
        else:
            assert isinstance(pattern, NMPattern)
            start = grown - grown % pattern.m
            group = left[row[:, None], start[:, None] + torch.arange(pattern.m, device=start.device)]
            pruned = start + group.argmin(dim=1)
            possible = left[row, pruned] < torch.inf
        after = before + contribution[row, pruned] - grow.contribution[place]
        turned = possible & (after.sign() != sign[row])
        if prune is not None and options.overshoot:
            turned = torch.zeros_like(turned)
        take = possible & ~turned
        where, pruned = row[take], pruned[take]
        mask[where, grown[take]] = True
        mask[where, pruned] = False
        left[where, pruned] = torch.inf
        error[where] = after[take]
        swaps[where] += 1
        row = row[~turned]
    return swaps


DSNOT = Reconstruction(
    name="dsnot",
    run=dsnot,
    paper="Zhang et al. 2024, Dynamic Sparse No Training (arXiv 2310.08915)",
    cost="a partial sort of the weights; no Gram matrix; the weights stay as they are",
    needs=frozenset({"moments"}),
    options=DSnoTOptions,
)
