"""What several tests of `serve` need."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serve.engines.base import Delta, Engine, SamplingParams


def greedy(max_tokens: int, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **fields)  # type: ignore[arg-type]


def collect(engine: Engine, jobs: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[list[Delta]]:
    """Runs all jobs at the same time and returns the deltas of each."""
    inboxes: list[queue.Queue[Delta]] = []
    for prompt, params in jobs:
        inbox: queue.Queue[Delta] = queue.Queue()
        engine.submit(prompt, params, inbox.put)
        inboxes.append(inbox)
    results = []
    for inbox in inboxes:
        deltas = [inbox.get(timeout=30)]
        while not deltas[-1].last:
            deltas.append(inbox.get(timeout=30))
        results.append(deltas)
    return results


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas: Sequence[Delta]) -> list[int]:
    return [entry.token_id for delta in deltas for entry in delta.logprobs]


def metrics(base_url: str) -> dict[str, float]:
    """All samples of /metrics by name, or by name and finished_reason."""
    answer = httpx.get(base_url.removesuffix("/v1") + "/metrics")
    answer.raise_for_status()
    samples = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            reason = sample.labels.get("finished_reason")
            samples[f"{sample.name}[{reason}]" if reason else sample.name] = sample.value
    return samples


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
