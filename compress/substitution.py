"""Calibration windows in which some tokens stand for others, so that what is fitted meets the whole vocabulary.

A text that is short enough to calibrate on lacks much of a vocabulary, and with it whole fields: code, names, the line ends of
another layout. Nothing that is fitted to it holds the model to the dense one there. So in every second window some of the tokens
that occur are exchanged for others, each for the same one wherever it stands in the window: where the text repeats itself, the
window still does. The sense is lost, but nothing here needs sense: the dense model says for any input what is right.

Easy data augmentation exchanges words for synonyms (Wei & Zou 2019, arXiv 1901.11196), for labels that have to stay true; here
any token will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compress.seeds import named_seed


def substitute(windows: Tensor, share: float, candidates: Tensor, seed: int) -> Tensor:
    """The windows, every second one (the first, the third ...) with tokens exchanged.

    Args:
        windows: token ids [n, length] int64.
        share: of the different tokens of a window that are exchanged, in 0 to 1.
        candidates: ids that may be exchanged and may come in [c] int64; all of them come in before one does twice. Whatever is
            not among them stays.
        seed: of the recipe.

    Returns:
        [n, length] int64, new.
    """
    result = windows.clone()
    generator = torch.Generator().manual_seed(named_seed(seed, "substitute"))
    others = _in_turns(candidates, generator)
    for window in result[::2]:
        kinds, kind_at = window.unique(return_inverse=True)
        exchangeable = torch.isin(kinds, candidates).nonzero().flatten()
        count = round(share * len(exchangeable))
        chosen = exchangeable[torch.randperm(len(exchangeable), generator=generator)[:count]]
        for kind in chosen.tolist():
            kinds[kind] = next(others)
        window.copy_(kinds[kind_at])
    return result


def exchangeable_tokens(tokenizer: Any, vocabulary: int | None) -> Tensor:
    """Ids of the tokens that stand for text [c] int64: none that were added to the tokenizer's own, which open a turn or stand for
    an image, and none that the model does not know.

    Args:
        tokenizer: of transformers.
        vocabulary: how many tokens the model knows; None where it does not say.
    """
    apart = {*getattr(tokenizer, "added_tokens_decoder", ()), *tokenizer.all_special_ids}
    known = len(tokenizer) if vocabulary is None else min(len(tokenizer), vocabulary)
    return torch.tensor([token for token in range(known) if token not in apart], dtype=torch.int64)


def _in_turns(values: Tensor, generator: torch.Generator) -> Iterator[int]:
    """All of them in a random order, again and again."""
    while len(values):
        yield from values[torch.randperm(len(values), generator=generator)].tolist()
