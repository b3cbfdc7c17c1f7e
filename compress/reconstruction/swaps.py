"""Swaps: exchange a kept and a pruned weight wherever that lowers the layer's output error, until nothing does.

Zimmer et al. 2025, "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale" (arXiv 2512.10922). For a row w with
mask m, what is lost is r = (1 − m) ∘ w, and with the Gram matrix H = XᵀX the row's squared output error is
L(m) = r H rᵀ. With c = H r, pruning a kept p in exchange for a pruned u changes it by exactly

    ΔL = (2 w_p c_p + w_p² H_pp) + (−2 w_u c_u + w_u² H_uu) − 2 w_p w_u H_pu,

and then c ← c + w_p H_:p − w_u H_:u. The paper takes the best swap of a row each time. Here the walk goes over the
columns, as SparseGPT's does: at each N:M group every row takes its best swap, only the rest of the block of columns
hears of it, and one matmul carries what the block changed to the rest of the matrix. A sweep starts from a c that
is computed anew; a row without a swap in a whole sweep is finished, since rows do not depend on each other and all its
pairs were seen with that c.

A finished row is a **local optimum**: no single swap inside an N:M group lowers its error. In an unstructured pattern
a swap stays within a window of 128 columns, whatever the comparison group: the number of weights kept per row and
per window stays, and it is the optimum among swaps inside of windows (a comparison group "row" would allow
any pair of a row, K²/4 of them at each step; some of those may still lower the error). The report says "swap_optimum"
with the columns that swaps stayed within, "swap_columns".

Axes: ``N`` output features, ``K`` input features, ``G`` the columns of a group or window. Inside, matrices are
transposed ([K, n]) so that a column is contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Options, Pruning, Reconstructed, Reconstruction
from compress.patterns import BLOCK_COLUMNS, NMPattern

PAIRS_AT_ONCE = 2**18
"""Pairs (p, u) whose ΔL are computed at once: what fits a core's cache."""
COLUMNS_A_SWAP = 4
"""A group of G columns is left after G / 4 swaps of a row (at least one); the next sweep comes back to it."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative error granted to c: a few units in the last place, for sums in blocks."""


class SwapsOptions(Options):
    max_sweeps: int = Field(50, ge=1, description="walks over the matrix at most; rows without a swap drop out")


def swaps(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: SwapsOptions) -> Reconstructed:
    """A better mask for the same ``weight`` [N, K], from ``statistics.gram`` [K, K]."""
    assert pruning.mask is not None, "the pipeline gives a mask to every method without a metric of its own"
    group = pruning.pattern.m if isinstance(pruning.pattern, NMPattern) else BLOCK_COLUMNS
    columns = weight.T.contiguous()  # [K, N]
    mask = pruning.mask.T.clone(memory_format=torch.contiguous_format)
    active = torch.arange(len(weight), device=weight.device)  # rows that are not known to be finished
    total = sweeps = 0
    while len(active) and sweeps < options.max_sweeps:
        state = _start(columns[:, active], mask[:, active], statistics.gram)
        swapped = _sweep(state, statistics.gram, group)
        mask[:, active] = state.mask
        total += int(swapped.sum())
        sweeps += 1
        active = active[swapped > 0]
    mask = mask.T.contiguous()
    notes = {"swaps": total, "sweeps": sweeps, "swap_columns": group, "swap_optimum": not len(active)}
    return Reconstructed(weight.masked_fill(~mask, 0), mask, notes=notes)


class _State(NamedTuple):
    """[K, n] each, or the rows of one window of them, [G, n]."""

    weight: Tensor
    mask: Tensor
    lost: Tensor
    """r: the weight where it is pruned, else 0."""
    pull: Tensor
    """c = H r."""
    alone: Tensor
    """w² H_jj."""
    doubt: Tensor
    """By how much rounding may have shifted ΔL for the weight's part in a swap."""

    def part(self, first: int, last: int) -> _State:
        """Some of the columns; views."""
        return _State(*(matrix[first:last] for matrix in self))


def _start(weight: Tensor, mask: Tensor, gram: Tensor) -> _State:
    """The state for ``weight`` and ``mask`` [K, n], which the state then alters.

    By Cauchy and Schwarz |Σ_j H_pj r_j| ≤ ‖X_:p‖ Σ_j ‖X_:j‖ |r_j|: rounding moves c_p by a few units in the last place
    of that. It is counted against a swap, so that each swap made does lower the error and none is ever undone.
    """
    lost = weight.masked_fill(mask, 0)
    diagonal = gram.diagonal()[:, None].clamp(min=0)
    norm = weight.abs() * diagonal.sqrt()  # ‖X_:j‖ |w_j|
    bound = norm.masked_fill(mask, 0).sum(dim=0)  # [n]
    return _State(weight, mask, lost, gram @ lost, norm.square(), 2 * ROUNDING * norm * (bound + norm))


