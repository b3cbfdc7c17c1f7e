"""Products of many rows of x where both its values and the weight's are of 8 bits: multiplied as bytes, which tensor cores do at twice the
rate of 16-bit numbers, by a weight that is expanded to bytes, half of what 16-bit numbers take.

By torch's dense products, whose sums are int32 (of int8) or float32 (of float8); or, where ``HALVE_PREFILL`` asks for it, by cuSPARSELt
(`serve.kernels.cuda.prefill`). Sums are multiplied by the scales of their row of x and of their row of the weight by a kernel in Triton, or, where
that is missing or wrong, by torch's operators. (torch multiplies float8 with scales for each row inside, too, but not on every GPU, and not every
shape: pytorch issue 192707, ao issue 4582. `benchmarks.gpu` times it.)

What a GPU can is found by a small product of which the result is known, before the first one. Where that is wrong or refused, or a shape is refused
later, the backends multiply 16-bit products of values and scales as they do by other weights.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from compress.errors import one_line
from serve import support
from serve.kernels.cuda import prefill
from serve.kernels.proof import Problem, problem

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
_refused: set[tuple[torch.dtype, int, int]] = set()
_NOT_SUPPORTED = (
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "HIPBLAS_STATUS_NOT_SUPPORTED",
    "could not find valid hipblaslt solution",
)
"""What torch says, one of these, of a shape that cuBLAS or hipBLASLt has nothing for, before anything is launched."""

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


def takes(device: torch.device, values: torch.dtype, dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether `linear` multiplies by a weight [n, k] there, x having been rounded from that dtype."""
    if not n or n % MULTIPLE or k % MULTIPLE or (values == torch.int8 and k > _MOST_INPUTS):
        return False
    return (values, n, k) not in _refused and scale_on(device, values, dtype) is not None


def most_rows(n: int) -> int:
    """Of x, that are multiplied at once by a weight [n, k]."""
    return max(_LEAST_ROWS, MOST_SUMS // n)


def prove(device: torch.device, values: torch.dtype) -> None:
    """Finds out what is right: not in a product, which may be captured in a graph."""
    for dtype in _ACTIVATIONS:
        scale_on(device, values, dtype)
    prefill.prove(device, values)


def linear(operands: Operands, stream: int) -> Tensor | None:
    """x times the transposed weight, times the scales, plus bias -> [rows, n], on the current stream, where `takes` says that it can; None where
    torch has no product of that shape after all, which `takes` knows from then on.

    Raises:
        RuntimeError: a library failed.
    """
    values, (n, k), rows = operands.weight.dtype, operands.weight.shape, len(operands.x)
    scale = scale_on(operands.x.device, values, operands.dtype)
    assert scale is not None
    by_library = prefill.multiplier(operands.weight, rows, stream)
    y = operands.x.new_empty(rows, n, dtype=operands.dtype)
    # Parts of the same size, more or less: torch refuses less than 17 rows of int8. Each begins where its scales are at a multiple of 16 bytes:
    # for others Triton compiles another kernel, which nothing has tried, and maybe while a graph is captured.
    parts = -(-rows // most_rows(n))
    starts = [rows * number // parts // 16 * 16 for number in range(parts)]
    for start, end in itertools.pairwise([*starts, rows]):
        part = slice(start, end)
        x = operands.x[part]
        try:
            sums = multiply(x, operands.weight) if by_library is None else by_library(x, None)
        except RuntimeError as error:
            if not any(said in str(error) for said in _NOT_SUPPORTED):
                raise
            _refused.add((values, n, k))
            _warn(f"weights [{n}, {k}] of {_name(values)} are multiplied as 16-bit numbers: {one_line(error)}")
            return None
        scale(sums, operands.x_scales[part], operands.scales, operands.bias, y[part])
    return y


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """torch's dense product of x [rows, k] and the transposed weight [n, k], in bytes -> sums [rows, n]: int32 of int8, float32 of float8."""
    if x.dtype == torch.int8:
        return _int_mm(x, weight.t())
    one = torch.ones((), dtype=torch.float32, device=x.device)
    return _scaled_mm(x, weight.t(), one, one, out_dtype=torch.float32)


def scale_on(device: torch.device, values: torch.dtype, dtype: torch.dtype) -> Scale | None:
    """What finishes sums on a GPU that multiplies such values; None where they are not multiplied."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, values, dtype) not in _tried and torch.cuda.is_current_stream_capturing():
        return None  # it waits for the GPU when it is proven, which a graph cannot hold
    return _proven(index, values, dtype)


@cache
def _proven(index: int, values: torch.dtype, dtype: torch.dtype) -> Scale | None:
    """The same, once all was right; the reason why it is not is logged once."""
    _tried.add((index, values, dtype))
    # (torch says of AMD's GPUs a number of AMD's)
    found: Scale | str | None = None
    if torch.version.hip is None:
        found = support.bytes_refusal(_name(values), torch.cuda.get_device_capability(index))
    if found is None:
        with torch.cuda.device(index):
            found = find(torch.device("cuda", index), values, dtype)
    if not isinstance(found, str):
        return found
    _warn(f"many rows of {_name(values)} are multiplied as 16-bit numbers: {found}")
    return None


@cache
def _warn(line: str) -> None:
    """Once, whatever the dtype of x was."""
    log.warning("%s", line)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find(device: torch.device, values: torch.dtype, dtype: torch.dtype) -> Scale | str:
    """What finishes sums of such values on the current device, or why they are not multiplied there."""
    known = problem(136, 64, 160, dtype, values).rounded()
    x, weight = (operand.to(device) for operand in known.in_bytes())
    try:
        if not known.is_solved_by_sums(multiply(x, weight)):
            return "torch's product is wrong on this device; please report it, with `halve doctor`"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:  # as torch has it where a GPU or a build cannot
        return f"{type(error).__name__}: {one_line(error)}"
    return _scale_on(device, known)


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


def _scale_on(device: torch.device, known: Problem) -> Scale:
    """Triton's kernel, if it is right, with a bias and without."""
    if device.type != "cuda":
        return scale_by_torch
    try:
        scale = scale_by(importlib.import_module("serve.kernels.triton.kernels"))
        refusal = wrong(scale, device, known)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, its compilers and the driver raise what they like
        refusal = f"{type(error).__name__}: {one_line(error)}"
    else:
        if refusal is None:
            return scale
    _warn(f"Triton's kernel that scales sums cannot be used, torch's operators do it, which take longer: {refusal}")
    return scale_by_torch


def wrong(scale: Scale, device: torch.device, known: Problem) -> str | None:
    """What finishes sums otherwise than it should on the device, or None."""
    assert known.x_scale is not None
    sums = known.x.double() @ known.in_bytes()[1].double().T
    given = sums.to(torch.int32 if known.packed.values.dtype == torch.int8 else torch.float32).to(device)
    for bias in (known.bias, torch.zeros_like(known.bias)):
        y = given.new_full(given.shape, torch.nan, dtype=bias.dtype)
        scale(given, known.x_scale.to(device), known.scales.to(device), bias.to(device) if bias.any() else None, y)
        if not replace(known, bias=bias).is_solved_by(y):
            return "it is wrong on this device; please report it, with `halve doctor`"
    return None
