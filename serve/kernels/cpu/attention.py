"""Softmax attention of bfloat16 with the C++ kernels, of a prompt as of one token, and its gradients.

For processors with AVX2, with AVX-512, and with its bfloat16 products; ``benchmarks/cpu_attention.py`` measures it against torch's own.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from serve.kernels.cpu import backend, library

MOST_DEPTH = 256
"""Of a head."""

_DEPTH_STEP = 16


def available() -> bool:
    """Whether this processor has a kernel for it."""
    path = backend.path()
    return path is not None and bool(functions().halve_cpu_has_attention(backend.PATHS.index(path)))


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """Why that attention cannot be computed here, or None; q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E], mask as in `attention`."""
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
    return None if mask is None else _why_no_mask(mask, batch, queries, keys)


def _why_no_mask(mask: Tensor, batch: int, queries: int, keys: int) -> str | None:
    if not (mask.is_cpu and mask.dtype is torch.bool):
        return f"a mask is bool on cpu, not {mask.dtype} on {mask.device}"
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[2:] == (queries, keys)
    if not fits or (mask.shape[1] != 1 and mask.stride(1)) or (keys > 1 and mask.stride(3) != 1):
        return f"a mask is [{batch}, 1, {queries}, {keys}] with the keys in a row, not {list(mask.shape)}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """softmax(scale q k^T) v.

    Sums are float32; the weights are rounded to bfloat16 for the second product, as torch does. The number of threads
    changes no result.

    Args:
        q: [B, H, Q, D]; k: [B, G, K, D]; v: [B, G, K, E], where G divides H.
        mask: [B or 1, 1, Q, K] bool, True where a query sees a key; a query that sees none gets zeros. None: it sees all.
        scale: more than 0.
        causal: query i sees keys 0 to i at most.

    Returns:
        [B, Q, H, E], in a row.

    Raises:
        ValueError: see `why_not`; or the scale.
    """
    if refusal := why_not(q, k, v, mask):
        raise ValueError(refusal)
    return _forward(q, k, v, mask, scale, causal, None)


class DifferentiableAttention(torch.autograd.Function):
    """`attention` with gradients: ``DifferentiableAttention.apply(q, k, v, scale, causal)``.

    The backward pass computes the weights again from one number a query (Dao et al. 2022, FlashAttention,
    arXiv 2205.14135), so what is kept between the passes grows with the length and not with its square.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        if refusal := why_not(q, k, v):
            raise ValueError(refusal)
        exponents = torch.empty(q.shape[:3], dtype=torch.float32)
        out = _forward(q, k, v, None, scale, causal, exponents)
        ctx.save_for_backward(q, k, v, out, exponents)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, exponents = ctx.saved_tensors
        (d_out,) = gradients
        if d_out.stride(-1) != 1:
            d_out = d_out.contiguous()
        # As models lay them out: heads side by side at each position.
        d_q, d_k, d_v = (
            torch.empty_like(each.transpose(1, 2), memory_format=torch.contiguous_format) for each in (q, k, v)
        )
        tensors = (q, k, v, *(each.transpose(1, 2) for each in (out, d_out, d_q, d_k, d_v)))
        lib, path, shape = functions(), _path(), _shape(q, k, v)
        scratch = torch.empty(lib.halve_attention_backward_scratch_bytes(path, shape), dtype=torch.uint8)
        addresses = (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))
        refusal = lib.halve_attention_backward(
            *(path, shape, addresses, _strides(*tensors), ctx.scale, int(ctx.causal)),
            *(exponents.data_ptr(), scratch.data_ptr(), torch.get_num_threads()),
        )
        if refusal:
            raise ValueError(f"the kernel refused the gradients of q {list(q.shape)}, k {list(k.shape)} ({refusal})")
        return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2), None, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, exponents: Tensor | None
) -> Tensor:
    if not scale > 0:
        raise ValueError(f"scores are scaled by more than 0, not by {scale}")
    lib, path, shape = functions(), _path(), _shape(q, k, v)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    scratch = torch.empty(lib.halve_attention_scratch_bytes(path, shape), dtype=torch.uint8)
    strides = _strides(q, k, v, out.transpose(1, 2), *(() if mask is None else (_by_query(mask),)))
    refusal = lib.halve_attention(
        *(path, shape, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), strides),
        *(None if mask is None else mask.data_ptr(), scale, int(causal)),
        *(None if exponents is None else exponents.data_ptr(), scratch.data_ptr(), torch.get_num_threads()),
    )
    if refusal:
        raise ValueError(f"the kernel refused q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} ({refusal})")
    return out


def _path() -> int:
    return backend.PATHS.index(backend.path() or "")


def _shape(q: Tensor, k: Tensor, v: Tensor) -> Any:
    batch, heads, queries, depth = q.shape
    return (ctypes.c_int64 * 7)(batch, heads, k.shape[1], queries, k.shape[2], depth, v.shape[-1])


def _strides(*tensors: Tensor) -> Any:
    """Of batch, head and position of each; of a mask that follows, of batch and query."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * (len(strides) + 2))(*strides)


def _by_query(mask: Tensor) -> Tensor:
    """A view of a mask whose strides are those of batch and query."""
    return mask.as_strided((1, 1, 1), (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2), 1))


@cache
def functions() -> ctypes.CDLL:
    """The library with the types of the functions that are called here."""
    lib = backend.functions()
    pointer, number = ctypes.c_void_p, ctypes.c_int
    lib.halve_cpu_has_attention.restype, lib.halve_cpu_has_attention.argtypes = number, (number,)
    for scratch_bytes in (lib.halve_attention_scratch_bytes, lib.halve_attention_backward_scratch_bytes):
        scratch_bytes.restype, scratch_bytes.argtypes = ctypes.c_int64, (number, pointer)
    lib.halve_attention.restype = lib.halve_attention_backward.restype = number
    rest = (ctypes.c_float, number, pointer, pointer, number)
    lib.halve_attention.argtypes = (number, *[pointer] * 7, *rest)
    lib.halve_attention_backward.argtypes = (number, *[pointer] * 3, *rest)
    return lib
