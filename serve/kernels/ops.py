"""The kernels as torch operators, ``torch.ops.halve.*``, so that torch.compile and others see through to shapes.

They take tensors and plain numbers only, and are for inference: there is no backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.kernels.cpu import attention as cpu_attention
from serve.kernels.cpu import backend as cpu
from serve.kernels.cuda import backend as cuda
from serve.kernels.triton import backend as triton
from serve.kernels.triton import layout as triton_layout

_library = torch.library.Library("halve", "DEF")
_library.define("sparse24_linear(Tensor x, Tensor prepared, Tensor? bias, int n, bool quantizes_x=False) -> Tensor")
_library.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor")


def _sparse24_linear(x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, quantizes_x: bool = False) -> Tensor:
    # (a weight that is prepared for a processor says itself whether x is quantized)
    return cpu.linear(x, prepared, bias, n)


def _sparse24_linear_cuda(
    x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, quantizes_x: bool = False
) -> Tensor:
    # One operator for both, told apart by the weight, whose lengths are never the same. (A compiled graph holds the length, so
    # one that is kept does not outlive a change of backend: `serve.vllm.compile_cache`.)
    if x.ndim and triton_layout.values_dtype(prepared.numel(), n, x.shape[-1], x.dtype) is not None:
        return triton.linear(x, prepared, bias, n, quantizes_x)
    return cuda.linear(x, prepared, bias, n, quantizes_x)


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.dense_linear(x, weight, bias)


def _sparse24_shape(x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, quantizes_x: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _dense_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _attention_shape(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


_library.impl("sparse24_linear", _sparse24_linear, "CPU")
_library.impl("sparse24_linear", _sparse24_linear_cuda, "CUDA")
_library.impl("dense_linear", _dense_linear, "CPU")
_library.impl("attention", cpu_attention.attention, "CPU")
torch.library.register_fake("halve::sparse24_linear", _sparse24_shape)
torch.library.register_fake("halve::dense_linear", _dense_shape)
torch.library.register_fake("halve::attention", _attention_shape)

sparse24_linear = torch.ops.halve.sparse24_linear.default
"""(x [..., K], prepared weight [bytes] uint8, bias [N] or None, N, quantizes_x: see `compress.packed.PackedWeight`) -> [..., N]"""

dense_linear = torch.ops.halve.dense_linear.default
"""(x [..., K], weight [N, K], bias [N] or None) -> [..., N]; for few rows"""

attention = torch.ops.halve.attention.default
"""(q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E], mask [B or 1, 1, Q, K] bool or None, scale, causal) -> [B, Q, H, E]"""
