"""The packed 2:4 format, version 1: the kept half of the values and one bit a column.

For a weight [N, K] (output, input features), K a multiple of 8:

- ``weight_packed`` [N, K/2]: the kept values, row-major, in column order;
- ``weight_mask`` [N, K/8] uint8: bit ``k % 8`` (least significant first) of byte ``k // 8`` is set where column
  ``k`` is kept.

Exactly two bits are set in every aligned group of four columns: where fewer than two values are non-zero,
the lowest zero columns are kept explicitly. −0.0 is stored as +0.0. NaN and infinity are refused. So a dense
2:4 weight has one packed form, and packing and unpacking are inverse to the bit. For 16-bit values it takes
9/16 of the dense bytes. Rows concatenate and columns slice at multiples of 8 without repacking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CorruptCheckpointError, NumericalError
from compress.patterns import NMPattern

PATTERN = NMPattern(2, 4)
COLUMN_MULTIPLE = 8
VALUES_SUFFIX = ".weight_packed"
MASK_SUFFIX = ".weight_mask"
DENSE_SUFFIX = ".weight"
MASK_BYTES_OF_A_WEIGHT = 1 / 8
VALUE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_BIT_VALUES = [1 << bit for bit in range(8)]
_WEIGHTS_AT_ONCE = 1 << 20
"""Weights that are packed at a time: to select by a mask takes a 64-bit index for each, several times what they take themselves."""
_TWO_OF_FOUR = [bin(byte & 15).count("1") == 2 and bin(byte >> 4).count("1") == 2 for byte in range(256)]


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight: ``values`` [N, K/2] and ``mask`` [N, K/8] uint8."""

    values: Tensor
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense weight."""
        return self.values.shape[0], self.values.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.mask.nbytes


def why_not(columns: int) -> str | None:
    """Why a weight of that many input features cannot be packed, or None."""
    if columns % COLUMN_MULTIPLE:
        return f"{columns} input features are not a multiple of {COLUMN_MULTIPLE}, which the packed format needs"
    return None


def is_two_of_four(weight: Tensor) -> bool:
    """Whether no aligned group of four columns of ``weight`` [N, K] has more than two non-zero values."""
    if weight.shape[1] % 4:
        return False
    return int((weight != 0).unflatten(-1, (-1, 4)).sum(dim=-1, dtype=torch.uint8).max()) <= 2


def pack(weight: Tensor, name: str = "weight") -> PackedWeight:
    """Packs a dense ``weight`` [N, K] that is 2:4 already. Nothing is rounded or dropped.

    Raises:
        NumericalError: a value is NaN or infinite.
        CorruptCheckpointError: a group of four has more than two non-zero values, or K is not a multiple of 8.
    """
    if reason := why_not(weight.shape[1]):
        raise CorruptCheckpointError(f"{name}: {reason}")
    require_finite(weight, name)
    rows, columns = weight.shape
    values = torch.empty(rows, columns // 2, dtype=weight.dtype, device=weight.device)
    mask = torch.empty(rows, columns // 8, dtype=torch.uint8, device=weight.device)
    step = max(1, _WEIGHTS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        nonzero = weight[part] != 0
        # Ties go to the lower column, so missing ones are filled with the lowest zeros.
        kept = PATTERN.mask(nonzero.to(torch.uint8))
        if bool((nonzero & ~kept).any()):
            raise CorruptCheckpointError(_not_two_of_four(weight, name))
        values[part] = canonical(weight[part])[kept].view(len(kept), columns // 2)
        mask[part] = pack_bits(kept)
    return PackedWeight(values, mask)


def _not_two_of_four(weight: Tensor, name: str) -> str:
    crowded = (weight != 0).unflatten(-1, (-1, 4)).sum(dim=-1, dtype=torch.uint8) > 2
    row, group = crowded.nonzero()[0].tolist()
    return (
        f"{name} is not 2:4: {int(crowded.sum())} groups of four have more than two non-zero values "
        f"(the first in row {row}, columns {group * 4} to {group * 4 + 3})"
    )


def unpack(packed: PackedWeight) -> Tensor:
    """The dense weight [N, K] with its zeros. The mask must be valid (see `validate`)."""
    kept = unpack_bits(packed.mask)
    dense = torch.zeros(kept.shape, dtype=packed.values.dtype, device=packed.values.device)
    return dense.masked_scatter_(kept, packed.values)


def pack_bits(kept: Tensor) -> Tensor:
    """[N, K] bool -> [N, K/8] uint8, least significant bit first."""
    weights = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=kept.device)
    return (kept.unflatten(-1, (-1, 8)) * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor) -> Tensor:
    """[N, K/8] uint8 -> [N, K] bool."""
    weights = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=mask.device)
    return mask.unsqueeze(-1).bitwise_and(weights).ne(0).flatten(-2)


def canonical(weight: Tensor) -> Tensor:
    """The same values with −0.0 as +0.0."""
    return weight + torch.zeros((), dtype=weight.dtype, device=weight.device)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass: both extremes are finite then, and only then."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def require_finite(weight: Tensor, name: str) -> None:
    """Raises NumericalError naming the tensor if a value is NaN or infinite."""
    if not is_finite(weight):
        bad = (~torch.isfinite(weight)).nonzero()
        raise NumericalError(f"{name}: {len(bad)} values are NaN or infinite (the first at {bad[0].tolist()})")


def validate_shapes(packed: PackedWeight, name: str) -> None:
    """Checks that the shapes and dtypes are those of a packed weight; looks at no number.

    Raises:
        CorruptCheckpointError: names the layer and what is wrong with it.
    """
    values, mask = packed.values, packed.mask
    if mask.dtype != torch.uint8 or values.dtype not in VALUE_DTYPES.values():
        raise CorruptCheckpointError(
            f"{name}: values are {values.dtype} and the mask is {mask.dtype}; expected floating-point and uint8"
        )
    if (
        values.ndim != 2
        or mask.ndim != 2
        or mask.shape != (values.shape[0], values.shape[1] // 4)
        or values.shape[1] % 4
    ):
        raise CorruptCheckpointError(
            f"{name}: values {list(values.shape)} and mask {list(mask.shape)} do not belong together; "
            "a weight [N, K] has values [N, K/2] and a mask [N, K/8]"
        )


def validate_mask(mask: Tensor, name: str) -> None:
    """Checks that a mask [N, K/8] has two bits in every group of four.

    Raises:
        CorruptCheckpointError: names the layer and the place.
    """
    table = torch.tensor(_TWO_OF_FOUR, device=mask.device)
    valid = table[mask.int()]
    if not bool(valid.all()):
        bad = (~valid).nonzero()
        row, byte = bad[0].tolist()
        raise CorruptCheckpointError(
            f"{name}: the mask does not have two bits in every group of four ({len(bad)} bytes are wrong, the first in "
            f"row {row}, columns {byte * 8} to {byte * 8 + 7}); the file is damaged, get it again"
        )


def validate(packed: PackedWeight, name: str) -> None:
    """Checks a packed weight that was read from somewhere: shapes, dtypes, two bits a group, finite values.

    Raises:
        CorruptCheckpointError: names the layer and what is wrong with it.
    """
    validate_shapes(packed, name)
    validate_mask(packed.mask, name)
    values = packed.values
    if not is_finite(values):
        bad = (~torch.isfinite(values)).nonzero()
        raise CorruptCheckpointError(
            f"{name}: {len(bad)} packed values are NaN or infinite (the first at {bad[0].tolist()})"
        )
