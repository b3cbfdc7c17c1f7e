"""Rounds rows of x to values of 8 bits on a GPU, for weights that `compress.packed.PackedWeight.quantizes_x`.

By one kernel in Triton, which reads x twice, the second time from a cache; by torch's operators, which take many passes, where Triton is
missing or its kernel proves to be wrong. Both have the same bits, those of `compress.packed.quantize_rows`.
"""

from __future__ import annotations

import importlib
import logging
from enum import Enum
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from compress.errors import one_line
from compress.packed import LARGEST, quantize_rows
from serve.kernels.triton import layout

BLOCK = 2048
"""Columns at a time: for each thread 16 bytes."""
WARPS = 8

log = logging.getLogger("halve.serve")
_tried: set[tuple[int, torch.dtype]] = set()


class Form(Enum):
    """How rounded rows are written."""

    NUMBERS = "the values as numbers of x's dtype, in which they are exact"
    PRODUCTS = (
        "values times the scale of their row, rounded to x's dtype: near x itself, and never beyond its dtype's range"
    )
    BYTES = "the values of 8 bits themselves"


def round_rows(x: Tensor, values: torch.dtype, form: Form = Form.NUMBERS) -> tuple[Tensor, Tensor]:
    """x as it is multiplied by a weight with such ``values``.

    Args:
        x: [rows, K] in bfloat16 or float16, K a multiple of 8, in a row in memory and from a multiple of 16 bytes on.
        values: int8 or float8_e4m3fn.

    Returns:
        Values [rows, K] in that form, and scales [rows] float32.
    """
    module = kernel_for(x.device, values)
    return by_torch(x, values, form) if module is None else launch(module, x, values, form)


def launch(module: ModuleType, x: Tensor, values: torch.dtype, form: Form) -> tuple[Tensor, Tensor]:
    """The same by the kernel, on the current device, which has to be that of x."""
    rows, k = x.shape
    rounded = x.new_empty(rows, k, dtype=values if form is Form.BYTES else x.dtype)
    scales = x.new_empty(rows, dtype=torch.float32)
    if rows:
        to = rounded.view(torch.uint8) if form is Form.BYTES else rounded
        how = {"CODE": layout.CODES[values], "PRODUCTS": form is Form.PRODUCTS, "BLOCK": BLOCK, "num_warps": WARPS}
        module.round_rows[(rows,)](x, to, scales, k // 8, **how)
    return rounded, scales


def by_torch(x: Tensor, values: torch.dtype, form: Form) -> tuple[Tensor, Tensor]:
    """The same by torch's operators."""
    rounded, scale = quantize_rows(x, values)
    if form is Form.BYTES:
        return rounded, scale.view(-1)
    numbers = rounded.float() * scale if form is Form.PRODUCTS else rounded
    return numbers.to(x.dtype), scale.view(-1)


def prove(device: torch.device, values: torch.dtype) -> None:
    """Compiles the kernel and tries it: not in a product, which may be captured in a graph."""
    kernel_for(device, values)


def kernel_for(device: torch.device, values: torch.dtype) -> ModuleType | None:
    """The module of the kernel, for a GPU where it is right; None where torch does it."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, values) not in _tried and torch.cuda.is_current_stream_capturing():
        return None  # it waits for the GPU when it proves itself, which a graph cannot hold
    return _proven(index, values)


@cache
def _proven(index: int, values: torch.dtype) -> ModuleType | None:
    """The module, once its kernel was right; the reason why it is not used is logged once."""
    _tried.add((index, values))
    try:
        module = importlib.import_module("serve.kernels.triton.kernels")
        with torch.cuda.device(index):
            refusal = wrong(module, torch.device("cuda", index), values)
    except Exception as error:  # Triton, its compilers and the driver raise what they like
        module, refusal = None, f"{type(error).__name__}: {one_line(error)}"
    if refusal is None:
        return module
    log.warning("Triton's kernel that rounds x cannot be used, torch's operators do it, which take longer: %s", refusal)
    return None


def wrong(module: ModuleType, device: torch.device, values: torch.dtype) -> str | None:
    """What the kernel rounds otherwise than torch does, or None: rows of every kind, in each form, to the bit."""
    for dtype in layout.ACTIVATIONS:
        for k in (264, BLOCK + 8):
            x = hard_rows(k, dtype, values)
            for form in Form:
                found = launch(module, x.to(device), values, form)
                for own, right in zip(found, by_torch(x, values, form), strict=True):
                    if not is_same(own.cpu(), right):
                        return f"it is wrong for x in {dtype} and {values} on this device; please report it, with `halve doctor`"
    return None


def hard_rows(k: int, dtype: torch.dtype, values: torch.dtype) -> Tensor:
    """Rows [9, k] on the processor, always the same: random ones of three sizes, one of ties between values, zeros, numbers that are
    smaller than any scale, the largest there are, and rows with one infinity or NaN."""
    random = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(9, k, generator=random, dtype=torch.float32, device="cpu")
    x[1] *= 2.0**-10
    x[2] *= torch.exp2(-12 * torch.rand(k, generator=random, dtype=torch.float32, device="cpu"))
    halves = torch.randint(-31, 32, (k,), generator=random, device="cpu")
    powers = torch.randint(-10, 3, (k,), generator=random, device="cpu")
    # Its largest number is that of the values, so the scale is 1: all that has more bits than they have is a tie or near one.
    x[3] = halves / 2 if values == torch.int8 else halves * torch.exp2(powers.float())
    x[3, -1] = LARGEST[values]
    x[4] = 0
    x[5] *= torch.finfo(dtype).tiny
    x[6] = torch.finfo(dtype).max * (x[6] / x[6].abs().max())
    x[7, k // 2] = -torch.inf
    x[8, -1] = torch.nan
    return x.to(dtype)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits, or both NaN."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.dtype.itemsize]
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one.view(kind) == other.view(kind)) | (one.float().isnan() & other.float().isnan())).all())
