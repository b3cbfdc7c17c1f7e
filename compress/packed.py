"""The packed 2:4 format, version 1: the kept half of the values and one bit a column.

For a weight [N, K] (output, input features), K a multiple of 8:

- ``weight_packed`` [N, K/2]: the kept values, row-major, in column order;
- ``weight_mask`` [N, K/8] uint8: bit ``k % 8`` (least significant first) of byte ``k // 8`` is set where column
  ``k`` is kept.

Exactly two bits are set in every aligned group of four columns: where fewer than two values are non-zero,
the lowest zero columns are kept explicitly. −0.0 is stored as +0.0. NaN and infinity are refused. So a dense
2:4 weight has one packed form, and packing and unpacking are inverse to the bit. For 16-bit values it takes
9/16 of the dense bytes. Rows concatenate and columns slice at multiples of 8 without repacking.

Values may be of 8 bits, int8 or float8_e4m3fn, beside one more tensor:

- ``weight_scale`` [N, 1] float32: a kept weight is its value times the scale of its row.

That is 5/16 of the bytes of a dense 16-bit weight, and the one step that rounds (`quantize`): to the nearest value, with the
scale that puts the largest weight of a row at the end of the range. int8 is symmetric, −127 to 127. Rows still concatenate and
columns slice, because a scale belongs to a row.
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
SCALE_SUFFIX = ".weight_scale"
PACKED_SUFFIXES = (VALUES_SUFFIX, MASK_SUFFIX, SCALE_SUFFIX)
DENSE_SUFFIX = ".weight"
MASK_BYTES_OF_A_WEIGHT = 1 / 8
FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What weights are computed in, and stored as where they are not scaled."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Value that the largest weight of a row becomes, of the dtypes that have scales."""
SCALED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in LARGEST}
VALUE_DTYPES = FLOAT_DTYPES | SCALED_DTYPES
"""What kept values may be stored as."""

_BIT_VALUES = [1 << bit for bit in range(8)]
_WEIGHTS_AT_ONCE = 1 << 20
"""Weights that are packed at a time: to select by a mask takes a 64-bit index for each, several times what they take themselves."""
_TWO_OF_FOUR = [bin(byte & 15).count("1") == 2 and bin(byte >> 4).count("1") == 2 for byte in range(256)]


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight: ``values`` [N, K/2], ``mask`` [N, K/8] uint8, and of 8-bit values the ``scale`` [N, 1] float32 of each row.

    Attributes:
        quantizes_x: whether what it multiplies is rounded to the dtype of such values, too, when it is multiplied; see `quantize_rows`.
    """

    values: Tensor
    mask: Tensor
    scale: Tensor | None = None
    quantizes_x: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense weight."""
        return self.values.shape[0], self.values.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.mask.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def rows(self, part: slice) -> PackedWeight:
        """Some rows of it."""
        scale = None if self.scale is None else self.scale[part]
        return PackedWeight(self.values[part], self.mask[part], scale, self.quantizes_x)

    def floating(self, dtype: torch.dtype | None = None) -> PackedWeight:
        """The same without scales: the products of values and scales, rounded to ``dtype`` (float32 if left out); itself where
        it has none."""
        if self.scale is None:
            return self
        return PackedWeight((self.values.float() * self.scale).to(dtype or torch.float32), self.mask)


def why_not(columns: int) -> str | None:
    """Why a weight of that many input features cannot be packed, or None."""
    if columns % COLUMN_MULTIPLE:
        return f"{columns} input features are not a multiple of {COLUMN_MULTIPLE}, which the packed format needs"
    return None


def bytes_of(n: int, k: int, dtype: torch.dtype) -> int:
    """Of a packed weight [n, k] with values of that dtype."""
    return n * k // 2 * dtype.itemsize + n * k // 8 + (4 * n if dtype in LARGEST else 0)


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


