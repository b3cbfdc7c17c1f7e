"""What is sent and when: arrivals, traces, prompts, and what of it is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from compress.errors import UsageError
from serve.measure.generator import Outcome, Outcomes
from serve.measure.latency import limits, round_of
from serve.measure.loads import Shape, asks, levels, poisson, replay

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
2023-11-16 18:16:51.2224670,10,5
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_arrivals_at_random_are_poisson() -> None:
    level = poisson(4.0, requests=4000, prompt=8, output=2)
    dues = [shape.due for shape in level.shapes(np.random.default_rng(1))]
    gaps = np.diff([0.0, *dues])  # type: ignore[list-item]
    assert np.mean(gaps) == pytest.approx(1 / 4, rel=0.05)
    assert stats.kstest(gaps, stats.expon(scale=1 / 4).cdf).pvalue > 0.01
    assert dues != [shape.due for shape in level.shapes(np.random.default_rng(2))]
    assert dues == [shape.due for shape in level.shapes(np.random.default_rng(1))]
    assert (level.label, level.concurrency) == ("rate=4", None)


def test_a_trace_is_replayed(trace: Path) -> None:
    level = replay(trace, scale=1.0, requests=None, prompt=None, output=None)
    shapes = level.shapes(np.random.default_rng(0))
    assert [shape[:2] for shape in shapes] == [(374, 44), (396, 109), (879, 55), (10, 5)]
    assert [shape.due for shape in shapes] == pytest.approx([0, 4.314579, 4.541877, 64.541877], abs=1e-6)
    assert level.longest[:2] == (879, 55)  # one request, not the longest prompt and another one's answer
    sent = "0 374 44\n4314579 396 109\n4541877 879 55\n64541877 10 5\n"
    assert level.about == {
        "sha256": hashlib.sha256(sent.encode()).hexdigest(), "scale": 1.0, "requests": 4, "cut": 0,
        "prompt": 879, "output": 109,
    }  # fmt: skip
    assert level.source == trace
    assert level.most_at_once == 4
    cut = replay(trace, scale=10.0, requests=3, prompt=380, output=50)
    assert cut.shapes(np.random.default_rng(0)) == [
        Shape(374, 44, 0.0),
        Shape(380, 50, pytest.approx(0.4314579, abs=1e-6)),  # type: ignore[arg-type]
        Shape(380, 50, pytest.approx(0.4541877, abs=1e-6)),  # type: ignore[arg-type]
    ]
    assert cut.about["cut"] == 2
    assert (cut.about["prompt"], cut.about["output"]) == (380, 50)


def test_a_trace_is_known_by_what_is_in_it(trace: Path, tmp_path: Path) -> None:
    """Not by its name: one that arrives at once is another load, and rows that are not replayed make no difference."""

    def about(text: str, requests: int | None = None) -> Any:
        trace.write_text(text)
        return replay(trace, scale=1.0, requests=requests, prompt=None, output=None).about

    assert about(TRACE) == about(TRACE)
    assert about(TRACE) != about(TRACE.replace("18:16:51", "18:15:52"))
    assert about(TRACE, 3) == about(TRACE.replace("18:16:51", "18:15:52"), 3)
    copied = tmp_path / "copy.csv"
    copied.write_text(TRACE)
    assert replay(copied, scale=1.0, requests=None, prompt=None, output=None).about == about(TRACE)


def test_only_the_rows_that_are_replayed_are_read(trace: Path) -> None:
    trace.write_text(TRACE + "this is no row\n")
    assert len(replay(trace, scale=1.0, requests=4, prompt=None, output=None).shapes(np.random.default_rng(0))) == 4
    with pytest.raises(UsageError, match="line 6"):
        replay(trace, scale=1.0, requests=5, prompt=None, output=None)


@pytest.mark.parametrize(
    "times",
    [
        ("2024-05-12 00:00:00.003714+00:00", "2024-05-12 00:00:10.503714+00:00"),
        ("2024-05-12 00:00:00+00:00", "2024-05-12 02:00:10.5+02:00"),
        ("2024-05-12T00:00:00Z", "2024-05-12T00:00:10.5000009Z"),
        ("2024-05-12 00:00:00", "2024-05-11 19:00:10.5-05:00"),
    ],
)
def test_times_with_an_offset(times: tuple[str, str], trace: Path) -> None:
    """Azure's trace of 2024 has them; the second request comes 10.5 s after the first one."""
    rows = "".join(f"{time},3,2\n" for time in times)
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    shapes = replay(trace, scale=1.0, requests=None, prompt=None, output=None).shapes(np.random.default_rng(0))
    assert [shape.due for shape in shapes] == pytest.approx([0, 10.5], abs=2e-6)


