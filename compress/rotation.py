"""Rotations within attention heads that let N:M keep more of the values' and the output projection's weights.

What attention does to the values is the same in every channel of a head, so a head's channels may be mixed by any orthogonal
matrix R as long as the output projection mixes them back: with v' = Rᵀ v and O' = O R the block computes what it did, and both
matrices stay plain weights. Such rotations are known from quantization (SpinQuant, arXiv 2405.16406: R2), where they spread
outliers, and from pruning (DenoiseRotator, arXiv 2505.23049), where they gather what is important in few weights. There the
entropy of the weights' importance is minimised. Here it only finds the start: what N:M loses depends on which weights share a
group, so the channels are then put in an order, and the rotation descends on the very share of importance that the mask drops,

    Σ_p  1 − kept(S_O) / total(S_O)  +  1 − kept(S_V) / total(S_V),     S_ij = W_ij² E[x_j²],

with E[x'_j²] = (Rᵀ E[x xᵀ] R)_jj for the output projection's input (Wanda's score, squared). As R = U C(A) with the Cayley
transform C(A) = (I + A)⁻¹ (I − A) of an antisymmetric A, it stays orthogonal. The two matrices are weighed alike: the share that
one of them loses counts whatever the other's size is.

Axes: ``P`` key-value heads, ``R`` query heads that share one, ``N`` output features of the output projection, ``C`` channels of
a head, ``K`` input features of the values' projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from compress.architecture import LinearModule, oriented
from compress.methods import Options
from compress.patterns import NMPattern
from compress.permutation import best_order

ROWS = 4096
"""Rows of the output projection, over all heads that share values, that a rotation is judged by; spread evenly."""
COLUMNS = 4096
"""Inputs of the values that it is judged by, about; whole groups."""
TINY = 1e-30


class RotationOptions(Options):
    steps: int = Field(100, ge=4, le=100_000, description="steps of the descent: the first quarter on the entropy")
    rate: float = Field(0.02, gt=0, le=1, description="length of a step of Adam, in radians about")
    tokens: int = Field(8192, ge=1, description="calibration tokens whose second moments it goes by, at most")


@dataclass(frozen=True)
class Rotation:
    """How channels are mixed before anything is pruned; see `compress.rotating` for where."""

    name: str
    paper: str
    cost: str
    needs: frozenset[str] = frozenset()
    options: type[Options] = RotationOptions


HEADS = Rotation(
    name="heads",
    paper="orthogonal mixing within heads as SpinQuant's R2 (arXiv 2405.16406) and DenoiseRotator (arXiv 2505.23049), on the share "
    "that N:M drops",
    cost="for each step of 100 about six products with each head's part of the values' and output projections; a Gram matrix [K, K] "
    "of two inputs; nothing at run time. N:M patterns only",
)


@dataclass(frozen=True)
class HeadProblem:
    """What the rotations of a layer's key-value heads are judged by; float32, on one device."""

    consumer: Tensor
    """The output projection by heads, [P, R, N, C]."""
    moments: Tensor
    """Σ_t x xᵀ of its input by heads, [P, R, C, C]."""
    producer: Tensor | None
    """The values' projection by heads, [P, C, K]; None where it is not pruned."""
    squares: Tensor | None
    """Σ_t x² of its input, [K]."""
    pattern: NMPattern

    def scores(self, rotations: Tensor) -> list[Tensor]:
        """The importance of all rotated weights, [P, rows, columns] each: the output projection's and the values'."""
        each = rotations[:, None]  # [P, 1, C, C]
        seen = (each * (self.moments @ each)).sum(dim=-2, keepdim=True)  # [P, R, 1, C]
        scores = [((self.consumer @ each).square() * seen).flatten(1, 2)]
        if self.producer is not None:
            assert self.squares is not None
            scores.append((rotations.mT @ self.producer).square() * self.squares)
        return scores

    def dropped(self, rotations: Tensor) -> Tensor:
        """The share of the importance that the pattern drops, [P], summed over the two matrices."""
        total = torch.zeros(len(rotations), device=rotations.device)
        for scores in self.scores(rotations):
            kept = scores * self.pattern.mask(scores.detach())
            total = total + 1 - kept.sum(dim=(1, 2)) / scores.sum(dim=(1, 2)).clamp_min(TINY)
        return total

    def entropy(self, rotations: Tensor) -> Tensor:
        """Of the importance within a row, [P]: the mean over rows by their importance, summed over the two matrices."""
        total = torch.zeros(len(rotations), device=rotations.device)
        for scores in self.scores(rotations):
            rows = scores.sum(dim=2, keepdim=True)
            shares = scores / rows.clamp_min(TINY)
            entropies = -(shares * shares.clamp_min(TINY).log()).sum(dim=2)  # [P, rows]
            weights = (rows / rows.sum(dim=1, keepdim=True).clamp_min(TINY)).squeeze(2).detach()
            total = total + (weights * entropies).sum(dim=1)
        return total

    def sampled(self) -> HeadProblem:
        """The same on at most `ROWS` rows and about `COLUMNS` columns."""
        most = max(1, ROWS // self.consumer.shape[1])
        consumer = self.consumer[:, :, :: -(-self.consumer.shape[2] // most)]
        producer, squares, m = self.producer, self.squares, self.pattern.m
        if producer is not None and squares is not None and producer.shape[2] > COLUMNS:
            groups = torch.arange(0, producer.shape[2] // m, -(-producer.shape[2] // COLUMNS))
            columns = (groups[:, None] * m + torch.arange(m)).flatten().to(producer.device)
            producer, squares = producer[:, :, columns], squares[columns]
        return HeadProblem(consumer, self.moments, producer, squares, self.pattern)


def best_rotations(problem: HeadProblem, options: RotationOptions) -> Tensor:
    """The rotations [P, C, C] that were found; for a head for which none drops less than none at all, the identity."""
    judge = problem.sampled()
    _, start = torch.linalg.eigh(problem.moments.sum(dim=1).double())
    early = options.steps // 4
    rotations = _descend(start.float(), judge.entropy, early, options.rate)
    rotations = _in_order(rotations, judge)
    rotations = _descend(rotations, judge.dropped, options.steps - early, options.rate)
    identity = torch.eye(rotations.shape[-1], device=rotations.device).expand_as(rotations)
    better = problem.dropped(rotations) < problem.dropped(identity)  # (a NaN is not)
    return torch.where(better[:, None, None], rotations, identity)


def rotate_columns(module: LinearModule, rotations: Tensor, columns: Tensor) -> None:
    """Mixes a linear's input channels ``columns`` [P, R, C] by ``rotations`` [P, C, C]: each part W becomes W R."""
    weight = oriented(module.weight.data, module).clone()
    parts = weight[:, columns.to(weight.device)].to(_wide(weight))  # [N, P, R, C]
    mixed = torch.einsum("nprc,pcd->nprd", parts, rotations.to(parts))
    weight[:, columns.to(weight.device)] = mixed.to(weight.dtype)
    module.weight.data = oriented(weight, module).contiguous()


def rotate_rows(module: LinearModule, rotations: Tensor, rows: Tensor) -> None:
    """Mixes a linear's output channels ``rows`` [P, S, C] and their biases: each part W becomes Rᵀ W."""

    def mixed(values: Tensor) -> Tensor:
        values = values.clone()
        parts = values[rows.to(values.device)].to(_wide(values))  # [P, S, C] or [P, S, C, K]
        turned = torch.einsum("psc...,pcd->psd...", parts, rotations.to(parts))
        values[rows.to(values.device)] = turned.to(values.dtype)
        return values

    module.weight.data = oriented(mixed(oriented(module.weight.data, module)), module).contiguous()
    if module.bias is not None:
        module.bias.data = mixed(module.bias.data)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _descend(start: Tensor, loss: Callable[[Tensor], Tensor], steps: int, rate: float) -> Tensor:
    """Adam from ``start`` [P, C, C]; heads do not influence each other, as each entry has a step of its own."""
    free = torch.zeros_like(start, requires_grad=True)
    adam = torch.optim.Adam([free], lr=rate)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        with torch.enable_grad():
            value = loss(start @ _cayley(free)).sum()
            (free.grad,) = torch.autograd.grad(value, [free])
        adam.step()
    return _orthogonal(start.double() @ _cayley(free.detach().double())).float()


def _cayley(free: Tensor) -> Tensor:
    """An orthogonal matrix [P, C, C] for any matrix; the identity for zeros."""
    antisymmetric = (free - free.mT) / 2
    identity = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return torch.linalg.solve(identity + antisymmetric, identity - antisymmetric)


def _orthogonal(nearly: Tensor) -> Tensor:
    """The nearest orthogonal matrix to one that rounding has moved, by a step of Newton's iteration."""
    return 1.5 * nearly - 0.5 * nearly @ nearly.mT @ nearly


def _in_order(rotations: Tensor, problem: HeadProblem) -> Tensor:
    """The rotated channels of each head in the order in which the pattern keeps most of the output projection."""
    scores = problem.scores(rotations)[0].sqrt()
    orders = [best_order(part, problem.pattern.keep_n, problem.pattern.m) for part in scores]
    return torch.stack([rotation[:, order] for rotation, order in zip(rotations, orders, strict=True)])


def record_of(problem: HeadProblem, rotations: Tensor) -> dict[str, Any]:
    """What the report says: the shares of the importance that the pattern drops, of both matrices as one matrix each."""
    identity = torch.eye(rotations.shape[-1], device=rotations.device).expand_as(rotations)
    found: dict[str, Any] = {}
    for label, these in (("before", identity), ("after", rotations)):
        for name, scores in zip(("output", "values"), problem.scores(these), strict=False):
            kept = (scores * problem.pattern.mask(scores)).sum(dtype=torch.float64)
            found[f"{name}_dropped_{label}"] = 1 - float(kept / scores.sum(dtype=torch.float64).clamp_min(TINY))
    return found
