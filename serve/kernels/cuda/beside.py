"""A second form of a weight, for many rows of x, kept behind the first in the same tensor: only where it is asked for.

The form of the kernels, 9/16 of the dense bytes, is all that is kept otherwise, and many rows are multiplied by what is made of it at
each call (`prefill.py`). ``HALVE_KEEP_BOTH=1`` keeps that, so that a product of many rows is one launch:

- the dense weight, 25/16 of the dense bytes together; or
- with ``HALVE_PREFILL=cusparselt``, the library's own form, 18/16 of them. A weight that the library does not take is kept dense.

Weights with values of 8 bits have one form alone (`backend.py` says why).

Both are in one tensor, because engines hold, move and reload a layer's weight as one. Its length says that there is a second form, and
its header which; that is read once for a length, because it waits for the GPU.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import UsageError
from serve.kernels.cuda import cusparselt, layout, prefill
from serve.kernels.cuda.layout import Second

VARIABLE = "HALVE_KEEP_BOTH"
SEARCHED_ROWS = (128, 512, 2048, 8192)
"""As `prefill.SEARCHED_ROWS`, where the library multiplies all that is too much for the kernels."""


_found: dict[tuple[int, int, torch.dtype, int], Second] = {}
"""By N, K, dtype and length."""


def wanted() -> bool:
    """Whether ``HALVE_KEEP_BOTH`` asks for two forms.

    Raises:
        UsageError: it is neither 1 nor 0.
    """
    wish = os.environ.get(VARIABLE, "") or "0"
    if wish not in ("0", "1"):
        raise UsageError(f"{VARIABLE}={wish!r} is neither 1 (keep two forms of each weight) nor 0 (keep one).")
    return wish == "1"


def keep(prepared: Tensor, dense: Tensor, stream: int) -> Tensor:
    """A prepared weight, with the second form of the ``dense`` one [n, k] behind it that is asked for.

    Raises:
        RuntimeError: the library refused.
    """
    library = prefill.library_for(dense, prefill.LEAST_ROWS)
    if library is None:
        second, bytes_ = Second.DENSE, dense.reshape(-1).view(torch.uint8)
    else:
        with prefill.calls:
            second, bytes_ = Second.CUSPARSELT, library.compress(dense, stream)
    both = layout.append(prepared, second, bytes_)
    n, k = dense.shape
    _found[n, k, dense.dtype, len(both)] = second
    return both


def find(prepared: Tensor, n: int, k: int, dtype: torch.dtype) -> Second:
    """What is behind a prepared weight [n, k] that is longer than one form.

    Raises:
        ValueError: it is no prepared weight [n, k].
    """
    key = (n, k, dtype, len(prepared))
    second = _found.get(key)
    if second is None:
        is_dtype, is_n, is_k, second = layout.describe(prepared)
        if (is_dtype, is_n, is_k) != (dtype, n, k) or second is None:
            raise ValueError(f"this is a prepared weight [{is_n}, {is_k}] in {is_dtype}, not [{n}, {k}] in {dtype}")
        _found[key] = second
    return second


def linear(x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, stream: int) -> Tensor:
    """x [rows, k] in a row times the transposed weight [n, k], by its second form, plus bias [n] -> [rows, n].

    Raises:
        RuntimeError: the library refused.
        ValueError: it is no prepared weight [n, k].
    """
    k = x.shape[1]
    behind = prepared[layout.prepared_bytes(n, k) :]
    if find(prepared, n, k, x.dtype) is Second.DENSE:
        return functional.linear(x, behind.view(x.dtype).view(n, k), bias)
    with prefill.calls:
        return cusparselt.on_device(x.device.index or 0).multiply(x, behind, bias, n, stream)
