"""Families whose blocks hand more than hidden states on to each other, or share weights: right, or refused before anything
is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress import calibration as texts
from compress import pipeline
from compress.blocks import BlockModel
from compress.errors import SourceError
from compress.sources import Source
from tests import tiny_models
from tests.runs import calibration, compress, tree

SIZES = {
    "vocab_size": 384,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def save(directory: Path, family: str, **settings: Any) -> Path:
    """A random model of a family that `tiny_models` does not have, with its calibration text beside it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4)
    model.save_pretrained(directory)
    tiny_models.tokenizer().save_pretrained(directory)
    calibration(directory.parent)
    return directory


@pytest.fixture
def shares_keys(tmp_path: Path) -> Path:
    """The last two layers attend to keys and values of the first two."""
    return save(
        tmp_path / "source",
        "gemma4_text",
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=16,
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "gpt_neox", "phi3", "mamba"])
def test_most_families_carry_nothing(family: str, tmp_path: Path) -> None:
    model = BlockModel(Source(tiny_models.build(family, tmp_path, layers=2)), torch.bfloat16, torch.device("cpu"))
    model.record_calls([{"input_ids": torch.arange(8)[None], "use_cache": False}])
    assert model.carried == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"repair": "block"}, "--repair block does not follow"),
        ({"reconstruction": "admm", "targets": "dense"}, "--targets dense does not follow"),
        ({"permutation": "fold"}, "--permutation fold does not follow"),
        ({"rotation": "heads"}, "--rotation heads does not follow"),
        ({"metric": "gblm", "reconstruction": "none"}, "a metric that needs gradients does not follow"),
    ],
)
def test_what_cannot_be_right_is_refused(shares_keys: Path, settings: dict[str, Any], said: str) -> None:
    """Two streams of activations would overwrite each other's keys and values; channels of v are read by later blocks."""
    with pytest.raises(SourceError, match=said):
        compress(shares_keys, shares_keys.parent / "out", samples=12, **settings)
    assert sorted(path.name for path in shares_keys.parent.iterdir()) == ["calibration.txt", "source"]


def test_layers_that_attend_to_earlier_keys_are_observed_behind_pruned_ones(
    shares_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs that each block gets, against transformers on the finished model."""
    seen: dict[int, torch.Tensor] = {}
    drawn: list[torch.Tensor] = []
    load_windows, finish = texts.load_windows, pipeline._Run._finish_block
    monkeypatch.setattr(texts, "load_windows", lambda *a, **k: drawn.append(load_windows(*a, **k)) or drawn[-1])

    def watched(self: Any, index: int, hidden: list[torch.Tensor], *rest: Any) -> None:
        seen[index] = hidden[0].clone()
        finish(self, index, hidden, *rest)

    monkeypatch.setattr(pipeline._Run, "_finish_block", watched)
    out = compress(shares_keys, shares_keys.parent / "out", format="dense", samples=4).directory
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        model(drawn[0][: len(seen[0])], use_cache=False)
    for index in range(1, 4):
        torch.testing.assert_close(seen[index], outputs[index - 1], rtol=1e-4, atol=1e-4)


def test_a_killed_run_begins_again_and_gives_the_same_bytes(shares_keys: Path) -> None:
    """What later blocks read of earlier ones is not saved with the activations."""

    class Killed(BaseException):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if done == 3:
            raise Killed

    base = shares_keys.parent
    expected = compress(shares_keys, base / "whole" / "out", samples=4).directory
    with pytest.raises(Killed):
        compress(shares_keys, base / "killed" / "out", samples=4, checkpoint_seconds=0, progress=stop)
    assert tree(compress(shares_keys, base / "killed" / "out", samples=4, resume=True).directory) == tree(expected)


def test_blocks_that_share_a_linear_are_refused(tmp_path: Path) -> None:
    """Zamba 2 uses one transformer block in several places."""
    source = save(
        tmp_path / "source",
        "zamba2",
        num_hidden_layers=4,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=16,
        num_mem_blocks=1,
        use_shared_attention_adapter=False,
        adapter_rank=8,
    )
    with pytest.raises(SourceError, match=r"shares .*shared_transformer.* between blocks"):
        compress(source, tmp_path / "out", samples=4)
