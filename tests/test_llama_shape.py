"""The forms of the random Llama must be the same model: the files that llama.cpp reads, without llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from benchmarks import llama_shape
from compress.verify import verify


@pytest.fixture
def config() -> LlamaConfig:
    config = llama_shape.shape(layers=1, vocabulary=384)
    config.hidden_size, config.intermediate_size = 256, 512
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    return config


def test_gguf_holds_the_weights_of_dense(config: LlamaConfig, tmp_path: Path) -> None:
    llama_shape.write_dense(tmp_path / "dense", config)
    llama_shape.write_gguf(tmp_path / "dense", tmp_path / "BF16.gguf")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "BF16.gguf").tensors}
    assert len(theirs) == len(weights) + 1  # and rope_freqs

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(theirs[name].data, theirs[name].tensor_type).copy())

    assert torch.equal(read("token_embd.weight"), weights["model.embed_tokens.weight"].float())
    assert torch.equal(read("blk.0.ffn_down.weight"), weights["model.layers.0.mlp.down_proj.weight"].float())
    assert torch.equal(read("output_norm.weight"), weights["model.norm.weight"].float())
    k = weights["model.layers.0.self_attn.k_proj.weight"].float()
    assert torch.equal(read("blk.0.attn_k.weight"), llama_shape.interleaved(k, 2))
    assert not torch.equal(read("blk.0.attn_k.weight"), k)


def test_sparse_is_two_of_four_of_dense(config: LlamaConfig, tmp_path: Path) -> None:
    llama_shape.write_dense(tmp_path / "dense", config)
    llama_shape.write_sparse(tmp_path / "dense", tmp_path / "sparse")
    assert len(verify(tmp_path / "sparse").sparse) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


def test_positions_turn_alike(config: LlamaConfig) -> None:
    """Neighbours turned by the angles over the factors are the halves that transformers turns, in another order."""
    heads, width, position = 2, 64, 5000
    states = torch.randn(heads * width, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(states, torch.tensor([[position]]))
    ours, _ = apply_rotary_pos_emb(states.view(1, heads, 1, width), states.view(1, heads, 1, width), cos, sin)

    pairs = torch.view_as_complex(llama_shape.interleaved(states[:, None], heads).view(heads, width // 2, 2))
    angles = position * 500000.0 ** (-np.arange(0, width, 2) / width) / llama_shape.position_factors(config)
    turned = torch.view_as_real(pairs * torch.polar(torch.ones(width // 2), torch.from_numpy(angles).float()))
    torch.testing.assert_close(
        turned.reshape(-1, 1), llama_shape.interleaved(ours.reshape(-1, 1), heads), atol=2e-3, rtol=0
    )
