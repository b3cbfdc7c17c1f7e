"""Masks from scores: which weights of a matrix are kept.

Axes: ``N`` output features (rows), ``K`` input features (columns), ``M`` the length of a group.

The literature disagrees on what the first number of "N:M" counts (Wanda's code: the pruned; NVIDIA's: the
kept; both agree on 2:4). Here it is always the number of weights that are **kept**, and is called ``keep_n``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress import fused
from compress.errors import RecipeError

Group = Literal["row", "block", "layer"]
"""Which weights compete with each other in an unstructured pattern: one output row, all rows of a block of
columns (SparseGPT's choice), or the whole matrix. An N:M pattern fixes its own groups."""

BLOCK_COLUMNS = 128
"""Columns in a comparison group of the kind "block"."""


@dataclass(frozen=True)
class NMPattern:
    """Of every ``m`` consecutive weights along the input dimension of a row, ``keep_n`` are kept."""

    keep_n: int
    m: int

    def __str__(self) -> str:
        return f"{self.keep_n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.keep_n / self.m

    def why_not(self, columns: int) -> str | None:
        """The reason why a matrix of that many columns cannot have this pattern, or None."""
        if columns % self.m:
            return f"{columns} input features are not a multiple of {self.m}"
        return None

    def mask(self, scores: Tensor, group: Group = "row") -> Tensor:
        """True where a weight is kept; exactly ``keep_n`` in every group, whatever the ties.

        ``scores`` [..., K], larger is kept. ``group`` is ignored: N:M groups lie inside a row. Of equal scores
        the lower column is kept.
        """
        kernels = fused.on(scores.device, "masks")
        if kernels is not None and kernels.takes(self.m) and scores.dtype in fused.SCORES:
            return kernels.keep_largest(scores, self.keep_n, self.m)
        kept = self.keep(scores.unflatten(-1, (-1, self.m)).unbind(-1))  # m times [..., K/m]
        return torch.stack(kept, dim=-1).flatten(-2)

    def keep(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The same for groups laid out as ``m`` tensors of any one shape, the first members, the second, and so on.

        No sort: the rank of a member is the number of members that beat it, m (m - 1) / 2 comparisons.
        """
        # A member starts behind all earlier ones; each comparison that a later one wins swaps one place.
        like = scores[0]
        counter = torch.int8 if self.m <= 128 else torch.int32  # ranks go up to m - 1
        rank = [torch.full(like.shape, i, dtype=counter, device=like.device) for i in range(self.m)]
        for i in range(self.m):
            for j in range(i + 1, self.m):
                later_wins = torch.gt(scores[j], scores[i]).view(torch.int8)
                rank[i] += later_wins
                rank[j] -= later_wins
        return [r < self.keep_n for r in rank]


@dataclass(frozen=True)
class UnstructuredPattern:
    """The given share of weights is pruned wherever they are, within each comparison group."""

    sparsity: float

    def __str__(self) -> str:
        return f"unstructured {self.sparsity:g}"

    def why_not(self, columns: int) -> str | None:
        return None

    def pruned(self, size: int) -> int:
        """How many of ``size`` competing weights are pruned."""
        return round(self.sparsity * size)

    def mask(self, scores: Tensor, group: Group = "row") -> Tensor:
        """True where a weight is kept. ``scores`` [N, K], larger is kept; of equal scores the first is kept."""
        if group == "block":
            return torch.cat([self.mask(block, "layer") for block in scores.split(BLOCK_COLUMNS, dim=1)], dim=1)
        competing = scores if group == "row" else scores.reshape(1, -1)
        order = competing.argsort(dim=-1, descending=True, stable=True)
        kept = competing.shape[-1] - self.pruned(competing.shape[-1])
        mask = torch.zeros_like(competing, dtype=torch.bool)
        mask.scatter_(-1, order[:, :kept], True)
        return mask.view(scores.shape)


Pattern = NMPattern | UnstructuredPattern


def has_pattern(weight: Tensor, pattern: Pattern) -> bool:
    """Whether the zeros of ``weight`` [N, K] are as the pattern asks, or more than that.

    Of an unstructured one only their number is looked at: which weights competed does not show.
    """
    nonzero = weight != 0
    if isinstance(pattern, NMPattern):
        if pattern.why_not(weight.shape[1]) is not None:
            return False
        return int(nonzero.unflatten(-1, (-1, pattern.m)).sum(dim=-1, dtype=torch.int32).max()) <= pattern.keep_n
    # Each comparison group rounds by half a weight at most. Groups are rows, or blocks of all rows and four columns at least.
    rounding = max(weight.shape[0], math.ceil(weight.shape[1] / 4)) / 2
    return weight.numel() - int(nonzero.sum()) >= pattern.sparsity * weight.numel() - rounding


def parse_pattern(text: str, sparsity: float | None = None) -> Pattern:
    """``"2:4"``, ``"4:8"``, any ``"N:M"`` with N kept of M, or ``"unstructured"`` with a sparsity.

    Raises:
        RecipeError: the text is neither, or a sparsity is missing, out of place or out of range.
    """
    if match := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        keep_n, m = int(match[1]), int(match[2])
        if not 0 < keep_n < m:
            raise RecipeError(
                f"pattern {text!r}: N weights of M are kept, so 0 < N < M must hold; 2:4 is the usual one"
            )
        if sparsity is not None and not abs(sparsity - (1 - keep_n / m)) <= 1e-9:  # a NaN is refused, too
            raise RecipeError(
                f"pattern {text!r} has a sparsity of {1 - keep_n / m:g}, but sparsity={sparsity:g} was asked for; "
                "leave sparsity out, or use pattern 'unstructured'"
            )
        return NMPattern(keep_n, m)
    if text == "unstructured":
        if sparsity is None:
            raise RecipeError("pattern 'unstructured' needs a sparsity, for example sparsity=0.5 (flag --sparsity 0.5)")
        if not 0 < sparsity < 1:
            raise RecipeError(f"sparsity={sparsity:g} must lie between 0 and 1 (0.5 prunes half of the weights)")
        return UnstructuredPattern(sparsity)
    near = "; did you mean '2:4'?" if re.search(r"\d\D+\d|of", text) else ""
    near = "; did you mean 'unstructured'?" if text.lower().startswith("un") else near
    raise RecipeError(
        f"unknown pattern {text!r}{near} (known: '2:4', '4:8', any 'N:M' with N kept of M, 'unstructured')"
    )
