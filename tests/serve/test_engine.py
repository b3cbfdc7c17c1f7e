"""The engine itself, against `model.generate` and against distributions computed here."""

from __future__ import annotations

import queue

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
)

from compress.errors import SourceError, UsageError
from serve.engines.base import Delta, EngineDeadError, SamplingParams
from serve.engines.kv_cache import BatchCache
from serve.engines.loading import choose_dtype
from serve.engines.sequence import Sequence
from serve.engines.transformers import TransformersEngine
from tests.serve.helpers import collect, greedy, text_of, tokens_of, wait_until

PROMPTS = ["the cat", "all the men and the dog ran to", "x", "and the river " * 9]


def generate(model, ids: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        )  # fmt: skip
    return output[0, len(ids) :].tolist()


def test_greedy_equals_generate_alone_and_in_a_batch(engine, reference, tokenizer):
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    counts = [40, 7, 60, 25]  # they leave at different times
    expected = [generate(reference, ids, count) for ids, count in zip(prompts, counts, strict=True)]
    eos = tokenizer.eos_token_id
    jobs = [
        (ids, greedy(count, logprobs=0, logit_bias={eos: -100})) for ids, count in zip(prompts, counts, strict=True)
    ]
    assert [tokens_of(collect(engine, [job])[0]) for job in jobs] == expected
    assert [tokens_of(deltas) for deltas in collect(engine, jobs)] == expected
    # More than there are rows: the rest waits and joins in flight.
    assert [tokens_of(deltas) for deltas in collect(engine, jobs * 5)] == expected * 5


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=320),
        OPTConfig(
            hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
            max_position_embeddings=128, vocab_size=320,
        ),
        GPTNeoXConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, vocab_size=320,
        ),
        MistralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=8, max_position_embeddings=128, vocab_size=320,
        ),
        Gemma2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
            num_key_value_heads=2, sliding_window=8, max_position_embeddings=128, vocab_size=320,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_families_decode_in_a_batch(config, tokenizer, tmp_path):
    """Learned positions, an offset in them, sliding windows: padding on the left suits them all."""
    config.initializer_range = config.init_std = 0.2
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), device="cpu")
    engine.load()
    try:
        prompts = [tokenizer(text).input_ids for text in PROMPTS]
        bias = {tokenizer.eos_token_id: -100}
        jobs = [(ids, greedy(20, logprobs=0, logit_bias=bias)) for ids in prompts]
        batched = [tokens_of(deltas) for deltas in collect(engine, jobs)]
        assert batched == [generate(model, ids, 20) for ids in prompts]
    finally:
        engine.close()


def test_a_prompt_longer_than_one_chunk(engine, reference, tokenizer, monkeypatch):
    monkeypatch.setattr("serve.engines.transformers.PREFILL_TOKENS", 16)
    ids = tokenizer("and the river ran " * 12).input_ids
    bias = {tokenizer.eos_token_id: -100}
    jobs = [(ids, greedy(9, logprobs=0, logit_bias=bias)), ([5, 6, 7], greedy(30, logprobs=0))]
    deltas = collect(engine, jobs)
    assert tokens_of(deltas[0]) == generate(reference, ids, 9)


def test_sampling_follows_the_distribution(engine, reference, tokenizer):
    """The nucleus of the top 12 at temperature 0.7, counted over 600 seeds, against its definition."""
    ids = tokenizer("the cat").input_ids
    with torch.inference_mode():
        logits = reference(torch.tensor([ids])).logits[0, -1].double()
    order = logits.argsort(descending=True)[:12].tolist()
    expected = torch.softmax(logits[order] / 0.7, -1)
    inside = [i for i in range(12) if expected[:i].sum() < 0.9]
    expected = expected[inside] / expected[inside].sum()
    params = [SamplingParams(1, 0.7, top_k=12, top_p=0.9, seed=s, ignore_eos=True, logprobs=0) for s in range(600)]
    drawn = [tokens_of(deltas)[0] for deltas in collect(engine, [(ids, p) for p in params])]
    assert set(drawn) <= {order[i] for i in inside}
    shares = torch.tensor([drawn.count(order[i]) / 600 for i in inside], dtype=torch.float64)
    assert (shares - expected).abs().max() < 0.08  # four standard deviations of a share of 0.5


