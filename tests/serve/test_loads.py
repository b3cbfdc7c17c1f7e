"""What is sent and when: arrivals, traces, prompts, and what of it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from compress.errors import UsageError
from serve.measure.latency import limits
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
    assert level.longest[:2] == (879, 109)
    assert level.about == {"trace": "trace.csv", "scale": 1.0, "requests": 4, "cut": 0}
    cut = replay(trace, scale=10.0, requests=3, prompt=380, output=50)
    assert cut.shapes(np.random.default_rng(0)) == [
        Shape(374, 44, 0.0),
        Shape(380, 50, pytest.approx(0.4314579, abs=1e-6)),  # type: ignore[arg-type]
        Shape(380, 50, pytest.approx(0.4541877, abs=1e-6)),  # type: ignore[arg-type]
    ]
    assert cut.about["cut"] == 2


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
    assert levels(concurrency="4")[0].about == {"requests": 8}
    for wrong in ("0", "two", "-1", "1,x", "1.5"):
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


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "ttft:0", "ttft:-3", "ttft:inf", "ttft:nan"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not NAME:MILLISECONDS"):
        limits([text])
    with pytest.raises(UsageError, match="no limit is set on 'tptt'; did you mean"):
        limits(["tptt:5"])
