"""A packed weight as one tensor for the Triton kernels, and back: ``[header 64 bytes][values][mask]``, in the order they are
stored in; values and mask begin at multiples of 16 bytes."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from compress.packed import PackedWeight, validate_mask, validate_shapes

CODES = {torch.bfloat16: 1, torch.float16: 2}
_DTYPES = {code: dtype for dtype, code in CODES.items()}
HEADER_BYTES = 64
MAGIC = 0x54326868
_HEADER = struct.Struct("<4I")  # magic, code of the dtype, N, K
_ALIGNMENT = 16


def prepared_bytes(n: int, k: int) -> int:
    """How long a prepared weight [n, k] is: less than one of `serve.kernels.cuda`, whatever the shape."""
    return _mask_at(n, k) + n * (k // 8)


def _mask_at(n: int, k: int) -> int:
    return HEADER_BYTES + -(-n * k // _ALIGNMENT) * _ALIGNMENT


def prepare(weight: PackedWeight, name: str = "weight") -> Tensor:
    """The bytes of a packed weight [N, K], [bytes] uint8, on its device.

    Raises:
        CorruptCheckpointError: values and mask do not belong together, or the mask has not two bits in every group of
            four; names the layer and the place.
        ValueError: the values are of a dtype that the kernels do not take.
    """
    validate_shapes(weight, name)
    validate_mask(weight.mask, name)
    if weight.values.dtype not in CODES:
        raise ValueError(f"{name}: values are {weight.values.dtype}; the kernels take {', '.join(map(str, CODES))}")
    n, k = weight.shape
    prepared = torch.zeros(prepared_bytes(n, k), dtype=torch.uint8, device=weight.values.device)
    header = _HEADER.pack(MAGIC, CODES[weight.values.dtype], n, k).ljust(HEADER_BYTES, b"\0")
    prepared[:HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(prepared.device)
    own = parts(prepared, n, k, weight.values.dtype)
    own.values.copy_(weight.values)
    own.mask.copy_(weight.mask)
    return prepared


def parts(prepared: Tensor, n: int, k: int, dtype: torch.dtype) -> PackedWeight:
    """Values [n, k/2] and mask [n, k/8] of a prepared weight, without a copy.

    Raises:
        ValueError: it is no prepared weight [n, k]; its length tells.
    """
    if prepared.dtype is not torch.uint8 or prepared.numel() != prepared_bytes(n, k):
        raise ValueError(
            f"{prepared.dtype} {list(prepared.shape)} on {prepared.device} is no prepared weight [{n}, {k}]"
        )
    values = prepared[HEADER_BYTES : HEADER_BYTES + n * k].view(dtype).view(n, k // 2)
    return PackedWeight(values, prepared[_mask_at(n, k) :].view(n, k // 8))


def restore(prepared: Tensor) -> PackedWeight:
    """The packed weight that was prepared, to the bit, in memory of its own.

    Raises:
        ValueError: this is no prepared weight, or a damaged one.
    """
    if prepared.dtype is torch.uint8 and prepared.ndim == 1 and len(prepared) >= HEADER_BYTES:
        magic, code, n, k = _HEADER.unpack(bytes(prepared[: _HEADER.size].tolist()))
        if magic == MAGIC and code in _DTYPES and len(prepared) == prepared_bytes(n, k):
            weight = parts(prepared, n, k, _DTYPES[code])
            return PackedWeight(weight.values.clone(), weight.mask.clone())
    raise ValueError("the prepared weight is damaged, or no prepared weight at all")
