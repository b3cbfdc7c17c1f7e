"""How long SparseGPT 2:4 of an 8B model takes on a GPU, and in how much of its memory, from a few of its blocks.

    python -m benchmarks.gpu_pruning [--method sparsegpt] [--depth 5] [--blocks 32] [--samples 128] [--length 2048] [--out DIR]

A random Llama of Llama-3-8B's width with a few blocks is pruned by `compress_model`, in a process of its own. The seconds between
one block's end and the next one's are those of a block; the first block, which compiles kernels, reads libraries and finds the memory
cold, counts once, with all that is before and after the blocks. The whole model is that and so many median blocks, which is said
with the result: an extrapolation. Embeddings and head have a small vocabulary, as pruning does not read them but once. Times do not
depend on what random weights say. Results are written after each block, gpu_pruning.json and .md. Needs a GPU, pydantic and
transformers, and on the disk 0.9 GB a block.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
WIDTH: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def prune(model: Path, out: Path, calibration: Path, settings: dict[str, Any], record: Path) -> None:
    """Prunes a model, and keeps a record of the seconds at which each block was done and of the memory."""
    import torch

    from compress import compress_model

    on_gpu = settings["device"] != "cpu"
    found: dict[str, Any] = {"done_at": [], "seconds": None, "fused": None}

    def note(**more: Any) -> None:
        found.update(more)
        if on_gpu:
            found["gpu_bytes"] = torch.cuda.max_memory_allocated()
            found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        partial = record.with_name(record.name + ".partial")
        partial.write_text(json.dumps(found))
        partial.replace(record)

    began = time.perf_counter()

    def progress(done: int, count: int, said: str) -> None:
        if done > len(found["done_at"]) and done <= count:
            note(done_at=[*found["done_at"], time.perf_counter() - began])

    done = compress_model(model, out, calibration=str(calibration), progress=progress, **settings)
    notes = [layer.get("notes", {}) for layer in done.report["layers"]]
    note(seconds=time.perf_counter() - began, fused=any(said.get("columns_by") == "triton" for said in notes))


def extrapolated(run: dict[str, Any], blocks: int) -> dict[str, Any]:
    """What a block and a model of so many take, from a run that has ended or was interrupted; nothing before the second block."""
    at = run["done_at"]
    each = [after - before for before, after in itertools.pairwise(at)]
    if not each:
        return {"block_seconds": None, "whole_seconds": None}
    after_blocks = run["seconds"] - at[-1] if run["seconds"] else 0.0
    block = statistics.median(each)
    return {
        "block_seconds": block,
        "each_block_seconds": each,
        "whole_seconds": at[0] + (blocks - 1) * block + after_blocks,
    }


def measure(
    directory: Path, depth: int, blocks: int, width: dict[str, Any], settings: dict[str, Any], keep: Any = None
) -> dict[str, Any]:
    """A model of ``depth`` blocks; ``keep`` is called with the result after each of them."""
    from compress.errors import UsageError
    from tests import tiny_models

    calibration, record = directory / "calibration.txt", directory / "record.json"
    needed = settings["samples"] * settings["length"]
    calibration.write_text(tiny_models.text(2 + 2 * needed // 690))  # some 690 tokens each
    model = tiny_models.build("llama", directory / "model", layers=depth, **width)
    request = [str(model), str(directory / "out"), str(calibration), json.dumps(settings), str(record)]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_pruning", "--child", *request], cwd=ROOT, stderr=said
        )
        seen = None
        while child.poll() is None:
            time.sleep(0.2)
            if keep and record.is_file() and (text := record.read_text()) != seen:
                seen = text
                keep(_result(json.loads(text), depth, blocks, width, settings))
        if child.returncode:
            said.seek(0)
            raise UsageError(f"pruning {depth} blocks failed:\n{said.read()[-2000:]}")
    return _result(json.loads(record.read_text()), depth, blocks, width, settings)


def _result(
    run: dict[str, Any], depth: int, blocks: int, width: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    whole = {"width": width, "settings": settings, "blocks": depth, "whole_blocks": blocks}
    return {**whole, "run": run, **extrapolated(run, blocks)}


def render(result: dict[str, Any]) -> str:
    """The page of results."""
    settings, width, run = result["settings"], result["width"], result["run"]
    lines = [
        f"# Pruning {result['whole_blocks']} blocks of {width['hidden_size']} and {width['intermediate_size']} features",
        "",
        f"{settings['reconstruction']}, 2:4, {settings['samples']} windows of {settings['length']} tokens, {result['environment']['machine']}, "
        f"{result['environment']['date']}.",
        "",
    ]
    ended = "" if run["seconds"] else "; **interrupted**"
    lines.append(
        f"{len(run['done_at'])} of {result['blocks']} blocks{ended}, done after (s): {', '.join(f'{at:.1f}' for at in run['done_at'])}."
    )
    if run.get("gpu_bytes") is not None:
        lines.append(
            f"Memory of the GPU: {run['gpu_bytes'] / 1e9:.1f} GB in tensors, {run['reserved_bytes'] / 1e9:.1f} GB reserved."
        )
    if run["fused"] is not None:
        lines.append(f"Fused kernels: {'yes' if run['fused'] else 'no'}.")
    if result["block_seconds"] is not None:
        low, high = min(result["each_block_seconds"]), max(result["each_block_seconds"])
        lines += [
            "",
            f"A block takes {result['block_seconds']:.2f} s ({low:.2f} to {high:.2f}), so {result['whole_blocks']} would take "
            f"{result['whole_seconds']:.0f} s (extrapolated, not run).",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sparsegpt", help="the reconstruction")
    parser.add_argument("--depth", type=int, default=5, help="blocks that are pruned; at least 2")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    missing = [name for name in ("torch", "transformers", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(2, f"error: {', '.join(missing)}: not installed, and pruning needs it\n")
    from compress.console import run_app

    if arguments.child:
        model, out, calibration, settings, record = arguments.child
        run_app(lambda: prune(Path(model), Path(out), Path(calibration), json.loads(settings), Path(record)))
        return
    run_app(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    import torch

    from compress.errors import UsageError
    from serve.measure.environment import environment

    if not torch.cuda.is_available():
        raise UsageError("there is no GPU to measure")
    if arguments.depth < 2:
        raise UsageError("--depth: the first block does not count, so two are needed")
    settings = {
        "reconstruction": arguments.method,
        "samples": arguments.samples,
        "length": arguments.length,
        "device": "cuda",
    }
    where = environment(torch.device("cuda"))
    text = ""

    def keep(result: dict[str, Any]) -> None:
        nonlocal text
        result["environment"] = where
        text = render(result)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, content in (("gpu_pruning.json", json.dumps(result, indent=1) + "\n"), ("gpu_pruning.md", text)):
            partial = arguments.out / f"{name}.partial"
            partial.write_text(content)
            partial.replace(arguments.out / name)

    with tempfile.TemporaryDirectory() as directory:
        keep(measure(Path(directory), arguments.depth, arguments.blocks, WIDTH, settings, keep))
    print(text)


if __name__ == "__main__":
    main()
