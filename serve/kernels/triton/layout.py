"""A packed weight as one tensor for the Triton kernels, and back: ``[header 64 bytes][values][mask][scales]``, in the order they are
stored in; each part begins at a multiple of 16 bytes, and only values of 8 bits have scales.

How long it is says what its values are (but not whether bfloat16 or float16, which x says), and that it is for these kernels: a multiple of
16 bytes, and as many more as the kind of values has for a number. One for `serve.kernels.cuda` is a multiple of 16 bytes, or longer than any
of these.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from compress.packed import LARGEST, PackedWeight, validate_mask, validate_shapes

CODES = {torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_DTYPES = {code: dtype for dtype, code in CODES.items()}
ACTIVATIONS = (torch.bfloat16, torch.float16)
"""What x may be."""
HEADER_BYTES = 64
MAGIC = 0x54326868
_HEADER = struct.Struct("<4I")  # magic, code of the dtype of the values, N, K
_ALIGNMENT = 16
_KINDS = {torch.bfloat16: 1, torch.float16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}


def prepared_bytes(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """How long a prepared weight [n, k] with values of that dtype is: never as long as one with values of another size or kind, or as one
    for `serve.kernels.cuda`."""
    needed = _scales_at(n, k, dtype) + (4 * n if dtype in LARGEST else 0)
    return _up(needed, _ALIGNMENT) + _KINDS[dtype]


@lru_cache(maxsize=4096)
def values_dtype(length: int, n: int, k: int, dtype: torch.dtype) -> torch.dtype | None:
    """Of what dtype the values of a prepared weight [n, k] of that length are; None where no such weight has it.

    Args:
        dtype: of x, which is that of the values, unless they are of 8 bits; or of the values.
    """
    kinds = (dtype, *LARGEST) if dtype in ACTIVATIONS else (dtype,) if dtype in LARGEST else ()
    return next((kind for kind in kinds if length == prepared_bytes(n, k, kind)), None)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _mask_at(n: int, k: int, dtype: torch.dtype) -> int:
    return HEADER_BYTES + _up(n * (k // 2) * dtype.itemsize, _ALIGNMENT)


def _scales_at(n: int, k: int, dtype: torch.dtype) -> int:
    return _mask_at(n, k, dtype) + _up(n * (k // 8), _ALIGNMENT)


def prepare(weight: PackedWeight, name: str = "weight") -> Tensor:
    """The bytes of a packed weight [N, K], [bytes] uint8, on its device.

    Raises:
        CorruptCheckpointError: values, mask and scales do not belong together, or the mask has not two bits in every group of
            four; names the layer and the place.
        ValueError: the values are of a dtype that the kernels do not take.
    """
    validate_shapes(weight, name)
    validate_mask(weight.mask, name)
    dtype = weight.values.dtype
    if dtype not in CODES:
        raise ValueError(f"{name}: values are {dtype}; the kernels take {', '.join(map(str, CODES))}")
    n, k = weight.shape
    prepared = torch.zeros(prepared_bytes(n, k, dtype), dtype=torch.uint8, device=weight.values.device)
    header = _HEADER.pack(MAGIC, CODES[dtype], n, k).ljust(HEADER_BYTES, b"\0")
    prepared[:HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(prepared.device)
    own = parts(prepared, n, k, dtype)
    own.values.copy_(weight.values)
    own.mask.copy_(weight.mask)
    if own.scale is not None:
        assert weight.scale is not None
        own.scale.copy_(weight.scale)
    return prepared


def parts(prepared: Tensor, n: int, k: int, dtype: torch.dtype) -> PackedWeight:
    """Values [n, k/2], mask [n, k/8] and, of 8-bit values, scales [n, 1] of a prepared weight, without a copy.

    Args:
        dtype: of x, see `values_dtype`.

    Raises:
        ValueError: it is no prepared weight [n, k]; its length tells.
    """
    kind = values_dtype(prepared.numel(), n, k, dtype)
    if prepared.dtype is not torch.uint8 or kind is None:
        raise ValueError(
            f"{prepared.dtype} {list(prepared.shape)} on {prepared.device} is no prepared weight [{n}, {k}]"
        )
    mask_at, scales_at = _mask_at(n, k, kind), _scales_at(n, k, kind)
    values = prepared[HEADER_BYTES : HEADER_BYTES + n * (k // 2) * kind.itemsize].view(kind).view(n, k // 2)
    mask = prepared[mask_at : mask_at + n * (k // 8)].view(n, k // 8)
    scale = prepared[scales_at : scales_at + 4 * n].view(torch.float32).view(n, 1) if kind in LARGEST else None
    return PackedWeight(values, mask, scale)


def restore(prepared: Tensor) -> PackedWeight:
    """The packed weight that was prepared, to the bit, in memory of its own.

    Raises:
        ValueError: this is no prepared weight, or a damaged one.
    """
    if prepared.dtype is torch.uint8 and prepared.ndim == 1 and len(prepared) >= HEADER_BYTES:
        magic, code, n, k = _HEADER.unpack(bytes(prepared[: _HEADER.size].tolist()))
        if magic == MAGIC and code in _DTYPES and len(prepared) == prepared_bytes(n, k, _DTYPES[code]):
            weight = parts(prepared, n, k, _DTYPES[code])
            scale = None if weight.scale is None else weight.scale.clone()
            return PackedWeight(weight.values.clone(), weight.mask.clone(), scale)
    raise ValueError("the prepared weight is damaged, or no prepared weight at all")
