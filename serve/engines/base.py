"""What the endpoint asks of an engine, and the plain data that passes between them.

An engine owns the model and decides what runs when. The endpoint hands it prompts as token ids and gets
`Delta`s back through a callback, one a token, from whatever thread the engine runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from compress.errors import HalveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]
MAX_LOGPROBS = 20
COLDEST = 2.0**-126
"""The smallest normal float32: logits cannot be divided by less."""


class EngineDeadError(HalveError):
    """The engine stopped working and cannot take requests; the process has to be started again."""


class EngineBusyError(HalveError):
    """So many sequences wait that the engine takes no more for now."""


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is generated. The defaults change nothing: plain sampling from the model."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy, and so is what is below `COLDEST`."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one's probability are left out; 0 keeps all."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt and the answer are divided by it where positive, else multiplied."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """How many alternatives to report beside each generated token; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt. With ``max_tokens=0`` this scores a prompt."""

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities at one position, from the model's own distribution (before temperature,
    penalties and truncation)."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()
    """The likeliest (token id, logprob), best first."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sequence. The last one carries `finish_reason` or `error`."""

    time: float
    """`time.perf_counter()` when the step ended."""
    text: str = ""
    """Ready text: whole characters, and nothing that may turn out to begin a stop string."""
    logprobs: Sequence[TokenLogprob] = ()
    """The tokens that `text` is made of, when they were asked for."""
    logprobs_at: int = 0
    """Where the text of the first of them begins, in characters of the answer: before `text` where that was held back."""
    prompt_logprobs: Sequence[TokenLogprob] = ()
    """For prompt tokens 1, 2, ...: the first token has no prediction."""
    new_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


Sink = Callable[[Delta], None]


class Ticket(Protocol):
    """Names a submitted request; all that can be done with it is to give it back to `Engine.cancel`."""


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and what is going on now."""

    running: int
    waiting: int
    kv_cache_usage: float
    """Reserved part of the key/value budget, 0 to 1."""
    prompt_tokens: int
    generation_tokens: int
    weight_bytes: int
    """Parameters and buffers as they are held in memory."""
    kv_cache_bytes: int
    """The budget of keys and values: the most that they may take."""
    backends: Sequence[Mapping[str, Any]] = ()
    """Which backend multiplies how many layers, and why: ``phase``, ``backend``, ``reason``, ``layers``."""
    preemptions: int = 0
    """How often a sequence had to make room for others, and was prefilled again later."""


class Engine(Protocol):
    """An engine, as the endpoint sees it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def max_model_len(self) -> int:
        """The most tokens, prompt and generated together, that one sequence may have."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def default_sampling(self) -> Mapping[str, float]:
        """What the checkpoint recommends for requests that say nothing else, by the names of `ranges.Advice`."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, or None while it works."""
        ...

    def load(self) -> None:
        """Reads the model and starts to take requests. Raises a `HalveError` that says what is wrong."""
        ...

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, sink: Sink) -> Ticket:
        """Queues a sequence. ``sink`` is called from the engine's thread and must not block.

        Raises `EngineDeadError` or `EngineBusyError`. The caller has checked that prompt and ``max_tokens`` fit `max_model_len`.
        """
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Stops a sequence within a step or two and frees its cache. Harmless if it has ended."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Stops the engine; requests that are under way fail with an error."""
        ...
