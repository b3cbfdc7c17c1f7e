"""One sequence on its way through an engine: what it has, what it still waits for, and when it ends."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from serve.engines.base import Delta, SamplingParams, Sink, TokenLogprob
from serve.engines.text import StopScanner, TextStream, TokenPieces

if TYPE_CHECKING:
    from transformers import DynamicCache

PLANNED_TOKENS = 1024
"""Of an answer, that there has to be room for before it begins, and again each time it has come to as many."""


class Sequence:
    """The state of one submitted prompt. Only the engine's thread touches it, `cancelled` excepted."""

    def __init__(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        sink: Sink,
        *,
        pieces: TokenPieces,
        eos_ids: frozenset[int],
    ) -> None:
        self.prompt_ids = prompt_ids  # shared by all choices of one prompt, so nobody may change it
        self.params = params
        self.sink = sink
        self.cancelled = False
        self.ended = False

        self.generated: list[int] = []
        self.counts: Counter[int] = Counter()

        self.number = -1
        """In the order in which they began."""
        self.prefill_cache: DynamicCache | None = None
        self.prefill_ids: SequenceOf[int] = ()
        self.prefilled = 0
        self.prompt_logprobs: list[TokenLogprob] = []

        self._ends = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_ids
        self._pieces = pieces
        self._stop = StopScanner(params.stop)
        self._unreported: deque[tuple[int, TokenLogprob]] = deque()  # (where its text begins, logprob)

    # The next four take time or memory to make, which a sequence that only waits in the queue does not need.

    @cached_property
    def _text(self) -> TextStream:
        return TextStream(self._pieces, self.prompt_ids)

    @cached_property
    def generator(self) -> torch.Generator:
        """Its own random numbers."""
        generator = torch.Generator()
        if self.params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.params.seed)
        return generator

    @cached_property
    def seen(self) -> set[int]:
        """The tokens of the prompt and the generated ones."""
        return {*self.prompt_ids, *self.generated}

    @cached_property
    def bias(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Token ids, and what is added to their logits."""
        changes = self.params.logit_bias
        return (torch.tensor(list(changes)), torch.tensor(list(changes.values()))) if changes else None

    @property
    def planned_length(self) -> int:
        """Tokens that there has to be room for, prompt included: not to its end, which few come to that name no limit, but to the
        next multiple of `PLANNED_TOKENS` of its answer."""
        planned = PLANNED_TOKENS * (len(self.generated) // PLANNED_TOKENS + 1)
        return len(self.prompt_ids) + min(self.params.max_tokens, planned)

    @property
    def last_token(self) -> int:
        return self.generated[-1]

    def begin(self, cache: DynamicCache) -> None:
        """Starts to fill a cache with the prompt, and with what was generated, if the sequence had to make room before."""
        self.prefill_cache, self.prefilled = cache, 0
        # (the last token is the next one to go through the model)
        self.prefill_ids = [*self.prompt_ids, *self.generated[:-1]] if self.generated else self.prompt_ids

    def end_prefill(self) -> None:
        self.prefill_cache, self.prefill_ids = None, ()

    def push(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """Takes the next token and says what becomes visible by it."""
        self.generated.append(token)
        self.counts[token] += 1
        if self.params.repetition_penalty != 1:
            self.seen.add(token)
        if token in self._ends:
            return self._end("stop", self._stop.flush(), everything=True)
        if logprob is not None:
            self._unreported.append((self._stop.position, logprob))
        text, stopped = self._stop.push(self._text.push(token))
        if stopped:
            return self._end("stop", text, everything=False)
        if len(self.generated) >= self.params.max_tokens:
            return self._end("length", text + self._stop.flush(), everything=True)
        at, logprobs = self._report()
        return Delta(time.perf_counter(), text, logprobs, at, self._take_prompt_logprobs(), new_tokens=1)

    def push_nothing(self) -> Delta:
        """The end of a sequence that only wanted its prompt scored."""
        self.ended = True
        return Delta(time.perf_counter(), prompt_logprobs=self._take_prompt_logprobs(), finish_reason="length")

    def fail(self, message: str) -> Delta:
        self.ended = True
        return Delta(time.perf_counter(), error=message)

    def _end(self, reason: str, text: str, *, everything: bool) -> Delta:
        self.ended = True
        at, logprobs = self._report(everything=everything)
        return Delta(
            time.perf_counter(),
            text,
            logprobs,
            at,
            self._take_prompt_logprobs(),
            new_tokens=1,
            finish_reason="stop" if reason == "stop" else "length",
        )

    def _report(self, *, everything: bool = False) -> tuple[int, list[TokenLogprob]]:
        """The tokens whose text has begun to be shown, and where that of the first begins. Those of a stop string are never reported, so
        the reported tokens always make up the text."""
        at = self._unreported[0][0] if self._unreported else 0
        reported = []
        while self._unreported and (everything or self._unreported[0][0] < self._stop.released):
            reported.append(self._unreported.popleft()[1])
        return at, reported

    def _take_prompt_logprobs(self) -> list[TokenLogprob]:
        taken, self.prompt_logprobs = self.prompt_logprobs, []
        return taken
