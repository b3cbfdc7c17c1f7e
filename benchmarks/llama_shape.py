"""A model of Llama-3.2-1B's shape with random weights, in every form that is compared: halve's, and llama.cpp's.

    python -m benchmarks.llama_shape [--llama-python ENV/bin/python] [--onnx] [--layers 16] [--out runs/llama-shape]

benchmarks/llama_cpp_side.py says how ENV is made; without one, halve's forms alone are made. In the directory OUT:

    dense/       the Hugging Face checkpoint in bfloat16, tied embeddings, Llama 3's scaling of the positions
    sparse/      its 2:4 twin by magnitude, packed: what `halve compress --metric magnitude --reconstruction none` keeps
    int8/        the same with kept values in int8, as `halve pack --value-dtype int8` makes it of sparse/
    int8-both/   int8/ with activations in int8, too: --activation-dtype int8
    onnx-...     with --onnx: graphs of sparse/ and int8-both/ with halve's operator, and of sparse/ with zeros; 9 GB
    BF16.gguf    the very weights of dense/
    Q8_0.gguf    made of BF16.gguf by llama.cpp's own quantizer with its defaults, so that token_embd, which is the
    Q4_0.gguf    output matrix as well, is Q8_0 in the first and Q6_K in the second, as llama-quantize does
    check.json   the logits of BF16.gguf in llama.cpp against those of dense/ in transformers

Speed does not depend on the values of weights, so a download is not needed; what a random model says means nothing, and
nothing about quality can be measured on it. What is there already stays (another shape needs another OUT), and all is
written under another name first. A few minutes on one core; 9 GB for 16 layers, and 2.5 GB more while sparse/ is made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedConfig

from compress.convert import pack_checkpoint
from compress.packed import PATTERN
from serve.onnx.export import export_onnx
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
SIDE = ROOT / "benchmarks" / "llama_cpp_side.py"
GGUFS = ("BF16", "Q8_0", "Q4_0")
GRAPHS = (
    ("onnx-packed", "sparse", "packed"),
    ("onnx-int8-both", "int8-both", "packed"),
    ("onnx-zeros", "sparse", "zeros"),
)
"""Name, of what, with which weights."""
STANDARD_DEVIATION = 0.02
CHECKED_TOKENS = 512
"""Long enough that the scaling of the positions, which changes the slow angles only, is seen."""


def shape(layers: int, vocabulary: int) -> LlamaConfig:
    """Llama-3.2-1B, but for the tokenizer's ids."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **tiny_models.TOKEN_IDS,
    )


