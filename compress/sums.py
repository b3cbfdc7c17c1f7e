"""Sums over the inputs of a linear layer, a feature at a time.

Axes: ``T`` tokens, ``K`` input features. Everything is a sum with a count, never a running mean: sums of unequal batches add up
exactly, and several reference codes get the running mean wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenCount:
    """Number of tokens seen, T."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self.value = 0

    def update(self, x: Tensor) -> None:
        self.value += x.shape[0]

    def permute(self, order: Tensor) -> None:
        """Reorders the input features: feature ``i`` is then what feature ``order[i]`` was."""


class Sum:
    """Σ_t x_t, [K] float64."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self.value = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        self.value += x.sum(dim=0, dtype=torch.float32)

    def permute(self, order: Tensor) -> None:
        self.value = self.value[order]


class SumOfSquares:
    """Σ_t x_t², [K] float64."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self.value = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        copy = x.to(torch.float32, copy=True)  # x itself is the model's activation
        self.value += copy.square_().sum(dim=0)  # many times faster than vector_norm over bfloat16

    def permute(self, order: Tensor) -> None:
        self.value = self.value[order]


class MeanAndVariance(NamedTuple):
    """``mean`` [K] and unbiased ``variance`` [K] over the tokens, float64."""

    mean: Tensor
    variance: Tensor


class Moments:
    """Mean and centred second moment, [K] float64 each.

    Batches are centred by their own mean and merged by the rule of Chan, Golub & LeVeque (1979), so that a mean
    far larger than the spread costs no digits, as Σx² − (Σx)²/T would.
    """

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self._count = 0
        self._mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._centred = torch.zeros(features, dtype=torch.float64, device=device)  # Σ (x − mean)²

    def update(self, x: Tensor) -> None:
        count = x.shape[0]
        if count == 0:
            return
        x = x.float()
        # The mean of the batch in two steps: what float32 loses in the first, the second finds.
        rough = x.mean(dim=0)
        rest = x - rough
        correction = rest.mean(dim=0)
        mean = rough.double() + correction.double()
        centred = rest.sub_(correction).square_().sum(dim=0).double()
        total = self._count + count
        delta = mean - self._mean
        self._centred += centred + delta.square() * (self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total

    @property
    def value(self) -> MeanAndVariance:
        return MeanAndVariance(self._mean, self._centred / max(self._count - 1, 1))

    def permute(self, order: Tensor) -> None:
        self._mean, self._centred = self._mean[order], self._centred[order]
