"""Products of many rows of x, which are bound by multiplications and not by the bytes of the weight. (Where x is rounded to values of 8
bits, `serve.kernels.narrow` does them, by the same library.)

By default the weight is expanded and multiplied densely. ``HALVE_PREFILL=cusparselt`` asks for cuSPARSELt's sparse product
instead: the weight, of which only the form for few rows is kept, is expanded and compressed into the library's own form at each
call. Both are passes over the weight, 6.25 bytes for each of its numbers: by the data sheet of an H100 (3.35 TB/s, 989 TFLOP/s) as long as
nearly half of a dense product of 2,048 rows, and a ninth of one of 8,192. Others measured that the library saves about two
fifths of a product of that size. Where memory is no concern, ``HALVE_KEEP_BOTH=1`` keeps what is made (`beside.py`).

It is not the default because it never ran. `benchmarks.gpu` times it (libraries, "cusparselt from ours").
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from types import TracebackType

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import UsageError, did_you_mean
from compress.packed import LARGEST
from serve.kernels.cuda import cusparselt
from serve.kernels.cuda.cusparselt import CusparseLt, CusparseLtError
from serve.kernels.proof import problem

VARIABLE = "HALVE_PREFILL"
WAYS = ("dense", "cusparselt")
LEAST_ROWS = 2048
"""For which the sparse product may make up for the passes."""

log = logging.getLogger("halve.serve")
_one_at_a_time = threading.Lock()
_tried: set[tuple[int, torch.dtype]] = set()
SEARCHED_ROWS = (2048, 8192)
"""For which the library's algorithms are timed when a weight is prepared; other numbers of rows take what was best for the nearer."""


class _Calls:
    """Of the library: one at a time, and a refusal is a RuntimeError that says how to do without."""

    def __enter__(self) -> None:
        _one_at_a_time.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _one_at_a_time.release()
        if isinstance(error, CusparseLtError):
            raise RuntimeError(f"{error}; {VARIABLE}=dense does without it") from error


calls = _Calls()
"""Every call is made with this one."""


def wanted() -> str:
    """The way that ``HALVE_PREFILL`` asks for.

    Raises:
        UsageError: it names none.
    """
    wish = os.environ.get(VARIABLE, WAYS[0])
    if wish not in WAYS:
        raise UsageError(f"{VARIABLE}={wish!r} is not known{did_you_mean(wish, WAYS)}.")
    return wish


def library_for(dense: Tensor, rows: int) -> CusparseLt | None:
    """The library where it is asked for and multiplies ``rows`` rows of x by such a weight [n, k]; None where torch does."""
    if (
        wanted() != "cusparselt"
        or rows < LEAST_ROWS
        or cusparselt.why_not(dense.shape[0], dense.shape[1], dense.dtype) is not None
    ):
        return None
    index = dense.device.index or 0
    if dense.device.type == "cuda" and (index, dense.dtype) not in _tried and torch.cuda.is_current_stream_capturing():
        return None  # it waits for the GPU when it proves itself, which a graph cannot hold
    return _proven(index, dense.dtype)


def prove(device: torch.device, dtype: torch.dtype) -> None:
    """Loads and tries the library where it is asked for: not in a product, which may be captured in a graph."""
    if wanted() == "cusparselt" and device.type == "cuda":
        _proven(device.index or 0, dtype)


def search(dense: Tensor, stream: int, rows_of_x: Sequence[int] = SEARCHED_ROWS) -> None:
    """Lets the library find its best algorithms for weights like ``dense`` [n, k], once for each shape: when a weight is prepared and
    not in a product. Does nothing where the library is not asked for, or not usable."""
    library = library_for(dense, LEAST_ROWS)
    n, k = dense.shape
    if library is None or library.searched(n, k, dense.dtype):
        return
    try:
        with _one_at_a_time:
            compressed = library.compress(dense, stream)
            for rows in rows_of_x:
                library.search(dense.new_ones(rows, k), compressed, n, stream)
    except CusparseLtError as error:
        log.info("cuSPARSELt's search for [%d, %d] failed, its own choice is taken: %s", n, k, error)


def linear(x: Tensor, dense: Tensor, bias: Tensor | None, stream: int) -> Tensor:
    """x [rows, k] in a row times the transposed weight [n, k], 2:4 and expanded, plus bias [n] -> [rows, n].

    Raises:
        RuntimeError: the library refused.
    """
    multiply = multiplier(dense, len(x), stream)
    return functional.linear(x, dense, bias) if multiply is None else multiply(x, bias)


def multiplier(dense: Tensor, rows: int, stream: int) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """The library's product of x [rows or fewer, k] and a weight [n, k], 2:4 and expanded, which is compressed for it here; None where torch
    multiplies. Both raise RuntimeError: the library refused."""
    library = library_for(dense, rows)
    if library is None:
        return None

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        with calls:
            return library.multiply(x, compressed, bias, len(dense), stream)

    with calls:
        compressed = library.compress(dense, stream)
    return multiply


@cache
def _proven(index: int, dtype: torch.dtype) -> CusparseLt | None:
    """The library, once its products were right; the reason why it is not used is logged once."""
    _tried.add((index, dtype))
    try:
        reason = _why_not(index, dtype)
        library = None if reason else cusparselt.on_device(index)
        if library is not None:
            with _one_at_a_time, torch.cuda.device(index):  # the library launches on the current one
                reason = wrong(library, torch.device("cuda", index), dtype, torch._C._cuda_getCurrentRawStream(index))
    except (CusparseLtError, RuntimeError) as error:
        reason, library = str(error), None
    if reason:
        log.warning("%s=cusparselt cannot be used, many rows are multiplied densely: %s", VARIABLE, reason)
        return None
    return library


def _why_not(index: int, dtype: torch.dtype) -> str | None:
    """On Hopper, float16 products of 128 and more rows were reported to end in an illegal instruction, which ends the process."""
    if dtype is torch.float16 and torch.cuda.get_device_capability(index) == (9, 0):
        return "its float16 products are reported to fail on this GPU"
    return None


def wrong(library: CusparseLt, device: torch.device, dtype: torch.dtype, stream: int) -> str | None:
    """What the library computes wrongly, or None: a small product, of 16 bits with a bias, against float64. Raises CusparseLtError."""
    if dtype in LARGEST:
        known = problem(136, 64, 160, torch.bfloat16, dtype).rounded()
        x, weight = (operand.to(device) for operand in known.in_bytes())
        is_right = known.is_solved_by_sums(library.multiply(x, library.compress(weight, stream), None, 64, stream))
    else:
        known = problem(136, 64, 160, dtype)
        compressed = library.compress(known.weight.to(device), stream)
        y = library.multiply(known.x.to(device), compressed, known.bias.to(device), len(known.bias), stream)
        is_right = known.is_solved_by(y)
    if is_right:
        return None
    return f"its product in {str(dtype).removeprefix('torch.')} is wrong on this device; please report it, with `halve doctor`"
