"""Prune a model to 2:4 with llm-compressor, in llm-compressor's own virtual environment.

`against_llmcompressor.py` makes that environment and runs this file in it, so nothing of halve is imported
here. The clock runs over the `oneshot` call alone: imports, loading and saving are reported beside it.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
from pathlib import Path  # noqa: E402

# Every linear of every decoder block, by targeting the blocks, as llm-compressor's own 2:4 examples did.
# With targets=["Linear"] the modifier names a layer "lm_head." (with a dot), which `ignore: ["lm_head"]`
# does not match, and the output layer, and with it the tied embedding, is pruned as well.
BLOCKS = r"re:.*layers\.\d+$"
PACKAGES = (
    "llmcompressor",
    "compressed-tensors",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
)


def peak_rss_bytes() -> int:
    """The largest resident set of this program so far.

    VmHWM and not ru_maxrss where there is one: the latter survives exec, so that it can be the parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--windows", required=True, help=".npy, int64 [windows, length]")
    parser.add_argument("--method", required=True, choices=("sparsegpt", "wanda"))
    parser.add_argument("--dtype", required=True, choices=("float32", "bfloat16"), help="dtype of the forwards")
    parser.add_argument("--batch-size", type=int, default=1, help="windows a forward (its default is 1)")
    parser.add_argument("--out", required=True, help="where the dense checkpoint with zeros goes")
    parser.add_argument("--result", required=True, help="where the JSON goes")
    arguments = parser.parse_args()

    import numpy as np
    import torch
    import transformers
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.pruning import (  # pyright: ignore[reportMissingImports]
        SparseGPTModifier,
        WandaPruningModifier,
    )
    from loguru import logger  # pyright: ignore[reportMissingImports]

    warnings: list[str] = []

    def keep_warning(message) -> None:
        if message.record["level"].name in ("WARNING", "ERROR"):  # its level METRIC ranks above them
            warnings.append(message.record["message"])

    logger.add(keep_warning, level="WARNING")

    windows = np.load(arguments.windows)
    saved_dtype = transformers.AutoConfig.from_pretrained(arguments.model).dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    dataset = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()})
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[arguments.method]
    recipe = modifier(sparsity=0.5, mask_structure="2:4", targets=[BLOCKS], ignore=["re:.*lm_head"])
    peak_before = peak_rss_bytes()

    began = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=recipe,
        batch_size=arguments.batch_size,
        num_calibration_samples=windows.shape[0],
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - began
    peak = peak_rss_bytes()
    peak_getrusage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # It carries on with identity in place of the inverse Hessian, which is magnitude pruning. A comparison
    # against that would not be one.
    failed = [warning for warning in warnings if "Failed to invert hessian" in warning]
    if failed:
        raise SystemExit(f"llm-compressor could not factor the Hessian of {len(failed)} layers: {failed[0]}")

    # Both sides are compared in the dtype of the source, which is what would be deployed.
    model.to(dtype=saved_dtype)  # pyright: ignore[reportCallIssue]
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    result = {
        "seconds": seconds,
        "process_seconds": time.perf_counter() - STARTED,
        "peak_rss_bytes": peak,
        "peak_rss_bytes_before": peak_before,
        "peak_rss_bytes_getrusage": peak_getrusage,
        "method": arguments.method,
        "dtype": arguments.dtype,
        "saved_dtype": str(saved_dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "windows": list(windows.shape),
        "threads": torch.get_num_threads(),
        "warnings": sorted(set(warnings)),
        "versions": installed_versions(),
    }
    Path(arguments.result).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
