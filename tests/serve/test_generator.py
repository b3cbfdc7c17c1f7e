"""The load generator against an endpoint whose delays are known: what it measures, and when it sends."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from serve.measure.clock import new_event_loop
from serve.measure.generator import Generator
from serve.measure.latency import limits, round_of, summary
from serve.measure.outcomes import Ask, Load, Outcomes
from serve.measure.requests import TIMES
from tests.serve.mocks import mock_endpoint

pytestmark = pytest.mark.alone

TTFT, ITL = 0.4, 0.06


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with Generator() as running:
        yield running


def ask(number: int, output: int, due: float | None = None) -> Ask:
    body = {
        "model": "mock", "prompt": [number] * 16, "max_tokens": output, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return Ask(json.dumps(body).encode(), output, due)


def asks(count: int, output: int, dues: Sequence[float] | None = None) -> list[Ask]:
    return [ask(number, output, None if dues is None else dues[number]) for number in range(count)]


@pytest.mark.parametrize(("concurrency", "count", "output"), [(1, 3, 8), (32, 64, 16)])
def test_what_it_was_told_is_measured_within_3_percent(
    generator: Generator, concurrency: int, count: int, output: int
) -> None:
    """Another program may hold the processor for a while, but hardly three times."""
    for _ in range(3):
        with mock_endpoint("--ttft", TTFT, "--itl", ITL) as mock:
            outcomes = generator(Load(mock.completions, asks(count, output), concurrency))
            truth = {request["prompt"][0]: request for request in mock.truth}
        found = round_of(outcomes, {})
        figures = found["figures"]
        assert found["errors"] == []
        told = {"ttft": TTFT, "tpot": ITL, "itl": ITL, "e2e": TTFT + (output - 1) * ITL}
        off = {(name, of): figures[name][of] / told[name] - 1 for name in told for of in ("mean", "p50")}
        # Every token of every request, against when it was really sent: the clock is the machine's.
        added = []
        for number, outcome in enumerate(outcomes.requests):
            assert len(outcome.tokens) == output
            sent = np.asarray(truth[number]["sent"]) - truth[number]["arrived"]
            added += (np.asarray(outcome.tokens) - outcome.sent - sent).tolist()
        if max(map(abs, off.values())) < 0.03 and np.median(added) < 0.003:
            break
    assert off == pytest.approx(dict.fromkeys(off, 0.0), abs=0.03)
    assert 0 <= np.median(added) < 0.003


def test_so_many_are_under_way(generator: Generator) -> None:
    with mock_endpoint("--ttft", 0.1, "--itl", 0.01) as mock:
        outcomes = generator(Load(mock.completions, asks(12, 4), 3))
        truth = mock.truth
    ends = [request["sent"][-1] for request in truth]
    under_way = [
        sum(other["arrived"] <= request["arrived"] < end for other, end in zip(truth, ends, strict=True))
        for request in truth
    ]
    assert max(under_way) == 3
    assert [outcome.error for outcome in outcomes.requests] == [None] * 12
    assert outcomes.seconds == pytest.approx(4 * 0.13, rel=0.15)


def test_percentiles_are_those_of_numpy(generator: Generator) -> None:
    with mock_endpoint("--ttft", 0.05, "--itl", 0.01) as mock:
        rounds = [
            round_of(generator(Load(mock.completions, asks(9, 5, np.linspace(0, 0.3, 9).tolist()))), {})
            for _ in range(2)
        ]  # fmt: skip
    found = summary(rounds)
    raw = [request for one in found["rounds"] for request in one["requests"]]
    by_hand = {
        "ttft": [request["events"][0] - request["intended"] for request in raw],
        "tpot": [(request["events"][-1] - request["events"][0]) / 4 for request in raw],
        "itl": [gap for request in raw for gap in np.diff(request["events"])],
        "e2e": [request["events"][-1] - request["intended"] for request in raw],
    }
    for name in TIMES:
        figure = found[f"{name}_seconds"]
        assert figure["samples"] == pytest.approx(by_hand[name], abs=3e-7)
        assert figure["mean"] == pytest.approx(np.mean(figure["samples"]))
        for percent in (50, 90, 99):
            assert figure[f"p{percent}"] == np.percentile(figure["samples"], percent)
    assert found["requests"] == 18


def test_an_open_load_counts_from_the_intended_start(generator: Generator) -> None:
    """While the endpoint stalls, requests go on to be due, and wait: their latency says so (coordinated omission)."""
    dues = [0.05 * number for number in range(20)]
    with mock_endpoint("--ttft", 0.05, "--itl", 0.01, "--stall", 0.325, 0.5) as mock:
        outcomes = generator(Load(mock.completions, asks(20, 2, dues)))
    assert [outcome.intended for outcome in outcomes.requests] == pytest.approx(dues, abs=1e-6)
    ttft = [outcome.tokens[0] - outcome.intended for outcome in outcomes.requests]
    begin = outcomes.requests[0].sent  # the mock counts from its first request
    expected = [
        begin + 0.825 - due if begin + 0.325 <= due + 0.05 < begin + 0.825 else 0.05 for due in dues
    ]  # fmt: skip  (the stall begins and ends between two answers, so that no answer is on its edge)
    assert ttft == pytest.approx(expected, abs=0.03)
    assert max(ttft) > 0.4
    # A generator that waits for answers before it sends would have sent few in the stall, and none of them late.
    assert sum(value > 0.1 for value in ttft) >= 8


def test_a_late_generator_does_not_flatter(generator: Generator) -> None:
    """Requests that were due long ago are sent at once, and what they waited is part of their latency."""
    with mock_endpoint("--ttft", 0.05) as mock:
        outcomes = generator(Load(mock.completions, asks(4, 1, [-0.4, -0.4, 0.0, 0.1])))
    ttft = [outcome.tokens[0] - outcome.intended for outcome in outcomes.requests]
    assert ttft == pytest.approx([0.4, 0.4, 0.05, 0.05], abs=0.06)
    assert min(ttft[:2]) > 0.39
    assert round_of(outcomes, {})["generator_late_seconds"] > 0.3


def failures(generator: Generator, *mock: str | float, count: int = 4, timeout: float = 30.0) -> Outcomes:
    with mock_endpoint("--ttft", 0.02, "--itl", 0.005, *mock) as running:
        return generator(Load(running.completions, asks(count, 6), 2, timeout=timeout))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("garbage", "it sent something that is no event of a completion"),
        ("early", "it hung up after 4 pieces"),
        ("status", "it refused (500): the mock fails as it was told"),
        ("error", "it broke off with an error: the engine died"),
        ("short", "it gave 3 tokens where 6 were asked for"),
    ],
)
def test_faults_are_counted(generator: Generator, fault: str, told: str) -> None:
    """Every second request fails; the others are measured as ever."""
    outcomes = failures(generator, "--fault", fault, "--every", 2)
    errors = [outcome.error for outcome in outcomes.requests if outcome.error is not None]
    assert len(errors) == 2
    assert all(told.split(" after ")[0] in error for error in errors), errors
    found = summary([round_of(outcomes, {})])
    assert (found["requests"], found["errors"], found["first_error"]) == (4, 2, errors[0])
    assert len(found["ttft_seconds"]["samples"]) == 2
    assert len(found["itl_seconds"]["samples"]) == 2 * 5


def test_an_answer_that_never_ends(generator: Generator) -> None:
    started = time.monotonic()
    outcomes = failures(generator, "--fault", "hang", "--every", 2, timeout=0.5)
    errors = [outcome.error for outcome in outcomes.requests if outcome.error is not None]
    assert errors == ["it did not end its answer within 0.5 s"] * 2
    assert time.monotonic() - started < 10


def test_usage_that_is_not_told(generator: Generator) -> None:
    outcomes = failures(generator, "--fault", "unmeasured")
    assert [(outcome.error, outcome.count) for outcome in outcomes.requests] == [(None, 6)] * 4


def test_nobody_there(generator: Generator) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/completions"
        outcomes = generator(Load(url, asks(3, 2), 2))
    assert all("it cannot be reached" in (outcome.error or "") for outcome in outcomes.requests)


def test_goodput(generator: Generator) -> None:
    with mock_endpoint("--ttft", 0.05, "--itl", 0.01, "--stall", 0.0, 0.3) as mock:
        outcomes = generator(Load(mock.completions, asks(6, 3), 2))
    assert limits(["ttft:200", "tpot:50"]) == {"ttft": 0.2, "tpot": 0.05}
    found = round_of(outcomes, limits(["ttft:200", "tpot:50"]))
    good = sum(outcome.tokens[0] - outcome.intended <= 0.2 for outcome in outcomes.requests)
    assert good == 4  # the first two waited for the stall to end
    assert found["figures"]["goodput_per_second"] == pytest.approx(4 / outcomes.seconds)
    assert round_of(outcomes, limits(["e2e:1"]))["figures"]["goodput_per_second"] == 0


def test_timers_are_exact() -> None:
    """epoll alone comes up to a millisecond late."""
    loop = new_event_loop()
    late = []
    for _ in range(40):
        due = loop.time() + 0.0032
        loop.call_at(due, lambda due=due: (late.append(loop.time() - due), loop.stop()))
        loop.run_forever()
    loop.close()
    assert min(late) >= 0
    assert np.median(late) < 0.0004


def test_the_generator_says_what_it_costs(generator: Generator) -> None:
    with mock_endpoint("--ttft", 0.02) as mock:
        outcomes = generator(Load(mock.completions, asks(20, 1, np.linspace(0, 1, 20).tolist())))
    assert 0 < outcomes.cpu_seconds < 0.2 * outcomes.seconds
