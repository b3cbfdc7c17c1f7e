"""Multiplies packed weights with the C++ kernels, on every processor that they were built for.

A packed weight is prepared once: its bytes are put into the order in which a multiplication reads them, without
growing (``src/halve_cpu.h`` shows the order). Up to `few_rows` rows of x, the weight is read once past sums in registers;
above, rows of x fill the vector lanes and only kept values are multiplied.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import CorruptCheckpointError, UsageError, did_you_mean
from compress.packed import FLOAT_DTYPES, LARGEST, PackedWeight, quantize_rows, validate_shapes
from serve import support
from serve.kernels.cpu import library

PATHS = ("portable", "avx2", "avx512", "avx512bf16")
"""The code paths in the library's own order."""

_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_FLOATS = {dtype: code for dtype, code in _CODES.items() if dtype in FLOAT_DTYPES.values()}
"""Of x, the bias and y."""
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_LINE = 64

_REFUSALS = {
    -1: "this processor cannot run the code path {path}",
    -2: "the prepared weight is damaged, or no prepared weight at all",
    -3: "the prepared weight has another shape or dtype than the call",
    -4: "the prepared weight does not start at a cache line",
    -5: "the code path {path} has no kernel for dense weights",
}


@cache
def path() -> str | None:
    """The code path that is used; None where the library is not there.

    Raises:
        UsageError: see `choose_path`.
    """
    return choose_path(library.paths())


def choose_path(runnable: Sequence[str]) -> str | None:
    """Of the paths that this processor can run, best first, the one to use: the best, or what ``HALVE_CPU_PATH`` names.

    Raises:
        UsageError: it names none, or one that this processor cannot run.
    """
    wish = os.environ.get("HALVE_CPU_PATH")
    if wish is None or not runnable:
        return runnable[0] if runnable else None
    if wish not in PATHS:
        raise UsageError(f"HALVE_CPU_PATH={wish!r} is not known{did_you_mean(wish, PATHS)}.")
    if wish not in runnable:
        raise UsageError(f"HALVE_CPU_PATH={wish!r}: this processor can run {', '.join(runnable)}.")
    return wish


@contextmanager
def using(name: str) -> Iterator[None]:
    """Multiplies with another code path than the best, to test or to measure it; for the whole process.

    Raises:
        UsageError: this processor cannot run it.
    """
    before = os.environ.get("HALVE_CPU_PATH")
    try:
        _wish(name)
        path()
        yield
    finally:
        _wish(before)


