"""The load generator: sends requests when they are due, and keeps when each piece of each answer arrived.

Why not a library. Two came into question, and neither does all that is asked of it:

- guidellm 0.8 keeps the first and the last token of a request and how many there were, not the times between (its
  ``RequestTimings``), so there is no distribution of inter-token latencies and none can be made of its results. It brings
  twenty packages, among them a web framework.
- `vllm bench serve` measures right where it can be used (`benchmarks.generator_overhead` runs it beside this one). But it
  comes only with vLLM, which the other engines do not need; it takes half a minute of processor time to start, for every
  round and side; it counts from when it got round to sending, not from when a request was due (coordinated omission); it has
  no limit on an answer that stalls but six hours; and an answer with fewer tokens than were asked for is a success.

So this is its own: HTTP by httptools (the parser that uvicorn uses) under asyncio's protocols, one callback a piece of an
answer, nothing parsed until the load is over, and timers that are exact (`clock`). It runs in a process of its own
(`Generator`), so that neither the program around it nor a progress bar takes its time.

In a closed load, so many requests are under way at any time, and the next one is sent when one ends. In an open load, each
has a time at which it is due whatever the endpoint does, and its latency counts from then.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import signal
import ssl
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection as Pipe
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httptools

from compress.errors import HalveError, one_line
from serve.measure.clock import new_event_loop
from serve.measure.outcomes import Ask, Load, Outcome, Outcomes
from serve.measure.stream import Answer, Piece, message_of, read_answer

_LEAD_SECONDS = 0.05  # between "now" and the first request that is due
_BUFFER_BYTES = 65536
_OPEN_CONNECTIONS = 16  # made before an open load begins; more are made when they are needed
_CLOSED_JUST_THEN = (
    0.005  # seconds, beyond what it takes to connect: how late a closing may arrive that crossed a request
)


@dataclass
class _Request:
    """A request on its way; times are those of the event loop."""

    ask: Ask
    due: float
    sent: float = 0.0
    ended: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    status: int = 0
    error: str | None = None
    timer: asyncio.TimerHandle | None = None
    resent: int = 0
    connection: _Connection | None = None
    connecting: asyncio.Task[None] | None = None


class _Connection(asyncio.BufferedProtocol):
    """One connection, one request at a time. httptools calls ``on_header``, ``on_body`` and ``on_message_complete``.

    What arrives goes into a buffer that all connections share: it is read at once, and a plain protocol's `recv` of 256 KiB
    costs more than all that is done with the few bytes of a token.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._request: _Request | None = None
        self.transport: asyncio.Transport | None = None
        self._fresh = True
        self.connect_seconds = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, request: _Request) -> None:
        assert self.transport is not None
        self._request, self._parser = request, httptools.HttpResponseParser(self)
        self._sent, self._arrived, self._framed = self._run.now(), 0.0, False
        request.sent = request.sent or self._sent
        self.transport.write(self._run.head + b"%d\r\n\r\n" % len(request.ask.body) + request.ask.body)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._run.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._request is None:
            self.abort()
            return
        self._arrived = self._run.now()
        try:
            self._parser.feed_data(self._run.buffer[:nbytes])
        except httptools.HttpParserError as error:
            self._end(f"it answered with something that is not HTTP: {one_line(error)}")
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_body(self, body: bytes) -> None:
        if self._request is not None:
            self._request.pieces.append((self._arrived, body))

    def on_message_complete(self) -> None:
        status, keep = self._parser.get_status_code(), self._parser.should_keep_alive()
        if self._request is None or status < 200:  # "100 Continue" and the like; the answer follows
            return
        self._request.status, self._fresh = status, False
        if not keep:
            self.abort()
        self._end(None, reusable=keep)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._run.lost(self)
        if self._request is None:
            return
        if exc is None and self._arrived and self._ends_with_its_connection():
            self._request.status = self._parser.get_status_code()
            self._end(None)
            return
        if self._was_closed_just_then():
            request, self._request = self._request, None
            request.resent += 1
            self._run.start(request)
            return
        self._end(f"it hung up{f' ({one_line(exc)})' if exc else ''} after {len(self._request.pieces)} pieces")

    def _ends_with_its_connection(self) -> bool:
        """Whether the body is delimited by the end of the connection (RFC 9112, section 6.3)."""
        return bool(self._request and self._request.pieces) and not self._framed

    def _was_closed_just_then(self) -> bool:
        """Whether it was closed for being idle while the request was on its way, so that nobody worked on it.

        A server that worked on it and then died has not answered. To send it again in silence would hide that.
        """
        waited = self._run.now() - self._sent
        return not self._fresh and not self._arrived and waited <= _CLOSED_JUST_THEN + self.connect_seconds

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
            self.transport = None

    def give_up(self, why: str) -> None:
        self._end(why)
        self.abort()

    def _end(self, error: str | None, *, reusable: bool = False) -> None:
        request, self._request = self._request, None
        if request is not None:
            self._run.ended(request, error, self if reusable else None)


