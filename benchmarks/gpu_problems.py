"""What the GPU checks and timings are made of: weights, rows of x, and the comparison with float64. Needs torch and a GPU, nothing else.

A sum of K/2 products may be off by what float32 loses in as many additions as the tensor cores do one after the other,
and by the rounding of the result. A group that is left out or a value in another column changes it by far more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.packed import LARGEST, PackedWeight, quantize, quantize_rows, unpack
from serve.kernels.cuda import backend

DTYPES = (torch.bfloat16, torch.float16)
SCALED = tuple(LARGEST)
"""Of kept values, with a scale for each row."""

_PATTERNS = (3, 5, 6, 9, 10, 12)


class WrongError(AssertionError):
    """A kernel computed something wrong; says what."""


def random_weight(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> PackedWeight:
    """A packed weight on the GPU with all patterns."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(n, k // 2, generator=generator, device="cuda", dtype=dtype) / k**0.5
    patterns = torch.tensor(_PATTERNS, dtype=torch.uint8, device="cuda")
    halves = patterns[torch.randint(6, (n, k // 8, 2), generator=generator, device="cuda")]
    return PackedWeight(values, halves[..., 0] | halves[..., 1] << 4)


def random_scaled(n: int, k: int, values: torch.dtype, seed: int = 0) -> PackedWeight:
    """One with values of 8 bits on the GPU; every third row of float8 has small values alone, many of them subnormal."""
    weight = quantize(random_weight(n, k, torch.float32, seed), values)
    if values != torch.int8:
        small = weight.values.view(torch.uint8)[::3]
        small &= 0x8F
        small[small == 0x80] = 0
    return weight


def exact(weight: PackedWeight) -> Tensor:
    """The dense weight [n, k] in float64, values times scales if there are some."""
    scale = 1.0 if weight.scale is None else weight.scale.double()
    return unpack(PackedWeight(weight.values.double() * scale, weight.mask))


def random_input(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def uneven_input(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Rows of five sizes in turn, so that no two next to each other have scales that are alike."""
    sizes = torch.exp2(torch.arange(rows, device="cuda") % 5 - 2.0)[:, None]
    return (random_input(rows, k, torch.float32, seed) * sizes).to(dtype)


def rounded_input(x: Tensor, values: torch.dtype) -> Tensor:
    """What is multiplied where x is rounded to values of 8 bits, in float64."""
    rounded, scale = quantize_rows(x, values)
    return rounded.double() * scale.double()


def check(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None, what: str, lost: float = 0.0) -> None:
    """Compares y [rows, n] with x [rows, k] times ``dense`` [n, k], in float64, some rows of the weight at a time.

    Args:
        lost: by the sums besides, as a share of the sum of the sizes of what is added.

    Raises:
        WrongError: an output is out of its bound.
    """
    k = dense.shape[1]
    part = max(1, (1 << 27) // k)
    for start in range(0, len(dense), part):
        rows = slice(start, start + part)
        weight, inputs = dense[rows].double(), x.double()
        exact, size = inputs @ weight.T, inputs.abs() @ weight.abs().T
        if bias is not None:
            exact, size = exact + bias[rows].double(), size + bias[rows].double().abs()
        limits = torch.finfo(y.dtype)
        bound = (
            size * ((k / 32 + 8) * 2.0**-22 + lost)
            + exact.abs() * limits.eps / 2 * 1.01
            + limits.smallest_normal * limits.eps
        )
        wrong = ~((y[:, rows].double() - exact).abs() <= bound)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise WrongError(
                f"{what}: {int(wrong.sum())} outputs are wrong, the first for row {row} of x and row {start + column} of "
                f"the weight: {float(y[row, start + column])} instead of {float(exact[row, column])}"
            )


def product(kernels: backend.Kernels, x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, **how: Any) -> Tensor:
    """x [rows, k] -> [rows, n], into memory that held NaN, on the current stream."""
    y = torch.full((len(x), n), float("nan"), dtype=x.dtype, device="cuda")
    kernels.multiply(x, prepared, bias, y, torch.cuda.current_stream().cuda_stream, **how)
    return y


def poison(count: int, dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that the next tensor of so many numbers gets."""
    torch.full((count,), float("nan"), dtype=dtype, device="cuda")


def loaded(dtype: torch.dtype, values: torch.dtype | None = None) -> backend.Kernels:
    """The kernels for the current device, x of that dtype, and values of the same or of 8 bits."""
    if refusal := backend.why_not(torch.device("cuda"), values or dtype):
        raise WrongError(f"the cuda backend cannot be used: {refusal}")
    index = torch.cuda.current_device()
    kernels = backend._kernels(index, dtype) if values is None else backend._kernels(index, dtype, values)
    assert isinstance(kernels, backend.Kernels)
    return kernels
