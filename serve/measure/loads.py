"""What is sent, and when: one request after the other, so many at once, at random, or as a recorded trace has it.

A `Level` gives the requests of a round; both sides of a comparison get the same ones, and no two rounds the same. Prompts
are random tokens, different from the first one on, so that a cache of prefixes has nothing to give.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.errors import UsageError
from serve.measure.outcomes import Ask

PROMPT, OUTPUT = 128, 32  # tokens, where nothing else is said
TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Shape(NamedTuple):
    """Tokens of one request, and, in an open load, when it is due, in seconds."""

    prompt: int
    output: int
    due: float | None = None


@dataclass(frozen=True)
class Level:
    """One load.

    Attributes:
        concurrency: requests under way at any time; None of an open load.
        shapes: gives the requests of a round by a generator of random numbers that is the round's own.
        longest: the request with the most tokens, prompt and output together.
        about: what has to be equal where two measurements are compared: how many requests, and their lengths ("prompt" and
            "output"; of a trace the largest of each).
        ramp_up: the requests at the beginning of a round that only bring the load up to its concurrency. They start together
            on an idle server, so they wait for one another as none of the later ones does, and have no part in the latencies.
        source: the file that it was read from.
    """

    label: str
    concurrency: int | None
    shapes: Callable[[np.random.Generator], Sequence[Shape]]
    longest: Shape
    about: dict[str, Any]
    ramp_up: int = 0
    source: Path | None = None

    @property
    def most_at_once(self) -> int:
        """Requests that may be under way together: in an open load all of a round, if the server is slow."""
        return self.concurrency or self.about["requests"]


def levels(
    *,
    concurrency: str | None = None,
    rates: Sequence[float] = (),
    trace: Path | None = None,
    trace_scale: float = 1.0,
    trace_requests: int | None = None,
    requests: int | None = None,
    prompt: int | None = None,
    output: int | None = None,
) -> list[Level]:
    """The loads that a command asks for, one request at a time if it asks for none. ``concurrency``: ``"1,4,16"``.
    ``requests`` is for all but the trace.

    Raises UsageError.
    """
    fixed = {"requests": requests, "prompt": PROMPT if prompt is None else prompt}
    fixed["output"] = OUTPUT if output is None else output
    if concurrency is None and not rates and trace is None:
        concurrency = "1"
    found = [] if concurrency is None else [closed(number, **fixed) for number in _numbers(concurrency)]
    found += [poisson(rate, **fixed) for rate in rates]
    if trace is not None:
        found.append(replay(trace, scale=trace_scale, requests=trace_requests, prompt=prompt, output=output))
    labels = [level.label for level in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(f"the load {twice[0]} is there twice")
    return found


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--concurrency {text!r} is no list of numbers of requests, such as 1,4,16")
    return [int(part) for part in parts]


def closed(concurrency: int, *, requests: int | None, prompt: int, output: int) -> Level:
    """``concurrency`` requests under way at any time; by default twice as many in a round, and four at least. Before them
    goes a wave that brings the load up (`Level.ramp_up`)."""
    count = max(4, 2 * concurrency) if requests is None else requests
    shape = Shape(prompt, output)
    about = {"requests": count, "ramp_up": concurrency, "prompt": prompt, "output": output}
    every = [shape] * (concurrency + count)
    return Level(f"concurrency={concurrency}", concurrency, lambda rng: every, shape, about, ramp_up=concurrency)


def poisson(rate: float, *, requests: int | None, prompt: int, output: int) -> Level:
    """Arrivals at random, ``rate`` a second on average: the gaps are exponential, and each round draws its own."""
    if not 0 < rate < float("inf"):
        raise UsageError(f"--rate {rate:g} is not a number of requests a second")
    count = max(16, round(10 * rate)) if requests is None else requests

    def shapes(rng: np.random.Generator) -> list[Shape]:
        return [Shape(prompt, output, float(due)) for due in np.cumsum(rng.exponential(1 / rate, count))]

    about = {"requests": count, "prompt": prompt, "output": output}
    return Level(f"rate={rate:g}", None, shapes, Shape(prompt, output), about)


def replay(file: Path, *, scale: float, requests: int | None, prompt: int | None, output: int | None) -> Level:
    """The arrivals and lengths of a recorded trace, in the form of Azure's: TIMESTAMP, ContextTokens, GeneratedTokens.

    Args:
        scale: how many times as fast.
        requests: only the first ones of the file.
        prompt, output: longer prompts and answers are cut to so many tokens; None leaves them.

    Raises:
        UsageError: the file is no trace.
    """
    if not 0 < scale < float("inf"):
        raise UsageError(f"--trace-scale {scale:g} is not a factor")
    rows = _read_trace(file, requests)
    shapes = [
        Shape(min(p, prompt or p), min(o, output or o), (when - rows[0][0]) / scale) for when, p, o in rows
    ]  # fmt: skip
    about = {
        "sha256": _digest(shapes),
        "scale": scale,
        "requests": len(shapes),
        "prompt": max(shape.prompt for shape in shapes),
        "output": max(shape.output for shape in shapes),
        "cut": sum((shape.prompt, shape.output) != row[1:] for shape, row in zip(shapes, rows, strict=True)),
    }
    longest = max(shapes, key=lambda shape: shape.prompt + shape.output)
    return Level("trace", None, lambda rng: shapes, longest, about, source=file)


def _digest(shapes: Sequence[Shape]) -> str:
    """What a trace is known by: a file's name says nothing of what is in it. Times to the microsecond, which clocks have."""
    lines = [f"{round((shape.due or 0.0) * 1e6)} {shape.prompt} {shape.output}\n" for shape in shapes]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_trace(file: Path, most: int | None) -> list[tuple[float, int, int]]:
    """(seconds, prompt tokens, output tokens) of the first ``most`` rows, by time; what follows is not read, since traces
    have up to millions. Raises UsageError."""
    found: list[tuple[float, int, int]] = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise UsageError(f"--trace {file} has no column {missing[0]}; it needs {', '.join(TRACE_COLUMNS)}")
            for row in islice(reader, most):
                try:
                    when, prompt, output = (row[name] for name in TRACE_COLUMNS)
                    found.append((_seconds(when), int(prompt), int(output)))
                    if min(found[-1][1:]) < 1:
                        raise ValueError
                except (ValueError, TypeError):
                    raise UsageError(
                        f"--trace {file}, line {reader.line_num}: {list(row.values())} is no request"
                    ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--trace {file} cannot be read: {error}") from None
    if not found:
        raise UsageError(f"--trace {file} holds no requests")
    return sorted(found)


def _seconds(text: str) -> float:
    """Of a date with its time of day, at UTC where it names no offset, or of a number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        moment = datetime.datetime.fromisoformat(text.strip())
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    if not np.isfinite(seconds):
        raise ValueError(text)
    return seconds


def asks(shapes: Sequence[Shape], tokens: np.ndarray, model: str, rng: np.random.Generator) -> list[Ask]:
    """The requests, with prompts drawn from ``tokens`` [n], the ids of ordinary tokens."""
    return [
        Ask(_body(model, rng.choice(tokens, shape.prompt).tolist(), shape.output), shape.output, shape.due)
        for shape in shapes
    ]


def _body(model: str, prompt: list[int], output: int) -> bytes:
    fields = {
        "model": model, "prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(fields, separators=(",", ":")).encode()
