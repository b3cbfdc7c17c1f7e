"""Layers for the tests of methods: weights and inputs as real models have them, and their statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.statistics import InputStatistics


def layer(n: int, k: int, t: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [n, k] and inputs [t, k]: correlated, with a mean that is not zero and a few channels far larger."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    latent = torch.randn(t, max(k // 2, 1), generator=generator)
    x = latent @ torch.randn(max(k // 2, 1), k, generator=generator) / k**0.5
    x += 0.3 * torch.randn(t, k, generator=generator) + 0.3 * torch.randn(k, generator=generator)
    x[:, 3::37] *= 20
    return weight, x


def gathered(
    x: Tensor, needs: Iterable[str] = ("gram", "sum_of_squares", "sample"), windows: int = 1, **more: Any
) -> LayerStatistics:
    """The statistics of inputs [t, k], with what else is known of the layer."""
    statistics = InputStatistics(needs, x.shape[1], tokens=len(x), windows=windows)
    statistics.update(x)
    return LayerStatistics(statistics, windows=windows, **more)


def damped(x: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """H + λI in float64, with 1 on the diagonal of dead inputs; and which are dead."""
    hessian = x.double().T @ x.double()
    dead = hessian.diagonal() == 0
    ridge = damping * hessian.diagonal().mean()
    return hessian + torch.diag(dead.double()) + ridge * torch.eye(len(hessian), dtype=torch.float64), dead
