"""Products of many rows by cuSPARSELt through its C interface, with plans that are made once and kept.

torch's own operator makes descriptors, plan and workspace anew at every call, which takes longer than many a product. Here a
call of a shape that was seen before is one launch.

Weight and x have one dtype. Of 16 bits, so has the result; products of int8 and of float8 are added up, and given, in int32 and in float32
(`RESULTS`), so that scales can multiply what nothing has rounded.

Types and values are those of ``cusparseLt.h`` and ``library_types.h``. Structures are opaque; they grew and shrank between versions
(512 bytes in 0.8, 11024 before), so each gets the room of the largest. They may point to each other: a plan keeps all of its
own where they are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections import OrderedDict
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

RESULTS = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.int8: torch.int32,
    torch.float8_e4m3fn: torch.float32,
}
"""Dtypes of weights and x, and what their products are in."""

# CUDA_R_16F, CUDA_R_16BF, CUDA_R_8I, CUDA_R_8F_E4M3, CUDA_R_32I, CUDA_R_32F
_TYPES = {
    torch.float16: 2,
    torch.bfloat16: 14,
    torch.int8: 3,
    torch.float8_e4m3fn: 28,
    torch.int32: 10,
    torch.float32: 0,
}
_ROW, _COLUMN = 2, 1  # CUSPARSE_ORDER_ROW, CUSPARSE_ORDER_COL
_AS_IT_IS, _TRANSPOSED = 0, 1  # CUSPARSE_OPERATION_NON_TRANSPOSE, CUSPARSE_OPERATION_TRANSPOSE
_HALF_SPARSE = 0  # CUSPARSELT_SPARSITY_50_PERCENT
_FLOAT_SUMS, _INTEGER_SUMS = 2, 0  # CUSPARSE_COMPUTE_32F, CUSPARSE_COMPUTE_32I
_DEFAULT_ALGORITHM = 0  # CUSPARSELT_MATMUL_ALG_DEFAULT
_BIAS_POINTER = 8  # CUSPARSELT_MATMUL_BIAS_POINTER
_ALGORITHM, _SPLIT_K, _SPLIT_K_MODE, _SPLIT_K_BUFFERS = 0, 3, 4, 5  # CUSPARSELT_MATMUL_ALG_CONFIG_ID and so on
_ALIGNMENT = 16
_ROOM = 16384
_SIGNATURES = {
    "cusparseLtInit": (c_void_p,),
    "cusparseLtGetProperty": (c_int, POINTER(c_int)),
    "cusparseLtDenseDescriptorInit": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_uint32, c_int, c_int),
    "cusparseLtStructuredDescriptorInit": (
        *(c_void_p, c_void_p, c_int64, c_int64, c_int64, c_uint32, c_int, c_int),
        c_int,
    ),
    "cusparseLtMatDescriptorDestroy": (c_void_p,),
    "cusparseLtMatmulDescriptorInit": (c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "cusparseLtMatmulDescSetAttribute": (c_void_p, c_void_p, c_int, c_void_p, c_size_t),
    "cusparseLtMatmulAlgSelectionInit": (c_void_p, c_void_p, c_void_p, c_int),
    "cusparseLtMatmulAlgSetAttribute": (c_void_p, c_void_p, c_int, c_void_p, c_size_t),
    "cusparseLtMatmulAlgGetAttribute": (c_void_p, c_void_p, c_int, c_void_p, c_size_t),
    "cusparseLtMatmulGetWorkspace": (c_void_p, c_void_p, POINTER(c_size_t)),
    "cusparseLtMatmulPlanInit": (c_void_p, c_void_p, c_void_p, c_void_p),
    "cusparseLtMatmulPlanDestroy": (c_void_p,),
    "cusparseLtMatmul": (*(c_void_p,) * 10, c_int32),
    "cusparseLtMatmulSearch": (*(c_void_p,) * 10, c_int32),
    "cusparseLtSpMMACompressedSize": (c_void_p, c_void_p, POINTER(c_size_t), POINTER(c_size_t)),
    "cusparseLtSpMMACompress": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
}


_DESTROY_SELECTION = "cusparseLtMatmulAlgSelectionDestroy"
"""Came with 0.8; before, selections held nothing."""

log = logging.getLogger("halve.serve")


class CusparseLtError(Exception):
    """The library is not there, or refused; one line that says what."""


@dataclass(frozen=True)
class Algorithm:
    """How a product is done: what the library's search finds best."""

    number: int
    split_k: int = 1
    split_k_mode: int = 0
    buffers: int = 0


class Opaque:
    """Room for one of the library's structures."""

    def __init__(self) -> None:
        self._room = ctypes.create_string_buffer(_ROOM + 64)
        self.address = (ctypes.addressof(self._room) + 63) & ~63