def test_a_seed_decides_whatever_else_runs(engine, tokenizer):
    ids = tokenizer("the dog").input_ids
    job = (ids, SamplingParams(30, 1.0, seed=7, ignore_eos=True, logprobs=0))
    noise = [([*ids, n], SamplingParams(20 + n, 1.3, ignore_eos=True)) for n in range(6)]
    alone = tokens_of(collect(engine, [job])[0])
    assert tokens_of(collect(engine, [*noise, job])[-1]) == alone
    other = SamplingParams(30, 1.0, seed=8, ignore_eos=True, logprobs=0)
    assert tokens_of(collect(engine, [(ids, other)])[0]) != alone


def test_penalties_forbid_repetition(engine, tokenizer):
    ids = tokenizer("the").input_ids
    plain = tokens_of(collect(engine, [(ids, greedy(60, logprobs=0))])[0])
    punished = tokens_of(collect(engine, [(ids, greedy(60, logprobs=0, frequency_penalty=100.0))])[0])
    assert len(set(plain)) < 60  # a random model loops
    assert len(set(punished)) == 60


def test_the_cache_is_freed_and_the_counts_are_right(engine, tokenizer):
    ids = tokenizer("the cat").input_ids
    collect(engine, [(ids, greedy(10)), (ids, greedy(20))])
    wait_until(lambda: engine.stats().running == 0)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (2 * len(ids), 30)
    assert stats.kv_cache_usage == 0


def test_cancel_stops_a_sequence(engine):
    inbox: queue.Queue = queue.Queue()
    ticket = engine.submit([5], greedy(250), inbox.put)
    waiting = [engine.submit([5], greedy(250), inbox.put) for _ in range(12)]
    inbox.get(timeout=30)
    for each in (ticket, *waiting):
        engine.cancel(each)
    wait_until(lambda: engine.stats().running + engine.stats().waiting == 0)
    assert engine.stats().generation_tokens < 250
    assert engine.stats().kv_cache_usage == 0
    assert text_of(collect(engine, [([5], greedy(3))])[0]) is not None  # and it goes on


def test_memory_bounds_what_runs_at_once(model_dir, monkeypatch):
    """With room for about two sequences, the others wait, and all come to their end."""
    monkeypatch.setattr("serve.engines.loading.cache_slots", lambda *_: 700)
    engine = TransformersEngine(str(model_dir), device="cpu")
    engine.load()
    try:
        seen = []
        inbox: queue.Queue = queue.Queue()
        for _ in range(6):
            engine.submit([5] * 50, greedy(150), inbox.put)
        ended = 0
        while ended < 6:
            ended += inbox.get(timeout=30).last
            seen.append(engine.stats())
        assert max(stats.running for stats in seen) <= 3  # two that decode and one that is prefilled
        assert max(stats.kv_cache_usage for stats in seen) <= 1
    finally:
        engine.close()


