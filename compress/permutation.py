"""An order of a layer's input channels that lets N:M keep more: RIA's channel permutation.

N:M keeps the best N of every M neighbours, so important channels that lie side by side compete with each other. Another
order of the channels spreads them (Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", ICLR 2024, section 3.2). The order is chosen to maximize the retained score, the sum of the scores
that an N:M mask keeps. What orders cost nothing at run time is the business of `compress.folding`.

Axes: ``N`` output features (rows), ``K`` input features (columns, channels), ``m`` the length of a group, ``G = K / m``
the number of groups. An order [K] says for each new place which channel comes there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from compress.methods import Options

ROUNDS = 3
"""Most passes over the slots."""
ENOUGH = 1e-3
"""A pass that gains less than this share of the retained score is the last one."""
CHUNK = 2**20
"""Scores of one slot that are compared at a time: about as many as fit the cache of one core."""


@dataclass(frozen=True)
class Permutation:
    """How channels are reordered; any metric's scores tell which order is good."""

    name: str
    paper: str
    cost: str
    needs: frozenset[str] = frozenset()
    options: type[Options] = Options


FOLD = Permutation(
    name="fold",
    paper="Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for LLMs (ICLR), section 3.2",
    cost="for each input that an order can be folded into, (K/4)² N comparisons a pass over the slots, and four assignments "
    "of K/4 channels; nothing at run time. N:M patterns only. The scores are the metric's, or wanda's",
)


def retained(scores: Tensor, keep_n: int, m: int) -> float:
    """The sum over all rows of the ``keep_n`` largest of every ``m`` neighbouring scores. ``scores`` [N, K]."""
    return sum(
        float(rows.unflatten(1, (-1, m)).topk(keep_n, dim=-1).values.sum(dtype=torch.float64))
        for rows in scores.split(max(1, CHUNK // scores.shape[1]))
    )


def best_order(scores: Tensor, keep_n: int, m: int) -> Tensor:
    """The best order found of the columns of ``scores`` [N, K], as [K] int64 on the same device; never worse than none.

    The columns start as `dealt`. Then the members in one slot of all groups are exchanged optimally among the groups by
    a linear sum assignment, slot after slot, until a pass over the slots gains nothing more.

    Args:
        scores: [N, K] float32 or float64, finite; larger is kept.
        keep_n: how many of a group are kept.
        m: the length of a group; K is a multiple of it.
    """
    scores = scores / scores.abs().max().clamp_min(torch.finfo(scores.dtype).tiny)  # no sum can overflow
    identity = torch.arange(scores.shape[1], device=scores.device)
    best, best_score = identity, retained(scores, keep_n, m)
    order = dealt(scores, m)
    score = retained(scores[:, order], keep_n, m)
    for _ in range(ROUNDS):
        if score > best_score:
            best, best_score = order, score
        before = score
        for slot in range(m):
            order = exchange_slot(scores, order, slot, keep_n, m)
        score = retained(scores[:, order], keep_n, m)
        if score - before <= ENOUGH * abs(before):
            break
    return order if score > best_score else best


def dealt(scores: Tensor, m: int) -> Tensor:
    """RIA's heuristic: the channels by descending column sum, dealt to the groups like cards, back and forth. [K].

    Of the G best channels each group gets one, of the next G each one in reverse, and so on: the strong are spread.
    """
    by_sum = scores.sum(dim=0, dtype=torch.float64).argsort(descending=True, stable=True)
    slots = by_sum.view(m, -1).clone()  # [m, G]
    slots[1::2] = slots[1::2].flip(1)
    return slots.T.reshape(-1)


def exchange_slot(scores: Tensor, order: Tensor, slot: int, keep_n: int, m: int) -> Tensor:
    """The order with the members in one slot of all groups assigned anew to the groups, optimally. [K].

    With the other m - 1 scores of a row's group in descending order f_1 >= f_2 >= ..., a new member x makes the group
    retain f_1 + ... + f_(keep_n - 1) + max(f_keep_n, x): only the max depends on it (keep_n < m, so f_keep_n exists).
    """
    groups = order.view(-1, m)
    rest = groups[:, [other for other in range(m) if other != slot]]  # [G, m - 1]
    gain = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=scores.device)
    for rows in scores.split(max(1, CHUNK // len(groups))):
        members = rows[:, groups[:, slot]].T.contiguous()  # [G, rows]
        threshold = rows[:, rest].topk(keep_n, dim=-1).values[..., -1].T.contiguous()  # [G, rows]
        larger = torch.empty_like(members)
        for group in range(len(groups)):  # one max for each (row, pair), and nothing of size [rows, G, G]
            gain[group] += torch.maximum(threshold[group], members, out=larger).sum(dim=1)
    # What is added to a whole row or column changes no assignment; without the means it is found ten times faster.
    gain -= gain.mean(dim=0)
    gain -= gain.mean(dim=1, keepdim=True)
    _, chosen = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    exchanged = groups.clone()
    exchanged[:, slot] = groups[torch.as_tensor(chosen, device=groups.device), slot]
    return exchanged.reshape(-1)
