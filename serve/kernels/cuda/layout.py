"""The order in which the GPU kernels read a packed weight, and back.

A weight [N, K] is cut into units of 64 rows and 64 columns, padded with zeros at the edges (their metadata says that
columns 0 and 1 of a group are kept). A unit is what a warp multiplies in one step, 4608 bytes, 9/16 of dense 16-bit ones:

- 8 blocks of 512 bytes, ``[column half 2][rows 4]``: the kept values of 16 rows and 32 columns as the A fragment of one
  ``mma.sp.m16n8k32``, 16 bytes a lane. Lane 4 q + t has, in registers of two values each, group t of rows q and q + 8,
  then group 4 + t of rows q and q + 8 (PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types").
- one block ``[lane 32][column half 2][row half 2]`` of 32-bit words: the metadata of two fragments, which lie below each
  other. A group is a nibble, the column of its first value and that of its second value times four. Lanes 4 q and
  4 q + 1 have row q (low half) and q + 8 (high half) of the upper fragment, 16 columns each, which sparsity selector 0
  takes; lanes 4 q + 2 and 4 q + 3 have those of the lower one, for selector 1.

``[header 512 bytes][panels of 64 rows][units along K]`` is a prepared weight. Where two forms are kept (`beside.py`), the second one
follows, at a multiple of 512 bytes, and the header says what and how long it is.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from compress.errors import CorruptCheckpointError
from compress.packed import PackedWeight, validate_shapes

CODES = {torch.bfloat16: 1, torch.float16: 2}
_DTYPES = {code: dtype for dtype, code in CODES.items()}

UNIT = 64
"""Rows and columns of a unit."""
UNIT_BYTES = 4608
HEADER_BYTES = 512
_VALUE_BYTES = 4096
_MAGIC = 0x47326868
_HEADER = struct.Struct("<4I2Q")  # magic, code of the dtype, N, K; what is behind, 0 nothing, and how many bytes

_NIBBLES = {1 << low | 1 << high: low | high << 2 for low in range(4) for high in range(low + 1, 4)}
_NOT_TWO = 0
"""Is no nibble of two different columns."""
_TO_NIBBLE = [_NIBBLES.get(bits, _NOT_TWO) for bits in range(16)]
_TO_BITS = [next((bits for bits, nibble in _NIBBLES.items() if nibble == wanted), 0) for wanted in range(16)]
_PAD_NIBBLE = _NIBBLES[0b0011]


class Second(IntEnum):
    """What is behind a prepared weight; the number is what the header says."""

    DENSE = 1
    CUSPARSELT = 2


class Described(NamedTuple):
    """What the header of a prepared weight says."""

    dtype: torch.dtype
    n: int
    k: int
    second: Second | None


def prepared_bytes(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """How long a prepared weight [n, k] is, without what is kept behind it; a multiple of 512."""
    return HEADER_BYTES + ceil_div(n, UNIT) * ceil_div(k, UNIT) * UNIT_BYTES


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def prepare(weight: PackedWeight, name: str = "weight") -> Tensor:
    """The bytes of a packed weight [N, K] in the order of the kernels, [bytes] uint8, on its device.

    Raises:
        CorruptCheckpointError: values and mask do not belong together, or the mask has not two bits in every group of
            four; names the layer and the place.
        ValueError: the values are neither bfloat16 nor float16.
    """
    validate_shapes(weight, name)
    if weight.values.dtype not in CODES:
        raise ValueError(f"{name}: values are {weight.values.dtype}; the kernels take bfloat16 and float16")
    n, k = weight.shape
    device = weight.values.device
    panels, units = ceil_div(n, UNIT), ceil_div(k, UNIT)
    prepared = torch.empty(prepared_bytes(n, k), dtype=torch.uint8, device=device)
    prepared[:HEADER_BYTES] = _header(weight.values.dtype, n, k).to(device)
    body = prepared[HEADER_BYTES:].view(panels, units, UNIT_BYTES)
    values = _padded(weight.values.view(torch.int16), 0, panels * UNIT, units * UNIT // 2)
    body[..., :_VALUE_BYTES] = _to_fragments(values).view(torch.uint8).flatten(2)
    nibbles = _padded(_nibbles(weight.mask, name), _PAD_NIBBLE, panels * UNIT, units * UNIT // 4)
    body[..., _VALUE_BYTES:] = _to_words(nibbles).view(torch.uint8).flatten(2)
    return prepared


def append(prepared: Tensor, second: Second, behind: Tensor) -> Tensor:
    """A prepared weight with a second form, [bytes] uint8, behind it, in memory of its own.

    Raises:
        ValueError: this is no prepared weight, or a damaged one, or has a second form already.
    """
    described = describe(prepared)
    if described.second is not None:
        raise ValueError("there is a second form behind this prepared weight already")
    both = torch.cat([prepared, behind])
    both[:HEADER_BYTES] = _header(*described[:3], second, len(behind)).to(both.device)
    return both


def restore(prepared: Tensor) -> PackedWeight:
    """The packed weight that was prepared, to the bit.

    Raises:
        ValueError: this is no prepared weight, or a damaged one.
    """
    dtype, n, k, _ = describe(prepared)
    body = prepared[HEADER_BYTES : prepared_bytes(n, k)].view(ceil_div(n, UNIT), ceil_div(k, UNIT), UNIT_BYTES)
    values = _from_fragments(body[..., :_VALUE_BYTES].contiguous().view(torch.int16))[:n, : k // 2]
    nibbles = _from_words(body[..., _VALUE_BYTES:].contiguous().view(torch.int16))[:n, : k // 4]
    bits = torch.tensor(_TO_BITS, dtype=torch.uint8, device=prepared.device)[nibbles.int()].view(n, k // 8, 2)
    if n and k and bool((bits == 0).any()):
        raise ValueError("the prepared weight is damaged: its metadata is not two columns in every group of four")
    return PackedWeight(values.contiguous().view(dtype), bits[..., 0] | bits[..., 1] << 4)


def describe(prepared: Tensor) -> Described:
    """What a prepared weight is. Reads its first bytes, which waits for the GPU.

    Raises:
        ValueError: this is no prepared weight, or a damaged one.
    """
    if prepared.dtype is not torch.uint8 or prepared.ndim != 1 or not prepared.is_contiguous():
        raise ValueError(f"a prepared weight is bytes in a row, this is {prepared.dtype} {list(prepared.shape)}")
    if len(prepared) >= HEADER_BYTES:
        magic, code, n, k, kind, behind = _HEADER.unpack(bytes(prepared[: _HEADER.size].tolist()))
        is_whole = len(prepared) == prepared_bytes(n, k) + behind and bool(kind) == bool(behind)
        if magic == _MAGIC and code in _DTYPES and is_whole and kind in (0, *Second):
            return Described(_DTYPES[code], n, k, Second(kind) if kind else None)
    raise ValueError("the prepared weight is damaged, or no prepared weight at all")


def _header(dtype: torch.dtype, n: int, k: int, kind: int = 0, behind: int = 0) -> Tensor:
    text = _HEADER.pack(_MAGIC, CODES[dtype], n, k, kind, behind)
    return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def _nibbles(mask: Tensor, name: str) -> Tensor:
    """Mask bytes [N, K/8] -> nibbles of metadata [N, K/4] uint8."""
    bits = torch.stack([mask & 15, mask >> 4], dim=-1).flatten(1)
    nibbles = torch.tensor(_TO_NIBBLE, dtype=torch.uint8, device=mask.device)[bits.int()]
    wrong = nibbles == _NOT_TWO
    if bool(wrong.any()):
        row, group = wrong.nonzero()[0].tolist()
        raise CorruptCheckpointError(
            f"{name}: the mask does not have two bits in every group of four (row {row}, columns {group * 4} to "
            f"{group * 4 + 3}); the file is damaged, get it again"
        )
    return nibbles


def _padded(tensor: Tensor, value: int, rows: int, columns: int) -> Tensor:
    if tensor.shape == (rows, columns):
        return tensor
    result = tensor.new_full((rows, columns), value)
    result[: tensor.shape[0], : tensor.shape[1]] = tensor
    return result


# Axes: P panels, r four times 16 rows, b 8 rows below, q row of 8; U units along K, h half of 32 columns, c half of that,
# t group of four; then the two values of a group.


def _to_fragments(values: Tensor) -> Tensor:
    """Values [P 64, U 32] -> [P, U, 2048]."""
    rows, columns = values.shape
    axes = values.view(rows // 64, 4, 2, 8, columns // 32, 2, 2, 4, 2)  # P r b q U h c t v
    return axes.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).reshape(rows // 64, columns // 32, 2048)  # P U h r q t c b v


def _from_fragments(fragments: Tensor) -> Tensor:
    """The inverse of `_to_fragments`."""
    panels, units = fragments.shape[:2]
    axes = fragments.view(panels, units, 2, 4, 8, 4, 2, 2, 2)  # P U h r q t c b v
    return axes.permute(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(panels * 64, units * 32)  # P r b q U h c t v


def _to_words(nibbles: Tensor) -> Tensor:
    """Nibbles [P 64, U 16] uint8 -> halves of 32-bit words [P, U, 256] int16. R: two times 32 rows, s: upper or lower 16."""
    rows, columns = nibbles.shape
    four = nibbles.view(rows, columns // 4, 4).int()
    halves = (four[..., 0] | four[..., 1] << 4 | four[..., 2] << 8 | four[..., 3] << 12).to(torch.int16)
    axes = halves.view(rows // 64, 2, 2, 2, 8, columns // 16, 2, 2)  # P R s b q U h c
    return axes.permute(0, 5, 4, 2, 7, 6, 1, 3).reshape(rows // 64, columns // 16, 256)  # P U q s c h R b


def _from_words(words: Tensor) -> Tensor:
    """The inverse of `_to_words`."""
    panels, units = words.shape[:2]
    axes = words.view(panels, units, 8, 2, 2, 2, 2, 2)  # P U q s c h R b
    halves = axes.permute(0, 6, 3, 7, 2, 1, 5, 4).reshape(panels * 64, units * 4).int()  # P R s b q U h c
    return torch.stack([halves >> shift & 15 for shift in (0, 4, 8, 12)], dim=-1).flatten(1).to(torch.uint8)
