"""The endpoint through the real server and the official client."""

from __future__ import annotations

import asyncio
import codecs
import itertools

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from serve.api_answers import CompletionStyle
from serve.api_models import Message
from serve.engines.base import SamplingParams, TokenLogprob
from serve.engines.sequence import Sequence
from serve.engines.text import TokenPieces
from serve.server import BackgroundServer
from tests.serve.conftest import CONTEXT
from tests.serve.helpers import metrics, wait_until

HELLO = [{"role": "user", "content": "hello"}]
EXACT = {"ignore_eos": True}


def complete(client, prompt="the cat", **fields):
    extra = {**EXACT, **fields.pop("extra", {})}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **fields)


def test_models_health_and_version(client, server):
    model = client.models.list().data[0]
    assert (model.id, model.model_extra["max_model_len"]) == ("tiny", CONTEXT)
    assert model.model_extra["root"].endswith("tiny-llama")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
    root = server.base_url.removesuffix("/v1")
    assert httpx.get(root + "/health").json() == {"status": "ok"}
    assert "version" in httpx.get(root + "/version").json()


def test_chat_whole_and_streamed_agree(client, tokenizer):
    fields = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "seed": 3, "extra_body": EXACT}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert whole.usage.prompt_tokens == len(tokenizer(rendered, add_special_tokens=False).input_ids)
    assert whole.usage.completion_tokens == 30


def test_chat_goes_to_the_end_of_the_context(client):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, extra_body=EXACT)
    assert answer.usage.total_tokens == CONTEXT


def test_chat_logprobs_spell_the_answer(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=40, logprobs=True, top_logprobs=5, seed=1,
        extra_body=EXACT,
    )  # fmt: skip
    entries = answer.choices[0].logprobs.content
    spelled = b"".join(bytes(entry.bytes) for entry in entries if not entry.token.startswith("<|"))
    assert spelled.decode(errors="ignore").startswith(answer.choices[0].message.content.split("\ufffd")[0])
    for entry in entries:
        assert len(entry.top_logprobs) == 5
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] <= 0


