"""KL(p ‖ q) of next-token distributions, with its gradient, in little memory.

The logits of a few windows over a large vocabulary are the largest tensors of a distillation. Written with log_softmax, the
loss holds half a dozen float32 copies of them; here a few tokens at a time are turned into float32, and what is kept for the
backward pass is the gradient, q − p, in the dtype of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 1 << 20
"""Logits that are turned into float32 at a time, so that they stay in a cache."""


class KLDivergence(torch.autograd.Function):
    """``KLDivergence.apply(found, expected)`` -> Σ_v p_v (log p_v − log q_v) of each token, [tokens] float32.

    ``expected`` [tokens, vocabulary] are the logits of p, a constant; ``found``, of the same shape, those of q.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, expected: Tensor) -> Tensor:
        divergence = torch.empty(found.shape[0], dtype=torch.float32, device=found.device)
        gradient = torch.empty_like(found) if ctx.needs_input_grad[0] else None
        step = max(1, _CHUNK // found.shape[1])
        for start in range(0, found.shape[0], step):
            rows = slice(start, start + step)
            log_p = expected[rows].float().log_softmax(dim=-1)
            log_q = found[rows].float().log_softmax(dim=-1)
            p = log_p.exp()
            if gradient is not None:
                gradient[rows] = log_q.exp().sub_(p)
            divergence[rows] = log_p.sub_(log_q).mul_(p).sum(dim=-1)
        ctx.gradient = gradient
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the divergence's gradient was asked for twice; it is kept for one backward pass")
        slope = slopes[0].to(gradient.dtype)  # (a product of two dtypes takes four times as long)
        return gradient.mul_(slope.unsqueeze(-1)), None
