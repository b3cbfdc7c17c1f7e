"""Endpoints that are down, refuse, answer with something else, stall or never end: told in one line, in time."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from compress.errors import HalveError, NumericalError, UsageError
from serve.measure.endpoint import EndpointError, EndpointRunner

PROMPT = [5, 6, 7]
MODELS = {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 64}]}


def scores(count: int = len(PROMPT)) -> dict[str, Any]:
    """A right answer to a prompt of three tokens, as OpenAI's legacy format has it."""
    logprobs = [None, -1.5, -0.5, -9.0][:count]
    top = [None, {"a": -0.25, "b": -1.5}, {"c": -0.5}, {"d": -9.0}][:count]
    return {"choices": [{"index": 0, "text": "", "logprobs": {"token_logprobs": logprobs, "top_logprobs": top}}]}


class Fake(http.server.ThreadingHTTPServer):
    """Answers /v1/models and /v1/completions with what a test says: a document, bytes, a status or a function."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: Any = MODELS
        self.completions: Any = scores()
        self.asked: list[dict[str, Any]] = []
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that give up are what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self.answer(self.server.models)

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.answer(self.server.completions)

    def answer(self, what: Any) -> None:
        if callable(what):
            what(self)
            return
        status, body = (what, {"error": {"message": "too busy", "type": "x"}}) if isinstance(what, int) else (200, what)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


def runner(fake: Fake, **options: Any) -> EndpointRunner:
    return EndpointRunner(fake.url, **{"max_length": 32, "timeout": 5.0, **options})


def test_a_right_answer(fake: Fake) -> None:
    """Also of a server that generates a token although none was asked for."""
    for answer in (scores(), scores(4)):
        fake.completions = answer
        with runner(fake) as running:
            assert (running.model, running.max_length) == ("tiny", 31)
            [found] = running.score([PROMPT])
        assert (found.logprobs, found.best) == ([-1.5, -0.5], [-0.25, -0.5])
    sent = fake.asked[0]
    assert {**sent} == {
        "model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 0, "echo": True, "logprobs": 1
    }  # fmt: skip


def test_answers_keep_their_order(fake: Fake) -> None:
    """Several at once, of which the first is the slowest."""

    def slow_first(handler: Handler) -> None:
        number = fake.asked[-1]["prompt"][0]
        time.sleep(0.2 if number == 0 else 0)
        handler.answer({"choices": [{"index": 0, "text": str(number)}]})

    fake.completions = slow_first
    counts: list[int] = []
    with runner(fake, concurrency=4) as running:
        texts = running.generate([([number], 1, ()) for number in range(9)], counts.append)
    assert texts == [str(number) for number in range(9)]
    assert counts == list(range(1, 10))


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(UsageError, match=r"/v1/models cannot be reached: .*; is it running\?"):
            EndpointRunner(url, max_length=8, timeout=5).__enter__()


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "localhost:8000",
            "ftp://x/v1",
            "8000",
            "http://",
            "http://[::1/v1",
            "http://a b/v1",
            "http://host:port/v1",
        ),
        *("http://127.0..1/v1", "http://hö..x/v1", "http://host/v1\t", "http://a\x00b/v1"),
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="is not the address of an endpoint"):
        EndpointRunner(url, max_length=8).__enter__()


def test_another_model(fake: Fake) -> None:
    with pytest.raises(UsageError, match=r"has no model 'tinny'; did you mean 'tiny'\? \(known: tiny\)"):
        runner(fake, model="tinny").__enter__()
    fake.models = {"data": [{"id": "one"}, {"id": "two"}]}
    with pytest.raises(UsageError, match=r"serves 2 models \(one, two\); choose one with --model"):
        runner(fake).__enter__()
    with runner(fake, model="two") as running:
        assert (running.model, running.max_length) == ("two", 31)
    fake.models = {"data": []}
    with pytest.raises(UsageError, match="serves 0 models"):
        runner(fake).__enter__()
    fake.models = {"data": [{"id": "tiny", "max_model_len": 1}]}
    with pytest.raises(EndpointError, match="says that 'tiny' reads 1 tokens"):
        runner(fake).__enter__()


@pytest.mark.parametrize(
    ("models", "told"),
    [
        (b"<html>hello</html>", "is not JSON; is it an endpoint"),
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        ({"hello": 1}, "did not answer as an OpenAI endpoint: data"),
        ([1], "did not answer as an OpenAI endpoint"),
        (404, r"refused \(404\): too busy"),
    ],
)
def test_what_is_no_endpoint(fake: Fake, models: Any, told: str) -> None:
    fake.models = models
    with pytest.raises(UsageError, match=told):
        runner(fake).__enter__()


def short(name: str) -> dict[str, Any]:
    answer = scores()
    del answer["choices"][0]["logprobs"][name][-1]
    return answer


def changed(name: str, at: int, value: Any) -> dict[str, Any]:
    answer = scores()
    answer["choices"][0]["logprobs"][name][at] = value
    return answer


@pytest.mark.parametrize(
    ("completions", "told"),
    [
        (b"data: {}\n\ndata: [DONE]\n\n", "is not JSON"),
        (b'{"choices": [{"index"', "is not JSON"),
        ({"choices": []}, "gave 0 choices where one was asked for"),
        ({"choices": [{"index": 0, "text": "x"}]}, "did not score the 3 tokens of a prompt"),
        ({"choices": [{"index": 0, "text": 3}]}, r"as an OpenAI endpoint: choices\.0\.text"),
        ({"choices": "many"}, "as an OpenAI endpoint: choices"),
        (short("token_logprobs"), "did not score the 3 tokens"),
        (short("top_logprobs"), "did not score the 3 tokens"),
        (changed("token_logprobs", 1, None), "left log-probabilities of a prompt out"),
        (changed("top_logprobs", 2, {}), "left log-probabilities of a prompt out"),
        (changed("token_logprobs", 1, "low"), r"choices\.0\.logprobs\.token_logprobs\.1"),
        (400, r"/v1/completions refused \(400\): too busy"),
        (404, r"refused \(404\)"),
        (503, r"refused \(503\): too busy"),
    ],
)
def test_answers_that_do_not_count(fake: Fake, completions: Any, told: str) -> None:
    fake.completions = completions
    with runner(fake) as running, pytest.raises(EndpointError, match=told):
        running.score([PROMPT])


def test_a_model_that_computes_nan(fake: Fake) -> None:
    fake.completions = json.dumps(changed("token_logprobs", 1, float("nan"))).encode()
    with runner(fake) as running, pytest.raises(NumericalError, match="prompt 0: the model's outputs are not finite"):
        running.score([PROMPT])


def test_it_is_asked_again_when_it_was_busy(fake: Fake) -> None:
    def busy_once(handler: Handler) -> None:
        handler.answer(503 if len(fake.asked) == 1 else scores())

    fake.completions = busy_once
    with runner(fake) as running:
        assert running.score([PROMPT])[0].logprobs == [-1.5, -0.5]
    assert len(fake.asked) == 2


def stall(handler: Handler) -> None:
    handler.server.ended.wait(20)


def drip(handler: Handler) -> None:
    """A byte now and then, for ever: silence is never long enough for a client that waits for silence."""
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.end_headers()
    while not handler.server.ended.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def drop(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


@pytest.mark.parametrize("never_ends", [stall, drip])
def test_an_endpoint_that_does_not_come_to_an_end(fake: Fake, never_ends: Any) -> None:
    fake.completions = never_ends
    started = time.monotonic()
    with (
        runner(fake, timeout=0.5, concurrency=2) as running,
        pytest.raises(EndpointError, match=r"/v1/completions did not answer within 0\.5 s; it stalls"),
    ):
        running.score([PROMPT] * 10)
    assert time.monotonic() - started < 5
    fake.models = never_ends
    with pytest.raises(UsageError, match=r"/v1/models did not answer within 0\.5 s"):
        runner(fake, timeout=0.5).__enter__()


def test_an_endpoint_that_breaks_off(fake: Fake) -> None:
    fake.completions = drop
    with runner(fake) as running, pytest.raises(HalveError, match=r"cannot be reached|broke off|is not JSON"):
        running.score([PROMPT])
