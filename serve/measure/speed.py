"""Prefill and decode times of models in one process, interleaved, as ratios with their spread.

Machines drift: a core is throttled, a neighbour wakes up. So every round measures each model once, in turn
(the order alternates), and what is reported is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import CalibrationError, SourceError

CACHES = ("past_key_values", "cache_params")
"""How models call what they keep from one token to the next: keys and values, or a state."""


@dataclass
class Speed:
    """Seconds of every round: ``prefill`` of the whole prompt, and ``decode`` of one token (the mean of a round)."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def measure_speed(
    models: dict[str, PreTrainedModel],
    *,
    prompt: int,
    output: int,
    batch: int = 1,
    rounds: int = 5,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Speed]:
    """Times greedy generation of every model on the same random prompt; one round is thrown away as warm-up.

    Args:
        models: by name; all on one device.
        prompt: tokens of the prompt.
        output: tokens that are decoded one by one after it.
        batch: sequences at once.

    Raises:
        CalibrationError: prompt and output together are longer than a model can read.
    """
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    for name, model in models.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and prompt + output > limit:
            raise CalibrationError(f"{name} reads at most {limit} tokens, and prompt and output have {prompt + output}")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (batch, prompt), generator=generator)
    results = {name: Speed() for name in models}
    for turn in range(rounds + 1):
        order = list(models) if turn % 2 else list(reversed(models))
        for name in order:
            prefill, decode = _generate(models[name], tokens, output)
            if turn:
                results[name].prefill.append(prefill)
                results[name].decode.append(decode)
        progress(turn, rounds, "warm-up" if not turn else f"round {turn}")
    return results


def ratio(sparse: list[float], dense: list[float]) -> dict[str, float]:
    """How many times faster ``sparse`` is, from times of the same rounds: the median, and the quartiles as its spread."""
    ratios = [slow / fast for slow, fast in zip(dense, sparse, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": middle, "p25": low, "p75": high}


@torch.no_grad()
def _generate(model: PreTrainedModel, tokens: Tensor, output: int) -> tuple[float, float]:
    """Seconds of the prefill, and of one decoded token."""
    tokens = tokens.to(model.device)
    synchronize(model.device)
    start = time.perf_counter()
    result = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    token = result.logits[:, -1:].argmax(dim=-1)
    synchronize(model.device)
    middle = time.perf_counter()
    cache = next((name for name in CACHES if result.get(name) is not None), None)
    if cache is None:
        raise SourceError(
            f"{type(model).__name__} keeps nothing from one token to the next, so its decoding has no time"
        )
    for _ in range(output):
        result = model(input_ids=token, use_cache=True, **{cache: result[cache]})
        token = result.logits[:, -1:].argmax(dim=-1)
    synchronize(model.device)
    return middle - start, (time.perf_counter() - middle) / output


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
