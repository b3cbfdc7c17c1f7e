"""Bad input gets a clear error in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api import create_app
from serve.api_answers import CompletionStyle
from serve.api_json import SLICE, dumps_in_pieces, pieces
from serve.server import BackgroundServer
from tests.serve.conftest import CONTEXT
from tests.serve.helpers import wait_until

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def post(server: BackgroundServer, path: str, **fields) -> dict:
    answer = httpx.post(server.base_url + path, **fields)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return {"status": answer.status_code, **error}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content": b'{"prompt": ', "headers": {"content-type": "application/json"}}, "not valid JSON"),
        ({"content": b"", "headers": {"content-type": "application/json"}}, "body"),
        ({"data": {"prompt": "x"}}, "Content-Type application/json"),
        ({"json": ["x"]}, "JSON object"),
        (
            {"content": b'{"prompt": "\\ud800"}', "headers": {"content-type": "application/json"}},
            "not Unicode",
        ),
        ({"content": b'{"\\ud800": 1}', "headers": {"content-type": "application/json"}}, "not a field"),
        ({"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, "body"),
    ],
)
def test_malformed_bodies(server, fields, message):
    error = post(server, "/completions", **fields)
    assert (error["status"], error["type"]) == (400, "invalid_request_error")
    assert message in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1, -2]]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"prompt": ["x"] * 9, "n": 128}, "prompt"),
        ({"temprature": 1}, "temprature"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"prompt": [[5] * 250] * 100, "echo": True, "logprobs": 20, "max_tokens": 0}, "logprobs"),
    ],
)
def test_impossible_completion_fields(server, change, param):
    error = post(server, "/completions", json={"prompt": "x", "max_tokens": 1, **change})
    assert (error["status"], error["param"]) == (400, param)
    assert param in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ],
)
def test_impossible_chat_fields(server, change, param):
    error = post(server, "/chat/completions", json={**CHAT, **change})
    assert error["status"] == 400
    assert error["param"].startswith(param)


@pytest.mark.parametrize("field", ["model", "x" * 7_000_000])
def test_long_names_cost_nothing(server, field):
    """The event loop serves everybody, and the answer does not repeat them."""
    started = time.perf_counter()
    error = post(server, "/completions", json={"prompt": "x", field: "a" * (7_000_000 if field == "model" else 1)})
    assert time.perf_counter() - started < 1  # 1.5 s, and 8 MB of answer, before
    assert error["status"] in (400, 404)
    assert len(str(error)) < 2000


def test_what_asks_for_nothing_is_accepted(server):
    body = {
        **CHAT, "tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "user": "me",
        "store": False, "repetition_penalty": 1.0, "temperature": None, "stop": None, "n": 1,
    }  # fmt: skip
    assert httpx.post(server.base_url + "/chat/completions", json=body).status_code == 200


async def _post(app, body: dict, **headers) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
        return await client.post("/v1/completions", json=body, headers=headers)


def test_a_full_queue_says_so(engine, monkeypatch):
    monkeypatch.setattr("serve.engines.transformers.MAX_WAITING", 3)
    app = create_app(engine, "tiny")
    full = asyncio.run(_post(app, {"prompt": "x", "n": 100, "max_tokens": 100, "ignore_eos": True}))
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert (full.json()["error"]["type"], full.json()["error"]["code"]) == ("rate_limit_error", "queue_full")
    wait_until(lambda: engine.stats().running + engine.stats().waiting == 0)  # what it had queued is gone
    assert asyncio.run(_post(app, {"prompt": "x", "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_long(server, announced):
    text = b'{"prompt": "' + b"x" * (8 * 2**20) + b'"}'
    content = text if announced else iter([text[: 2**22], text[2**22 :]])
    error = post(server, "/completions", content=content, headers={"content-type": "application/json"})
    assert error["status"] == 413
    assert "8 MiB" in error["message"]
    assert httpx.get(server.base_url + "/models").status_code == 200


def test_many_choices_do_not_hold_up_others(engine):
    """While the largest request that is allowed begins, the event loop goes on."""

    async def scenario() -> float:
        worst, last = 0.0, time.perf_counter()
        largest = {"prompt": ["the cat"] * 8, "n": 128, "max_tokens": 1}
        task = asyncio.ensure_future(_post(create_app(engine, "tiny"), largest))
        while not task.done() and engine.stats().prompt_tokens == 0:
            await asyncio.sleep(0)
            worst, last = max(worst, time.perf_counter() - last), time.perf_counter()
        task.cancel()
        return worst

    assert asyncio.run(scenario()) < 1  # 20 s for 128,000, and 0.16 s for as many as this, before


ANSWERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(ANSWERS)
def test_json_in_pieces_is_json(answer):
    assert json.loads(dumps_in_pieces(answer)) == answer
    assert dumps_in_pieces(answer) == json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def test_no_piece_of_json_is_long():
    count = 10_000
    logprobs = {
        "tokens": ["tok"] * count,
        "top_logprobs": [{"a": -1.0, "b": -2.0}] * count,
        "text_offset": list(range(count)),
    }
    answer = {"choices": [{"index": index, "text": "", "logprobs": logprobs} for index in range(3)], "usage": {}}
    found = list(pieces(answer))
    assert json.loads("".join(found)) == answer
    assert max(map(len, found)) < 25 * SLICE


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_long_prompts_do_not_hold_up_others(engine, monkeypatch, stream):
    """While they are written, the event loop goes on."""
    write = CompletionStyle._append

    def slow(*arguments) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(CompletionStyle, "_append", slow)
    body = {"prompt": "the cat sat", "n": 4, "max_tokens": 0, "echo": True, "logprobs": 2, "stream": stream}

    async def scenario() -> tuple[httpx.Response, float]:
        worst, last = 0.0, time.perf_counter()
        task = asyncio.ensure_future(_post(create_app(engine, "tiny"), body))
        while not task.done():
            await asyncio.sleep(0.001)
            worst, last = max(worst, time.perf_counter() - last), time.perf_counter()
        return await task, worst

    answer, worst = asyncio.run(scenario())
    assert answer.status_code == 200
    assert worst < 0.25


def test_unknown_model_route_and_method(server, client):
    error = post(server, "/completions", json={"model": "tinny", "prompt": "x"})
    assert (error["status"], error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "did you mean 'tiny'" in error["message"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert post(server, "/embeddings", json={})["status"] == 404
    answer = httpx.get(server.base_url + "/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "POST" in answer.json()["error"]["message"]


def test_a_prompt_that_is_too_long(server):
    for ids, asked in ([5] * 300, 1), ([5] * 250, 7):
        error = post(server, "/completions", json={"prompt": ids, "max_tokens": asked})
        assert (error["status"], error["code"]) == (400, "context_length_exceeded")
        assert str(CONTEXT) in error["message"]
        assert str(len(ids)) in error["message"]
    long = {"messages": [{"role": "user", "content": "q" * 300}]}
    assert post(server, "/chat/completions", json=long)["code"] == "context_length_exceeded"
    body = {"prompt": [5] * CONTEXT, "max_tokens": 0, "echo": True, "logprobs": 1}
    assert httpx.post(server.base_url + "/completions", json=body).status_code == 200  # it can be scored


def test_a_key_and_a_model_without_a_template(chatless_dir):
    with BackgroundServer(str(chatless_dir), api_key="sesame", device="cpu") as server:
        assert server.model == "tiny-base"
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
            error = post(server, "/completions", content=b"{", headers=headers)
            assert (error["status"], error["code"]) == (401, "invalid_api_key")
        root = server.base_url.removesuffix("/v1")
        assert httpx.get(root + "/health").status_code == 200
        assert httpx.get(root + "/metrics").status_code == 200
        with (
            openai.OpenAI(base_url=server.base_url, api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        with openai.OpenAI(base_url=server.base_url, api_key="sesame") as client:
            assert client.models.list().data[0].id == "tiny-base"
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(model="tiny-base", **CHAT)
        os.kill(server.pid, signal.SIGINT)
        assert server.wait() == 0


def test_a_dead_engine_is_unhealthy(engine):
    async def scenario() -> None:
        transport = httpx.ASGITransport(create_app(engine, "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            assert (await client.get("/health")).status_code == 200

            def explode(*_: object) -> None:
                raise RuntimeError("the cable came off")

            engine.model.register_forward_pre_hook(explode)
            body = {"prompt": "x", "max_tokens": 5}
            struck = await client.post("/v1/completions", json=body)
            assert struck.status_code == 503
            assert "the cable came off" in struck.json()["error"]["message"]
            later = await client.post("/v1/completions", json={**body, "stream": True})
            assert (later.status_code, later.json()["error"]["code"]) == (503, "engine_dead")
            health = await client.get("/health")
            assert health.status_code == 503
            assert "the cable came off" in health.json()["error"]["message"]

    asyncio.run(scenario())


def test_an_error_in_mid_stream_reaches_the_client(engine):
    async def scenario() -> str:
        transport = httpx.ASGITransport(create_app(engine, "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            calls = []

            def explode_later(*_: object) -> None:
                calls.append(1)
                if len(calls) > 5:
                    raise RuntimeError("the cable came off")

            engine.model.register_forward_pre_hook(explode_later)
            body = {"prompt": "x", "max_tokens": 50, "stream": True, "ignore_eos": True}
            return (await client.post("/v1/completions", json=body)).text

    events = asyncio.run(scenario()).strip().split("\n\n")
    assert "the cable came off" in events[-2]
    assert events[-1] == "data: [DONE]"
