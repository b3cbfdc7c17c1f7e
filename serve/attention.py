"""halve's attention for transformers' models: the CPU kernel where it can compute a call, torch's own everywhere else (in
float32 where the processor cannot multiply the dtype).

Importing this module registers it in transformers under `NAME`; a model takes it by ``set_attn_implementation(NAME)``.
Calls that the kernel does not know (position biases, dropout, masks of numbers, gradients through a mask) go to torch.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from compress.attention import TORCH, set_attention
from compress.wide import is_emulated
from serve.kernels import ops
from serve.kernels.cpu import attention as cpu
from serve.kernels.cpu.attention import DifferentiableAttention

NAME = "halve"
"""In transformers' registry of attentions."""

_IGNORED = frozenset({"position_ids", "use_cache", "cache_position", "sliding_window"})
"""Arguments that torch's attention in transformers ignores, too (a window is in the mask). Any other one is left to it."""


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, Q, D], key and value [B, G, K, D] -> [B, Q, H, D], as transformers calls it."""
    plain = not torch.compiler.is_compiling() and not dropout and all(_absent(name, kwargs[name]) for name in kwargs)
    if plain:
        query, key, value = (_as_autocast(each) for each in (query, key, value))
        queries, keys = query.shape[2], key.shape[2]
        asked = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(asked) and queries > 1 and attention_mask is None  # (with a mask, that says it)
        if causal and keys > queries:  # an empty static cache: what follows the prompt is not there yet
            key, value = key[:, :, :queries], value[:, :, :queries]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if scale > 0 and cpu.why_not(query, key, value, attention_mask) is None:
            if not _wants_gradient(query, key, value):
                return ops.attention(query, key, value, attention_mask, scale, causal), None
            if attention_mask is None:
                return DifferentiableAttention.apply(query, key, value, scale, causal), None
    stored = query.dtype
    if is_emulated(stored, query.device) and not torch.is_autocast_enabled("cpu"):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        kwargs = {name: given.float() if _is_of(given, stored) else given for name, given in kwargs.items()}
    out, _ = sdpa_attention_forward(
        *(module, query, key, value, attention_mask),
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return out.to(stored), None


def use(model: PreTrainedModel) -> None:
    """Lets a model take it, where the model would take torch's and the processor has a kernel."""
    set_attention(model, name())


def name() -> str:
    """What to ask transformers for here; ``HALVE_BACKEND=plain``, which computes as torch does, leaves it to torch."""
    gains = cpu.available() or is_emulated(torch.bfloat16, torch.device("cpu"))
    return NAME if gains and os.environ.get("HALVE_BACKEND") != "plain" else TORCH


def _absent(name: str, value: Any) -> bool:
    """Whether an argument that is not known here asks for nothing."""
    return name in _IGNORED or value is None or value is False


def _is_of(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype


def _as_autocast(tensor: Tensor) -> Tensor:
    """In the dtype that torch's attention would take it in."""
    if tensor.is_cpu and tensor.dtype is torch.float32 and torch.is_autocast_enabled("cpu"):
        return tensor.to(torch.get_autocast_dtype("cpu"))
    return tensor


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
