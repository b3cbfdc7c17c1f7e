"""What the presets would take for large models on one GPU of 80 GB: estimates from its data sheet, nothing measured.

    python -m benchmarks.recipes [--device h100]

The shapes are those of Llama 3's 8B and 70B models, made here from their published configurations; no weights are needed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from compress.presets import PRESETS
from compress.recipe import Recipe
from serve.measure import effort, gpus, shapes
from serve.measure.advice_text import duration

RESULTS = Path(__file__).parent / "results"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32,
    "num_key_value_heads": 8, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
    "max_position_embeddings": 8192, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
}  # fmt: skip
MODELS = {
    "8B": LLAMA,
    "70B": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100", help="a GPU that `halve advise --device` knows")
    arguments = parser.parse_args()
    gpu = gpus.find(arguments.device)
    found: dict[str, dict[str, Any]] = {}
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(config))
            shape = shapes.read(directory)
        for preset, fields in PRESETS.items():
            found[f"{name}, {preset}"] = effort.estimate(shape, Recipe.create(**fields.fields), effort.of_gpu(gpu))
    (RESULTS / "recipes.json").write_text(json.dumps({"device": gpu.name, "recipes": found}, indent=1) + "\n")
    (RESULTS / "recipes.md").write_text(render(gpu.name, gpu.memory, found))


def render(device: str, memory: float, found: dict[str, dict[str, Any]]) -> str:
    """The table."""
    lines = [
        f"# What the presets would take for large models, one {device} of {memory / 1e9:.0f} GB: an estimate",
        "",
        "Nothing here was run, and no pruning was ever timed on a GPU, so expect more: operations are counted, and the data sheet, what "
        "it reaches, and a disk of 1 GB/s are taken for granted. Memory is that "
        "of the device; activations lie in the memory of the host, or on its disk.",
        "",
        "| model, preset | time | most of it | memory, GB | activations, GB | on disk, GB |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name, run in found.items():
        most = max(run["stages"], key=lambda stage: stage["seconds"])["name"]
        sizes = " | ".join(f"{run[key] / 1e9:.1f}" for key in ("device_bytes", "activation_bytes", "disk_bytes"))
        lines.append(f"| {name} | {duration(run['seconds'])} | {most} | {sizes} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