def test_seconds_will_do_as_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("ContextTokens,TIMESTAMP,GeneratedTokens\n3,12.5,2\n4,10,1\n")
    shapes = replay(path, scale=1, requests=None, prompt=None, output=None).shapes(np.random.default_rng(0))
    assert list(shapes) == [(4, 1, 0.0), (3, 2, 2.5)]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("", "has no column TIMESTAMP"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "has no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\nnoon,2,3\n", "line 3: ['noon', '2', '3'] is no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,0,3\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnan,1,3\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2.5,3\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,\x00,3\n", "line 2"),
    ],
)
def test_what_is_no_trace(content: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(told)):
        replay(path, scale=1.0, requests=None, prompt=None, output=None)


def test_loads_of_a_command(trace: Path) -> None:
    assert [level.label for level in levels()] == ["concurrency=1"]
    found = levels(concurrency="1, 4,16", rates=[0.5], trace=trace, requests=5)
    assert [level.label for level in found] == ["concurrency=1", "concurrency=4", "concurrency=16", "rate=0.5", "trace"]
    assert [level.label for level in levels(rates=[2])] == ["rate=2"]
    four = levels(concurrency="4")[0]
    assert four.about == {"requests": 8, "ramp_up": 4, "prompt": 128, "output": 32}
    assert len(four.shapes(np.random.default_rng(0))) == 12
    assert (four.ramp_up, four.most_at_once) == (4, 4)
    assert levels(rates=[4])[0].most_at_once == 40
    for wrong in ("0", "two", "-1", "1,x", "1.5", "", " , "):
        with pytest.raises(UsageError, match="is no list of numbers of requests"):
            levels(concurrency=wrong)
    with pytest.raises(UsageError, match="concurrency=4 is there twice"):
        levels(concurrency="4,4")
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--rate"):
            levels(rates=[rate])
    with pytest.raises(UsageError, match="--trace-scale"):
        levels(trace=trace, trace_scale=0)


def test_prompts_have_nothing_in_common() -> None:
    tokens = np.arange(5, 300)
    shapes = [Shape(40, 3)] * 20
    found = asks(shapes, tokens, "tiny", np.random.default_rng([0, 1]))
    bodies = [json.loads(ask.body) for ask in found]
    prompts = [tuple(body["prompt"]) for body in bodies]
    assert {len(prompt) for prompt in prompts} == {40}
    assert len({prompt[:3] for prompt in prompts}) == 20
    assert {token for prompt in prompts for token in prompt} <= set(tokens.tolist())
    assert bodies[0].items() >= {"model": "tiny", "max_tokens": 3, "ignore_eos": True, "temperature": 0}.items()
    assert asks(shapes, tokens, "tiny", np.random.default_rng([0, 1])) == found
    assert asks(shapes, tokens, "tiny", np.random.default_rng([0, 2])) != found


def test_each_load_says_its_own_lengths(trace: Path) -> None:
    """A fixed load is not of the lengths of a trace beside it."""
    beside = levels(concurrency="1", trace=trace)
    assert [(level.about["prompt"], level.about["output"]) for level in beside] == [(128, 32), (879, 109)]
    assert beside[0].about == levels()[0].about
    assert beside[0].about != levels(prompt=879, output=109)[0].about


def test_the_requests_that_bring_a_load_up_have_no_part_in_its_latencies() -> None:
    """Two that start on an idle server and wait for one another, then two as the load has them."""

    def outcome(sent: float, ttft: float) -> Outcome:
        return Outcome(sent, sent, 0.0, sent + ttft + 1.0, [sent + ttft, sent + ttft + 1.0], 2)

    outcomes = Outcomes([outcome(0, 5.0), outcome(0, 9.0), outcome(10, 0.1), outcome(11, 0.3)], 16.0, 0.0)
    found = round_of(outcomes, {"ttft": 0.2}, ramp_up=2)
    assert found["samples"]["ttft"] == [0.1, 0.3]
    assert len(found["requests"]) == 4
    assert found["figures"]["requests_per_second"] == 4 / 16
    assert found["figures"]["output_tokens_per_second"] == 8 / 16
    assert found["figures"]["goodput_per_second"] == pytest.approx(0.5 * 4 / 16)


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "ttft:0", "ttft:-3", "ttft:inf", "ttft:nan"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not NAME:MILLISECONDS"):
        limits([text])
    with pytest.raises(UsageError, match="two limits on ttft"):
        limits(["ttft:500", "ttft:100"])
    with pytest.raises(UsageError, match="no limit is set on 'tptt'; did you mean"):
        limits(["tptt:5"])
