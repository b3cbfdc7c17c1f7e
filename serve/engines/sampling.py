"""From logits to tokens, each sequence by its own parameters and its own random numbers.

A sampled token is the point where the cumulative distribution passes one uniform number, which comes from the
sequence's own generator on the CPU. So a seeded request draws the same numbers whatever else is in the batch,
whichever device the model is on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TypeVar

import torch

from serve.engines.base import SamplingParams, TokenLogprob
from serve.engines.sequence import Sequence

log = logging.getLogger("halve.serve")
Result = TypeVar("Result")

# top_p first looks at this many of the likeliest tokens: sorting a whole vocabulary costs ten times as much,
# and they nearly always hold the mass that is asked for.
NUCLEUS_GUESS = 512


def next_tokens(logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[tuple[int, TokenLogprob | None] | str]:
    """Chooses the next token of each sequence from its row of ``logits`` [rows, vocab] float32.

    Returns (token, its logprob if asked for), or why that sequence fails: the others go on.
    """
    failed: dict[int, str] = {}

    def attempt(row: int, step: Callable[[], Result]) -> Result | None:
        try:
            return step()
        except Exception as error:  # one request's parameters are no reason to fail the whole batch
            log.exception("A token cannot be chosen.")
            failed[row] = f"The next token cannot be chosen: {type(error).__name__}: {error}"
            return None

    adjusted: list[torch.Tensor] = []
    for row, sequence in enumerate(sequences):
        changed = attempt(row, lambda row=row, sequence=sequence: adjust(logits[row], sequence))
        adjusted.append(logits[row] if changed is None else changed)
    # A NaN anywhere in a row is its maximum, so this finds rows that are not finite on the way.
    best, greedy = zip(*(row.max(-1) for row in adjusted), strict=True)
    for row, fine in enumerate(torch.stack(best).isfinite().tolist()):
        if not fine:
            failed.setdefault(row, "The model computed NaN or infinity for this prompt.")
    chosen = list(greedy)
    for row, sequence in enumerate(sequences):
        if row not in failed and not sequence.params.greedy:
            drawn = attempt(row, lambda row=row, s=sequence: sample(adjusted[row], s.params, s.generator))
            chosen[row] = greedy[row] if drawn is None else drawn
    tokens = torch.stack(chosen)
    answers: list[tuple[int, TokenLogprob | None] | str] = []
    for row, (token, sequence) in enumerate(zip(tokens.tolist(), sequences, strict=True)):
        logprob = None
        if sequence.params.logprobs is not None and row not in failed:
            logprob = top_logprobs(logits[row : row + 1], tokens[row : row + 1], sequence.params.logprobs)[0]
        answers.append(failed.get(row, (token, logprob)))
    return answers


def adjust(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Applies logit_bias and the penalties to ``logits`` [vocab] float32, which are not changed.

    In vLLM's order. The repetition penalty (CTRL, arXiv:1909.05858, with transformers' sign rule) divides the logits
    of tokens that were seen where they are positive, else multiplies them. The others are as the OpenAI reference
    defines them: logit - count * frequency_penalty - (count > 0) * presence_penalty, of generated tokens.
    """
    params = sequence.params
    if sequence.bias is not None:
        index, values = sequence.bias
        logits = logits.index_add(0, index.to(logits.device), values.to(logits))
    if params.repetition_penalty != 1 and sequence.seen:
        index = torch.tensor(list(sequence.seen), device=logits.device)
        old = logits[index]
        new = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
        logits = logits.index_copy(0, index, new)
    if params.frequency_penalty or params.presence_penalty:
        index = torch.tensor(list(sequence.counts), dtype=torch.long, device=logits.device)
        counts = torch.tensor(list(sequence.counts.values())).to(logits)
        logits = logits.index_add(0, index, -(counts * params.frequency_penalty + params.presence_penalty))
    return logits


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> torch.Tensor:
    """Draws one token id (a 0-d tensor) from ``logits`` [vocab] float32 by temperature, min_p, top_k and top_p, in
    vLLM's order: the mass that top_p counts is of what min_p and top_k left."""
    # Drawn in any case, and in double precision: one number a token keeps seeded runs in step.
    uniform = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device)
    ids: torch.Tensor | None = None  # None while position and token id are the same
    logits = (logits - logits.max()) / params.temperature
    if params.min_p > 0:  # the likeliest has exp(0) = 1, so exp is the share of its probability
        logits = logits.masked_fill(logits.exp() < params.min_p, -torch.inf)
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
    """The smallest set of likeliest tokens whose mass reaches ``top_p``, at least one: (probabilities, positions)."""
    kept = min(NUCLEUS_GUESS, probabilities.numel())
    while True:
        values, order = probabilities.topk(kept)
        mass_before = values.cumsum(-1) - values
        keep = mass_before < top_p
        keep[0] = True  # as float32, a tiny top_p is no more than the mass before the first
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