def test_who_began_last_makes_room(model_dir, reference, tokenizer, monkeypatch):
    """Requests that name no limit run together while their answers are short. When they outgrow the memory some pause, and nobody
    reads anything else than alone."""
    monkeypatch.setattr("serve.engines.loading.cache_slots", lambda *_: 640)
    monkeypatch.setattr("serve.engines.sequence.PLANNED_TOKENS", 8)
    engine = TransformersEngine(str(model_dir), max_num_seqs=8, device="cpu")
    engine.load()
    try:
        bias = {tokenizer.eos_token_id: -100}
        prompts = [
            tokenizer(text).input_ids
            for text in ("the cat", "all the men and the dog", "x", "the river ran", "a", "men")
        ]
        scored = {"logprobs": 0, "prompt_logprobs": 0, "logit_bias": bias}
        jobs = [(ids, greedy(100 + 9 * number, **scored)) for number, ids in enumerate(prompts)]
        jobs[1] = (prompts[1], SamplingParams(max_tokens=150, temperature=0.8, seed=3, ignore_eos=True, **scored))
        alone = [collect(engine, [job])[0] for job in jobs]
        assert engine.stats().preemptions == 0
        counted = engine.stats()
        slots, most, resize = [], [], BatchCache._resize

        def watched(cache: BatchCache, *sizes: int) -> None:
            resize(cache, *sizes)
            slots.append(cache.row_capacity * cache.column_capacity)
            most.append(engine.stats().running)

        monkeypatch.setattr(BatchCache, "_resize", watched)
        together = collect(engine, jobs)
        wait_until(lambda: engine.stats().running == 0)
        stats = engine.stats()
        assert stats.preemptions >= 2
        assert max(slots) <= 640
        assert max(most) >= 5, "at their full lengths two would fit"
        assert [tokens_of(deltas) for deltas in together] == [tokens_of(deltas) for deltas in alone]
        assert tokens_of(together[0]) == generate(reference, prompts[0], 100)
        for mine, its in zip(together, alone, strict=True):
            assert text_of(mine) == text_of(its)
            assert sum(len(delta.prompt_logprobs) for delta in mine) == sum(len(delta.prompt_logprobs) for delta in its)
        assert stats.prompt_tokens == 2 * counted.prompt_tokens, "what is prefilled again is no new prompt"
        assert stats.generation_tokens == 2 * counted.generation_tokens
        assert stats.kv_cache_usage == 0
    finally:
        engine.close()


def test_a_prompt_that_finds_no_room_at_its_end_is_put_back(model_dir, monkeypatch):
    """The others grew while it was prefilled in pieces: its first token is given once, and its prompt is scored once."""
    monkeypatch.setattr("serve.engines.loading.cache_slots", lambda *_: 640)
    monkeypatch.setattr("serve.engines.sequence.PLANNED_TOKENS", 4)
    monkeypatch.setattr("serve.engines.transformers.PREFILL_TOKENS", 1)
    engine = TransformersEngine(str(model_dir), max_num_seqs=8, device="cpu")
    engine.load()
    try:
        scored = {"logprobs": 0, "prompt_logprobs": 0}
        jobs = [([5, 6 + number], greedy(180, **scored)) for number in range(3)]
        late = ([7] * 80, greedy(30, **scored))
        alone = [collect(engine, [job])[0] for job in [*jobs, late]]
        counted, put_back = engine.stats(), TransformersEngine._put_back
        halfway: list[int] = []

        def watched(self: TransformersEngine, sequence: Sequence) -> None:
            if self._prefilling is sequence:
                halfway.append(len(sequence.generated))
            put_back(self, sequence)

        monkeypatch.setattr(TransformersEngine, "_put_back", watched)
        inboxes = [queue.Queue() for _ in alone]
        tokens = 0

        def submit_when_there_are_some(delta: Delta) -> None:
            """In the thread of the engine. Four rows of 96 tokens fit, and the others have 80 more when the prompt is through."""
            nonlocal tokens
            tokens += delta.new_tokens
            inboxes[0].put(delta)
            if tokens == 80:
                engine.submit(*late, inboxes[3].put)

        for job, sink in zip(jobs, (submit_when_there_are_some, inboxes[1].put, inboxes[2].put), strict=True):
            engine.submit(*job, sink)
        for inbox, its in zip(inboxes, alone, strict=True):
            mine = [inbox.get(timeout=30)]
            while not mine[-1].last:
                mine.append(inbox.get(timeout=30))
            assert tokens_of(mine) == tokens_of(its)
            assert text_of(mine) == text_of(its)
            assert sum(len(delta.prompt_logprobs) for delta in mine) == sum(len(delta.prompt_logprobs) for delta in its)
        assert halfway == [1], "with its first token"
        wait_until(lambda: engine.stats().running == 0)
        assert engine.stats().prompt_tokens == 2 * counted.prompt_tokens
        assert engine.stats().generation_tokens == 2 * counted.generation_tokens
    finally:
        engine.close()


