"""What a model predicts where its last block gives some output, against what the dense model predicts.

A block is repaired to give the dense block's output again, and for most blocks no nearer measure is at hand. Behind the last
one there is: the final norm and the head make predictions of its output, and they do not weigh all of its directions alike. So
the last block can go on learning from

    loss = mean over tokens of KL(p ‖ q) = Σ_v p_v (log p_v − log q_v),

where p are the dense model's predictions and q those made of the block's output. What lies behind the block is in memory
meanwhile and stays as it is, and all else is as in the repair: inputs come from the pruned prefix, and dense predictions are made of
the dense prefix's activations. It differs from a distillation (`compress.distill`) in that one block learns, not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compress.blocks import BlockModel
from compress.divergence import KLDivergence
from compress.training import autocast, precision

Divergence = Callable[[Tensor, int], Tensor]
"""Of an output of the last block, [batch, length, hidden], for a batch by its number: KL(p ‖ q) of each prediction, float32."""


@contextmanager
def divergence_of_predictions(
    model: BlockModel, batches: Sequence[Mapping[str, Any]], targets: Sequence[Tensor]
) -> Iterator[Divergence]:
    """Holds what lies outside of the blocks in memory, to tell how far predictions are from the dense model's.

    Args:
        batches: what the model is called with, one forward pass each.
        targets: the dense model's outputs of the last block for each of them, [batch, length, hidden].
    """
    low = precision(model.dtype, model.device)
    with model.after_blocks() as run:

        def logits(states: Tensor, batch: int) -> Tensor:
            """[predictions, classes]; a language model's classes are its tokens."""
            with autocast(model.device, low):
                return run(states.to(model.device, targets[batch].dtype), batches[batch]).logits.flatten(0, -2)

        def divergence(output: Tensor, batch: int) -> Tensor:
            with torch.no_grad():
                expected = logits(targets[batch], batch)
            # The gradient of a mean over many tokens would vanish on its way through float16: it goes as that of a sum.
            scale = float(len(expected)) if targets[batch].dtype == torch.float16 else 1.0
            found = logits(_Scaled.apply(output, 1 / scale), batch)
            return _Scaled.apply(KLDivergence.apply(found, expected), scale)

        yield divergence


class _Scaled(torch.autograd.Function):
    """``_Scaled.apply(x, factor)`` -> x, with ``factor`` times its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0] * ctx.factor, None
