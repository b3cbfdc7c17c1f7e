"""A small product of which the result is known, by which kernels prove themselves on a device before they are used there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.packed import LARGEST, PATTERN, PackedWeight, pack, pack_bits, quantize_rows, unpack

_SMALL = 0x8F
"""Of a float8, the bits of those that are less than 2^-5, half of which are subnormal."""

LOST = 2.0**-16
"""By sums in float32."""


@dataclass(frozen=True)
class Problem:
    """Random numbers on the processor: ``packed``, a weight [n, k]; ``x`` [rows, k]; ``bias`` [n]; and ``x_scale`` [rows] float32, where x
    is to be multiplied by that."""

    packed: PackedWeight
    x: Tensor
    bias: Tensor
    x_scale: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The dense one [n, k], in x's dtype."""
        return unpack(self.packed, self.x.dtype)

    @property
    def scales(self) -> Tensor:
        """Of the rows of a weight with values of 8 bits, [n] float32."""
        assert self.packed.scale is not None
        return self.packed.scale.flatten()

    def is_solved_by(self, y: Tensor, lost: float = LOST, rounding: float | None = None) -> bool:
        """Whether y [some rows, n] is x, times its scales, times the transposed weight plus bias for the first rows: within the rounding of
        the result, and what sums in float32 lose, of float64. A product that is left out, or in another column, is found, and so is the
        scale of another row.

        Args:
            lost: by the sums, as a share of the sum of the sizes of what is added.
            rounding: of the result, as a share of it; left out: as much as x's dtype needs.
        """
        scale = 1.0 if self.packed.scale is None else self.packed.scale.double()
        weight = unpack(PackedWeight(self.packed.values.double() * scale, self.packed.mask))
        x, bias = self.x[: len(y)].double(), self.bias.double()
        if self.x_scale is not None:
            x *= self.x_scale[: len(y), None].double()
        expected = x @ weight.T + bias
        size = x.abs() @ weight.abs().T + bias.abs()
        error = (y.cpu().double() - expected).abs()
        rounding = torch.finfo(self.x.dtype).eps if rounding is None else rounding
        return bool((error <= rounding * expected.abs() + lost * size).all())

    def rounded(self) -> Problem:
        """The same where x is rounded to such values as the packed ones are, which are of 8 bits. Its rows are of five sizes in turn."""
        sizes = torch.exp2(torch.arange(len(self.x), device="cpu") % 5 - 2.0)[:, None]
        values, scale = quantize_rows(self.x.float() * sizes, self.packed.values.dtype)
        return replace(self, x=values.to(self.x.dtype), x_scale=scale[:, 0])

    def in_bytes(self) -> tuple[Tensor, Tensor]:
        """x, if it is `rounded`, and the dense weight as values of 8 bits."""
        kept = self.packed.values.view(torch.uint8)  # (torch scatters no float8)
        dtype = self.packed.values.dtype
        return self.x.to(dtype), unpack(PackedWeight(kept, self.packed.mask)).view(dtype)

    def is_solved_by_sums(self, sums: Tensor) -> bool:
        """Whether these [rows, n] are the products of what `in_bytes` gives, which scales and bias are still missing from."""
        assert self.x_scale is not None
        scaled = sums.cpu().double() * self.x_scale[:, None].double() * self.scales.double()
        return self.is_solved_by(scaled + self.bias.double(), lost_by(self.packed.values.dtype), rounding=0.0)


def lost_by(values: torch.dtype) -> float:
    """What sums of products of such values lose, see `Problem.is_solved_by`: in float32, into which those of int8 fit. Of float8 Hopper's tensor
    cores keep about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""
    return 2.0**-10 if values == torch.float8_e4m3fn else LOST


def problem(rows: int, n: int, k: int, dtype: torch.dtype, values: torch.dtype | None = None) -> Problem:
    """Always the same one.

    Args:
        dtype: of x and the bias, and of the weight,
        values: unless its kept values are of this one of 8 bits: then all there are occur, and a third of the rows of float8 have
            small ones alone.
    """
    random = torch.Generator("cpu").manual_seed(0)
    # (whatever dtype and device are torch's defaults where this is called)
    exact: dict[str, Any] = {"generator": random, "dtype": torch.float32, "device": "cpu"}
    weight, x, bias = (torch.randn(*shape, **exact).to(dtype) for shape in ((n, k), (rows, k), (n,)))
    kept = PATTERN.mask(weight.abs())
    if values is None:
        return Problem(pack(weight * kept), x, bias)
    bits = torch.randint(256, (n, k // 2), generator=random, dtype=torch.uint8, device="cpu")
    if values == torch.int8:
        bits[bits == 0x80] = 0  # −128 is none
    else:
        bits[::3] &= _SMALL
        bits[(bits & 0x7F == 0x7F) | (bits == 0x80)] = 0  # NaN, and −0.0
    # The largest weight of a row is 1 to 8, more or less, and no two rows have the same.
    scale = torch.exp2(3 * torch.rand(n, 1, **exact)) / LARGEST[values]
    if values != torch.int8:
        scale[::3] *= LARGEST[values] * 2**5
    return Problem(PackedWeight(bits.view(values), pack_bits(kept), scale), x, bias)
