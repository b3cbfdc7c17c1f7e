"""What the C++ kernels for processors must compute, in float64, and how far they may be from it.

An output is a sum of h = K/2 products (K for a dense weight) and perhaps a bias b, and S is the sum of their absolute
values. Kernels work in float32, with u = 2^-24:

- A product of two 16-bit inputs is exact in float32; one of two float32 is rounded once, or not at all (fused).
- However the sum is ordered, a product goes through at most h additions, and one of the bias. (Additions of the zeros
  that pad K are exact.) With the rounding of the product that is a factor of at most (1 + u)^(h + 2), so the sum is off
  by at most S times gamma = (h + 3) u / (1 - (h + 3) u): one more than needed, which leaves room for float64's own error.
- Results below the normal numbers are rounded to a multiple of 2^-149, at most half of that away, or, by vdpbf16ps,
  replaced by zero, less than 2^-126 away; in each of h + 2 operations.
- vdpbf16ps also takes denormal *inputs* as zero. The reference does so, too, where that instruction is used.

Rounding to the dtype is monotone, so the output lies between the two rounded ends of that interval: no slack is needed
for it. (The conversion that goes with vdpbf16ps gives zero for everything below the normal numbers.) This holds where S
does not overflow float32.

A group that is left out, or a kept value at another column, changes the sum by about S/h, against S h u of the bound:
`test_cpu_kernels` shows that both are found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.packed import PackedWeight, quantize_rows, unpack_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PATTERNS = (3, 5, 6, 9, 10, 12)
"""The masks of a group of four."""

_UNIT = 2.0**-24
_SMALLEST_NORMAL = 2.0**-126
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Expected:
    """What outputs [M, N] must be: between ``low`` and ``high``, both of the dtype, around the exact ``middle``."""

    middle: Tensor
    low: Tensor
    high: Tensor

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Expected:
        return Expected(self.middle[index], self.low[index], self.high[index])

    def wrong(self, y: Tensor) -> Tensor:
        """Which outputs are not what they must be, [M, N] bool. NaN stands for NaN, and infinity for itself."""
        assert y.dtype == self.low.dtype, "another dtype than that of the bound"
        assert y.shape == self.middle.shape, "another shape than that of the bound"
        inside = (self.low <= y) & (y <= self.high)
        return torch.where(self.middle.isnan(), ~y.isnan(), ~inside)

    def error(self, y: Tensor) -> float:
        """The largest error of finite outputs as a part of what is allowed."""
        wide = torch.maximum(self.high.double() - self.middle, self.middle - self.low.double())
        parts = (y.double() - self.middle).abs() / wide
        return float(parts[(wide > 0) & wide.isfinite()].max())


def dot_flushes(path: str, dtype: torch.dtype) -> bool:
    """Whether that path multiplies that dtype by vdpbf16ps, which knows no denormal numbers."""
    return path == "avx512bf16" and dtype == torch.bfloat16


def expected(x: Tensor, packed: PackedWeight, bias: Tensor | None, *, flushes: bool) -> Expected:
    """x [M, K] times the transposed packed weight [N, K] plus bias [N]. Columns that are not kept are not looked at."""
    columns = kept_columns(packed.mask)
    return _expected(x.double()[:, columns], packed.values.double(), bias, x.dtype, flushes)


def expected_dense(x: Tensor, weight: Tensor, bias: Tensor | None, *, flushes: bool) -> Expected:
    """The same for a dense weight [N, K]."""
    return _expected(x.double()[:, None, :], weight.double(), bias, x.dtype, flushes)


def _expected(
    inputs: Tensor, values: Tensor, bias: Tensor | None, dtype: torch.dtype, flushes: bool, more: Tensor | float = 0.0
) -> Expected:
    """inputs [M, N or 1, h], values [N, h]; ``more`` is added to the bound."""
    if flushes:
        inputs, values = (torch.where(v.abs() < _SMALLEST_NORMAL, 0.0, v) for v in (inputs, values))
    products = inputs * values
    middle, size = products.sum(-1), products.abs().sum(-1)
    if bias is not None:
        middle, size = middle + bias.double(), size + bias.double().abs()
    h = values.shape[-1]
    gamma = (h + 3) * _UNIT / (1 - (h + 3) * _UNIT)
    assert not bool(((size * (1 + gamma) > _LARGEST) & middle.isfinite()).any()), "no bound holds: float32 overflows"
    off = gamma * size + (h + 2) * (_SMALLEST_NORMAL if flushes else 2.0**-150) + more
    low, high = middle - off, middle + off
    special = ~middle.isfinite()
    low, high = torch.where(special, middle, low), torch.where(special, middle, high)
    if flushes:  # a sum that may be below the normal numbers may become zero
        low = torch.where((low > 0) & (low < _SMALLEST_NORMAL), 0.0, low)
        high = torch.where((high < 0) & (high > -_SMALLEST_NORMAL), 0.0, high)
    return Expected(middle, low.to(dtype), high.to(dtype))


def expected_scaled(x: Tensor, packed: PackedWeight, bias: Tensor | None, *, flushes: bool, integers: bool) -> Expected:
    """The same for values of 8 bits, whose sums are multiplied by the scale of their row: one more rounding, for which there is room.

    Args:
        integers: whether x is rounded to 16 bits below the power of two of its 64 columns, half of a unit away at most.
    """
    assert packed.scale is not None
    columns, scale = kept_columns(packed.mask), packed.scale.double()
    values = packed.values.double() * scale
    off = torch.zeros(len(x), len(values), dtype=torch.float64)
    if integers:
        spans = -(-x.shape[1] // 64)
        padded = torch.nn.functional.pad(x.double().abs(), (0, spans * 64 - x.shape[1]))
        _, exponent = padded.view(len(x), spans, 64).amax(-1).frexp()  # the largest is below 2^exponent
        unit = 2.0 ** (exponent.clamp(min=-86) - 15).double()
        sizes = torch.zeros(len(values), spans, dtype=torch.float64).scatter_add_(1, columns // 64, values.abs())
        off = (unit / 2) @ sizes.T
    return _expected(x.double()[:, columns], values, bias, x.dtype, flushes, off)


def expected_quantized(x: Tensor, packed: PackedWeight, bias: Tensor | None, *, flushes: bool) -> Expected:
    """The same where rows of x are rounded to values like those of the weight, each with a scale: one more rounding of the sums."""
    assert packed.scale is not None
    rounded, scale = quantize_rows(x, packed.values.dtype)
    inputs, values = rounded.double() * scale.double(), packed.values.double() * packed.scale.double()
    return _expected(inputs[:, kept_columns(packed.mask)], values, bias, x.dtype, flushes)


def kept_columns(mask: Tensor) -> Tensor:
    """[N, K/8] uint8 -> the kept columns, [N, K/2] in order."""
    return unpack_bits(mask).nonzero()[:, 1].view(len(mask), -1)


def random_mask(n: int, k: int, seed: int = 0) -> Tensor:
    """A mask [N, K/8] of all patterns."""
    patterns = torch.tensor(PATTERNS, dtype=torch.uint8)
    halves = patterns[torch.randint(6, (n, k // 8, 2), generator=torch.Generator().manual_seed(seed))]
    return halves[..., 0] | halves[..., 1] << 4


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_scaled(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> PackedWeight:
    """A weight with all values that 8 bits can be, and scales between 1/16 and 1."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=random)
    bad = codes == 0x80 if dtype == torch.int8 else (codes & 0x7F == 0x7F) | (codes == 0x80)
    scale = 2.0 ** (-4 * torch.rand(n, 1, generator=random))
    return PackedWeight(codes.masked_fill_(bad, 1).view(dtype), random_mask(n, k, seed), scale)


def random_weight(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> PackedWeight:
    return PackedWeight(normal(n, k // 2, dtype=dtype, seed=seed), random_mask(n, k, seed))
