"""Perplexity by the papers' protocol, in the model's own dtype, with a float32 loss.

A text is tokenized once and cut into windows that do not overlap; the remainder is dropped. The figure is the
exponential of the mean loss of all predicted tokens. Windows of different lengths give figures that cannot be
compared, so the length and the number of windows are part of every result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compress.errors import CalibrationError, NumericalError

LOSS_TOKENS = 32
"""Rows of logits that are float32 at a time: few, as memory of that size is used again, and that of more is fetched anew."""


@dataclass(frozen=True)
class Perplexity:
    """``losses``: the mean loss of each window, in nats a token."""

    losses: list[float]
    length: int

    @property
    def value(self) -> float:
        return math.exp(sum(self.losses) / len(self.losses))


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    progress: Callable[[int, int, float], None] = lambda done, total, value: None,
) -> Perplexity:
    """Perplexity of a model over ``windows`` [n, length] of token ids.

    Raises:
        CalibrationError: windows longer than the model can read.
        NumericalError: a loss is not finite.
    """
    require_room(model, windows)
    losses: list[float] = []
    for window in windows:
        losses.append(window_loss(window_logits(model, window), window))
        require_finite(losses, str(model.dtype))
        progress(len(losses), len(windows), Perplexity(losses, windows.shape[1]).value)
    return Perplexity(losses, windows.shape[1])


def require_room(model: PreTrainedModel, windows: Tensor) -> None:
    """Raises CalibrationError where ``windows`` [n, length] are longer than the model can read."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and windows.shape[1] > limit:
        raise CalibrationError(
            f"the model reads at most {limit} tokens, and the windows have {windows.shape[1]}; choose a smaller --length"
        )


def require_finite(losses: list[float], dtype: str) -> None:
    """Raises NumericalError where the last loss is not finite."""
    if not math.isfinite(losses[-1]):
        raise NumericalError(
            f"window {len(losses) - 1}: the loss is {losses[-1]}; the model's outputs are not finite in {dtype}"
        )


@torch.no_grad()
def window_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What a model predicts for ``tokens`` [length] from the second on: [length - 1, vocabulary], in its dtype."""
    return model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0, :-1]


@torch.no_grad()
def window_loss(logits: Tensor, tokens: Tensor) -> float:
    """Mean loss in nats of predicting ``tokens`` [length] from the second on by ``logits`` [length - 1, vocabulary]."""
    targets = tokens[1:].to(logits.device)
    total = 0.0
    for piece, expected in zip(logits.split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True):
        total += float(functional.cross_entropy(piece.float(), expected, reduction="sum"))
    return total / len(targets)
