"""How long SparseGPT 2:4 of an 8B model takes on a GPU, and in how much of its memory, from a few of its blocks.

    python -m benchmarks.gpu_pruning [--method sparsegpt] [--depths 2 4] [--blocks 32] [--samples 128] [--length 2048]

Two random Llamas of Llama-3-8B's width, alike but for their number of blocks, are pruned one after the other by `compress_model`, each in
a process of its own. What one block takes is the difference; the whole model is the shallow one and so many blocks more, which is
said with the result: an extrapolation. Embeddings and head have a small vocabulary, as pruning does not read them but once. Times do
not depend on what random weights say. Needs a GPU, and on the disk 0.9 GB a block; writes benchmarks/results/gpu_pruning.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compress.console import run_app
from compress.errors import UsageError
from serve.measure.environment import environment
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
WIDTH: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def prune(model: Path, out: Path, calibration: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `compress_model`, and the most that it held of the GPU's memory."""
    from compress import compress_model

    began = time.perf_counter()
    done = compress_model(model, out, calibration=str(calibration), **settings)
    seconds = time.perf_counter() - began
    on_gpu = settings["device"] != "cpu"
    notes = [layer.get("notes", {}) for layer in done.report["layers"]]
    return {
        "seconds": seconds,
        "gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "fused": any(found.get("columns_by") == "triton" for found in notes),
    }


def measure(
    directory: Path, depths: tuple[int, int], blocks: int, width: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Both models; see the head of this file."""
    calibration = directory / "calibration.txt"
    needed = settings["samples"] * settings["length"]
    calibration.write_text(tiny_models.text(2 + 2 * needed // 690))  # some 690 tokens each
    runs = []
    for depth in depths:
        model = tiny_models.build("llama", directory / f"depth-{depth}", layers=depth, **width)
        request = [str(model), str(directory / f"out-{depth}"), str(calibration), json.dumps(settings)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_pruning", "--child", *request],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UsageError(f"pruning {depth} blocks failed:\n{done.stderr[-2000:]}")
        runs.append({"blocks": depth, **json.loads(done.stdout.splitlines()[-1])})
    block = (runs[1]["seconds"] - runs[0]["seconds"]) / (depths[1] - depths[0])
    return {
        "width": width,
        "settings": settings,
        "runs": runs,
        "block_seconds": block,
        "whole_blocks": blocks,
        "whole_seconds": runs[0]["seconds"] + (blocks - depths[0]) * block,
    }


def render(result: dict[str, Any]) -> str:
    """The page of results."""
    settings, width = result["settings"], result["width"]
    lines = [
        f"# Pruning {result['whole_blocks']} blocks of {width['hidden_size']} and {width['intermediate_size']} features",
        "",
        f"{settings['reconstruction']}, 2:4, {settings['samples']} windows of {settings['length']} tokens, {result['environment']['machine']}, "
        f"{result['environment']['date']}.",
        "",
        "| blocks | seconds | memory of the GPU, GB | fused kernels |",
        "|---:|---:|---:|---|",
    ]
    for run in result["runs"]:
        held = "" if run["gpu_bytes"] is None else f"{run['gpu_bytes'] / 1e9:.1f}"
        lines.append(f"| {run['blocks']} | {run['seconds']:.1f} | {held} | {'yes' if run['fused'] else 'no'} |")
    lines += [
        "",
        f"A block takes {result['block_seconds']:.2f} s, so {result['whole_blocks']} would take {result['whole_seconds']:.0f} s "
        "(extrapolated, not run).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sparsegpt", help="the reconstruction")
    parser.add_argument("--depths", type=int, nargs=2, default=(2, 4))
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, out, calibration, settings = arguments.child
        run_app(lambda: print(json.dumps(prune(Path(model), Path(out), Path(calibration), json.loads(settings)))))
        return
    run_app(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    if not torch.cuda.is_available():
        raise UsageError("there is no GPU to measure")
    settings = {
        "reconstruction": arguments.method,
        "samples": arguments.samples,
        "length": arguments.length,
        "device": "cuda",
    }
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), tuple(arguments.depths), arguments.blocks, WIDTH, settings)
    result["environment"] = environment(torch.device("cuda"))
    text = render(result)
    RESULTS.mkdir(exist_ok=True)
    for name, content in (("gpu_pruning.json", json.dumps(result, indent=1) + "\n"), ("gpu_pruning.md", text)):
        partial = RESULTS / f"{name}.partial"
        partial.write_text(content)
        partial.replace(RESULTS / name)
    print(text)


if __name__ == "__main__":
    main()