def test_one_that_made_room_can_be_cancelled(model_dir, monkeypatch):
    monkeypatch.setattr("serve.engines.loading.cache_slots", lambda *_: 700)
    monkeypatch.setattr("serve.engines.sequence.PLANNED_TOKENS", 8)
    engine = TransformersEngine(str(model_dir), max_num_seqs=8, device="cpu")
    engine.load()
    try:
        inboxes = [queue.Queue() for _ in range(6)]
        tickets = [engine.submit([5, 6], greedy(200), inbox.put) for inbox in inboxes]
        wait_until(lambda: engine.stats().preemptions > 0)
        for ticket in tickets[1:]:
            engine.cancel(ticket)
        deltas = [inboxes[0].get(timeout=30)]
        while not deltas[-1].last:
            deltas.append(inboxes[0].get(timeout=30))
        assert deltas[-1].finish_reason == "length"
        wait_until(lambda: engine.stats().running + engine.stats().waiting == 0)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("stored", "device", "is_packed", "expected"),
    [
        (torch.float32, "cpu", False, torch.float32),
        (torch.float32, "cuda", False, torch.bfloat16),
        (torch.float32, "cuda", True, torch.float32),
        (torch.float16, "cuda", True, torch.float16),
        (None, "cuda", False, torch.float32),
    ],
)
def test_the_dtype_of_a_checkpoint(stored, device, is_packed, expected):
    """Packed values have no other dtype than their own, so they are not served in another one."""
    assert choose_dtype("auto", stored, torch.device(device), is_packed=is_packed)[0] == expected


def test_not_finite_logits_fail_that_request_only(engine):
    bad = {5: float("nan")}
    failed, fine = collect(engine, [([5], greedy(5, logit_bias=bad)), ([6], greedy(5))])
    assert "NaN" in failed[-1].error
    assert fine[-1].finish_reason == "length"


def test_a_dead_engine_fails_its_requests_and_takes_no_more(engine, caplog):
    inbox: queue.Queue = queue.Queue()
    engine.submit([5], greedy(200), inbox.put)
    inbox.get(timeout=30)

    def explode(*_: object) -> None:
        raise RuntimeError("the cable came off")

    engine.model.register_forward_pre_hook(explode)
    deltas = [inbox.get(timeout=30)]
    while not deltas[-1].last:
        deltas.append(inbox.get(timeout=30))
    assert "the cable came off" in deltas[-1].error
    assert "the cable came off" in engine.failure
    with pytest.raises(EngineDeadError, match="cable"):
        engine.submit([5], greedy(1), inbox.put)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1000}, "more than the 256 positions"),
        ({"max_model_len": 0}, "at least 1"),
        ({"max_num_seqs": 0}, "at least one"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "toaster"}, "not a device"),
        ({"dtype": "bfloat61"}, "did you mean 'bfloat16'"),
    ],
)
def test_wrong_options_are_explained(model_dir, options, message):
    with pytest.raises(UsageError, match=message):
        TransformersEngine(str(model_dir), **options).load()


def test_wrong_directories_are_explained(model_dir, tmp_path):
    with pytest.raises(SourceError, match="no model directory"):
        TransformersEngine(str(tmp_path / "absent")).load()
    with pytest.raises(SourceError, match=r"no config\.json"):
        TransformersEngine(str(tmp_path)).load()
    AutoConfig.from_pretrained(model_dir).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="no usable tokenizer"):
        TransformersEngine(str(tmp_path)).load()
