"""Products of many rows of x where both its values and the weight's are of 8 bits: multiplied as bytes, which tensor cores do at twice the
rate of 16-bit numbers, by a weight that is expanded to bytes, half of what 16-bit numbers take.

By torch's dense products: of int8, whose sums are int32; of float8 with the scales inside, or with sums in float32. Or, where
``HALVE_PREFILL`` asks for it, by cuSPARSELt (`serve.kernels.cuda.prefill`). Sums are multiplied by the scales of their row of x and of their row of the
weight by a kernel in Triton, or, where that is missing or wrong, by torch's operators.

Which of these a GPU has is found by trying them on a small product of which the result is known, before the first one. Where none is right, the
backends multiply 16-bit products of values and scales as they do by other weights.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from compress.errors import one_line
from serve.kernels.cuda import prefill
from serve.kernels.proof import Problem, lost_by, problem

MULTIPLE = 16
"""N and K have to be multiples of this, as cuBLAS asks for."""
_MOST_INPUTS = 2 * (2**31 // 127**2)
"""K, half of which are zeros, for sums of products of int8 that fit into int32."""
MOST_SUMS = 1 << 26
"""Of 4 bytes, that are there at a time; so many rows of x are multiplied at once."""
_LEAST_ROWS = 1024
"""That are multiplied at once however many outputs there are."""
_BLOCK = (8, 512)
"""Rows of x and outputs in a block of `kernels.scale_sums`."""
_ACTIVATIONS = (torch.bfloat16, torch.float16)

_int_mm, _scaled_mm = torch.ops.aten._int_mm.default, torch.ops.aten._scaled_mm.default
log = logging.getLogger("halve.serve")
_tried: set[tuple[int, torch.dtype, torch.dtype]] = set()

Scale = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
"""(sums [rows, n], scales of x [rows] and of the weight [n], bias, y [rows, n]): writes y."""


@dataclass(frozen=True)
class Operands:
    """x [rows, k] and the weight [n, k] in bytes, their scales [rows] and [n] float32, and a bias [n] in the dtype of the result."""

    x: Tensor
    x_scales: Tensor
    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def rows(self, part: slice) -> Operands:
        """Some rows of x."""
        return Operands(self.x[part], self.x_scales[part], self.weight, self.scales, self.bias, self.dtype)


@dataclass(frozen=True)
class Way:
    """How a GPU does it for a dtype of values and one of x.

    Attributes:
        multiply: torch's dense product: sums [rows, n], without scales and bias, or,
        finishes: if it does it all, the result.
        scale: finishes sums.
    """

    multiply: Callable[[Operands], Tensor]
    finishes: bool
    scale: Scale


def takes(device: torch.device, values: torch.dtype, dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether `linear` multiplies by a weight [n, k] there, x having been rounded from that dtype."""
    if not n or n % MULTIPLE or k % MULTIPLE or (values == torch.int8 and k > _MOST_INPUTS):
        return False
    return way_on(device, values, dtype) is not None


def prove(device: torch.device, values: torch.dtype) -> None:
    """Finds out what is right: not in a product, which may be captured in a graph."""
    for dtype in _ACTIVATIONS:
        way_on(device, values, dtype)
    prefill.prove(device, values)