def test_message_parts_and_developer_role(client):
    plain = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    parts = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    fields = {"model": "tiny", "max_tokens": 10, "temperature": 0}
    answers = [client.chat.completions.create(messages=m, **fields) for m in (plain, parts)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage == answers[1].usage


def test_what_a_template_may_read_of_a_turn_goes_on_to_it():
    said = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2", "name": "sum", "refusal": None}
    assert Message(**said).for_template() == {
        "role": "assistant", "content": "4", "reasoning_content": "2 + 2", "name": "sum",
    }  # fmt: skip
    assert Message(role="developer", content="be brief").for_template() == {"role": "system", "content": "be brief"}


def test_all_forms_of_a_prompt(client, tokenizer):
    texts = ["the cat", "all the men"]
    ids = [tokenizer(text).input_ids for text in texts]
    fields = {"max_tokens": 12, "temperature": 0}
    single = [complete(client, text, **fields).choices[0].text for text in texts]
    for prompt in (texts, ids):
        answer = complete(client, prompt, **fields)
        assert [choice.text for choice in answer.choices] == single
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert complete(client, ids[0], **fields).choices[0].text == single[0]
    assert complete(client, max_tokens=None).usage.completion_tokens == 16


def test_echo_scores_a_prompt_as_log_softmax_does(client, reference, tokenizer):
    """The legacy format that lm-eval reads, against an independent forward pass."""
    ids = tokenizer("the cat sat on the naïve €").input_ids
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    for fields in ({"max_tokens": 0}, {"max_tokens": 1, "temperature": 0}):
        answer = complete(client, ids, echo=True, logprobs=3, **fields)
        choice = answer.choices[0]
        scores = choice.logprobs
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        assert len(scores.tokens) == len(ids) + fields["max_tokens"]
        for at in range(1, len(ids)):
            row = expected[at - 1]
            assert scores.token_logprobs[at] == pytest.approx(row[ids[at]].item(), abs=1e-4)
            best = sorted(scores.top_logprobs[at].values(), reverse=True)[:3]
            assert best == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
            assert scores.tokens[at] in scores.top_logprobs[at]
        assert choice.text.startswith("the cat sat on the naïve €")
        for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
            assert token.startswith("bytes:") or choice.text[offset:].startswith(token)
        assert answer.usage.completion_tokens == fields["max_tokens"]
    # What lm-eval asks next: is the continuation what greedy decoding would give?
    greedy = [max(top, key=top.get) for top in scores.top_logprobs[1:]]
    assert greedy[-1] == scores.tokens[-1]


def test_echo_streams_the_prompt_first(client):
    whole = complete(client, echo=True, max_tokens=5, temperature=0, logprobs=0)
    chunks = list(complete(client, echo=True, max_tokens=5, temperature=0, logprobs=0, stream=True))
    assert chunks[0].choices[0].text.startswith("the cat")
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    for name in ("tokens", "token_logprobs", "text_offset"):
        parts = [getattr(c.choices[0].logprobs, name) for c in chunks if c.choices[0].logprobs]
        assert list(itertools.chain(*parts)) == pytest.approx(getattr(whole.choices[0].logprobs, name))


def test_usage_in_every_chunk(client):
    """As vLLM's clients may ask for it."""
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    chunks = list(complete(client, max_tokens=5, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 5
    assert all(
        chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens for chunk in chunks
    )


def test_offsets_of_text_that_was_held_back():
    """A token that ends like a stop string begins is shown in part, and reported with its own place once the rest follows."""
    words = Tokenizer(models.BPE({"abX": 0, "c": 1, "Y": 2, "d": 3}, []))
    words.decoder = decoders.ByteLevel()
    pieces = TokenPieces(PreTrainedTokenizerFast(tokenizer_object=words))

    def answer(*tokens: int) -> dict:
        style = CompletionStyle("tiny", pieces, 1, logprobs=True)
        params = SamplingParams(len(tokens), stop=("XY",), logprobs=0)
        sequence = Sequence([3], params, lambda delta: None, pieces=pieces, eos_ids=frozenset())
        for token in tokens:
            style.add(0, sequence.push(token, TokenLogprob(token, -1.0)))
        [choice] = style.whole()
        return choice

    told = answer(0, 1, 3)
    assert told["text"] == "abXcd"
    assert (told["logprobs"]["tokens"], told["logprobs"]["text_offset"]) == (["abX", "c", "d"], [0, 3, 4])
    stopped = answer(1, 0, 2)
    assert (stopped["text"], stopped["finish_reason"]) == ("cab", "stop")
    assert (stopped["logprobs"]["tokens"], stopped["logprobs"]["text_offset"]) == (["c", "abX"], [0, 1])


def test_seed_and_n(client):
    fields = {"max_tokens": 20, "temperature": 1.0}
    first = complete(client, n=3, seed=11, **fields).choices
    again = complete(client, n=3, seed=11, **fields).choices
    assert [choice.text for choice in first] == [choice.text for choice in again]
    assert len({choice.text for choice in first}) == 3
    assert complete(client, seed=11, **fields).choices[0].text == first[0].text
    assert complete(client, seed=12, **fields).choices[0].text == first[1].text
    assert len({complete(client, **fields).choices[0].text for _ in range(3)}) == 3  # no seed, no repetition


def test_stop_strings_over_token_borders(client, tokenizer):
    full = complete(client, max_tokens=60, temperature=0, logprobs=0).choices[0]
    tokens = full.logprobs.tokens
    # From the middle of one token to the middle of another.
    stop = next(full.text[at : at + 5] for at in range(8, 40) if full.text.find(full.text[at : at + 5]) == at)
    for stream in (False, True):
        answer = complete(client, max_tokens=60, temperature=0, logprobs=0, stop=[stop, "never"], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        text = "".join(choice.text for choice in choices)
        assert text == full.text[: full.text.index(stop)]
        assert choices[-1].finish_reason == "stop"
        reported = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
        assert reported == tokens[: len(reported)]
        assert len(reported) < len(tokens)
    token = tokenizer("q").input_ids[0]
    biased = complete(client, max_tokens=9, logit_bias={str(token): 100}, extra={"stop_token_ids": [token]})
    assert (biased.choices[0].text, biased.choices[0].finish_reason) == ("", "stop")
    assert biased.usage.completion_tokens == 1


def test_eos_ends_unless_ignored(client, tokenizer):
    bias = {str(tokenizer.eos_token_id): 100}
    stopped = complete(client, max_tokens=9, logit_bias=bias, extra={"ignore_eos": False})
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 1)
    ignored = complete(client, max_tokens=9, logit_bias=bias)
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 9)


def test_streams_hold_whole_characters(client, tokenizer):
    """A bias walks the model through the bytes of characters of two, three and four bytes."""
    text = "é€🐈"
    ids = tokenizer(text).input_ids
    assert len(ids) == 9
    bias = {str(token): 30 for token in ids}
    stream = complete(client, max_tokens=200, temperature=1.0, seed=5, logit_bias=bias, stream=True)
    chunks = [chunk.choices[0].text for chunk in stream]
    assert any(ord(character) > 127 for character in "".join(chunks))
    whole = complete(client, max_tokens=200, temperature=1.0, seed=5, logit_bias=bias, logprobs=0).choices[0]
    assert "".join(chunks) == whole.text
    spelled = b"".join(
        bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) if name.startswith("bytes:") else name.encode()
        for name in whole.logprobs.tokens
        if not name.startswith("<|")
    )
    assert whole.text == codecs.getincrementaldecoder("utf-8")("replace").decode(spelled)  # without an unfinished end


def test_eight_at_once_equal_one_by_one(server):
    prompts = ["the cat", "the dog ran", "all", "x y z", "river " * 20, "and the", "stage", "to be"]

    async def ask(client: openai.AsyncOpenAI, index: int) -> str:
        sampled = {"temperature": 1.0, "seed": index} if index % 2 else {"temperature": 0}
        fields = {"model": "tiny", "prompt": prompts[index], "max_tokens": 20 + 5 * index, **sampled}
        if index % 3:
            return (await client.completions.create(**fields, extra_body=EXACT)).choices[0].text
        stream = await client.completions.create(**fields, extra_body=EXACT, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def both() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none") as client:
            one_by_one = [await ask(client, index) for index in range(8)]
            return one_by_one, await asyncio.gather(*(ask(client, index) for index in range(8)))

    one_by_one, at_once = asyncio.run(both())
    assert at_once == one_by_one


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_stops_the_generation(server: BackgroundServer, stream):
    wait_until(lambda: metrics(server.base_url)["vllm:num_requests_running"] == 0)
    before = metrics(server.base_url)
    body = {"prompt": "the", "n": 8, "max_tokens": 250, "stream": stream, "ignore_eos": True}
    url = server.base_url + "/completions"
    if stream:
        with httpx.stream("POST", url, json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=httpx.Timeout(5, read=0.05))

    def stopped() -> bool:
        now = metrics(server.base_url)
        return now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"] == 0

    wait_until(stopped)
    after = metrics(server.base_url)
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] < 8 * 250
    assert after["vllm:request_success_total[abort]"] - before["vllm:request_success_total[abort]"] == 8
    assert after["vllm:kv_cache_usage_perc"] == 0


def test_metrics_have_vllms_names(client, server):
    before = metrics(server.base_url)
    complete(client, max_tokens=6, extra={"ignore_eos": True})
    after = metrics(server.base_url)

    def gained(name: str) -> float:
        return after[name] - before[name]

    assert gained("vllm:generation_tokens_total") == 6
    assert gained("vllm:prompt_tokens_total") > 0
    assert gained("vllm:time_to_first_token_seconds_count") == 1
    assert gained("vllm:inter_token_latency_seconds_count") == 5
    assert gained("vllm:request_time_per_output_token_seconds_count") == 1
    assert gained("vllm:e2e_request_latency_seconds_count") == 1
    assert gained("vllm:request_success_total[length]") == 1
    assert 0 < gained("vllm:time_to_first_token_seconds_sum") < gained("vllm:e2e_request_latency_seconds_sum")
