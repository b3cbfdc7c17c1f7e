"""What a streamed answer says, read after the load is over: when each token came, how many there were, what went wrong.

The answer is a list of pieces (time, bytes) as they arrived. Events are separated by empty lines and may be cut anywhere;
the time of an event is that of the piece which completes it.

An event without text may stand for a token (half of a character, a special one), or for none: some servers open an answer with
an empty event, or close it with one that only says why it ended. Which it is, the number of tokens tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Piece = tuple[float, bytes]


@dataclass
class Answer:
    """``tokens``: the time of each event that shows some; an event may show several, and ``count`` is how many there were."""

    tokens: list[float] = field(default_factory=list)
    count: int = 0
    error: str | None = None


def read_answer(pieces: Sequence[Piece], expected: int) -> Answer:
    """An answer of ``expected`` tokens, or what is wrong with it (then ``tokens`` has what came before)."""
    answer = Answer()
    counted: int | None = None
    done = finished = False
    events: list[tuple[float, bool]] = []  # when, and whether it had text
    for when, data in _events(pieces):
        if data == "[DONE]":
            done = True
            break
        event = _parse(data)
        if not isinstance(event, dict) or not ("choices" in event or "error" in event or "usage" in event):
            answer.error = f"it sent something that is no event of a completion: {data[:60]!r}"
            return answer
        if event.get("error"):
            answer.error = f"it broke off with an error: {message_of(event['error'])}"
            return answer
        choices = event.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            events.append((when, bool(choices[0].get("text"))))
            answer.tokens.append(when)
            finished = finished or choices[0].get("finish_reason") is not None
        usage = event.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            counted = usage["completion_tokens"]
    answer.tokens = _shown(events, expected if counted is None else counted)
    answer.count = len(answer.tokens) if counted is None else counted
    if not answer.tokens:
        answer.error = "it sent no tokens"
    elif not (done or finished):
        answer.error = f"it ended its answer early, after {len(answer.tokens)} events"
    elif answer.count != expected:
        answer.error = f"it gave {answer.count} tokens where {expected} were asked for (does it know ignore_eos?)"
    return answer


def _shown(events: Sequence[tuple[float, bool]], tokens: int) -> list[float]:
    """The times of those events that show some of so many tokens."""
    opening = next((number for number, (_, text) in enumerate(events) if text), 0)
    surplus = len(events) - tokens
    if surplus < 0:  # events show several tokens, and there was none to show yet
        without = set(range(opening))
    else:
        empty = [number for number, (_, text) in enumerate(events) if not text]
        ends = empty[-1:] if empty and empty[-1] == len(events) - 1 else []
        without = set(list(dict.fromkeys([*ends, *range(opening), *reversed(empty)]))[:surplus])
    return [when for number, (when, _) in enumerate(events) if number not in without]


def message_of(error: Any) -> str:
    """The text of an error as OpenAI writes it, on one line."""
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text).split())[:200]


def _events(pieces: Sequence[Piece]) -> Iterator[tuple[float, str]]:
    """(time, data) of each complete event; comments and other fields are no data."""
    rest = b""
    for when, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        # Servers write one line of data an event, and the newline after it completes it.
        for line in lines:
            line = line.strip()
            if line.startswith(b"data:"):
                yield when, line[5:].strip().decode("utf-8", "replace")
            elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                yield when, line.decode("utf-8", "replace")


def _parse(data: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
