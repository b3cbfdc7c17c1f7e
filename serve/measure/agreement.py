"""How far a sparse model says what the dense one says: the most sensitive check of accuracy there is.

Perplexity looks at one token of each position, the one that the text has. Agreement looks at the whole
distribution: how often both models hold the same token for the likeliest, and the Kullback-Leibler divergence
KL(dense || sparse), in nats a token. A change that perplexity averages away shows here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import SourceError
from serve.measure.perplexity import LOSS_TOKENS


@dataclass
class Agreement:
    """Of each window: the share of positions with the same likeliest token, and the mean divergence in nats a token."""

    top1: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def add(self, dense: Tensor, sparse: Tensor) -> None:
        """Takes up one window: the logits [positions, vocabulary] of both models at the same positions.

        Memory beyond the two: float32 copies of `LOSS_TOKENS` rows.

        Raises:
            SourceError: the vocabularies differ.
        """
        if dense.shape != sparse.shape:
            raise SourceError(
                f"the models predict {dense.shape[-1]} and {sparse.shape[-1]} tokens; agreement is between models with "
                "one vocabulary (leave it out with --no-agreement)"
            )
        same, divergence = 0, 0.0
        for left, right in zip(dense.split(LOSS_TOKENS), sparse.split(LOSS_TOKENS), strict=True):
            right = right.to(left.device)
            same += int((left.argmax(-1) == right.argmax(-1)).sum())
            divergence += _divergence(left, right)
        self.top1.append(same / len(dense))
        self.kl.append(divergence / len(dense))


@torch.no_grad()
def _divergence(dense: Tensor, sparse: Tensor) -> float:
    """Sum over rows of KL(dense || sparse), of logits [rows, vocabulary]."""
    expected = dense.float().log_softmax(-1)
    found = sparse.float().log_softmax(-1)
    likely = expected.exp()
    # A token that is banned (a logit of minus infinity) has no share, and 0 * (-inf - -inf) would be NaN.
    terms = torch.where(likely > 0, likely * (expected - found), 0.0)
    return float(terms.sum(dtype=torch.float64))
