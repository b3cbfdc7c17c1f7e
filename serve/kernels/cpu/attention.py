"""Softmax attention of bfloat16 with the C++ kernels, for many queries (a prompt, a window of text).

torch's own multiplies in float32 there; with ``vdpbf16ps`` the two products take half of the time.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from serve.kernels.cpu import backend, library

MOST_DEPTH = 256
"""Of a head."""

_DEPTH_STEP = 16


def available() -> bool:
    """Whether this processor has a kernel for it."""
    path = backend.path()
    return path is not None and bool(functions().halve_cpu_has_attention(backend.PATHS.index(path)))


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why that attention cannot be computed here, or None; q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E]."""
    if not available():
        return library.status() if backend.path() is None else f"the code path {backend.path()} has no attention"
    for tensor in (q, k, v):
        if not (tensor.is_cpu and tensor.dtype is torch.bfloat16):
            return f"attention takes bfloat16 on cpu, not {tensor.dtype} on {tensor.device}"
        depth = tensor.shape[-1]
        if tensor.stride(-1) != 1 or depth % _DEPTH_STEP or not 0 < depth <= MOST_DEPTH:
            return f"heads of {_DEPTH_STEP} to {MOST_DEPTH} channels in a row, in steps of {_DEPTH_STEP}, not {depth}"
    batch, heads, queries, depth = q.shape
    groups, keys = k.shape[1:3]
    if not (k.shape == (batch, groups, keys, depth) and v.shape[:3] == k.shape[:3] and groups and keys and queries):
        return f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not belong together"
    if heads % groups or not batch:
        return f"{heads} heads cannot share {groups} heads of keys"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale q k^T) v.

    Sums are float32; the weights are rounded to bfloat16 for the second product, as torch does. The number of threads
    changes no result.

    Args:
        q: [B, H, Q, D]; k: [B, G, K, D]; v: [B, G, K, E], where G divides H.
        scale: more than 0.
        causal: query i sees keys 0 to i.

    Returns:
        [B, Q, H, E], in a row.

    Raises:
        ValueError: see `why_not`; or the scale.
    """
    if refusal := why_not(q, k, v):
        raise ValueError(refusal)
    if not scale > 0:
        raise ValueError(f"scores are scaled by more than 0, not by {scale}")
    lib = functions()
    batch, heads, queries, depth = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1])
    shape = (ctypes.c_int64 * 7)(batch, heads, k.shape[1], queries, k.shape[2], depth, v.shape[-1])
    places = [tensor.stride()[:3] for tensor in (q, k, v, out.transpose(1, 2))]
    strides = (ctypes.c_int64 * 12)(*(stride for place in places for stride in place))
    path = backend.PATHS.index(backend.path() or "")
    scratch = torch.empty(lib.halve_attention_scratch_bytes(path, shape), dtype=torch.uint8)
    refusal = lib.halve_attention(
        *(path, shape, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), strides),
        *(scale, int(causal), scratch.data_ptr(), torch.get_num_threads()),
    )
    if refusal:
        raise ValueError(f"the kernel refused q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} ({refusal})")
    return out


@cache
def functions() -> ctypes.CDLL:
    lib = backend.functions()
    pointer, number = ctypes.c_void_p, ctypes.c_int
    lib.halve_cpu_has_attention.restype, lib.halve_cpu_has_attention.argtypes = number, (number,)
    lib.halve_attention_scratch_bytes.restype = ctypes.c_int64
    lib.halve_attention_scratch_bytes.argtypes = (number, pointer)
    lib.halve_attention.restype = number
    lib.halve_attention.argtypes = (number, *[pointer] * 6, ctypes.c_float, number, pointer, number)
    return lib
