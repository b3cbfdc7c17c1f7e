"""A small product of which the result is known, by which kernels prove themselves on a device before they are used there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.packed import PATTERN


@dataclass(frozen=True)
class Problem:
    """Random numbers on the processor: ``weight`` [n, k], 2:4; ``x`` [rows, k]; ``bias`` [n]."""

    weight: Tensor
    x: Tensor
    bias: Tensor

    def is_solved_by(self, y: Tensor) -> bool:
        """Whether y [some rows, n] is x times the transposed weight plus bias for the first rows: within the rounding of the result, and
        what sums in float32 lose, of float64. A product that is left out, or in another column, is found."""
        x, weight, bias = self.x[: len(y)].double(), self.weight.double(), self.bias.double()
        expected = x @ weight.T + bias
        size = x.abs() @ weight.abs().T + bias.abs()
        error = (y.cpu().double() - expected).abs()
        return bool((error <= torch.finfo(self.weight.dtype).eps * expected.abs() + 2**-16 * size).all())


def problem(rows: int, n: int, k: int, dtype: torch.dtype) -> Problem:
    """Always the same one."""
    random = torch.Generator("cpu").manual_seed(0)
    # (whatever dtype and device are torch's defaults where this is called)
    exact: dict[str, Any] = {"generator": random, "dtype": torch.float32, "device": "cpu"}
    weight, x, bias = (torch.randn(*shape, **exact).to(dtype) for shape in ((n, k), (rows, k), (n,)))
    return Problem(weight * PATTERN.mask(weight.abs()), x, bias)