def draw(name: str, size: torch.Size) -> Tensor:
    """Each weight has its own stream, by its name. Norms lie around one, so that a norm in the wrong place is seen."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(size, generator=generator)
    return (1 + 0.1 * noise if len(size) == 1 else STANDARD_DEVIATION * noise).bfloat16()


def write_dense(out: Path, config: PreTrainedConfig) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {name: draw(name, parameter.shape) for name, parameter in model.named_parameters()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(partial)
    GenerationConfig(**tiny_models.TOKEN_IDS, do_sample=False).save_pretrained(partial)
    tiny_models.tokenizer().save_pretrained(partial)
    partial.rename(out)


def write_sparse(dense: Path, out: Path) -> None:
    """The two largest of four stay in every linear of every block; then as `halve pack`."""
    zeros = out.with_name(out.name + "-zeros.partial")
    shutil.rmtree(zeros, ignore_errors=True)
    shutil.copytree(dense, zeros, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(dense / "model.safetensors")
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            weights[name] = weight * PATTERN.mask(weight.abs())
    save_file(weights, zeros / "model.safetensors", metadata={"format": "pt"})
    pack_checkpoint(zeros, out)
    shutil.rmtree(zeros)


def rope_of(config: LlamaConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def width_of_a_head(config: LlamaConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def position_factors(config: LlamaConfig) -> np.ndarray:
    """What llama.cpp divides each angle by, as convert_hf_to_gguf has it."""
    rope, head = rope_of(config), width_of_a_head(config)
    length, low, high, factor = (
        rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    )
    factors = []
    for place in range(0, head, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (place / head)
        smooth = min(max((length / wavelength - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of q or k in the order of llama.cpp, which turns neighbours, not halves, of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(dense: Path, out: Path) -> None:
    """As convert_hf_to_gguf --outtype bf16, without a vocabulary: only token ids go in and out."""
    import gguf

    config = LlamaConfig.from_pretrained(dense)
    head = width_of_a_head(config)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads or 0}
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["q_proj.weight"])
    writer.add_head_count_kv(heads["k_proj.weight"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope_of(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in load_file(dense / "model.safetensors").items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs, name
        if weight.ndim == 1:  # norms are float32 there
            writer.add_tensor(theirs, weight.float().numpy())
            continue
        for suffix, count in heads.items():
            weight = interleaved(weight, count) if name.endswith(suffix) else weight
        data = weight.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(theirs, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("rope_freqs.weight", position_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def side(python: Path, *arguments: str | Path) -> None:
    """Runs llama_cpp_side.py in its environment."""
    subprocess.run([str(python), "-I", str(SIDE), *map(str, arguments)], check=True)


@torch.inference_mode()
def check(directory: Path, python: Path, threads: int) -> dict[str, Any]:
    """Logits of the BF16 file against transformers', and transformers' own in bfloat16 as the yardstick."""
    config = LlamaConfig.from_pretrained(directory / "dense")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, CHECKED_TOKENS), generator=generator)

    def transformers_logits(dtype: torch.dtype) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(directory / "dense", dtype=dtype)
        return model(tokens).logits[0].float().numpy()

    file = directory / "logits.npy"
    ids = ",".join(map(str, tokens[0].tolist()))
    side(python, "logits", directory / "BF16.gguf", file, "--tokens", ids, "--threads", str(threads))
    theirs, exact = np.load(file), transformers_logits(torch.float32)
    file.unlink()

    def against(found: np.ndarray) -> dict[str, Any]:
        same = found.argmax(axis=1) == exact.argmax(axis=1)
        return {
            "max_difference": float(np.abs(found - exact).max()),
            "relative_error": float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
            "same_argmax": float(same.mean()),
            "same_argmax_of_the_last": bool(same[-1]),
        }

    return {
        "tokens": CHECKED_TOKENS,
        "logits_standard_deviation": float(exact.std()),
        "llama.cpp BF16 against transformers float32": against(theirs),
        "transformers bfloat16 against transformers float32": against(transformers_logits(torch.bfloat16)),
    }


def build(
    directory: Path,
    python: Path | None,
    *,
    layers: int = 16,
    vocabulary: int = 128256,
    threads: int = 1,
    onnx: bool = False,
) -> Path:
    """Makes what of the directory is missing, and returns it.

    Args:
        python: of the environment with llama-cpp-python; None: without its files.
        onnx: whether the graphs are made, too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = shape(layers, vocabulary)
    dense, sparse = directory / "dense", directory / "sparse"
    if not dense.exists():
        write_dense(dense, config)
    there = LlamaConfig.from_pretrained(dense)
    if (there.num_hidden_layers, there.vocab_size) != (layers, vocabulary):
        raise SystemExit(f"{directory} holds a model of another shape; choose another --out, or remove it")
    if not (sparse / "config.json").exists():
        write_sparse(dense, sparse)
    if not (directory / "int8" / "config.json").exists():
        pack_checkpoint(sparse, directory / "int8", "int8")
    if not (directory / "int8-both" / "config.json").exists():
        pack_checkpoint(directory / "int8", directory / "int8-both", activation_dtype="int8")
    for form, source, weights in GRAPHS if onnx else ():
        if not (directory / form).exists():
            export_onnx(directory / source, directory / form, weights=weights)
    if python is None:
        return directory
    for kind in GGUFS:
        if (out := directory / f"{kind}.gguf").exists():
            continue
        if kind == "BF16":
            write_gguf(dense, out)
        else:
            side(python, "quantize", directory / "BF16.gguf", out, "--type", kind, "--threads", str(threads))
    result = directory / "check.json"
    if not result.exists():
        result.with_suffix(".partial").write_text(json.dumps(check(directory, python, threads), indent=2) + "\n")
        result.with_suffix(".partial").rename(result)
    return directory


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, help="the Python that has llama-cpp-python")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "llama-shape")
    parser.add_argument("--onnx", action="store_true", help="make the graphs, too")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    directory = build(
        arguments.out.resolve(),
        arguments.llama_python
        and arguments.llama_python.absolute(),  # not resolve(): the link is what names the environment
        layers=arguments.layers,
        vocabulary=arguments.vocabulary,
        threads=arguments.threads,
        onnx=arguments.onnx,
    )
    for file in sorted(path for path in directory.rglob("*") if path.suffix in (".safetensors", ".gguf")):
        print(f"{file.stat().st_size / 1e6:10.1f} MB  {file.relative_to(directory)}")
    if (checked := directory / "check.json").exists():
        print(checked.read_text(), end="")


if __name__ == "__main__":
    main()
