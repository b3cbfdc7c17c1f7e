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

Of values of 8 bits, a unit has 2560 bytes: 4 blocks ``[column half 2][row half 2]`` of values, 16 bytes a lane, then the metadata. Of
its lane's bytes, the first half is of the upper fragment, the second one of the lower, and a 32-bit word of them has both registers of 16
columns, because it takes the fewest instructions to make them of it: first the first values of rows q and q + 8, then the second ones.

``[header 512 bytes][panels of 64 rows][units along K]`` is a prepared weight; of 8-bit values the scales of all rows of the panels follow, in
float32, zeros at the edge, and some bytes more, by which lengths tell kinds of values apart. Where two forms are kept (`beside.py`), the second one
follows, at a multiple of 512 bytes, and the header says what and how long it is. (Of 16-bit values only.)
"""

from __future__ import annotations

import struct
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from compress.errors import CorruptCheckpointError
from compress.packed import LARGEST, PackedWeight, validate_shapes

CODES = {torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_DTYPES = {code: dtype for dtype, code in CODES.items()}

UNIT = 64
"""Rows and columns of a unit."""
UNIT_BYTES = 4608
SCALED_UNIT_BYTES = 2560
HEADER_BYTES = 512
_METADATA_BYTES = 512
_MORE_BYTES = {torch.int8: 512, torch.float8_e4m3fn: 1024}
"""Behind the scales: no two kinds have the same length, not even of a weight without rows."""
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


def unit_bytes(dtype: torch.dtype) -> int:
    """Of a unit with values of that dtype."""
    return SCALED_UNIT_BYTES if dtype in LARGEST else UNIT_BYTES


def prepared_bytes(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """How long a prepared weight [n, k] with values of that dtype is, without what is kept behind it: a multiple of 256, of 16-bit values of
    512. One with values of 8 bits is shorter than one with 16, unless it has no rows."""
    panels = ceil_div(n, UNIT)
    units = HEADER_BYTES + panels * ceil_div(k, UNIT) * unit_bytes(dtype)
    return units + (panels * UNIT * 4 + _MORE_BYTES[dtype] if dtype in LARGEST else 0)


@lru_cache(maxsize=4096)
def scaled_dtype(length: int, n: int, k: int) -> torch.dtype | None:
    """Of what dtype the values of a prepared weight [n, k] of that length are, if they are of 8 bits."""
    return next((dtype for dtype in LARGEST if length == prepared_bytes(n, k, dtype)), None)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def prepare(weight: PackedWeight, name: str = "weight") -> Tensor:
    """The bytes of a packed weight [N, K] in the order of the kernels, [bytes] uint8, on its device.

    Raises:
        CorruptCheckpointError: values, mask and scales do not belong together, or the mask has not two bits in every group of
            four; names the layer and the place.
        ValueError: the values are of a dtype that the kernels do not take.
    """
    validate_shapes(weight, name)
    dtype = weight.values.dtype
    if dtype not in CODES:
        known = ", ".join(str(code).removeprefix("torch.") for code in CODES)
        raise ValueError(f"{name}: values are {dtype}; the kernels take {known}")
    n, k = weight.shape
    device = weight.values.device
    panels, units = ceil_div(n, UNIT), ceil_div(k, UNIT)
    prepared = torch.zeros(prepared_bytes(n, k, dtype), dtype=torch.uint8, device=device)
    prepared[:HEADER_BYTES] = _header(dtype, n, k).to(device)
    body = _body(prepared, n, k, dtype)
    values, to_fragments = weight.values.view(torch.int16), _to_fragments
    if weight.scale is not None:
        values, to_fragments = weight.values.view(torch.int8), _to_scaled_fragments
        _scales(prepared, n, k, dtype)[:n] = weight.scale[:, 0]
    values = _padded(values, 0, panels * UNIT, units * UNIT // 2)
    body[..., :-_METADATA_BYTES] = to_fragments(values).view(torch.uint8).flatten(2)
    nibbles = _padded(_nibbles(weight.mask, name), _PAD_NIBBLE, panels * UNIT, units * UNIT // 4)
    body[..., -_METADATA_BYTES:] = _to_words(nibbles).view(torch.uint8).flatten(2)
    return prepared


def _body(prepared: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The units of a prepared weight [panels, units along K, bytes], without a copy."""
    panels, units, size = ceil_div(n, UNIT), ceil_div(k, UNIT), unit_bytes(dtype)
    return prepared[HEADER_BYTES : HEADER_BYTES + panels * units * size].view(panels, units, size)


