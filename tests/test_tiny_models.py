"""The models that the other tests compress must themselves be sound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny_models


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_builds_reloads_and_generates(family: str, tmp_path: Path) -> None:
    directory = tiny_models.build(family, tmp_path / family)
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    model = model.float().eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)

    prompt = tokenizer(tiny_models.TEXT[:150], return_tensors="pt").input_ids
    length = prompt.shape[1]
    assert length > 2 * tiny_models.SLIDING_WINDOW
    assert tokenizer.decode(prompt[0]) == tiny_models.TEXT[:150]

    # The logits are those of the model that was saved, they spread, and they hang on the context.
    expected = tiny_models.FAMILIES[family](3)
    for parameter in expected.parameters():  # not .to(bfloat16), which rounds the rotary frequencies too
        parameter.data = parameter.data.bfloat16().float()
    torch.testing.assert_close(logits(model, prompt), logits(expected, prompt))
    spread = logits(model, prompt)[0].std(dim=-1).mean()
    assert 0.8 < spread < 6
    changed = prompt.clone()
    changed[0, -9:-1] = (changed[0, -9:-1] + 1) % tiny_models.VOCABULARY
    last, last_changed = logits(model, prompt)[0, -1], logits(model, changed)[0, -1]
    assert (last - last_changed).abs().mean() > 0.05 * spread

    generated = model.generate(prompt, min_new_tokens=12, max_new_tokens=12)[0, length:]
    assert len(generated) == 12
    # (greedy random models soon run in circles, so variety is asked of the prompt's positions)
    assert len(logits(model, prompt)[0].argmax(dim=-1).unique()) > length / 4

    widths = [module.weight.shape for module in model.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert all(size % 8 == 0 for shape in widths for size in shape)


def test_chat_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.build("llama", tmp_path / "m", layers=1))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert ids[:2] == [tokenizer.bos_token_id, 3]


def test_seed_depth_and_shards(tmp_path: Path) -> None:
    base = tiny_models.build("llama", tmp_path / "base", max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    again, other, deeper = (
        load(tiny_models.build("llama", tmp_path / name, **settings)).state_dict()
        for name, settings in {"again": {}, "other": {"seed": 1}, "deeper": {"layers": 4}}.items()
    )
    for name, weight in load(base).state_dict().items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, deeper[name])
        assert not torch.equal(weight, other[name])


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_hub_gpt2_keys(max_shard_size: str, tmp_path: Path) -> None:
    plain = tiny_models.build("gpt2", tmp_path / "plain")
    hub = tiny_models.build("gpt2", tmp_path / "hub", max_shard_size=max_shard_size, hub_gpt2_keys=True)
    keys: list[str] = []
    for shard in hub.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            keys += file.keys()
    assert "h.0.attn.c_attn.weight" in keys
    assert "h.0.attn.bias" in keys
    assert not any(key.startswith("transformer.") for key in keys)
    ids = torch.arange(40)[None]
    assert torch.equal(logits(load(plain), ids), logits(load(hub), ids))
