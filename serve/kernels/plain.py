"""The backend that runs everywhere: expand the weight, then multiply densely.

It reads 9/16 of the bytes and writes all of them before it multiplies, so it saves memory, never time. Its
result equals that of the dense layer with zeros to the bit, because it is the same matmul on the same weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress.packed import PackedWeight, unpack_bits


def expand(weight: PackedWeight) -> Tensor:
    """The dense weight [N, K], by selections that any device vectorizes (a scatter does not, on a CPU)."""
    rows, columns = weight.shape
    kept = unpack_bits(weight.mask).view(rows, columns // 4, 4)
    first, second = weight.values.view(rows, columns // 4, 2).unbind(-1)
    zero = torch.zeros((), dtype=first.dtype, device=first.device)
    dense = torch.empty(rows, columns // 4, 4, dtype=first.dtype, device=first.device)
    # The first kept value is the lowest kept column's, so column 1 holds it unless column 0 does; and so on from above.
    dense[..., 0] = torch.where(kept[..., 0], first, zero)
    dense[..., 1] = torch.where(kept[..., 1], torch.where(kept[..., 0], second, first), zero)
    dense[..., 2] = torch.where(kept[..., 2], torch.where(kept[..., 3], first, second), zero)
    dense[..., 3] = torch.where(kept[..., 3], second, zero)
    return dense.view(rows, columns)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N]."""
    return functional.linear(x, expand(weight), bias)


def linear_conv1d(x: Tensor, weight: PackedWeight, bias: Tensor) -> Tensor:
    """The same with the operands in the order of transformers' Conv1D (GPT-2), so that the bits are its own."""
    dense = expand(weight).T.contiguous()  # [K, N], as Conv1D stores it
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), dense).view(*x.shape[:-1], dense.shape[1])
