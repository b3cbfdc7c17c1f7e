"""Which backend multiplies a packed weight, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.packed import PackedWeight
from serve.kernels import plain


@dataclass(frozen=True)
class Backend:
    """A way to multiply. ``run(x [..., K], weight, bias [N] or None) -> [..., N]``."""

    name: str
    run: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]


@dataclass(frozen=True)
class Choice:
    """A backend and the reason why it was chosen."""

    backend: Backend
    reason: str


PLAIN = Backend("plain", plain.linear)


def choose(device: torch.device, dtype: torch.dtype, rows: int, n: int, k: int) -> Choice:
    """The backend for ``rows`` rows of x against a weight [n, k] on that device in that dtype."""
    return Choice(PLAIN, f"no faster backend than expand-and-multiply is built for {device.type} yet")


def sparse24_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transposed packed weight [N, K] plus bias [N] -> [..., N], in x's dtype.

    Raises:
        ValueError: x has another width than the weight.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x has {x.shape[-1]} features, the packed weight takes {k}")
    rows = x.numel() // k
    return choose(x.device, x.dtype, rows, n, k).backend.run(x, weight, bias)