class Plan:
    """One product: its descriptors, the plan and the size of the workspace."""

    def __init__(self, library: CusparseLt, rows: int, n: int, k: int, dtype: torch.dtype, bias: int | None,
                 algorithm: Algorithm | None) -> None:  # fmt: skip
        """y [rows, n] = x [rows, k] times a sparse weight [n, k], all in rows.

        The library multiplies the weight by columns of x, so x is given as it lies and transposed, and y by columns.

        Raises:
            CusparseLtError: the library refused.
        """
        self._library, call, handle = library, library.call, library.handle.address
        kind, result = _TYPES[dtype], _TYPES[RESULTS[dtype]]
        self._weight, self._input, self._output = Opaque(), Opaque(), Opaque()
        self._product, self.selection, self.plan = Opaque(), Opaque(), Opaque()
        self._tensors = tuple(c_void_p() for _ in range(4))  # weight, x, y, room
        self._streams = (c_void_p * 1)()
        self._selected = False
        self._alive: list[tuple[str, int]] = []  # what gives back what the library made, the first one first
        try:
            self._describe(rows, n, k, kind, result, bias)
            self._select(algorithm)
            size = c_size_t()
            call("cusparseLtMatmulGetWorkspace", handle, self.plan.address, byref(size))
        except CusparseLtError:
            self.destroy()
            raise
        self.workspace_bytes = size.value
        # Made once: to convert eleven arguments takes longer than all else of a call.
        weight, x, y, room = self._tensors
        self._arguments = (
            *(c_void_p(handle), c_void_p(self.plan.address), library.one, weight, x, library.zero, y, y, room),
            *(self._streams, 1),
        )

    def multiply(self, x: Tensor, compressed: Tensor, y: Tensor, stream: int, *, search: bool = False) -> None:
        """y [rows, n] = x [rows, k] times the weight; or, to ``search``, again and again by all algorithms.

        Raises:
            CusparseLtError: the library refused.
        """
        weight, from_, to, room = self._tensors
        weight.value, from_.value, to.value = compressed.data_ptr(), x.data_ptr(), y.data_ptr()
        self._streams[0] = stream
        if self.workspace_bytes:
            workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=x.device)
            room.value = workspace.data_ptr()
        library = self._library
        if refusal := (library.search_ready if search else library.multiply_ready)(*self._arguments):
            raise library.error("cusparseLtMatmulSearch" if search else "cusparseLtMatmul", refusal)

    def _describe(self, rows: int, n: int, k: int, kind: int, result: int, bias: int | None) -> None:
        """The operands and the product."""
        call, handle = self._library.call, self._library.handle.address
        weight, inputs, output = self._weight.address, self._input.address, self._output.address
        call("cusparseLtStructuredDescriptorInit", handle, weight, n, k, k, _ALIGNMENT, kind, _ROW, _HALF_SPARSE)
        self._alive.append(("cusparseLtMatDescriptorDestroy", weight))
        call("cusparseLtDenseDescriptorInit", handle, inputs, rows, k, k, _ALIGNMENT, kind, _ROW)
        self._alive.append(("cusparseLtMatDescriptorDestroy", inputs))
        call("cusparseLtDenseDescriptorInit", handle, output, n, rows, n, _ALIGNMENT, result, _COLUMN)
        self._alive.append(("cusparseLtMatDescriptorDestroy", output))
        product = self._product.address
        call("cusparseLtMatmulDescriptorInit", handle, product, _AS_IT_IS, _TRANSPOSED, weight, inputs, output, output,
             _INTEGER_SUMS if kind == _TYPES[torch.int8] else _FLOAT_SUMS)  # fmt: skip
        if bias is not None:
            pointer = c_void_p(bias)
            call("cusparseLtMatmulDescSetAttribute", handle, product, _BIAS_POINTER, byref(pointer), 8)

    def _select(self, algorithm: Algorithm | None) -> None:
        """Makes the plan by that algorithm; where the library does not take it as it reported it, by its number alone, and then by
        its own choice."""
        ways: list[Algorithm | None] = [None]
        if algorithm is not None:
            ways = list(dict.fromkeys([algorithm, Algorithm(algorithm.number), None]))
        for way in ways:
            try:
                self._plan_by(way)
            except CusparseLtError as error:
                if way is None:
                    raise
                log.info("cuSPARSELt does not take what its search found, %s: %s", way, error)
            else:
                return

    def _plan_by(self, algorithm: Algorithm | None) -> None:
        call, handle, product = self._library.call, self._library.handle.address, self._product.address
        selection = self.selection.address
        call("cusparseLtMatmulAlgSelectionInit", handle, selection, product, _DEFAULT_ALGORITHM)
        try:
            if algorithm is not None:
                self._set(_ALGORITHM, algorithm.number)
                # (attributes that the search left at "none" are refused when they are set to it)
                if algorithm.split_k != 1:
                    self._set(_SPLIT_K, algorithm.split_k)
                if algorithm.split_k_mode > 0:
                    self._set(_SPLIT_K_MODE, algorithm.split_k_mode)
                if algorithm.buffers > 0:
                    self._set(_SPLIT_K_BUFFERS, algorithm.buffers)
            call("cusparseLtMatmulPlanInit", handle, self.plan.address, product, selection)
        except CusparseLtError:
            self._library.destroy_selection(selection)
            raise
        self._selected = True
        self._alive.insert(0, ("cusparseLtMatmulPlanDestroy", self.plan.address))

    def algorithm(self) -> Algorithm:
        """What is selected now."""
        return Algorithm(*map(self._get, (_ALGORITHM, _SPLIT_K, _SPLIT_K_MODE, _SPLIT_K_BUFFERS)))

    def destroy(self) -> None:
        """Gives back what the library allocated."""
        for name, address in self._alive:
            self._library.call(name, address)
        self._alive = []
        if self._selected:
            self._library.destroy_selection(self.selection.address)
            self._selected = False

    def _set(self, attribute: int, value: int) -> None:
        number, handle = c_int(value), self._library.handle.address
        self._library.call(
            "cusparseLtMatmulAlgSetAttribute", handle, self.selection.address, attribute, byref(number), 4
        )

    def _get(self, attribute: int) -> int:
        number, handle = c_int(), self._library.handle.address
        self._library.call(
            "cusparseLtMatmulAlgGetAttribute", handle, self.selection.address, attribute, byref(number), 4
        )
        return number.value


