"""The load generator where connections are cut, close or do not come about: what counts as answered, and from when."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serve.measure import generator
from serve.measure.generator import run_load
from serve.measure.latency import round_of, summary
from serve.measure.outcomes import Ask, Load, Outcomes
from tests.serve.test_stream import DONE, token, usage

pytestmark = pytest.mark.alone

BODY = [token(), token(finish="length") + usage(2) + DONE]
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CLOSED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def serving(handler: Handler) -> Iterator[str]:
    """The address of a server whose connections are each handled so; they are closed after it."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listener, loops = socket.create_server(("127.0.0.1", 0)), []
    ended = asyncio.Event()

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with await asyncio.start_server(handle, sock=listener):
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
    finally:
        loops[0].call_soon_threadsafe(ended.set)
        thread.join(10)


async def request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))


def answer(writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in BODY) + b"0\r\n\r\n")


def load(url: str, count: int, *, timeout: float = 30.0) -> Outcomes:
    """One request after the other."""
    return run_load(Load(url, [Ask(b"{}", 2)] * count, 1, timeout=timeout))


def cutting(after: float, received: list[float]) -> Handler:
    """Answers the first request of each connection, and cuts it so many seconds after the second one came."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        received.append(time.monotonic())
        answer(writer)
        await request(reader)
        received.append(time.monotonic())
        await asyncio.sleep(after)

    return handler


def test_a_request_that_was_worked_on_is_not_sent_again() -> None:
    """A server whose workers die does not look like one that answers at once."""
    received: list[float] = []
    with serving(cutting(0.3, received)) as url:
        outcomes = load(url, 4)
    assert [outcome.error for outcome in outcomes.requests] == [None, "it hung up after 0 pieces"] * 2
    assert len(received) == 4
    found = summary([round_of(outcomes, {})])
    assert (found["errors"], "resent" in found) == (2, False)


def test_a_connection_that_was_closed_just_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is sent again, that is told, and its time counts from when it was sent first."""
    monkeypatch.setattr(generator, "_CLOSED_JUST_THEN", 0.15)  # the machine may be busy
    received: list[float] = []
    with serving(cutting(0.1, received)) as url:
        outcomes = load(url, 2)
    assert [(outcome.error, outcome.resent) for outcome in outcomes.requests] == [(None, 0), (None, 1)]
    assert len(received) == 3
    again = outcomes.requests[1]
    assert again.intended == again.sent
    assert again.tokens[0] - again.intended >= 0.1
    assert again.late < 0.1
    found = summary([round_of(outcomes, {})])
    assert (found["resent"], found["errors"], found["requests"]) == (1, 0, 2)


def test_the_time_limit_holds_while_it_connects_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is over before there is a connection ends the request then; nothing waits without one."""
    monkeypatch.setattr(generator, "_CLOSED_JUST_THEN", 10.0)
    connect, made = generator._Run._connect, []

    async def slowly(self: Any) -> Any:
        made.append(time.monotonic())
        if len(made) == 2:
            await asyncio.sleep(1.0)
        return await connect(self)

    monkeypatch.setattr(generator._Run, "_connect", slowly)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        if len(made) == 1:
            answer(writer)
            await request(reader)  # and it is closed
        else:
            await asyncio.sleep(30)

    found: list[Outcomes] = []
    with serving(handler) as url:
        thread = threading.Thread(target=lambda: found.append(load(url, 2, timeout=0.5)), daemon=True)
        thread.start()
        thread.join(8)
    assert found, "the load never ended"
    assert [outcome.error for outcome in found[0].requests] == [None, "it cannot be reached within 0.5 s"]
    assert found[0].requests[1].ended - found[0].requests[1].sent < 0.9


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        (BODY, None),
        (BODY[:1], "it ended its answer early, after 1 events"),
        ([b'data: {"choi'], "it sent no tokens"),
    ],
)
def test_an_answer_that_ends_with_its_connection(pieces: list[bytes], told: str | None) -> None:
    """HTTP/1.1 allows a body without a length; whether it was whole, the events tell."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CLOSED + b"".join(pieces))

    with serving(handler) as url:
        assert [outcome.error for outcome in load(url, 2).requests] == [told] * 2


def test_a_refusal_that_ends_with_its_connection() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b'HTTP/1.1 503 Busy\r\nconnection: close\r\n\r\n{"error": {"message": "busy"}}')

    with serving(handler) as url:
        assert load(url, 1).requests[0].error == "it refused (503): busy"


def test_an_answer_with_a_length_that_is_cut() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CLOSED.replace(b"\r\n\r\n", b"\r\ncontent-length: 9999\r\n\r\n") + b"".join(BODY))

    with serving(handler) as url:
        assert "it hung up after" in (load(url, 1).requests[0].error or "")
