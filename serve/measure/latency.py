"""From the times of requests to figures, in the words of the field.

    TTFT    time to first token: from when the request was due (in a closed load: sent) to its first token
    TPOT    time per output token: from the first token to the last, by the tokens after the first
    ITL     inter-token latency: between an event with tokens and the next
    E2E     end to end: from there to its last token

Requests that failed have no latencies; they are counted. Percentiles are numpy's. Rates are of a round: what was answered
whole, by the time from its first request to the end of its last one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.errors import UsageError, did_you_mean
from serve.measure.generator import Outcome, Outcomes

TIMES = ("ttft", "tpot", "itl", "e2e")
RATES = ("requests_per_second", "output_tokens_per_second", "goodput_per_second")
PERCENTILES = (50, 90, 99)
_DIGITS = 7  # of a second: what is behind is noise


def times_of(outcome: Outcome) -> dict[str, list[float]]:
    """The latencies of a request that was answered, in seconds, by name. TPOT and ITL take two tokens."""
    first, last = outcome.tokens[0], outcome.tokens[-1]
    found = {"ttft": [first - outcome.intended], "tpot": [], "e2e": [last - outcome.intended]}
    if outcome.count > 1:
        found["tpot"] = [(last - first) / (outcome.count - 1)]
    found["itl"] = np.diff(outcome.tokens).tolist()
    return {name: [round(value, _DIGITS) for value in found[name]] for name in TIMES}


def limits(given: Sequence[str]) -> dict[str, float]:
    """``["ttft:500", "tpot:50"]``, in milliseconds, as seconds by name. Raises UsageError."""
    found: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition(":")
        known = [time for time in TIMES if time != "itl"]
        if name not in known:
            raise UsageError(f"--goodput {text!r}: no limit is set on {name!r}{did_you_mean(name, known)}")
        if name in found:
            raise UsageError(f"--goodput sets two limits on {name}; give the one that counts")
        try:
            found[name] = float(value) / 1e3
        except ValueError:
            found[name] = -1.0
        if not 0 < found[name] < float("inf"):
            raise UsageError(f"--goodput {text!r} is not NAME:MILLISECONDS, such as ttft:500")
    return found


def round_of(outcomes: Outcomes, goodput: Mapping[str, float], ramp_up: int = 0) -> dict[str, Any]:
    """One round: its samples, its statistics (``figures``), its rates, its errors, and each request as it went.

    The first ``ramp_up`` requests (`loads.Level`) have no part in the latencies, nor in the share of requests that are good.
    """
    answered = [outcome for outcome in outcomes.requests if outcome.error is None]
    errors = [outcome.error for outcome in outcomes.requests if outcome.error is not None]
    times = [times_of(outcome) for outcome in outcomes.requests[ramp_up:] if outcome.error is None]
    samples = {name: [value for one in times for value in one[name]] for name in TIMES}
    figures: dict[str, Any] = {name: _statistics(samples[name]) for name in TIMES if samples[name]}
    figures["requests_per_second"] = len(answered) / outcomes.seconds
    figures["output_tokens_per_second"] = sum(outcome.count for outcome in answered) / outcomes.seconds
    if goodput:
        good = sum(all(max(one[name], default=0.0) <= most for name, most in goodput.items()) for one in times)
        figures["goodput_per_second"] = figures["requests_per_second"] * (good / len(times) if times else 0.0)
    return {
        "seconds": outcomes.seconds,
        "generator_cpu_seconds": outcomes.cpu_seconds,
        "generator_late_seconds": max(outcome.late for outcome in outcomes.requests),
        "figures": figures,
        "samples": samples,
        "errors": errors,
        "requests": [_raw(outcome) for outcome in outcomes.requests],
    }


def _raw(outcome: Outcome) -> dict[str, Any]:
    raw: dict[str, Any] = {
        name: round(getattr(outcome, name), _DIGITS) for name in ("intended", "sent", "ended")
    }  # fmt: skip
    raw |= {"tokens": outcome.count, "events": [round(when, _DIGITS) for when in outcome.tokens]}
    return raw if outcome.error is None else {**raw, "error": outcome.error}


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all rounds of a load came to: samples of all requests with mean and percentiles, rates of each round."""
    found: dict[str, Any] = {}
    for name in TIMES:
        samples = [value for one in rounds for value in one["samples"][name]]
        if samples:
            found[f"{name}_seconds"] = {"samples": samples, **_statistics(samples)}
    for name in RATES:
        if all(name in one["figures"] for one in rounds):
            rates = [one["figures"][name] for one in rounds]
            found[name] = {"samples": rates, "mean": statistics.fmean(rates), "median": statistics.median(rates)}
    errors = [error for one in rounds for error in one["errors"]]
    found["requests"] = sum(len(one["requests"]) for one in rounds)
    found["errors"] = len(errors)
    if errors:
        found["first_error"] = errors[0]
    found["rounds"] = [{key: value for key, value in one.items() if key != "samples"} for one in rounds]
    return found


def _statistics(samples: Sequence[float]) -> dict[str, float]:
    values = np.asarray(samples, dtype=np.float64)
    percentiles = np.percentile(values, PERCENTILES)
    return {
        "mean": float(values.mean()),
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
    }