def unpack(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight [N, K] with its zeros. The mask must be valid (see `validate`).

    Args:
        dtype: of scaled values, see `PackedWeight.floating`; others keep their own.
    """
    values, kept = packed.floating(dtype).values, unpack_bits(packed.mask)
    dense = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    return dense.masked_scatter_(kept, values)


def quantize(weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
    """The same weight with kept values of 8 bits and a scale for each row; the mask stays.

    Rounds to nearest, ties to even. Of int8 a weight is off by at most half a scale, 1/254 of the largest of its row; of
    float8_e4m3fn by at most 1/16 of itself, or 2^-10 scales where it is smaller than 2^-6.

    Args:
        dtype: int8 or float8_e4m3fn.
    """
    values, largest = weight.values.float(), LARGEST[dtype]
    # A row of zeros may have any scale; the least normal number keeps the quotient of tiny ones finite.
    scale = values.abs().amax(dim=1, keepdim=True) / largest if values.shape[1] else values.new_zeros(len(values), 1)
    scale = torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(scale))
    scaled = (values / scale).clamp_(-largest, largest)
    if dtype == torch.int8:
        return PackedWeight(scaled.round_().to(dtype), weight.mask, scale)
    bits = scaled.to(dtype).view(torch.uint8)
    return PackedWeight(bits.masked_fill_(bits == 0x80, 0).view(dtype), weight.mask, scale)  # −0.0 as +0.0


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Activations as they are multiplied where a packed weight `quantizes_x`: the nearest values of 8 bits, with a scale for each row
    of x that puts its largest number at the end of the range ("dynamic, per token").

    The steps are in float32 and every kernel takes the same ones, so that all of them have the same values: the scale is the largest size
    (2^-100, where all are smaller) over `LARGEST`, and x is multiplied by its inverse, `LARGEST` over the size. A row with a number that is not
    finite has a scale of NaN.

    Args:
        x: [..., K] of floats; ``dtype``: int8 or float8_e4m3fn.

    Returns:
        Values [..., K] of that dtype, and scales [..., 1] float32.
    """
    largest, x = LARGEST[dtype], x.float()
    size = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite = torch.isfinite(size)
    size = torch.where(finite, size.clamp(min=2.0**-100), 1)
    # (of a tensor and a number torch may make a product with an inverse, which is rounded twice)
    end = torch.full_like(size, largest)
    scaled = torch.where(finite, x * (end / size), 0).clamp_(-largest, largest)
    values = scaled.round_() if dtype == torch.int8 else scaled
    return values.to(dtype), torch.where(finite, size / end, torch.nan)


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
    values, mask, scale = packed.values, packed.mask, packed.scale
    if mask.dtype != torch.uint8 or values.dtype not in VALUE_DTYPES.values():
        raise CorruptCheckpointError(
            f"{name}: values are {values.dtype} and the mask is {mask.dtype}; expected {', '.join(VALUE_DTYPES)} and uint8"
        )
    if (scale is not None) != (values.dtype in LARGEST):
        raise CorruptCheckpointError(
            f"{name}: values are {values.dtype} and there is {'no' if scale is None else 'a'} scale; values of 8 bits have one, "
            "others none"
        )
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != (len(values), 1)):
        raise CorruptCheckpointError(
            f"{name}: the scale is {scale.dtype} {list(scale.shape)}; a weight with values {list(values.shape)} has a scale "
            f"torch.float32 [{len(values)}, 1]"
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
    if packed.scale is not None:
        validate_scaled(packed.values, packed.scale, name)
        return
    values = packed.values
    if not is_finite(values):
        bad = (~torch.isfinite(values)).nonzero()
        raise CorruptCheckpointError(
            f"{name}: {len(bad)} packed values are NaN or infinite (the first at {bad[0].tolist()})"
        )


def validate_scaled(values: Tensor, scale: Tensor, name: str) -> None:
    """Checks values of 8 bits [N, K/2] and their scales [N, 1]: values in their range, scales finite and above zero.

    Raises:
        CorruptCheckpointError: names the layer and the place.
    """
    if values.dtype == torch.int8:
        bad, what = values == -128, "outside of -127 to 127"
    else:
        bad, what = values.view(torch.uint8).bitwise_and(0x7F) == 0x7F, "NaN"
    if bool(bad.any()):
        places = bad.nonzero()
        raise CorruptCheckpointError(
            f"{name}: {len(places)} packed values are {what} (the first at {places[0].tolist()}); the file is damaged, get it again"
        )
    bad = ~((scale > 0) & torch.isfinite(scale))
    if bool(bad.any()):
        raise CorruptCheckpointError(
            f"{name}: {int(bad.sum())} scales are not finite and above zero (the first is of row {int(bad.nonzero()[0, 0])}); the "
            "file is damaged, get it again"
        )
