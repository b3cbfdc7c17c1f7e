"""What scoring a text asks of whatever runs the model: the engine in this process (here), or an endpoint (`endpoint`).

Both give the same numbers, because both are the same engine: a prompt is prefilled, and the log-probability of
each of its tokens is read off. In 16 bit, the last digits depend on what else is computed at the same time, so one
prompt is under way at a time unless ``concurrency`` says otherwise.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from compress.errors import HalveError, NumericalError
from serve.engines.base import Delta, SamplingParams
from serve.engines.directory import require_checkpoint

Done = Callable[[int], None]
"""Called with the number of prompts that are done."""


@dataclass(frozen=True)
class Scored:
    """Natural log-probabilities at the positions of a prompt from its second token on."""

    logprobs: list[float]
    """Of the prompt's own tokens."""
    best: list[float]
    """Of the likeliest token at each position."""


class Runner(Protocol):
    """Scores and continues prompts of token ids. A context manager: it holds a model or a connection."""

    max_length: int
    """The most tokens of a prompt; with what is generated after it, one more."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def score(self, prompts: Sequence[list[int]], done: Done = lambda count: None) -> list[Scored]:
        """Raises `HalveError` where a prompt cannot be scored, NumericalError where the model computes NaN."""
        ...

    def generate(
        self, jobs: Sequence[tuple[list[int], int, tuple[str, ...]]], done: Done = lambda count: None
    ) -> list[str]:
        """Greedy continuations of (prompt, most tokens, stop strings); the stop string is not part of them."""
        ...


class EngineRunner:
    """The engine that `halve serve` runs, in this process.

    Raises:
        SourceError: ``directory`` is no checkpoint; CorruptCheckpointError: it is damaged.
    """

    def __init__(self, directory: Path, *, device: str = "auto", concurrency: int = 1) -> None:
        require_checkpoint(str(directory))
        from serve.engines.transformers import TransformersEngine

        self._concurrency = concurrency
        self._engine: Any = TransformersEngine(str(directory), max_num_seqs=concurrency, device=device)

    def __enter__(self) -> Self:
        self._engine.load()
        self.max_length = self._engine.max_model_len - 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()
        self._engine.model = None  # the thread's frame may live on for a moment, the weights need not

    def score(self, prompts: Sequence[list[int]], done: Done = lambda count: None) -> list[Scored]:
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=1)
        scored = []
        for number, deltas in enumerate(self._run((prompt, params) for prompt in prompts)):
            entries = [entry for delta in deltas for entry in delta.prompt_logprobs]
            logprobs = [entry.logprob for entry in entries]
            scored.append(finite(Scored(logprobs, [entry.top[0][1] for entry in entries]), number))
            done(len(scored))
        return scored

    def generate(
        self, jobs: Sequence[tuple[list[int], int, tuple[str, ...]]], done: Done = lambda count: None
    ) -> list[str]:
        texts = []
        for deltas in self._run(
            (prompt, SamplingParams(max_tokens=most, temperature=0, stop=stop)) for prompt, most, stop in jobs
        ):
            texts.append("".join(delta.text for delta in deltas))
            done(len(texts))
        return texts

    def _run(self, jobs: Iterable[tuple[list[int], SamplingParams]]) -> Iterator[list[Delta]]:
        """The deltas of each job, in order; at most ``concurrency`` jobs are under way."""
        under_way: deque[queue.SimpleQueue[Delta]] = deque()
        for prompt, params in jobs:
            if len(under_way) == self._concurrency:
                yield _all(under_way.popleft())
            inbox: queue.SimpleQueue[Delta] = queue.SimpleQueue()
            self._engine.submit(prompt, params, inbox.put)
            under_way.append(inbox)
        while under_way:
            yield _all(under_way.popleft())


def _all(inbox: queue.SimpleQueue[Delta]) -> list[Delta]:
    deltas = [inbox.get()]
    while not deltas[-1].last:
        deltas.append(inbox.get())
    if deltas[-1].error is not None:
        raise HalveError(deltas[-1].error)
    return deltas


def finite(scored: Scored, number: int) -> Scored:
    """The same scores. Raises NumericalError where one is NaN."""
    if any(value != value for value in (*scored.logprobs, *scored.best)):
        raise NumericalError(
            f"prompt {number}: the model's outputs are not finite; `halve verify` looks at its weights"
        )
    return scored
