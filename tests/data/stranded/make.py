"""Makes these checkpoints with what wrote such ones: llm-compressor 0.5.1 and compressed-tensors 0.9.4, which need transformers 4.51.

python make.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.transformers.sparsification.compressed_tensors_utils import modify_save_pretrained
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 48
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SCHEMES = {"float8": "FP8_DYNAMIC", "float8-static": "FP8", "int8": "INT8"}


def base(directory: Path) -> None:
    """A model of random weights, 2:4 in all linears of its blocks but for one."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=WORDS, max_position_embeddings=64)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "proj" in name and "1.self_attn.o_proj" not in name:
            groups = parameter.data.view(-1, 4)
            dropped = groups.abs().argsort(dim=1)[:, :2]
            groups.scatter_(1, dropped, 0)
    model.save_pretrained(directory)
    words = {"<unk>": 0, "</s>": 2, **{f"w{i}": i for i in range(WORDS) if i not in (0, 2)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(directory)


def quantized(source: Path, scheme: str | None) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(source, torch_dtype=torch.bfloat16)
    if scheme is None:
        modify_save_pretrained(model)
        return model
    how = {}
    if scheme == "FP8":
        tokens = torch.randint(0, WORDS, (4, 32), generator=torch.Generator().manual_seed(0))
        samples = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
        how = {"dataset": Dataset.from_dict(samples), "num_calibration_samples": 4, "max_seq_length": 32}
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]), **how)
    return model


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    base(directory / "base")
    for name, scheme in {"plain": None, **SCHEMES}.items():
        for kind, dense in (("bitmask", False), ("dense", True)):
            if not (dense and scheme is None):
                model = quantized(directory / "base", scheme)
                model.save_pretrained(directory / f"{name}-{kind}", skip_sparsity_compression_stats=dense)