class CusparseLt:
    """The library on one device, with its plans. One thread at a time."""

    def __init__(self, path: str, most_plans: int = 512) -> None:
        """For the device that is current.

        Args:
            most_plans: the least recently used one is given back when there are more.

        Raises:
            CusparseLtError: there is no such library, or it refused.
        """
        try:
            self._library = ctypes.CDLL(path)
            for name, arguments in _SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
            self._library.cusparseLtGetErrorString.restype = c_char_p
            # (looked up by [] these are other objects, without types to convert to: `Plan` has its arguments ready)
            self.multiply_ready = self._library["cusparseLtMatmul"]
            self.search_ready = self._library["cusparseLtMatmulSearch"]
            self._destroy_selection = getattr(self._library, _DESTROY_SELECTION, None)
            if self._destroy_selection is not None:
                self._destroy_selection.argtypes = (c_void_p,)
        except (OSError, AttributeError) as error:
            raise CusparseLtError(f"cuSPARSELt cannot be used: {error}") from error
        self._plans: OrderedDict[tuple[int, int, int, torch.dtype, int | None], Plan] = OrderedDict()
        self._algorithms: dict[tuple[int, int, torch.dtype], dict[int, Algorithm]] = {}  # by rows
        self._most_plans = most_plans
        self._factors = (c_float(1), c_float(0))
        self.one, self.zero = (c_void_p(ctypes.addressof(factor)) for factor in self._factors)
        self.handle = Opaque()
        self.call("cusparseLtInit", self.handle.address)

    def call(self, name: str, *arguments: object) -> None:
        """One function of the library. Raises CusparseLtError: it refused."""
        if refusal := getattr(self._library, name)(*arguments):
            raise self.error(name, refusal)

    def error(self, name: str, refusal: int) -> CusparseLtError:
        """What to raise when a function refused."""
        said = self._library.cusparseLtGetErrorString(refusal)
        return CusparseLtError(f"{name} refused: {said.decode() if said else refusal}")

    def destroy_selection(self, address: int) -> None:
        """Gives back what a selection of an algorithm holds, where it holds anything. Raises CusparseLtError: it refused."""
        if self._destroy_selection is not None:
            self.call(_DESTROY_SELECTION, address)

    def version(self) -> tuple[int, int, int]:
        """Major, minor and patch. (In one number, as the library has it, too, 0.10 is 1.0.)"""
        parts = (c_int(), c_int(), c_int())
        for which, part in enumerate(parts):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
            self.call("cusparseLtGetProperty", which, byref(part))
        major, minor, patch = (part.value for part in parts)
        return major, minor, patch

    def compress(self, dense: Tensor, stream: int) -> Tensor:
        """A 2:4 weight [n, k] in the library's own form, [bytes] uint8.

        Raises:
            CusparseLtError: the library refused, or N or K are no multiples of `multiple`.
        """
        n, k = dense.shape
        if reason := why_not(n, k, dense.dtype):
            raise CusparseLtError(reason)
        plan = self._plan(multiple(dense.dtype), n, k, dense.dtype, None)
        size, buffer_size = c_size_t(), c_size_t()
        handle = self.handle.address
        self.call("cusparseLtSpMMACompressedSize", handle, plan.plan.address, byref(size), byref(buffer_size))
        compressed = torch.empty(size.value, dtype=torch.uint8, device=dense.device)
        buffer = torch.empty(buffer_size.value, dtype=torch.uint8, device=dense.device)
        self.call("cusparseLtSpMMACompress", handle, plan.plan.address, dense.data_ptr(), compressed.data_ptr(),
                  buffer.data_ptr(), stream)  # fmt: skip
        return compressed

    def multiply(self, x: Tensor, compressed: Tensor, bias: Tensor | None, n: int, stream: int) -> Tensor:
        """x [rows, k] in a row, times the weight [n, k] plus bias [n], of 16 bits -> [rows, n] in the dtype that `RESULTS` says.

        Raises:
            CusparseLtError: the library refused.
        """
        rows, k = x.shape
        missing = -rows % row_multiple(x.dtype)
        if missing:
            x = _padded(x)
        plan = self._plan(rows + missing, n, k, x.dtype, None if bias is None else bias.data_ptr())
        y = x.new_empty(rows + missing, n, dtype=RESULTS[x.dtype])
        plan.multiply(x, compressed, y, stream)
        return y[:rows] if missing else y

    def search(self, x: Tensor, compressed: Tensor, n: int, stream: int) -> Algorithm:
        """Times the library's algorithms for that number of rows, and takes the best from now on, also for other numbers of rows that
        are nearer to it than to any that was searched for. Takes a while, and waits.

        Raises:
            CusparseLtError: the library refused.
        """
        x, k = _padded(x), x.shape[1]
        y = x.new_empty(len(x), n, dtype=RESULTS[x.dtype])
        plan = Plan(self, len(x), n, k, x.dtype, None, None)
        try:
            plan.multiply(x, compressed, y, stream, search=True)
            found = plan.algorithm()
        finally:
            plan.destroy()
        self._algorithms.setdefault((n, k, x.dtype), {})[len(x)] = found
        for key in [key for key in self._plans if key[1:4] == (n, k, x.dtype)]:
            self._plans.pop(key).destroy()
        return found

    def searched(self, n: int, k: int, dtype: torch.dtype) -> bool:
        """Whether there was a search for weights [n, k]."""
        return (n, k, dtype) in self._algorithms

    def _algorithm(self, rows: int, n: int, k: int, dtype: torch.dtype) -> Algorithm | None:
        """What the search found for the nearest number of rows, by ratio."""
        found = self._algorithms.get((n, k, dtype))
        if not found:
            return None
        return found[min(found, key=lambda searched: max(searched, rows) / min(searched, rows))]

    def _plan(self, rows: int, n: int, k: int, dtype: torch.dtype, bias: int | None) -> Plan:
        key = (rows, n, k, dtype, bias)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = Plan(self, *key, self._algorithm(rows, n, k, dtype))
            if len(self._plans) > self._most_plans:
                self._plans.popitem(last=False)[1].destroy()
        else:
            self._plans.move_to_end(key)
        return plan


