"""vLLM's own OpenAI server on a packed checkpoint, under the official client. One server for all tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch

from compress.errors import HalveError
from serve.engines.vllm import VllmServer
from serve.loading import load_model, load_tokenizer
from serve.measure.backends import backends_of
from serve.measure.memory import told_by
from tests.runs import Halve
from tests.serve import vllm_checkpoints as checkpoints
from tests.serve.helpers import metrics
from tests.serve.vllm_session import ENVIRONMENT

pytestmark = checkpoints.needs_vllm
DATA = Path(__file__).resolve().parents[1] / "data" / "tasks"
TEXT = "The miller had three sons, and when he died"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.pair(tmp_path_factory.mktemp("vllm-server"))[0]


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[VllmServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        extra = ["--enforce-eager"]
        with VllmServer(
            str(packed), served_model_name="tiny", api_key="secret", max_model_len=512, max_num_seqs=8, extra=extra
        ) as running:
            yield running


@pytest.fixture
def client(server: VllmServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="secret", max_retries=0, timeout=60) as client:
        yield client


def complete(client: openai.OpenAI, prompt: str, tokens: int = 16, **options: object) -> str:
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, **options)  # type: ignore[call-overload]
    return answer.choices[0].text


def test_the_model_and_the_key(server: VllmServer, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(f"{server.base_url}/models").status_code == 401
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="another", prompt="x")
    assert "linear layers run 2:4 on cpu" in server.log


def test_a_completion_streamed_and_whole_is_what_transformers_says(client: openai.OpenAI, packed: Path) -> None:
    whole = complete(client, TEXT, extra_body={"ignore_eos": True})
    stream = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=16, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 8
    assert "".join(pieces) == whole
    model, tokenizer = load_model(packed), load_tokenizer(packed)
    prompt = tokenizer(TEXT, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False)  # type: ignore[operator]
    expected = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert whole[:8] == expected[:8], "bfloat16 may differ later on"


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Who had three sons?"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 12
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True)  # type: ignore[arg-type]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=TEXT, max_tokens=4, temperature=0, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs is not None
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values()) <= 0


def test_concurrent_requests_get_their_own_answers(client: openai.OpenAI) -> None:
    prompts = [f"Part {number}. {TEXT}" for number in range(12)]
    alone = [complete(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    # A batch of another size may round another way in bfloat16; an answer to another prompt would differ in all.
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 9
    assert len(set(alone)) > 6


def test_a_client_that_hangs_up_frees_its_place(server: VllmServer, client: openai.OpenAI) -> None:
    def generated() -> float:
        return metrics(server.base_url)["vllm:generation_tokens_total"]

    before, expected = generated(), complete(client, TEXT)
    # Far more answers than run at once, so that not all are there before the server sees that the connection ended: on a busy
    # machine its process may wait for many seconds while the engine's goes on.
    answers, tokens = 1024, 480
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=tokens, n=answers, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    seen = [before, generated()]
    while seen[-1] != seen[-2]:  # until nothing is generated any more
        time.sleep(1)
        seen.append(generated())
    assert before < seen[-1] < before + answers * tokens / 2
    assert complete(client, TEXT) == expected


def test_bad_requests_are_refused_and_the_server_goes_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="tiny", prompt="x " * 4000)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert complete(client, TEXT)


def test_bench_through_a_server_that_runs(server: VllmServer, packed: Path, halve: Halve) -> None:
    """vLLM's stream is understood, and its memory told."""
    called = halve(
        "bench", packed, "--url", server.base_url, "--api-key", "secret", "--prompt", "24", "--output", "6",
        "--concurrency", "1,4", "--requests", "4", "--rounds", "2", "--json",
    )  # fmt: skip
    assert called.code == 0, called.stderr
    for label, one in called.document["models"]["model"]["loads"].items():
        sent = 2 * (4 + int(label.removeprefix("concurrency=")))  # 4 a round, after those that bring the load up
        assert (one["requests"], one["errors"]) == (sent, 0)
        assert [request["tokens"] for done in one["rounds"] for request in done["requests"]] == [6] * sent
        # So small a model is faster than its server, which then sends several tokens at once.
        assert 0 <= one["tpot_seconds"]["p50"] < one["ttft_seconds"]["p50"] <= one["e2e_seconds"]["p50"]
    told = told_by(server.base_url, server.log)
    assert told["kv_cache"] > 0
    used = backends_of(server.base_url, server.log)
    assert {one["backend"] for one in used if one["reason"] != "not 2:4"} == {"cpu"}


def test_lm_eval_through_the_endpoint_is_that_of_the_process(server: VllmServer, packed: Path, halve: Halve) -> None:
    """Tasks by vLLM as by transformers, both on halve's kernels: each answer gets the same probability, up to bfloat16."""
    tasks = ["--no-perplexity", "--tasks", "lambada_openai,arc_easy", "--task-data", DATA, "--json"]
    served = halve("eval", packed, "--url", server.base_url, "--api-key", "secret", *tasks)
    assert served.code == 0, served.stderr
    own = halve("eval", packed, "--device", "cpu", *tasks)
    assert served.document["through"] == "endpoint"
    by_vllm, by_transformers = (called.document["models"][0]["tasks"] for called in (served, own))
    assert by_vllm.keys() == by_transformers.keys() == {"lambada_openai", "arc_easy"}
    for name, expected in by_transformers.items():
        assert by_vllm[name]["sha256"] == expected["sha256"]
        for metric, figure in expected["metrics"].items():
            tolerance = (
                {"rel": 0.02, "abs": 0.25} if metric == "perplexity" else {"abs": 0}
            )  # (its samples are logarithms)
            assert by_vllm[name]["metrics"][metric]["samples"] == pytest.approx(figure["samples"], **tolerance)
    assert by_vllm["arc_easy"]["metrics"]["acc"]["value"] == by_transformers["arc_easy"]["metrics"]["acc"]["value"]


def test_a_server_that_does_not_start_says_why(packed: Path) -> None:
    started = time.monotonic()
    done = threading.Event()
    with (
        pytest.raises(HalveError, match=r"vLLM ended with code 2(.|\n)*--no-such-argument"),
        VllmServer(str(packed), extra=["--no-such-argument"]),
    ):
        done.set()
    assert not done.is_set()
    assert time.monotonic() - started < 120