def _scales(prepared: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The scales of a prepared weight with values of 8 bits [n, up to a multiple of 64] float32, without a copy."""
    panels = ceil_div(n, UNIT)
    start = HEADER_BYTES + panels * ceil_div(k, UNIT) * unit_bytes(dtype)
    return prepared[start : start + panels * UNIT * 4].view(torch.float32)


def append(prepared: Tensor, second: Second, behind: Tensor) -> Tensor:
    """A prepared weight with a second form, [bytes] uint8, behind it, in memory of its own.

    Raises:
        ValueError: this is no prepared weight, or a damaged one, or has values of 8 bits or a second form already.
    """
    described = describe(prepared)
    if described.dtype in LARGEST:
        raise ValueError("only a weight with values of 16 bits has a second form")
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
    body = _body(prepared, n, k, dtype)
    fragments, scale = body[..., :-_METADATA_BYTES].contiguous(), None
    if dtype in LARGEST:
        values = _from_scaled_fragments(fragments)[:n, : k // 2]
        scale = _scales(prepared, n, k, dtype)[:n].clone().view(n, 1)
    else:
        values = _from_fragments(fragments.view(torch.int16))[:n, : k // 2]
    nibbles = _from_words(body[..., -_METADATA_BYTES:].contiguous().view(torch.int16))[:n, : k // 4]
    bits = torch.tensor(_TO_BITS, dtype=torch.uint8, device=prepared.device)[nibbles.int()].view(n, k // 8, 2)
    if n and k and bool((bits == 0).any()):
        raise ValueError("the prepared weight is damaged: its metadata is not two columns in every group of four")
    return PackedWeight(values.contiguous().view(dtype), bits[..., 0] | bits[..., 1] << 4, scale)


def describe(prepared: Tensor) -> Described:
    """What a prepared weight is. Reads its first bytes, which waits for the GPU.

    Raises:
        ValueError: this is no prepared weight, or a damaged one.
    """
    if prepared.dtype is not torch.uint8 or prepared.ndim != 1 or not prepared.is_contiguous():
        raise ValueError(f"a prepared weight is bytes in a row, this is {prepared.dtype} {list(prepared.shape)}")
    if len(prepared) >= HEADER_BYTES:
        magic, code, n, k, kind, behind = _HEADER.unpack(bytes(prepared[: _HEADER.size].tolist()))
        dtype = _DTYPES.get(code) if magic == _MAGIC else None
        second = () if dtype in LARGEST else Second
        is_whole = dtype is not None and len(prepared) == prepared_bytes(n, k, dtype) + behind
        if dtype is not None and is_whole and bool(kind) == bool(behind) and kind in (0, *second):
            return Described(dtype, n, k, Second(kind) if kind else None)
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


# Axes: P panels, r four times 16 rows (R s: two times 32, of them upper and lower 16), b 8 rows below, q row of 8; U units along K, h half of 32 columns, c half of that,
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


def _to_scaled_fragments(values: Tensor) -> Tensor:
    """Values [P 64, U 32] int8 -> [P, U, 2048]."""
    rows, columns = values.shape
    axes = values.view(rows // 64, 2, 2, 2, 8, columns // 32, 2, 2, 4, 2)  # P R s b q U h c t v
    axes = axes.permute(0, 5, 6, 1, 4, 8, 2, 7, 9, 3)  # P U h R q t s c v b
    return axes.reshape(rows // 64, columns // 32, 2048)


def _from_scaled_fragments(fragments: Tensor) -> Tensor:
    """The inverse of `_to_scaled_fragments`."""
    panels, units = fragments.shape[:2]
    axes = fragments.view(panels, units, 2, 2, 8, 4, 2, 2, 2, 2)  # P U h R q t s c v b
    return axes.permute(0, 3, 6, 9, 4, 1, 2, 7, 5, 8).reshape(panels * 64, units * 32)  # P R s b q U h c t v


def _to_words(nibbles: Tensor) -> Tensor:
    """Nibbles [P 64, U 16] uint8 -> halves of 32-bit words [P, U, 256] int16."""
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
