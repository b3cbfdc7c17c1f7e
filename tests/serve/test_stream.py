"""Streams of server-sent events, cut anywhere, whole and broken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.measure.stream import read_answer


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str = " x", finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])


def usage(count: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": count})


DONE = b"data: [DONE]\n\n"
WHOLE = [token(), token(" é"), token("\\n\\ndata: "), token(finish="length"), usage(4), DONE]


@given(st.lists(st.integers(1, 30), max_size=60), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_events_may_be_cut_anywhere(cuts: list[int], newline: bytes, comments: bool) -> None:
    """The time of an event is that of the piece which completes it, wherever the pieces end."""
    events = [b": ping\n\n" + one if comments else one for one in WHOLE]
    events = [one.replace(b"\n", newline) for one in events]
    body = b"".join(events)
    ends, at = [], 0
    for one in events:
        at += len(one)
        ends.append(at)
    pieces, at, number = [], 0, 0
    for cut in [*cuts, len(body)]:
        if at < len(body):
            pieces.append((float(number), body[at : at + cut]))
            at, number = at + cut, number + 1
    assert b"".join(piece for _, piece in pieces) == body

    def completed_in(end: int) -> set[float]:
        """The pieces that hold the first newline after the data, or, if that is where it was cut, the line's end."""
        reached, found = 0, set()
        for when, piece in pieces:
            if reached < end - len(newline) <= reached + len(piece):
                found.add(when)
            reached += len(piece)
        return found

    answer = read_answer(pieces, 4)
    assert answer.error is None
    assert answer.count == 4
    assert all(when in completed_in(end) for when, end in zip(answer.tokens, ends, strict=False))
    assert len(answer.tokens) == 4


@pytest.mark.parametrize(
    ("body", "expected", "told"),
    [
        ([], 2, "it sent no tokens"),
        ([DONE], 2, "it sent no tokens"),
        ([token(), token()], 2, "it ended its answer early, after 2 events"),
        ([token(), token()[:-9]], 2, "it ended its answer early, after 1 events"),
        ([token(), token(finish="stop"), usage(2), DONE], 3, "it gave 2 tokens where 3 were asked for"),
        ([token(), token(finish="length"), DONE], 3, "it gave 2 tokens where 3"),
        ([token(), b"<html>busy</html>\n"], 2, "is no event of a completion: '<html>"),
        ([b'data: {"choi\n\n'], 2, "is no event of a completion"),
        ([b"data: 3\n\n"], 2, "is no event of a completion: '3'"),
        ([b"data: " + b"[" * 100_000 + b"\n\n"], 2, "is no event of a completion"),
        ([b"\x00\xff\xfe\n\n"], 2, "is no event of a completion"),
        ([token(), event(error={"message": "out of\nmemory"}), DONE], 2, "broke off with an error: out of memory"),
        ([event(error="gone")], 2, "broke off with an error: gone"),
    ],
)  # fmt: skip
def test_answers_that_do_not_count(body: list[bytes], expected: int, told: str) -> None:
    answer = read_answer([(float(i), piece) for i, piece in enumerate(body)], expected)
    assert told in (answer.error or "")


def test_an_event_may_hold_several_tokens_or_none() -> None:
    """What was counted is what the server says; an event that only says why it ended shows no token."""
    several = read_answer([(1.0, token(" a b")), (2.0, token(" c", "length")), (3.0, usage(3)), (3.0, DONE)], 3)
    assert (several.tokens, several.count, several.error) == ([1.0, 2.0], 3, None)
    reason = read_answer([(1.0, token()), (2.0, token()), (3.0, token("", "length")), (4.0, usage(2)), (4.0, DONE)], 2)
    assert (reason.tokens, reason.count, reason.error) == ([1.0, 2.0], 2, None)
    unmeasured = read_answer([(1.0, token()), (2.0, token(finish="length"))], 2)
    assert (unmeasured.count, unmeasured.error) == (2, None)


def times(*texts: str, count: int | None = 3, expected: int = 3) -> list[float]:
    """When tokens came of events with these texts, 1 s, 2 s, ...; ``count``: what the server says that there were."""
    events = [token(text, "length" if number == len(texts) else None) for number, text in enumerate(texts, 1)]
    end = [DONE] if count is None else [usage(count), DONE]
    pieces = [(float(number), piece) for number, piece in enumerate([*events, *end], 1)]
    answer = read_answer(pieces, expected)
    assert answer.error is None
    assert answer.count == expected
    return answer.tokens


def test_an_empty_event_is_a_token_only_where_there_are_so_many() -> None:
    """Some servers open an answer with an empty event, at once; a token that is half of a character has no text, too."""
    assert times("", "a", "b", "c") == [2, 3, 4]
    assert times("", "a", "b", "c", count=None) == [2, 3, 4]
    assert times("", "a", "b", "c", "") == [2, 3, 4]
    assert times("", "b", "c") == [1, 2, 3]  # one event a token: the first one is a token without text
    assert times("", "a b", "c") == [1, 2, 3]
    assert times("", "a b c", count=3) == [2]  # events of several tokens: with the first one there was none
    assert times("a", "", "b", "c", "") == [1, 3, 4]
    assert times("a", "", "b", "") == [1, 2, 3]
    assert times("", "", "") == [1, 2, 3]
