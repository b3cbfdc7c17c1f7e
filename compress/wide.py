"""Linear layers of 16-bit weights on processors that cannot multiply 16-bit numbers.

Without instructions for them (AVX-512 BF16, AMX; for float16 AVX-512 FP16), torch emulates every 16-bit product, several times
slower than a float32 one. Here such a layer widens its weight and its input, multiplies in float32, and rounds once, as the
instructions do: nothing but the order of the sums differs. The weight stays 16-bit in memory; for one product at a time, a
part of it is held in float32, which costs little where many rows of x share it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress.device import has_known_instructions

PART = 1 << 24
"""Weights that are widened at once, at most, unless a single row has more: 64 MB."""


def _emulated_here() -> dict[torch.dtype, bool]:
    if not has_known_instructions():
        return {}
    return {
        torch.bfloat16: not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
        torch.float16: not torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }


EMULATED = _emulated_here()
"""The dtypes that this processor cannot multiply, as far as that is known."""


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of that dtype are emulated on that device. Known of x86-64; elsewhere torch is left to itself."""
    return device.type == "cpu" and EMULATED.get(dtype, False)


def _as_it_is(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own product is meant: nothing is emulated, or autocast decides."""
    return x.dtype != weight.dtype or not is_emulated(x.dtype, x.device) or torch.is_autocast_enabled(x.device.type)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times the transposed weight [N, K] plus bias [N] -> [..., N] in x's dtype; in float32 where its own is emulated."""
    if _as_it_is(x, weight):
        return functional.linear(x, weight, bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _WideProduct.apply(x, weight, bias) if wanted else _product(x, weight, bias)


def _parts(weight: Tensor) -> list[slice]:
    """Rows of a weight [N, K] that are widened together."""
    rows = max(1, PART // max(weight.shape[1], 1))
    return [slice(first, first + rows) for first in range(0, len(weight), rows)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.float()
    parts = [
        functional.linear(wide, weight[rows].float(), None if bias is None else bias[rows].float()).to(x.dtype)
        for rows in _parts(weight)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _WideProduct(torch.autograd.Function):
    """The product with its gradients; between the passes the 16-bit tensors are kept, and no wide copies of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,), (x, weight) = slopes, ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        d_x, d_weight = None, torch.empty_like(weight) if need_weight else None
        wide_x = x.flatten(0, -2).float() if need_weight else x  # [T, K]
        for rows in _parts(weight):
            part = slope[..., rows].float()  # [..., some of N]
            if need_x:
                towards = part @ weight[rows].float()
                d_x = towards if d_x is None else d_x.add_(towards)
            if d_weight is not None:
                d_weight[rows] = part.flatten(0, -2).T @ wide_x
        d_bias = slope.flatten(0, -2).float().sum(dim=0).to(slope.dtype) if need_bias else None
        return None if d_x is None else d_x.to(x.dtype), d_weight, d_bias


class WideLinear(nn.Linear):
    """An nn.Linear whose 16-bit products are made in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        return linear(input, self.weight, self.bias)


class WideConv1D(Conv1D):
    """The same of GPT-2's layer, whose weight is [K, N] and which always has a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if _as_it_is(x, self.weight):
            return super().forward(x)
        return linear(x, self.weight.T, self.bias)


_WIDE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: WideLinear, Conv1D: WideConv1D}


def widen(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Makes the linear layers of a model that will compute in that dtype on that device wide, if its products are emulated
    there."""
    if not is_emulated(dtype, device):
        return
    for module in model.modules():
        if (wide := _WIDE.get(type(module))) is not None:
            module.__class__ = wide