def multiple(dtype: torch.dtype) -> int:
    """Of this N and K have to be multiples."""
    return 32 // dtype.itemsize


def row_multiple(dtype: torch.dtype) -> int:
    """To multiples of this rows of x are padded."""
    return 16 // dtype.itemsize


def why_not(n: int, k: int, dtype: torch.dtype) -> str | None:
    """Why a weight [n, k] cannot be one of the library's, or None."""
    if dtype not in RESULTS:
        return f"values are {str(dtype).removeprefix('torch.')}"
    if n % multiple(dtype) or k % multiple(dtype):
        return f"cuSPARSELt takes multiples of {multiple(dtype)} outputs and inputs, not {n} and {k}"
    return None


def _padded(x: Tensor) -> Tensor:
    """Rows of zeros up to a multiple of `row_multiple`."""
    missing = -len(x) % row_multiple(x.dtype)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x


def find() -> str:
    """The library's path: of the wheel that CUDA builds of torch bring, else its name, for the system to find."""
    for package, inside in (("nvidia.cusparselt", "lib"), ("nvidia.cu13", "lib")):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for place in (spec.submodule_search_locations or []) if spec else []:
            file = Path(place, inside, "libcusparseLt.so.0")
            if file.is_file():
                return str(file)
    return "libcusparseLt.so.0"


@cache
def on_device(index: int) -> CusparseLt:
    """The library for a device. Raises CusparseLtError."""
    with torch.cuda.device(index):
        return CusparseLt(find())
