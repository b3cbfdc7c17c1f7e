"""An OpenAI endpoint without a model: it streams tokens at exactly known times, so that a load generator can be checked.

    python -m benchmarks.mock_endpoint [--ttft 0.1] [--itl 0.02] [--stall AFTER SECONDS] [--fault NAME]

It prints its address and serves until its standard input closes. Each token has a time of its own, counted from the
arrival of the request (``ttft + i * itl``), so that delays do not add up. What it did is kept by the system's monotonic
clock, which all processes of a machine share: ``GET /truth`` gives, for each request, when it had arrived and when each
token was sent, and the processor seconds that the mock has used.

One protocol and its timers, in place of a web framework: it has to cost less than what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from serve.measure.clock import new_event_loop

MODEL = "mock"
FAULTS = ("", "garbage", "early", "hang", "status", "error", "unmeasured", "short")
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_HEAD = {"id": "cmpl-mock", "object": "text_completion", "created": 1, "model": MODEL}


class Mock:
    """What all connections share.

    Args:
        ttft: seconds from a request to its first token; itl: between two tokens.
        stall: (a, b): whatever falls due within b seconds, beginning a seconds after the first request, waits until then.
        fault: what goes wrong with each request: "garbage" (no events), "early" (it hangs up after half of the tokens),
            "hang" (after half of the tokens nothing more comes), "status" (500), "error" (an error as an event), "unmeasured" (no
            usage), "short" (half of the tokens, and a proper end).
        every: the fault befalls each request whose number is a multiple of this; ``after``: but for so many at the beginning.
    """

    def __init__(
        self,
        ttft: float,
        itl: float,
        stall: tuple[float, float] = (0.0, 0.0),
        fault: str = "",
        every: int = 1,
        after: int = 0,
    ) -> None:
        self.ttft, self.itl, self.stall, self.fault, self.every, self.after = ttft, itl, stall, fault, every, after
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def due(self, when: float) -> float:
        begin = self.requests[0]["arrived"] + self.stall[0]
        return begin + self.stall[1] if begin <= when < begin + self.stall[1] else when

    def begin(self, asked: dict[str, Any], connection: Connection) -> None:
        record = {"arrived": time.monotonic(), "sent": [], "prompt": asked["prompt"], "asked": asked}
        self.requests.append(record)
        number = len(self.requests)
        fault = self.fault if number > self.after and number % self.every == 0 else ""
        if fault == "status":
            connection.answer(500, {"error": {"message": "the mock fails as it was told"}})
            return
        connection.write(_STREAM)
        Answer(self, connection, record, asked["max_tokens"], fault).go_on()


class Answer:
    """One stream on its way."""

    def __init__(self, mock: Mock, connection: Connection, record: dict[str, Any], tokens: int, fault: str) -> None:
        self._mock, self._connection, self._record, self._tokens, self._fault = mock, connection, record, tokens, fault
        self._stop = max(1, tokens // 2) if fault else tokens

    def go_on(self) -> None:
        number = len(self._record["sent"])
        due = self._mock.due(self._record["arrived"] + self._mock.ttft + number * self._mock.itl)
        asyncio.get_running_loop().call_at(due, self._token, number)

    def _token(self, number: int) -> None:
        if self._connection.closed:
            return
        last = number + 1 == self._tokens or (self._fault == "short" and number + 1 == self._stop)
        self._record["sent"].append(time.monotonic())
        if self._fault == "garbage":
            self._connection.chunk(b"\x00\xff this is no event {\n\n")
        else:
            choice = {"index": 0, "text": f" {number}", "logprobs": None, "finish_reason": "length" if last else None}
            self._connection.event({**_HEAD, "choices": [choice]})
        if last:
            self._end(number + 1)
        elif number + 1 == self._stop and self._fault == "early":
            self._connection.abort()
        elif number + 1 == self._stop and self._fault == "error":
            self._connection.event({"error": {"message": "the engine died", "code": 503}})
            self._connection.end()
        elif not (number + 1 == self._stop and self._fault == "hang"):
            self.go_on()

    def _end(self, count: int) -> None:
        if self._fault != "unmeasured":
            prompt = len(self._record["prompt"])
            usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
            self._connection.event({**_HEAD, "choices": [], "usage": usage})
        self._connection.chunk(b"data: [DONE]\n\n")
        self._connection.end()


class Connection(asyncio.Protocol):
    """HTTP/1.1 as far as load generators speak it: one request after the other, with a length."""

    def __init__(self, mock: Mock) -> None:
        self._mock, self._received, self.closed = mock, b"", False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        request, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(fields.get("content-length", 0))
        if len(body) < length:
            return
        self._received = body[length:]
        method, path, _ = request.split(" ")
        self._mock.keys.append(fields.get("authorization"))
        self._route(method, path, body[:length])

    def _route(self, method: str, path: str, body: bytes) -> None:
        answers: dict[str, Callable[[], Any]] = {
            "/v1/models": lambda: {"data": [{"id": MODEL, "object": "model", "max_model_len": 1_000_000}]},
            "/health": dict,
            "/truth": lambda: {
                "requests": [{k: v for k, v in r.items() if k != "asked"} for r in self._mock.requests],
                "cpu_seconds": time.process_time(),
            },
            "/keys": lambda: self._mock.keys,
            "/asked": lambda: [record["asked"] for record in self._mock.requests],
        }
        if method == "POST" and path == "/v1/completions":
            self._mock.begin(json.loads(body), self)
        elif path in answers:
            self.answer(200, answers[path]())
        else:
            self.answer(404, {"error": {"message": f"there is no {path}"}})

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.write(head.encode() + body)

    def write(self, data: bytes) -> None:
        if not self.closed:
            self._transport.write(data)

    def event(self, content: dict[str, Any]) -> None:
        self.chunk(b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        self.write(b"0\r\n\r\n")

    def abort(self) -> None:
        self._transport.close()


async def _serve(mock: Mock) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(mock), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    ended = asyncio.Event()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=watch, daemon=True).start()
    await ended.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ttft", type=float, default=0.1)
    parser.add_argument("--itl", type=float, default=0.02)
    parser.add_argument("--stall", type=float, nargs=2, default=(0.0, 0.0), metavar=("AFTER", "SECONDS"))
    parser.add_argument("--fault", choices=FAULTS, default="")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--after", type=int, default=0)
    arguments = parser.parse_args()
    stall = tuple(arguments.stall)
    mock = Mock(arguments.ttft, arguments.itl, stall, arguments.fault, arguments.every, arguments.after)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(mock))


if __name__ == "__main__":
    sys.exit(main())
