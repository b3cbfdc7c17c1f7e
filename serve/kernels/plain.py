"""The backend that runs everywhere: expand the weight, then multiply densely.

It reads 9/16 of the bytes and writes all of them before it multiplies, so it saves memory, never time. Its
result equals that of the dense layer with zeros to the bit, because it is the same matmul on the same weight: torch's, or where
torch emulates 16-bit products and ``HALVE_BACKEND=plain`` does not ask for its bits, one in float32 (`compress.wide`).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional

from compress import wide
from compress.packed import PackedWeight, quantize_rows, unpack_bits
from compress.wide import is_emulated

_GROUPS_AT_ONCE = 1 << 18
"""Groups of four that are expanded at a time: what is needed on the way then stays in a cache of a few MB."""


def expand(weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight [N, K], bit for bit as `compress.packed.unpack` has it, by arithmetic that every device vectorizes (a scatter does
    not, on a CPU).

    Args:
        dtype: of scaled values, see there.
    """
    weight = weight.floating(dtype)
    rows, columns = weight.shape
    dense = torch.empty(rows, columns, dtype=weight.values.dtype, device=weight.values.device)
    expand_into = _expand_16_bit if dense.dtype.itemsize == 2 else _expand_any
    step = max(1, _GROUPS_AT_ONCE // (columns // 4))
    for start in range(0, rows, step):
        rows_of = slice(start, start + step)
        expand_into(weight.values[rows_of], weight.mask[rows_of], dense[rows_of])
    return dense


def _expand_16_bit(values: Tensor, mask: Tensor, dense: Tensor) -> None:
    """A group of four 16-bit columns is one 64-bit word: both kept values are shifted to their places in it.

    Of the four mask bits b of a group, the lowest set one is b & -b in {1, 2, 4}, so its column is half of that;
    the other one is in {2, 4, 8}, and its column is half of that, less an eighth.
    """
    rows = len(values)
    bits = torch.stack([mask & 15, mask >> 4], dim=-1).view(rows, -1)  # [rows, K/4]
    low = bits & (~bits + 1)
    high = bits ^ low
    low_shift = (low >> 1) << 4
    high_shift = ((high >> 1) - (high >> 3)) << 4
    pairs = values.view(torch.int32)  # [rows, K/4], the first value in the low half
    first = (pairs & 0xFFFF).to(torch.int64).bitwise_left_shift_(low_shift.to(torch.int64))
    second = ((pairs >> 16) & 0xFFFF).to(torch.int64).bitwise_left_shift_(high_shift.to(torch.int64))
    torch.bitwise_or(first, second, out=dense.view(torch.int64))


def _expand_any(values: Tensor, mask: Tensor, dense: Tensor) -> None:
    """The same for values of any width, by selections."""
    rows = len(values)
    kept = unpack_bits(mask).view(rows, -1, 4)
    first, second = values.view(rows, -1, 2).unbind(-1)
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    groups = dense.view(rows, -1, 4)
    # The first value is the lowest kept column's, so column 1 holds it unless column 0 does; and so on from above.
    groups[..., 0] = torch.where(kept[..., 0], first, zero)
    groups[..., 1] = torch.where(kept[..., 1], torch.where(kept[..., 0], second, first), zero)
    groups[..., 2] = torch.where(kept[..., 2], torch.where(kept[..., 3], first, second), zero)
    groups[..., 3] = torch.where(kept[..., 3], second, zero)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N]."""
    if weight.quantizes_x:
        return _quantized(x, weight, bias)
    product = functional.linear if _as_torch() else wide.linear
    return product(x, expand(weight, x.dtype), bias)


def linear_conv1d(x: Tensor, weight: PackedWeight, bias: Tensor) -> Tensor:
    """The same with the operands in the order of transformers' Conv1D (GPT-2), so that the bits are its own."""
    if weight.quantizes_x:
        return _quantized(x, weight, bias)
    if is_emulated(x.dtype, x.device) and not _as_torch():
        return wide.linear(x, expand(weight, x.dtype), bias)
    dense = expand(weight, x.dtype).T.contiguous()  # [K, N], as Conv1D stores it
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), dense).view(*x.shape[:-1], dense.shape[1])


def _quantized(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x rounded to values like those of the weight; sums in float32, which are exact up to 2^24."""
    assert weight.scale is not None
    rounded, scale = quantize_rows(x, weight.values.dtype)
    values = PackedWeight(weight.values.float(), weight.mask)
    y = functional.linear(rounded.float(), expand(values)) * scale * weight.scale.T.squeeze(0)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _as_torch() -> bool:
    return os.environ.get("HALVE_BACKEND") == "plain"