def _wish(name: str | None) -> None:
    if name is None:
        os.environ.pop("HALVE_CPU_PATH", None)
    else:
        os.environ["HALVE_CPU_PATH"] = name
    for cached in (path, path_number, _linear):
        cached.cache_clear()


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights of that kind cannot be multiplied here, or None."""
    if refusal := support.kernel_refusal("cpu", device.type, str(dtype).removeprefix("torch.")):
        return refusal
    return library.status() if path() is None else None


def few_rows(dtype: torch.dtype) -> int:
    """Up to how many rows of x the weight is streamed past sums that stay in registers.

    Args:
        dtype: of the values; if they are scaled, of x in bfloat16.
    """
    return functions().halve_sparse24_few_rows(path_number(), _CODES[dtype], _FLOATS.get(dtype, 0))


def reason(dtype: torch.dtype, rows: int) -> str:
    """What is done with so many rows of x."""
    if rows <= few_rows(dtype):
        return f"{path()} kernel, the weight is read once past {rows} rows of x"
    if rows > _EXPAND_ABOVE and expands(dtype):
        return "the weight is expanded in parts for oneDNN, whose AMX units outrun any sparse kernel"
    return f"{path()} kernel, only kept weights are multiplied"


@cache
def expands(dtype: torch.dtype) -> bool:
    """Whether many rows of x are multiplied by oneDNN with the expanded weight; of scaled values, rows in bfloat16.

    A processor with AMX has units of their own for dense bfloat16, many times as wide as vectors, of which 2:4 saves half.
    """
    return dtype in (torch.bfloat16, *LARGEST) and torch.cpu._is_amx_tile_supported()


def prepare(weight: PackedWeight, name: str = "weight") -> Tensor:
    """The bytes of a packed weight [N, K] in the order of the kernels, [bytes] uint8.

    Raises:
        CorruptCheckpointError: values and mask do not belong together, or the mask has not two bits in every group of
            four; names the layer and the place.
        ValueError: they are not on the CPU.
    """
    validate_shapes(weight, name)
    if not (weight.values.is_cpu and weight.mask.is_cpu and (weight.scale is None or weight.scale.is_cpu)):
        raise ValueError(
            f"{name}: values are on {weight.values.device} and the mask is on {weight.mask.device}, not on cpu"
        )
    n, k = weight.shape
    values, mask = weight.values.contiguous(), weight.mask.contiguous()
    scale = None if weight.scale is None else weight.scale.contiguous()
    code = _CODES[values.dtype]
    lib = functions()
    stream = torch.empty(lib.halve_sparse24_stream_bytes(code, n, k), dtype=torch.uint8)
    bad = lib.halve_sparse24_prepare(
        *(code, weight.quantizes_x, values.data_ptr(), mask.data_ptr(), None if scale is None else scale.data_ptr()),
        *(n, k, stream.data_ptr(), torch.get_num_threads()),
    )
    if bad >= 0:
        row, byte = divmod(bad, k // 8)
        raise CorruptCheckpointError(
            f"{name}: the mask does not have two bits in every group of four (row {row}, columns {byte * 8} to "
            f"{byte * 8 + 7}); the file is damaged, get it again"
        )
    return stream


def gather_into_huge_pages(tensor: Tensor) -> None:
    """Moves a tensor's memory into pages of 2 MB, where the system can do that; its address stays.

    Memory is read several per cent faster then. Prepared weights are made in such pages from the start.
    """
    functions().halve_cpu_gather_into_huge_pages(tensor.data_ptr(), tensor.nbytes)


def restore(stream: Tensor) -> PackedWeight:
    """The packed weight that was prepared, to the bit.

    Raises:
        ValueError: this is no prepared weight, or a damaged one.
    """
    dtype, n, k, quantizes_x = describe(stream)
    values = torch.empty(n, k // 2, dtype=dtype)
    mask = torch.empty(n, k // 8, dtype=torch.uint8)
    scale = torch.empty(n, 1, dtype=torch.float32) if dtype in LARGEST else None
    _check(
        functions().halve_sparse24_restore(
            *(stream.data_ptr(), stream.numel(), values.data_ptr(), mask.data_ptr()),
            *(None if scale is None else scale.data_ptr(), torch.get_num_threads()),
        )
    )
    return PackedWeight(values, mask, scale, quantizes_x)


def describe(stream: Tensor) -> tuple[torch.dtype, int, int, bool]:
    """dtype, N and K of a prepared weight, and whether x is rounded to that dtype, too.

    Raises:
        ValueError: this is no prepared weight, or a damaged one.
    """
    if not _is_bytes(stream):
        raise ValueError(f"a prepared weight is bytes in a row on the CPU, this is {_described(stream)}")
    shape = (ctypes.c_int64 * 4)()
    _check(functions().halve_sparse24_describe(stream.data_ptr(), stream.numel(), shape))
    return _DTYPES[shape[0]], shape[1], shape[2], bool(shape[3])


def expand(stream: Tensor, first_row: int, rows: int, out: Tensor) -> None:
    """Writes rows of the dense weight to ``out`` [rows, K]; of scaled values in whatever dtype that has.

    Raises:
        ValueError: this is no prepared weight, it has no such rows, or ``out`` is none for them.
    """
    dtype, n, k, _ = describe(stream)
    if not 0 <= first_row <= first_row + rows <= n:
        raise ValueError(f"rows {first_row} to {first_row + rows} of a prepared weight with {n}")
    fits = out.dtype in _FLOATS if dtype in LARGEST else out.dtype is dtype
    if not (out.is_cpu and out.is_contiguous() and fits and out.shape == (rows, k)):
        kind = "a floating-point dtype" if dtype in LARGEST else dtype
        raise ValueError(f"{kind} [{rows}, {k}] in a row on the CPU is needed for the rows, this is {_described(out)}")
    _check(
        functions().halve_sparse24_expand(
            *(stream.data_ptr(), stream.numel(), _FLOATS[out.dtype], first_row, rows, out.data_ptr()),
            torch.get_num_threads(),
        )
    )


def linear(x: Tensor, stream: Tensor, bias: Tensor | None, n: int, few_rows: int = -1) -> Tensor:
    """x [..., K] times the transposed prepared weight [N, K] plus bias [N] -> [..., N], in x's dtype, which is that of the values where
    these are not scaled.

    Sums are float32 and in the order of K, whatever the number of threads.

    Args:
        few_rows: up to how many rows of x the weight is streamed past registers; negative: `few_rows` of the path.

    Raises:
        ValueError: x, the prepared weight and the bias do not belong together; says what is wrong.
    """
    # A decoding step calls this for every layer, so each operation on tensors here is felt.
    code = _FLOATS.get(x.dtype)
    if code is None or not (x.is_cpu and stream.is_cpu and stream.is_contiguous()):
        raise ValueError(_why_no_product(x, stream, n))
    x = x.contiguous()
    shape = x.shape
    k = shape[-1] if shape else 0
    if not k:
        raise ValueError(_why_no_product(x, stream, n))
    if bias is not None:
        bias = _fitting(bias, x, n)
    m = x.numel() // k
    if m > _EXPAND_ABOVE and few_rows < 0 and expands(x.dtype):
        return _expand_and_multiply(x, stream, bias, n)
    run, scratch_bytes, which = _linear()
    y = x.new_empty((*shape[:-1], n))
    scratch = None
    if need := scratch_bytes(which, stream.numel(), code, n, k, m, few_rows):
        scratch = torch.empty(need, dtype=torch.uint8)
    refusal = run(
        *(which, stream.data_ptr(), stream.numel(), code, n, k, x.data_ptr(), m, k),
        *(None if bias is None else bias.data_ptr(), y.data_ptr(), n, few_rows),
        *(None if scratch is None else scratch.data_ptr(), torch.get_num_threads()),
    )
    if refusal:
        raise ValueError(_why_no_product(x, stream, n))
    return y


_EXPAND_ABOVE = 64
"""Rows of x, where `expands` says so: fewer do not pay for the expansion."""

_EXPANDED_BYTES = 1 << 20
"""Of the weight at a time, so that what is expanded is still in a cache when it is multiplied."""


def _expand_and_multiply(x: Tensor, stream: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x [..., K] -> [..., N] by torch's own product, for one part of the weight's rows after the other."""
    k, dtype, x_scale = x.shape[-1], x.dtype, None
    values, _, _, quantizes_x = describe(stream)
    if quantizes_x:
        rounded, x_scale = quantize_rows(x, values)
        x = rounded.to(dtype)  # exactly
    step = max(64, _EXPANDED_BYTES // (k * x.element_size()) // 16 * 16)
    part = torch.empty(step, k, dtype=x.dtype)
    y = x.new_empty((*x.shape[:-1], n))
    for row in range(0, n, step):
        rows = min(step, n - row)
        expand(stream, row, rows, part[:rows])
        added = None if bias is None else bias[row : row + rows]
        product = functional.linear(x, part[:rows], added if x_scale is None else None)
        if x_scale is not None:
            product = product.float() * x_scale
            product = (product if added is None else product + added.float()).to(dtype)
        y[..., row : row + rows] = product
    return y


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times a transposed dense weight [N, K] plus bias [N] -> [..., N]; for few rows.

    Raises:
        ValueError: x, the weight and the bias do not belong together; says what is wrong.
        RuntimeError: the portable path has no dense kernel.
    """
    code = _FLOATS.get(x.dtype)
    x = x.contiguous()
    shape = x.shape
    k = shape[-1] if shape else 0
    if code is None or not k or weight.ndim != 2 or weight.shape[1] != k or weight.dtype is not x.dtype:
        raise ValueError(f"x is {_described(x)}, the dense weight {_described(weight)}")
    if not (x.is_cpu and weight.is_cpu and weight.stride(1) == 1):
        raise ValueError(
            f"x is {_described(x)}, the dense weight {_described(weight)}; both in rows on the CPU are needed"
        )
    n = weight.shape[0]
    if bias is not None:
        bias = _fitting(bias, x, n)
    m = x.numel() // k
    y = x.new_empty((*shape[:-1], n))
    refusal = functions().halve_dense_linear(
        *(path_number(), code, weight.data_ptr(), n, k, weight.stride(0), x.data_ptr(), m, k),
        *(None if bias is None else bias.data_ptr(), y.data_ptr(), n, torch.get_num_threads()),
    )
    if refusal:
        raise RuntimeError(_REFUSALS[refusal].format(path=path()))
    return y


def _fitting(bias: Tensor, x: Tensor, n: int) -> Tensor:
    """The bias in a row, if it is one for x."""
    if bias.dtype is not x.dtype or bias.shape != (n,) or not bias.is_cpu:
        raise ValueError(f"a bias of {n} numbers in {x.dtype} on the CPU is needed, this is {_described(bias)}")
    return bias.contiguous()


def _why_no_product(x: Tensor, stream: Tensor, n: int) -> str:
    """What is wrong with a multiplication that was refused."""
    try:
        dtype, rows, k, _ = describe(stream)
    except ValueError as error:
        return str(error)
    if rows != n:
        return f"the prepared weight has {rows} rows, not {n}"
    kind = "floats" if dtype in LARGEST else dtype
    return f"x is {_described(x)}, the prepared weight takes {kind} [..., {k}] on cpu"


def _described(tensor: Tensor) -> str:
    strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    return f"{tensor.dtype} {list(tensor.shape)}{strides} on {tensor.device}"


def _is_bytes(stream: Tensor) -> bool:
    return stream.dtype is torch.uint8 and stream.is_cpu and stream.is_contiguous()


@cache
def _linear() -> tuple[Any, Callable[..., int], int]:
    """What a multiplication needs every time, looked up once."""
    lib = functions()
    return lib.halve_sparse24_linear, lru_cache(maxsize=4096)(lib.halve_sparse24_scratch_bytes), path_number()


def _check(refusal: int) -> None:
    if refusal:
        raise ValueError(_REFUSALS[refusal])


@cache
def path_number() -> int:
    """That of the path, as the library counts them."""
    chosen = path()
    assert chosen is not None, "asked only where `why_not` gives no reason"
    return PATHS.index(chosen)


@cache
def functions() -> ctypes.CDLL:
    """The library with the types of its functions, running on torch's threads."""
    lib = library.load()
    assert lib is not None, "asked only where `why_not` gives no reason"
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    signatures = {
        "halve_sparse24_stream_bytes": (size, (number, size, size)),
        "halve_sparse24_prepare": (size, (number, number, pointer, pointer, pointer, size, size, pointer, number)),
        "halve_sparse24_few_rows": (size, (number, number, number)),
        "halve_sparse24_describe": (number, (pointer, size, pointer)),
        "halve_sparse24_restore": (number, (pointer, size, pointer, pointer, pointer, number)),
        "halve_sparse24_expand": (number, (pointer, size, number, size, size, pointer, number)),
        "halve_sparse24_scratch_bytes": (size, (number, size, number, size, size, size, size)),
        "halve_sparse24_linear": (
            number,
            (
                number,
                pointer,
                size,
                number,
                size,
                size,
                pointer,
                size,
                size,
                pointer,
                pointer,
                size,
                size,
                pointer,
                number,
            ),
        ),
        "halve_dense_linear": (
            number,
            (number, number, pointer, size, size, size, pointer, size, size, pointer, pointer, size, number),
        ),
        "halve_cpu_gather_into_huge_pages": (None, (pointer, size)),
        "halve_cpu_set_thread_pool": (None, (pointer, pointer, pointer)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    if pool := library.thread_pool():
        lib.halve_cpu_set_thread_pool(pool.parallel, pool.thread_num, pool.num_threads)
    return lib
