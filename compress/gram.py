"""The Gram matrix of the inputs of a linear layer: of all tokens, or in a part to fit to and one to choose by.

Axes: ``T`` tokens, ``K`` input features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from compress.sums import Sum

HELD_OUT_WINDOWS = 16
"""Least windows that are held out to choose by, where that is not more than half of them."""
_LOST = 1e-6
"""Share of a diagonal entry of a Gram matrix that rounding may have lost; see `tests.compress.test_statistics`."""


class Gram:
    """XᵀX, [K, K] float32: the Hessian of the layer's squared output error, up to a factor.

    Products are accumulated in float32. Inputs that are bfloat16 may go through bfloat16 units, which is exact for the
    products; no other input is ever rounded.
    """

    panel = 128
    """Only the lower triangle is computed, in panels of this many columns: narrow ones compute less above the diagonal."""
    gpu_panel = 2048
    """A GPU is busy with wide ones only."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self._lower = torch.zeros(features, features, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        stored, panel = x.dtype, self.gpu_panel if x.is_cuda else self.panel
        wide = wide_product(x.device, stored)
        x = x if wide else x.float()
        with exact_products(stored):
            for start in range(0, x.shape[1], panel):
                lower, left, right = (
                    self._lower[start:, start : start + panel],
                    x[:, start:].T,
                    x[:, start : start + panel],
                )
                if wide:
                    lower.add_(wide(left, right))
                else:
                    lower.addmm_(left, right)

    @property
    def value(self) -> Tensor:
        lower = self._lower.tril_()
        return lower + lower.tril(-1).T

    @property
    def diagonal(self) -> Tensor:
        """Σ_t x_t², [K] float32."""
        return self._lower.diagonal()

    def permute(self, order: Tensor) -> None:
        self._lower = self.value[order][:, order]


@cache
def wide_product(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The product of two 16-bit matrices with sums and results in float32, on a GPU's tensor cores: several times faster than float32
    ones, and as exact. None where torch has none (2.11 is the first that does), or one that is not exact."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32)

    random = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2048, 96, generator=random).add(1).to(dtype)
    try:
        found = product(x.to(device)[:, 32:].T, x.to(device)[:, 32:64]).cpu()
    except (TypeError, RuntimeError):
        return None
    exact = x.double()[:, 32:].T @ x.double()[:, 32:64]
    size = x.double().abs()[:, 32:].T @ x.double().abs()[:, 32:64]
    return product if bool(((found.double() - exact).abs() <= 1e-5 * size).all()) else None


class Part(NamedTuple):
    """Of some ``tokens``: ``gram`` Σ_t x_t x_tᵀ [K, K] float32 and ``sum`` Σ_t x_t [K] float64."""

    gram: Tensor
    sum: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        """[K] float64; zero where there is no token."""
        return self.sum / self.tokens if self.tokens else self.sum

    def about(self, mean: Tensor) -> Tensor:
        """Σ_t (x_t − mean)(x_t − mean)ᵀ for any ``mean`` [K], [K, K] float32.

        What float32 sums have lost by rounding stands out once a mean far larger than the spread is taken away; the
        diagonal is raised by as much as that may be, so that the matrix stays positive semidefinite.
        """
        mean, total = mean.double(), self.sum
        half = torch.outer(total - self.tokens / 2 * mean, mean)
        centred = (self.gram.double() - half - half.T).to(self.gram.dtype)
        centred.diagonal().add_(_LOST * self.gram.diagonal())
        return centred


class Split(NamedTuple):
    """The calibration in two: what is fitted to, and what tells how well that holds elsewhere."""

    fit: Part
    held_out: Part


class SplitGram:
    """The Gram matrix in two parts: of the windows that are held out, and of all the others. Every token is in one.

    A window is a stretch of ``tokens / windows`` tokens of the stream, as the calibration made them; calls bring some
    windows at a time, one after the other. (Of what an expert of a mixture is sent, a stretch holds tokens of several
    neighbouring windows, which is as good.)
    """

    def __init__(self, features: int, device: torch.device, tokens: int, windows: int = 1) -> None:
        self._parts = Gram(features, device, tokens), Gram(features, device, tokens)
        self._sums = Sum(features, device, tokens), Sum(features, device, tokens)
        self._counts = [0, 0]
        self._window = max(tokens // windows, 1)
        self._period = held_out_period(windows)

    def update(self, x: Tensor) -> None:
        while len(x):
            seen = sum(self._counts)
            window = seen // self._window
            part = self._part_of(window)
            end = window + 1
            while self._part_of(end) == part and end * self._window < seen + len(x):
                end += 1  # neighbours of one part go together
            some, x = x[: end * self._window - seen], x[end * self._window - seen :]
            self._counts[part] += len(some)
            self._parts[part].update(some)
            self._sums[part].update(some)

    def _part_of(self, window: int) -> int:
        """1 for a window that is held out."""
        return int(self._period > 0 and window % self._period == self._period // 2)

    @property
    def value(self) -> Split:
        return Split(
            *(
                Part(gram.value, total.value, count)
                for gram, total, count in zip(self._parts, self._sums, self._counts, strict=True)
            )
        )

    @property
    def diagonal(self) -> Tensor:
        """Of both parts together, [K]."""
        return self._parts[0].diagonal + self._parts[1].diagonal

    def permute(self, order: Tensor) -> None:
        for accumulator in (*self._parts, *self._sums):
            accumulator.permute(order)


def held_out_period(windows: int) -> int:
    """Every how many windows one is held out: 8 where that makes ``HELD_OUT_WINDOWS``, else fewer; 0 of a single one."""
    return 0 if windows < 2 else min(max(windows // HELD_OUT_WINDOWS, 2), 8)


@contextlib.contextmanager
def exact_products(*dtypes: torch.dtype) -> Iterator[None]:
    """Float32 matmuls inside may use the bfloat16 units if all operands came from bfloat16.

    Their products are exact then and are accumulated in float32. Whether it does is up to oneDNN: with AVX-512 BF16 alone
    (torch 2.13) it was seen not to. With any other dtype this does nothing.
    """
    if not dtypes or any(dtype != torch.bfloat16 for dtype in dtypes):
        yield
        return
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