class _Run:
    """One load on its way, in an event loop."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        parts = urlsplit(load.url)
        self._host, self._tls = parts.hostname or "", ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        key = f"authorization: Bearer {load.api_key}\r\n" if load.api_key else ""
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        self.head = (
            f"POST {path} HTTP/1.1\r\nhost: {parts.netloc.rpartition('@')[2]}\r\n{key}content-type: application/json\r\n"
            "accept: text/event-stream\r\ncontent-length: "
        ).encode("latin-1")
        self.buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._idle: list[_Connection] = []
        self._left = len(load.asks)
        self._waiting: deque[Ask] = deque(load.asks if load.concurrency is not None else ())
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._at_once = load.concurrency or _OPEN_CONNECTIONS
        self.requests: list[_Request] = []

    async def __call__(self) -> None:
        """Runs the load to its end."""
        first = await asyncio.gather(
            *(self._connect() for _ in range(min(self._at_once, len(self._load.asks)))), return_exceptions=True
        )
        self._idle = [one for one in first if isinstance(one, _Connection)]
        cpu = time.process_time()
        self.begin = self.now() + _LEAD_SECONDS
        if self._load.concurrency is None:
            for ask in self._load.asks:
                request = _Request(ask, self.begin + (ask.due or 0.0))
                self.requests.append(request)
                self._loop.call_at(request.due, self.start, request)
        else:
            for _ in range(min(self._load.concurrency, len(self._load.asks))):
                self._next(self.begin)
        await self._done
        self.cpu_seconds = time.process_time() - cpu
        for connection in self._idle:
            connection.abort()

    def _next(self, when: float) -> None:
        """The next request of a closed load."""
        request = _Request(self._waiting.popleft(), when)
        self.requests.append(request)
        self._loop.call_at(when, self.start, request)

    def start(self, request: _Request) -> None:
        """Sends a request, or sends it again."""
        if request.timer is None:
            request.timer = self._loop.call_at(request.due + self._load.timeout, self._too_late, request)
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                self._send(connection, request)
                return
        request.connection = None
        request.connecting = self._loop.create_task(self._start_on_new(request))

    async def _start_on_new(self, request: _Request) -> None:
        try:
            connection = await self._connect()
        except OSError as error:
            self.ended(request, f"it cannot be reached: {one_line(error)}", None)
            return
        self._send(connection, request)

    def _send(self, connection: _Connection, request: _Request) -> None:
        request.connection, request.connecting = connection, None
        connection.send(request)

    def _too_late(self, request: _Request) -> None:
        if request.connection is not None:
            request.connection.give_up(f"it did not end its answer within {self._load.timeout:g} s")
        else:
            assert request.connecting is not None
            request.connecting.cancel()
            self.ended(request, f"it cannot be reached within {self._load.timeout:g} s", None)

    async def _connect(self) -> _Connection:
        begin = self.now()
        _, connection = await self._loop.create_connection(
            partial(_Connection, self), self._host, self._port, ssl=self._tls
        )
        connection.connect_seconds = self.now() - begin
        return connection

    def lost(self, connection: _Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def ended(self, request: _Request, error: str | None, connection: _Connection | None) -> None:
        """A request is over; ``connection`` can take another one."""
        request.ended, request.error = self.now(), error
        if request.timer is not None:
            request.timer.cancel()
        if connection is not None:
            self._idle.append(connection)
        self._left -= 1
        if self._waiting:
            self._next(request.ended)
        elif self._left == 0:
            self._done.set_result(None)

    def outcomes(self) -> Outcomes:
        """What came of it; answers are parsed only here."""
        found = [self._outcome(request) for request in self.requests]
        return Outcomes(found, max(request.ended for request in self.requests) - self.begin, self.cpu_seconds)

    def _outcome(self, request: _Request) -> Outcome:
        answer, error = Answer(), request.error
        if error is None and request.status != 200:
            error = f"it refused ({request.status}): {_refusal(b''.join(piece for _, piece in request.pieces))}"
        elif request.status in (0, 200):
            answer = read_answer(request.pieces, request.ask.output)
            error = error or answer.error
        return Outcome(
            intended=(request.due if self._load.concurrency is None or not request.sent else request.sent) - self.begin,
            sent=(request.sent or request.due) - self.begin,
            late=request.sent - request.due if request.sent else 0.0,
            ended=request.ended - self.begin,
            tokens=[when - self.begin for when in answer.tokens],
            count=answer.count,
            error=error,
            resent=request.resent,
        )


def _refusal(body: bytes) -> str:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = body[:200].decode("utf-8", "replace")
    return message_of(document.get("error", document) if isinstance(document, dict) else document) or "without a reason"


def run_load(load: Load) -> Outcomes:
    """Sends a load and waits for its end, in this process."""

    async def run() -> _Run:
        running = _Run(load)
        await running()
        return running

    # A collection of garbage in the middle would be measured as latency.
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            running = runner.run(run())
    finally:
        gc.enable()
    return running.outcomes()


def _serve(pipe: Pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
    while True:
        try:
            load = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(run_load(load))
        except Exception as error:  # whatever it is, the parent has to hear of it
            pipe.send(HalveError(f"the load generator failed: {one_line(error)}"))


class Generator:
    """`run_load` in a process of its own, for as long as a ``with`` block lasts."""

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), name="halve-generator", daemon=True)
        self._process.start()
        other.close()
        return self

    def __call__(self, load: Load) -> Outcomes:
        """Raises HalveError where the generator itself fails."""
        self._pipe.send(load)
        try:
            found: Any = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise HalveError(f"the load generator ended with code {self._process.exitcode}") from None
        if isinstance(found, Exception):
            raise found
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.kill()  # it may be in the middle of a load, and has nothing to put in order
        self._process.join()
        self._process.close()
