"""From logits to tokens, each sequence by its own parameters and its own random numbers.

A sampled token is the point where the cumulative distribution passes one uniform number, which comes from the
sequence's own generator on the CPU. So a seeded request draws the same numbers whatever else is in the batch,
whichever device the model is on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from serve.engines.base import SamplingParams, TokenLogprob

# top_p first looks at this many of the likeliest tokens: sorting a whole vocabulary costs ten times as much,
# and they nearly always hold the mass that is asked for.
NUCLEUS_GUESS = 512


def next_tokens(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    counts: Sequence[Mapping[int, int]],
    generators: Sequence[torch.Generator],
) -> list[tuple[int, TokenLogprob | None] | None]:
    """Chooses the next token of each row of ``logits`` [rows, vocab] float32.

    ``counts`` says how often each token was generated in that row. Returns (token, its logprob if asked for),
    or None for a row that is not finite.
    """
    adjusted = [adjust(row, wish, seen) for row, wish, seen in zip(logits, params, counts, strict=True)]
    # A NaN anywhere in a row is its maximum, so this finds rows that are not finite on the way.
    best, greedy = zip(*(row.max(-1) for row in adjusted), strict=True)
    sane = torch.stack(best).isfinite().tolist()
    chosen = [
        sample(row, wish, generator) if fine and not wish.greedy else token
        for row, wish, generator, fine, token in zip(adjusted, params, generators, sane, greedy, strict=True)
    ]
    tokens = torch.stack(chosen)
    answers: list[tuple[int, TokenLogprob | None] | None] = []
    for row, (token, wish, fine) in enumerate(zip(tokens.tolist(), params, sane, strict=True)):
        logprob = None
        if wish.logprobs is not None:
            logprob = top_logprobs(logits[row : row + 1], tokens[row : row + 1], wish.logprobs)[0]
        answers.append((token, logprob) if fine else None)
    return answers


def adjust(logits: torch.Tensor, params: SamplingParams, counts: Mapping[int, int]) -> torch.Tensor:
    """Applies logit_bias and the penalties on tokens that were generated ``counts`` times.

    ``logits`` [vocab] float32 are not changed. Penalties as the OpenAI reference defines them:
    logit - count * frequency_penalty - (count > 0) * presence_penalty.
    """
    changes: dict[int, float] = dict(params.logit_bias)
    if params.frequency_penalty or params.presence_penalty:
        for token, count in counts.items():
            penalty = count * params.frequency_penalty + params.presence_penalty
            changes[token] = changes.get(token, 0.0) - penalty
    if not changes:
        return logits
    index = torch.tensor(list(changes), device=logits.device)
    return logits.index_add(0, index, torch.tensor(list(changes.values())).to(logits))


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """Draws one token id (a 0-d tensor) from ``logits`` [vocab] float32 by temperature, top_k and top_p."""
    # Drawn in any case, and in double precision: one number a token keeps seeded runs in step.
    uniform = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device)
    ids: torch.Tensor | None = None  # None while position and token id are the same
    logits = (logits - logits.max()) / params.temperature
    if 0 < params.top_k < logits.numel():
        logits, ids = logits.topk(params.top_k)
    probabilities = logits.softmax(-1)
    if params.top_p < 1:
        probabilities, order = _nucleus(probabilities, params.top_p)
        ids = order if ids is None else ids[order]
    cumulative = probabilities.double().cumsum(-1)
    position = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    position = position.clamp(max=cumulative.numel() - 1)
    return position if ids is None else ids[position]


def _nucleus(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest set of likeliest tokens whose mass reaches ``top_p``: (probabilities, positions)."""
    kept = min(NUCLEUS_GUESS, probabilities.numel())
    while True:
        values, order = probabilities.topk(kept)
        mass_before = values.cumsum(-1) - values
        keep = mass_before < top_p
        if not bool(keep[-1]) or kept == probabilities.numel():
            return values[keep], order[keep]
        kept = probabilities.numel()


def top_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[TokenLogprob]:
    """Log-softmax of ``logits`` [positions, vocab] at ``tokens`` [positions], with the ``top`` likeliest."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(top, logits.shape[1])) if top else (logprobs[:, :0], tokens[:, None][:, :0])
    return [
        TokenLogprob(token, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(
            tokens.tolist(), chosen, ids.tolist(), values.tolist(), strict=True
        )
    ]
