"""From the times of requests to figures, in the words of the field.

    TTFT    time to first token: from when the request was due (in a closed load: sent) to its first token
    TPOT    time per output token: from the first token to the last, by the tokens after the first
    ITL     inter-token latency: between an event with tokens and the next
    E2E     end to end: from there to its last token

Requests that failed count as longer than all others (`requests`). Percentiles are numpy's. Rates are of a round: what was
answered whole, by the time from its first request to the end of its last one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import UsageError, did_you_mean
from serve.measure.outcomes import Outcome, Outcomes
from serve.measure.requests import DIGITS, TIMES, described, samples_of, times_of, too_many_failed

RATES = ("requests_per_second", "output_tokens_per_second", "goodput_per_second")


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
    requests = [_raw(outcome) for outcome in outcomes.requests]
    for request in requests[:ramp_up]:
        request["ramp_up"] = True
    answered = [request for request in requests if "error" not in request]
    samples = samples_of(requests)
    figures: dict[str, Any] = {name: described(samples[name]) for name in TIMES if _any_answered(samples[name])}
    figures["requests_per_second"] = len(answered) / outcomes.seconds
    figures["output_tokens_per_second"] = sum(request["tokens"] for request in answered) / outcomes.seconds
    if goodput:
        times = [times_of(request) for request in answered if not request.get("ramp_up")]
        good = sum(all(max(one[name], default=0.0) <= most for name, most in goodput.items()) for one in times)
        figures["goodput_per_second"] = figures["requests_per_second"] * (good / len(times) if times else 0.0)
    return {
        "seconds": outcomes.seconds,
        "generator_cpu_seconds": outcomes.cpu_seconds,
        "generator_late_seconds": max(outcome.late for outcome in outcomes.requests),
        "figures": figures,
        "samples": samples,
        "errors": [request["error"] for request in requests if "error" in request],
        "requests": requests,
    }


def _raw(outcome: Outcome) -> dict[str, Any]:
    raw: dict[str, Any] = {
        name: round(getattr(outcome, name), DIGITS) for name in ("intended", "sent", "ended")
    }  # fmt: skip
    raw |= {"tokens": outcome.count, "events": [round(when, DIGITS) for when in outcome.tokens]}
    if outcome.resent:
        raw["resent"] = outcome.resent
    return raw if outcome.error is None else {**raw, "error": outcome.error}


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all rounds of a load came to: mean and percentiles of all requests, samples of the answered ones, rates of rounds.

    A mean or percentile that is not defined, because requests failed, is None.
    """
    found: dict[str, Any] = {}
    for name in TIMES:
        samples = [value for one in rounds for value in one["samples"][name]]
        if _any_answered(samples):
            finite = [value for value in samples if math.isfinite(value)]
            found[f"{name}_seconds"] = {"samples": finite, **described(samples)}
    for name in RATES:
        if all(name in one["figures"] for one in rounds):
            rates = [one["figures"][name] for one in rounds]
            found[name] = {"samples": rates, "mean": statistics.fmean(rates), "median": statistics.median(rates)}
    errors = [error for one in rounds for error in one["errors"]]
    found["requests"] = sum(len(one["requests"]) for one in rounds)
    found["errors"] = len(errors)
    if errors:
        found["first_error"] = errors[0]
    if resent := sum(request.get("resent", 0) for one in rounds for request in one["requests"]):
        found["resent"] = resent
    found["rounds"] = [{key: value for key, value in one.items() if key != "samples"} for one in rounds]
    return found


def failing(rounds: Sequence[Mapping[str, Any]]) -> bool:
    """Whether so many requests of a load failed that its figures are not to be compared."""
    return too_many_failed(sum(len(one["errors"]) for one in rounds), sum(len(one["requests"]) for one in rounds))


def failures(document: Mapping[str, Any]) -> list[str]:
    """The loads of a bench of which too many requests failed, in words."""
    return [
        f"{load['errors']} of {load['requests']} requests of {label} failed on the {name} side"
        for name, model in document["models"].items()
        for label, load in model["loads"].items()
        if too_many_failed(load["errors"], load["requests"])
    ]


def _any_answered(samples: Sequence[float]) -> bool:
    return any(map(math.isfinite, samples))
