"""What a request that was sent says of latency, and how those that failed count.

A request as it stands in a document has ``intended`` (what its latency counts from), ``events`` (when each event with tokens
came), ``tokens`` (how many there were), ``error`` if it failed, and ``ramp_up`` if it only brought the load up; times are in
seconds from the beginning of its round.

A request that failed is right-censored: its latency is not known, only that it is longer than any that was waited for. So it
counts in percentiles as larger than all of the others, and a percentile that lies among those that failed is not defined, nor
is a mean. To leave failures out would make the side that fails most the fastest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TIMES = ("ttft", "tpot", "itl", "e2e")
PERCENTILES = (50, 90, 99)
MOST_FAILED = 0.05
"""Above this share of failed requests, a load has no figures to compare: what was answered is not what was asked for."""
DIGITS = 7  # of a second: what is behind is noise


def times_of(request: Mapping[str, Any]) -> dict[str, list[float]]:
    """The latencies of a request that was answered, in seconds, by name. TPOT and ITL take two tokens."""
    events, count = request["events"], request["tokens"]
    first, last = events[0], events[-1]
    found = {"ttft": [first - request["intended"]], "tpot": [], "e2e": [last - request["intended"]]}
    if count > 1:
        found["tpot"] = [(last - first) / (count - 1)]
    found["itl"] = np.diff(events).tolist()
    return {name: [round(value, DIGITS) for value in found[name]] for name in TIMES}


def samples_of(requests: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The latencies of a round by name: of those that were answered, and then infinities for those that failed; without those
    that only brought the load up.

    A failed request stands for as many gaps between tokens as one that was answered has on average.
    """
    requests = [request for request in requests if not request.get("ramp_up")]
    times = [times_of(request) for request in requests if request.get("error") is None]
    failed = len(requests) - len(times)
    found = {name: [value for one in times for value in one[name]] for name in TIMES}
    gaps = round(failed * len(found["itl"]) / len(times)) if times else 0
    return {name: found[name] + [math.inf] * (gaps if name == "itl" else failed) for name in TIMES}


def percentile(samples: Sequence[float], percent: float) -> float:
    """numpy's; infinite where it lies among infinite samples."""
    values = np.asarray(samples, dtype=np.float64)
    answered = values[np.isfinite(values)]
    if math.ceil((len(values) - 1) * percent / 100) >= len(answered):
        return math.inf
    values[np.isinf(values)] = answered.max()  # what is behind the percentile does not matter to it, but inf * 0 does
    return float(np.percentile(values, percent))


def described(samples: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles; None where one is not defined."""
    found = {"mean": float(np.mean(samples)), **{f"p{p}": percentile(samples, p) for p in PERCENTILES}}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def too_many_failed(failed: int, requests: int) -> bool:
    return failed > MOST_FAILED * requests
