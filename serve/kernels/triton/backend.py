"""Multiplies packed weights on GPUs by kernels in Triton, where those of `serve.kernels.cuda` do not run.

Those GPUs are AMD's, and NVIDIA's where NVRTC is missing, refuses, or its kernels prove wrong. The weight is read as it is stored, expanded
in registers and multiplied densely, so what few rows of x gain is the bytes that need not be read, and many rows gain nothing
but that no dense weight is ever in memory.

Triton compiles when a kernel is first launched and keeps the result on disk. All kernels of a dtype are launched, and compared with
float64, before a weight is prepared for them.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compress.packed import PackedWeight, pack
from serve import support
from serve.kernels.proof import problem
from serve.kernels.triton import layout

_SIZE = 1024
"""Numbers that a block of `kernels.add_splits` adds up."""
_MOST_SPLITS = 16
_LEAST_STEPS = 4
"""Along K for a block, fewer of which do not pay."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: ``rows`` of x, ``outputs`` and ``depth`` along K for a block of ``warps``, ``stages`` in flight."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


def tiles(rows: int, *, amd: bool = False) -> Tiles:
    """For so many rows of x. What they need of shared memory every GPU with that Triton has (tested: 99 KB, and AMD's 64).

    By reasoning, not by measurement: the least tile that takes all rows at once, up to 128.
    """
    taken = next((size for size in (16, 32, 64) if rows <= size), 128)
    if taken == 128:
        return Tiles(128, 128, 64, 8, 2 if amd else 3)
    return Tiles(taken, 64, 128, 4, 2 if amd else 4 if taken == 16 else 3)


def splits(cut: Tiles, rows: int, n: int, k: int, processors: int) -> int:
    """Into how many blocks the sum along K is cut, so that there are about two blocks for each processor."""
    blocks = -(-n // cut.outputs) * -(-rows // cut.rows)
    steps = -(-k // cut.depth)
    found = 1
    while found < _MOST_SPLITS and 2 * found * blocks <= 2 * processors and steps >= 2 * found * _LEAST_STEPS:
        found *= 2
    return found


@dataclass(frozen=True)
class Kernels:
    """The kernels for a device."""

    module: ModuleType
    processors: int
    amd: bool = False

    def multiply(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor, *, number_of_splits: int = 0
    ) -> None:
        """y [rows, n] = x [rows, k] times the weight plus bias, all in a row in memory.

        Args:
            number_of_splits: of the sum along K; 0: what `splits` says.
        """
        (rows, k), n = x.shape, y.shape[1]
        cut = tiles(rows, amd=self.amd)
        split = number_of_splits or splits(cut, rows, n, k, self.processors)
        sums = y if split == 1 else x.new_empty(split, rows, n, dtype=torch.float32)
        options: dict[str, Any] = {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
        grid = (-(-n // cut.outputs), -(-rows // cut.rows), split)
        self.module.multiply[grid](
            *(x, weight.values, weight.mask, x if bias is None else bias, sums, rows, n, k),
            ROWS=cut.rows,
            OUTPUTS=cut.outputs,
            DEPTH=cut.depth,
            SPLITS=split,
            HAS_BIAS=bias is not None,
            **options,
        )
        if split > 1:
            self.module.add_splits[(-(-rows * n // _SIZE),)](
                *(sums, x if bias is None else bias, y, rows * n, n),
                SPLITS=split,
                HAS_BIAS=bias is not None,
                SIZE=_SIZE,
                enable_fp_fusion=True,
            )


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights of that kind cannot be multiplied here, or None. Compiles and tries the kernels if need be."""
    if refusal := support.kernel_refusal("triton", device.type, str(dtype).removeprefix("torch.")):
        return refusal
    with warnings.catch_warnings():  # torch warns of a driver that does not do; `halve doctor` shows what it says
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return "torch finds no GPU that it can use"
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _kernels(index, dtype)
    return found if isinstance(found, str) else None


@cache
def _kernels(index: int, dtype: torch.dtype) -> Kernels | str:
    """The kernels for a device, or why there are none."""
    try:
        module = importlib.import_module("serve.kernels.triton.kernels")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    kernels = Kernels(
        module, torch.cuda.get_device_properties(index).multi_processor_count, torch.version.hip is not None
    )
    try:
        with torch.cuda.device(index):
            return wrong(kernels, torch.device("cuda", index), dtype) or kernels
    except Exception as error:  # Triton, its compilers and the driver raise what they like; the plain way remains
        return f"Triton's kernels do not run here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def wrong(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernels compute wrongly on a device, or None: small products by each of them, against float64."""
    for n, k in ((200, 328), (192, 1024)):  # Triton compiles anew for sizes that are multiples of 16
        known = problem(128, n, k, dtype)
        packed = pack(known.weight)
        packed = PackedWeight(packed.values.to(device), packed.mask.to(device))
        x, bias = known.x.to(device), known.bias.to(device)
        for rows in (16, 32, 64, 128):
            y = torch.full((rows, n), torch.nan, dtype=dtype, device=device)
            kernels.multiply(x[:rows], packed, bias, y)
            if not known.is_solved_by(y):
                return f"Triton's kernel for {rows} rows of x computes wrongly on this device; please report it, with `halve doctor`"
    return None


def reason(dtype: torch.dtype, rows: int) -> str:
    """What is done with so many rows of x."""
    return "a Triton kernel expands the weight in registers, then multiplies densely"


prepare, restore = layout.prepare, layout.restore


def linear(x: Tensor, prepared: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x [..., K] times the transposed prepared weight [N, K] plus bias [N] -> [..., N], in x's dtype.

    Raises:
        ValueError: x, the prepared weight and the bias do not belong together; says what is wrong.
        RuntimeError: there are no kernels for this device.
    """
    k = x.shape[-1] if x.ndim else 0
    if x.dtype not in layout.CODES or not k or k % 8 or prepared.device != x.device:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}, the prepared weight is on {prepared.device}: they do not go together"
        )
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != (n,) or bias.device != x.device):
        raise ValueError(
            f"a bias of {n} numbers in {x.dtype} on {x.device} is needed, this is {bias.dtype} {list(bias.shape)}"
        )
    weight = layout.parts(prepared, n, k, x.dtype)
    kernels = _kernels(x.device.index, x.dtype)
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    y = x.new_empty(*x.shape[:-1], n)
    if not y.numel():
        return y
    rows, bias = x.contiguous().view(-1, k), None if bias is None else bias.contiguous()
    if torch.cuda.current_device() == x.device.index:
        kernels.multiply(rows, weight, bias, y.view(-1, n))
    else:
        with torch.cuda.device(x.device.index):  # Triton launches on the current one
            kernels.multiply(rows, weight, bias, y.view(-1, n))
    return y
