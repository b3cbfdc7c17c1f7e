"""Which models take an attention by its name; needs no kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compress.attention import TORCH, set_attention
from compress.blocks import BlockModel
from compress.errors import UsageError
from compress.sources import Source
from serve.loading import load_model
from tests import tiny_models

NAME = "of-a-test"


@pytest.fixture(autouse=True)
def registered() -> None:
    AttentionInterface.register(NAME, sdpa_attention_forward)


def test_taken_instead_of_torchs() -> None:
    model = tiny_models.llama(1)
    set_attention(model, NAME)
    assert model.config._attn_implementation == NAME


def test_what_the_user_chose_stays() -> None:
    model = tiny_models.llama(1)
    model.set_attn_implementation("eager")
    set_attention(model, NAME)
    assert model.config._attn_implementation == "eager"


def test_unknown() -> None:
    with pytest.raises(UsageError, match="'of-a-tes' is not in transformers' registry; did you mean 'of-a-test'"):
        set_attention(tiny_models.llama(1), "of-a-tes")


def test_a_model_that_asks_for_names_keeps_torchs() -> None:
    """Its sparse attention masks under the names that it knows, and would see everything under another."""
    config = DeepseekV32Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    with torch.device("meta"):
        model = DeepseekV32ForCausalLM(config)
    assert model.config._attn_implementation == TORCH
    set_attention(model, NAME)
    assert model.config._attn_implementation == TORCH


def test_a_cap_of_the_logits_is_kept(tmp_path: Path) -> None:
    """Gemma 2's, which torch's attention ignores: in the blocks that are pruned, and in what is served and evaluated."""
    source = tiny_models.build("gemma2", tmp_path, dtype=torch.float32, attn_logit_softcapping=0.5)
    tokens = torch.arange(5, 45)[None]
    plain = {name: AutoModelForCausalLM.from_pretrained(source, attn_implementation=name) for name in ("eager", TORCH)}
    with torch.no_grad():
        wanted, ignored = (plain[name](tokens).logits for name in ("eager", TORCH))
        assert (ignored - wanted).norm() > 0.01 * wanted.norm()
        torch.testing.assert_close(load_model(source)(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    model = BlockModel(Source(source), torch.float32, torch.device("cpu"))
    [states] = model.record_calls([{"input_ids": tokens, "use_cache": False}])
    for index in range(len(model.blocks)):
        model.load_block(index)
        with torch.no_grad():
            states = model.run_block(index, 0, states)
        model.drop_block(index)
    with model.after_blocks() as run, torch.no_grad():
        logits = run(states, {"input_ids": tokens, "use_cache": False}).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
