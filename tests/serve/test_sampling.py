"""Sampling at its edges, against transformers' own processors, and a checkpoint's advice."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from compress.errors import SourceError
from serve.api import create_app
from serve.engines import sampling
from serve.engines.base import SamplingParams
from serve.engines.ranges import read_advice
from serve.engines.sampling import next_tokens, sample
from serve.engines.sequence import Sequence
from serve.engines.text import TokenPieces
from serve.engines.transformers import TransformersEngine
from tests.serve.helpers import collect, greedy, tokens_of


def sequence(prompt: list[int], params: SamplingParams, tokenizer) -> Sequence:
    return Sequence(prompt, params, lambda delta: None, pieces=TokenPieces(tokenizer), eos_ids=frozenset())


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_p": 1e-50},
        {"top_p": 1e-38},
        {"temperature": 1e-50},
        {"temperature": 1e-50, "top_p": 0.9},
        {"temperature": 1e-40, "top_k": 5, "min_p": 0.5},
        {"temperature": 2.0**-126, "top_p": 0.5},
        {"min_p": 1.0},
        {"temperature": 1e3, "top_p": 1e-50, "top_k": 1},
    ],
)
def test_extremes_leave_the_likeliest(engine, tokenizer, extreme):
    ids = tokenizer("the cat").input_ids
    [best] = collect(engine, [(ids, greedy(4, logprobs=0))])
    params = SamplingParams(4, **{"seed": 1, "ignore_eos": True, "logprobs": 0, **extreme})
    [drawn] = collect(engine, [(ids, params)])
    assert tokens_of(drawn) == tokens_of(best)
    assert engine.failure is None


def test_min_p_keeps_what_transformers_keeps():
    torch.manual_seed(0)
    logits = torch.randn(50)
    kept = MinPLogitsWarper(0.1)(torch.zeros(1, 1), (logits / 0.8)[None])[0].isfinite()
    generator = torch.Generator().manual_seed(0)
    drawn = {int(sample(logits, SamplingParams(1, 0.8, min_p=0.1), generator)) for _ in range(3000)}
    assert 1 < len(drawn) < 50
    assert drawn == set(kept.nonzero().flatten().tolist())


def test_the_repetition_penalty_is_transformers(engine, reference, tokenizer):
    """On prompt and answer, each token once; the reference decodes by itself."""
    ids = tokenizer("the cat sat on the mat").input_ids
    expected, penalty = list(ids), RepetitionPenaltyLogitsProcessor(1.7)
    with torch.inference_mode():
        for _ in range(25):
            logits = reference(torch.tensor([expected])).logits[:, -1].float()
            expected.append(int(penalty(torch.tensor([expected]), logits).argmax()))
    plain, punished = collect(
        engine, [(ids, greedy(25, logprobs=0)), (ids, greedy(25, logprobs=0, repetition_penalty=1.7))]
    )
    assert tokens_of(punished) == expected[len(ids) :]
    assert tokens_of(plain) != tokens_of(punished)


def test_an_error_of_one_sequence_is_its_own(engine, monkeypatch):
    def explode(logits, params, generator):
        if params.seed == 13:
            raise IndexError("no token is left")
        return sample(logits, params, generator)

    monkeypatch.setattr(sampling, "sample", explode)
    bad, fine = collect(engine, [([5], SamplingParams(5, seed=13)), ([6], SamplingParams(5, seed=1, ignore_eos=True))])
    assert "no token is left" in bad[-1].error
    assert fine[-1].finish_reason == "length"
    assert engine.failure is None
    assert collect(engine, [([6], greedy(3))])[0][-1].finish_reason == "length"


def test_not_finite_rows_and_broken_ones_in_one_batch(tokenizer):
    logits = torch.randn(3, 20)
    logits[0, 3] = float("nan")
    rows = [
        sequence([1], SamplingParams(1, 0), tokenizer),
        sequence([1], SamplingParams(1, 0, logit_bias={99: 1.0}), tokenizer),
        sequence([1], SamplingParams(1, 0, logprobs=0), tokenizer),
    ]
    nan, outside, fine = next_tokens(logits, rows)
    assert isinstance(nan, str)
    assert "NaN" in nan
    assert isinstance(outside, str)
    assert fine[0] == int(logits[2].argmax())


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -2},
        {"min_p": "0.1"},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
    ],
)
def test_wrong_advice_is_named(wrong):
    with pytest.raises(SourceError, match=rf"generation_config\.json of 'dir' recommends {next(iter(wrong))} "):
        read_advice(wrong, "dir")


def test_advice_that_is_not_followed_is_told():
    advice, notes = read_advice(
        {"temperature": 0, "top_k": 0, "num_beams": 4, "no_repeat_ngram_size": 0, "typical_p": 1.0, "bos_token_id": 1},
        "d",
    )
    assert advice == {"temperature": 0, "top_k": 0}
    assert "temperature 0, top_k 0" in notes[0]
    assert "num_beams" in notes[1]
    assert "ngram" not in notes[1] + notes[0]
    assert read_advice({"eos_token_id": 2}, "d") == ({}, [])


def advised(model_dir: Path, directory: Path, **advice: object) -> TransformersEngine:
    """An engine on a copy of the model that recommends something."""
    shutil.copytree(model_dir, directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **advice}))
    return TransformersEngine(str(directory), device="cpu")


def test_advice_is_checked_when_the_model_is_loaded(model_dir, tmp_path):
    with pytest.raises(SourceError, match=r"recommends top_p 0\.0"):
        advised(model_dir, tmp_path / "model", top_p=0.0).load()


def test_advice_counts_where_a_request_says_nothing(model_dir, tmp_path):
    engine = advised(
        model_dir, tmp_path / "model", temperature=0, repetition_penalty=1.7, frequency_penalty=0.5, max_new_tokens=9
    )
    engine.load()
    ids = [5, 6, 7]

    async def ask(path: str, **body: object) -> dict:
        transport = httpx.ASGITransport(create_app(engine, "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            return (await client.post(path, json={"ignore_eos": True, **body})).json()

    try:
        both = greedy(20, repetition_penalty=1.7, frequency_penalty=0.5)
        expected = "".join(delta.text for delta in collect(engine, [(ids, both)])[0])
        plain = "".join(delta.text for delta in collect(engine, [(ids, greedy(20))])[0])
        assert expected != plain
        told = asyncio.run(ask("/v1/completions", prompt=ids, max_tokens=20))
        assert told["choices"][0]["text"] == expected
        own = {"repetition_penalty": 1.0, "frequency_penalty": 0.0}
        told = asyncio.run(ask("/v1/completions", prompt=ids, max_tokens=20, **own))
        assert told["choices"][0]["text"] == plain
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        assert asyncio.run(ask("/v1/chat/completions", **chat))["usage"]["completion_tokens"] == 9
        assert asyncio.run(ask("/v1/chat/completions", **chat, max_tokens=12))["usage"]["completion_tokens"] == 12
    finally:
        engine.close()