def _sweep(state: _State, gram: Tensor, group: int) -> Tensor:
    """One walk over all groups; alters the state [K, n] and returns the swaps of each row [n]."""
    width, rows = state.weight.shape
    swapped = torch.zeros(rows, dtype=torch.int64, device=gram.device)
    columns = max(BLOCK_COLUMNS // group, 1) * group
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        block, inner = state.part(start, stop), gram[start:stop, start:stop]
        before = block.lost.clone()
        for first in _improvable(block, inner, min(group, stop - start)):
            last = min(first + group, stop - start)
            members, own = block.part(first, last), inner[first:last, first:last]
            old = members.lost.clone()
            hit = _swap(members, own)
            swapped[hit] += 1
            for _ in range((last - first) // COLUMNS_A_SWAP - 1):
                if not len(hit):
                    break
                hit = _swap(members, own, hit)
                swapped[hit] += 1
            block.pull[last:].addmm_(inner[last:, first:last], members.lost - old)
        if stop < width:
            state.pull[stop:].addmm_(gram[stop:, start:stop], block.lost - before)
    return swapped


def _improvable(block: _State, gram: Tensor, group: int) -> list[int]:
    """The first columns of the groups of a block in which some row has a swap to make: late sweeps skip most groups.

    What a swap in another group of the block makes worth while is found in the next sweep.
    """
    prune, grow = _costs(block)
    change = _with_best_partner(block.weight, prune, grow, gram, group)
    return (change.unflatten(0, (-1, group)) < 0).any(dim=2).any(dim=1).nonzero()[:, 0].mul(group).tolist()


def _swap(members: _State, gram: Tensor, rows: Tensor | None = None) -> Tensor:
    """The best swap of each of ``rows`` (None: all) inside of one group, where one lowers the error.

    Alters the group's state [G, n], whose Gram matrix is ``gram`` [G, G], and returns the rows that swapped.
    """
    current = members if rows is None else _State(*(matrix[:, rows] for matrix in members))
    w = current.weight
    prune, grow = _costs(current)
    change, p = _with_best_partner(w, prune, grow, gram, len(w)).min(dim=0)
    index = (change < 0).nonzero()[:, 0]
    p, w = p[index], w[:, index]
    own = torch.arange(len(index), device=p.device)
    w_p = w[p, own]
    u = (grow[:, index] - 2 * w_p * w * gram[:, p]).min(dim=0).indices
    hit = index if rows is None else rows[index]
    members.mask[p, hit], members.mask[u, hit] = False, True
    members.lost[p, hit], members.lost[u, hit] = w_p, torch.zeros_like(w_p)
    if len(gram) >= 2 * COLUMNS_A_SWAP:  # a smaller group is left now
        members.pull[:, hit] += gram[:, p] * w_p - gram[:, u] * w[u, own]
    return hit


def _costs(state: _State) -> tuple[Tensor, Tensor]:
    """ΔL of pruning each weight alone, and of growing it alone; infinite where it is pruned, or kept, already."""
    carried, cost = 2 * state.weight * state.pull, state.alone + state.doubt
    return (cost + carried).masked_fill_(~state.mask, torch.inf), (cost - carried).masked_fill_(state.mask, torch.inf)


def _with_best_partner(w: Tensor, prune: Tensor, grow: Tensor, gram: Tensor, group: int) -> Tensor:
    """For each p the smallest ΔL(p, u) among the u of its group of columns. All [B, n], ``gram`` [B, B]."""
    size = len(w) // group
    inner = gram.unfold(0, group, group).unfold(1, group, group).diagonal().permute(2, 0, 1)  # [groups, p, u]
    best = []
    step = max(PAIRS_AT_ONCE // (len(w) * group), 1)
    for some_w, some_grow in zip(w.split(step, dim=1), grow.split(step, dim=1), strict=True):
        pair = inner[..., None] * some_w.unflatten(0, (size, 1, group))  # [groups, p, u, n]
        pair.mul_(-2 * some_w.unflatten(0, (size, group, 1))).add_(some_grow.unflatten(0, (size, 1, group)))
        best.append(pair.amin(dim=2).flatten(0, 1))
    return torch.cat(best, dim=1) + prune


SWAPS = Reconstruction(
    name="swaps",
    run=swaps,
    paper="Zimmer et al. 2025, SparseSwaps (arXiv 2512.10922)",
    cost="about 1.5 K² N for each of some 20 to 50 sweeps, in which ever fewer rows take part; float32 Gram matrix [K, K] in memory; the weights stay as they are",
    needs=frozenset({"gram"}),
    options=SwapsOptions,
)