def linear(operands: Operands, stream: int) -> Tensor:
    """x times the transposed weight, times the scales, plus bias -> [rows, n], on the current stream, where `takes` says that it can.

    Raises:
        RuntimeError: a library refused.
    """
    way = way_on(operands.x.device, operands.weight.dtype, operands.dtype)
    assert way is not None
    (rows, _), n = operands.x.shape, len(operands.weight)
    by_library = prefill.multiplier(operands.weight, rows, stream)
    if by_library is None and way.finishes:
        return way.multiply(operands)
    y = operands.x.new_empty(rows, n, dtype=operands.dtype)
    # Parts of the same size, more or less: torch refuses less than 17 rows of int8.
    parts = -(-rows // max(_LEAST_ROWS, MOST_SUMS // n))
    for number in range(parts):
        part = slice(rows * number // parts, rows * (number + 1) // parts)
        own = operands.rows(part)
        sums = way.multiply(own) if by_library is None else by_library(own.x, None)
        way.scale(sums, own.x_scales, own.scales, own.bias, y[part])
    return y


def way_on(device: torch.device, values: torch.dtype, dtype: torch.dtype) -> Way | None:
    """The way of a GPU; None where there is none."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, values, dtype) not in _tried and torch.cuda.is_current_stream_capturing():
        return None  # it waits for the GPU when it is proven, which a graph cannot hold
    return _proven(index, values, dtype)


@cache
def _proven(index: int, values: torch.dtype, dtype: torch.dtype) -> Way | None:
    """The way, once its product was right; the reason why there is none is logged once."""
    _tried.add((index, values, dtype))
    with torch.cuda.device(index):
        way = find(torch.device("cuda", index), values, dtype)
    if isinstance(way, Way):
        return way
    _warn(f"many rows of {str(values).removeprefix('torch.')} are multiplied as 16-bit numbers: {way}")
    return None


@cache
def _warn(line: str) -> None:
    """Once, whatever the dtype of x was."""
    log.warning("%s", line)


def find(device: torch.device, values: torch.dtype, dtype: torch.dtype) -> Way | str:
    """The first way that is right on the current device, or why none is."""
    known = problem(136, 64, 160, dtype, values).rounded()
    x, weight = (operand.to(device) for operand in known.in_bytes())
    assert known.x_scale is not None
    operands = Operands(x, known.x_scale.to(device), weight, known.scales.to(device), known.bias.to(device), dtype)
    scale = _scale_on(operands, known)
    refusal = "there is none"
    for multiply, finishes in _candidates(values, dtype):
        try:
            y = multiply(operands)
            if known.is_solved_by(y, lost_by(values)) if finishes else known.is_solved_by_sums(y):
                return Way(multiply, finishes, scale)
            refusal = "its product is wrong on this device; please report it, with `halve doctor`"
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            ValueError,
            NotImplementedError,
        ) as error:  # as torch has it where a GPU or a build cannot
            refusal = f"{type(error).__name__}: {one_line(error)}"
    return refusal


def _candidates(values: torch.dtype, dtype: torch.dtype) -> list[tuple[Callable[[Operands], Tensor], bool]]:
    """`Way.multiply` and `Way.finishes`, the best one first."""
    if values == torch.int8:
        return [(_int8_sums, False)]
    by_rows = [(_float8_by_rows, True)] if dtype == torch.bfloat16 else []  # (the only dtype that torch gives)
    return [*by_rows, (_float8_sums, False)]


def _int8_sums(operands: Operands) -> Tensor:
    return _int_mm(operands.x, operands.weight.t())


def _float8_by_rows(operands: Operands) -> Tensor:
    return _scaled_mm(
        *(operands.x, operands.weight.t(), operands.x_scales[:, None], operands.scales[None, :]),
        bias=operands.bias,
        out_dtype=operands.dtype,
    )


def _float8_sums(operands: Operands) -> Tensor:
    one = torch.ones((), dtype=torch.float32, device=operands.x.device)
    return _scaled_mm(operands.x, operands.weight.t(), one, one, out_dtype=torch.float32)


def scale_by_torch(sums: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """`kernels.scale_sums` by torch's operators, which take several passes."""
    scaled = (sums * x_scales[:, None]).mul_(scales)
    y.copy_(scaled if bias is None else scaled.add_(bias))


def scale_by(module: ModuleType) -> Scale:
    """`kernels.scale_sums` of that module, launched on the current device, which has to be that of the tensors."""

    def scale(sums: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
        (rows, n), (of_x, outputs) = sums.shape, _BLOCK
        module.scale_sums[-(-rows // of_x), -(-n // outputs)](
            *(sums, scales, x_scales, y if bias is None else bias, y, rows, n // MULTIPLE, int(bias is not None)),
            UNIT=MULTIPLE,
            ROWS=of_x,
            OUTPUTS=outputs,
        )

    return scale


def _scale_on(operands: Operands, known: Problem) -> Scale:
    """By Triton's kernel, if it is right, with a bias and without."""
    if operands.x.device.type != "cuda":
        return scale_by_torch
    try:
        scale = scale_by(importlib.import_module("serve.kernels.triton.kernels"))
        refusal = wrong(scale, operands, known)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, its compilers and the driver raise what they like
        refusal = f"{type(error).__name__}: {one_line(error)}"
    else:
        if refusal is None:
            return scale
    _warn(f"Triton's kernel that scales sums cannot be used, torch's operators do it, which take longer: {refusal}")
    return scale_by_torch


def wrong(scale: Scale, operands: Operands, known: Problem) -> str | None:
    """What finishes sums otherwise than it should on the device of the operands, or None."""
    sums = known.x.double() @ known.in_bytes()[1].double().T
    given = sums.to(torch.int32 if operands.weight.dtype == torch.int8 else torch.float32).to(operands.x.device)
    for bias in (operands.bias, None):
        y = given.new_full(given.shape, torch.nan, dtype=operands.dtype)
        scale(given, operands.x_scales, operands.scales, bias, y)
        if not (known if bias is not None else replace(known, bias=torch.zeros_like(known.bias))).is_solved_by(y):
            return "it is wrong on this device; please report it, with `halve doctor`"
    return None
