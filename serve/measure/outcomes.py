"""What the load generator is asked to send, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """One request: its JSON, the tokens that its answer has to have, and, in an open load, when it is due (seconds)."""

    body: bytes
    output: int
    due: float | None = None


@dataclass(frozen=True)
class Load:
    """``concurrency`` None: an open load, whose requests are all due at their times.

    ``url`` is that of the completions; ``timeout``: seconds for a whole answer, from when its request was due, or could have
    been sent.
    """

    url: str
    asks: Sequence[Ask]
    concurrency: int | None = None
    api_key: str | None = None
    timeout: float = 300.0


@dataclass(frozen=True)
class Outcome:
    """One request, in seconds from the load's beginning. ``error`` None: it was answered, whole.

    ``intended``: what its latency counts from: when it was due, or, in a closed load, which has no due times, when it was
    sent (for the first time). ``late``: what the generator itself took from when it could have been sent until it was.
    ``tokens``: when each event with tokens came; ``count``: how many tokens there were. ``resent``: how often it was sent again,
    as its connection had been closed just then.
    """

    intended: float
    sent: float
    late: float
    ended: float
    tokens: list[float]
    count: int
    error: str | None = None
    resent: int = 0


@dataclass(frozen=True)
class Outcomes:
    """In the order of the requests. ``cpu_seconds``: what the generator itself used while the load ran."""

    requests: list[Outcome]
    seconds: float
    cpu_seconds: float
