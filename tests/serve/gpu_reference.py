"""What kernels must compute of weights with kept values of 8 bits and a scale for each row, in float64.

As `cpu_reference` has it for a sum of h = K/2 products: values of 8 bits are exact in x's dtype, so their products are exact in float32,
and the sum is off by at most gamma S. What follows, the scale and the bias, is rounded once each, which gamma leaves room for: it counts
h + 3 roundings, the additions of zeros that pad K are exact, and so is the first one. There is room for one more: the scale of a row of x that is
rounded to values of 8 bits, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.packed import PackedWeight, quantize_rows
from tests.serve.cpu_reference import Expected, _expected, expected, kept_columns, random_mask

SCALED = (torch.int8, torch.float8_e4m3fn)


def scaled_weight(n: int, k: int, values: torch.dtype, seed: int = 0) -> PackedWeight:
    """All values there are, small ones as often as large ones (a fourth of the rows of float8 has subnormal ones alone), and scales from
    2^-9 to 2^-3, of which no two next to each other are alike."""
    random = torch.Generator().manual_seed(seed)
    bits = torch.randint(256, (n, k // 2), generator=random, dtype=torch.uint8)
    if values == torch.int8:
        bits[bits == 0x80] = 0
    else:
        bits[3::4] &= 0x87
        bits[(bits & 0x7F == 0x7F) | (bits == 0x80)] = 0
    scale = torch.exp2(6 * torch.rand(n, 1, generator=random) - 9)
    return PackedWeight(bits.view(values), random_mask(n, k, seed), scale)


def expected_scaled(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Expected:
    """x [M, K] times the transposed weight [N, K] plus bias [N]."""
    assert weight.scale is not None
    floating = PackedWeight(weight.values.double() * weight.scale.double(), weight.mask)
    return expected(x, floating, bias, flushes=False)


def expected_rounded(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Expected:
    """The same where x [M, K] is rounded to values of 8 bits, too."""
    assert weight.scale is not None
    rounded, scale = quantize_rows(x, weight.values.dtype)
    inputs = (rounded.double() * scale.double())[:, kept_columns(weight.mask)]
    return _expected(inputs, weight.values.double() * weight.scale.double(), bias, x.dtype, False)


def products_of(x: Tensor, values: torch.dtype) -> Tensor:
    """x as it is multiplied densely: its rounded values times their scales, in its dtype."""
    rounded, scale = quantize_rows(x, values)
    return (rounded.float() * scale).to(x.dtype)


def same(one: PackedWeight, other: PackedWeight) -> bool:
    """Whether two packed weights are the same to the bit."""
    assert (one.scale is None) == (other.scale is None)
    scales = one.scale is None or other.scale is None or torch.equal(one.scale, other.scale)
    values = one.values.dtype == other.values.dtype and torch.equal(*(w.values.view(torch.uint8) for w in (one, other)))
    return values and scales and torch.equal(one.mask, other.mask)
