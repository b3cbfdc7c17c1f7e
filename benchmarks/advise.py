"""How far `halve advise` is off: its prediction beside `halve bench`, for models of three shapes.

    python -m benchmarks.advise [--shapes smollm2-135m qwen2-0.5b llama-1b] [--threads N] [--smoke]

Each shape has random weights (speed does not depend on them), written once to ``runs/advise/SHAPE``. In a process of its own
`advise` predicts from ``config.json`` alone, then `bench` measures the whole model, dense and 2:4 in turn. The error is that of
the ratio: how many times as fast 2:4 is. Shapes that are not named keep what was measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.llama_shape import shape as llama_shape
from benchmarks.llama_shape import write_dense, write_sparse
from compress.console import progress_bar
from serve.measure.advice_check import check
from serve.measure.advise import advise
from serve.measure.commands import bench
from serve.measure.environment import environment
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
FIGURES = {"tpot": "time per output token", "ttft": "time to first token"}


def smollm2() -> PreTrainedConfig:
    """SmolLM2-135M, but for the tokenizer's ids."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **tiny_models.TOKEN_IDS,
    )


def qwen2() -> PreTrainedConfig:
    """Qwen2-0.5B, but for the tokenizer's ids."""
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        **tiny_models.TOKEN_IDS,
    )


SHAPES = {"smollm2-135m": smollm2, "qwen2-0.5b": qwen2, "llama-1b": lambda: llama_shape(16, 128256)}


def model_of(name: str, runs: Path) -> Path:
    """The directory with ``dense`` and ``sparse``; made if it is not there."""
    directory = runs / name
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "dense").exists():
        write_dense(directory / "dense", SHAPES[name]())
    if not (directory / "sparse" / "config.json").exists():
        write_sparse(directory / "dense", directory / "sparse")
    return directory


def run(directory: Path, prompt: int, output: int, rounds: int, budget: float) -> dict[str, Any]:
    """Predicts, measures and compares."""
    load: dict[str, Any] = {"prompt": prompt, "output": output, "batch": 1}
    with progress_bar(directory.name) as progress:
        how: dict[str, Any] = {"device": "cpu", "progress": progress, **load}
        advice = advise(str(directory / "dense" / "config.json"), budget=budget, **how)
        measured = bench(directory / "sparse", against=directory / "dense", rounds=rounds, **how)
    for side, found in measured["models"].items():
        found["directory"] = (
            f"{directory.name}/{side}"  # (where it lay on this machine is nothing to a reader of the results)
        )
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in ("advice.json", "bench.json")]
        for file, document in zip(files, (advice, measured), strict=True):
            file.write_text(json.dumps(document))
        checked = check(*files)
    return {
        "load": load,
        "predicted": {key: advice[key] for key in ("times", "speedup", "memory", "layers", "verdict", "notes")},
        "measured": {key: measured[key] for key in ("models", "speedup")},
        "check": checked["speedup"],
        "environment": measured["environment"],
    }


def render(document: dict[str, Any]) -> str:
    lines = [
        "# `halve advise` beside `halve bench`",
        "",
        "How many times as fast 2:4 is as dense, predicted from config.json (from models of a few blocks with random weights) and "
        "measured on the whole model; medians over the rounds, with the quartiles. The error is that of the ratio.",
        "",
        "| model | prompt, output | figure | predicted | measured | error of the ratio | dense, predicted | dense, measured | error |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in document["shapes"].items():
        load = found["load"]
        for key, label in FIGURES.items():
            figure = found["check"][key]
            dense = figure["seconds"]["dense"]
            spreads = [found[side]["speedup"][key] for side in ("predicted", "measured")]
            cells = [f"{s['median']:.2f} ({s['p25']:.2f} to {s['p75']:.2f})" for s in spreads]
            lines.append(
                f"| {name} | {load['prompt']}, {load['output']} | {label} | {cells[0]} | {cells[1]} | {figure['error']:+.1%} | "
                f"{dense['predicted'] * 1e3:.1f} ms | {dense['measured'] * 1e3:.1f} ms | {dense['error']:+.1%} |"
            )
    lines.append("")
    for name, found in document["shapes"].items():
        env = found["environment"]
        lines.append(
            f"{name}: {found['predicted']['verdict']['headline']}. {found['predicted']['notes'][-1]}. {env['machine']}, "
            f"{env['threads']} threads, torch {env['versions']['torch']}, {env['date']}.\n"
        )
    return "\n".join(lines)


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "advise", help="where the models are, or will be")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that advise has")
    parser.add_argument("--smoke", action="store_true", help="few rounds, printed and not kept: does it run?")
    parser.add_argument("--only-write", action="store_true", help="only writes the models")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.prompt, arguments.output, arguments.rounds, arguments.budget = 16, 4, 2, 5.0
    how = (arguments.prompt, arguments.output, arguments.rounds, arguments.budget)
    if arguments.child:
        print(json.dumps(run(arguments.runs / arguments.child, *how)))
        return
    for name in arguments.shapes:
        model_of(name, arguments.runs)
    if arguments.only_write:
        return
    kept = RESULTS / "advise.json"
    document = json.loads(kept.read_text()) if kept.exists() and not arguments.smoke else {"shapes": {}}
    document["environment"] = environment()
    for name in arguments.shapes:
        command = [sys.executable, "-m", "benchmarks.advise", *sys.argv[1:], "--child", name]
        environ = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        document["shapes"][name] = json.loads(done.stdout.splitlines()[-1])
        document["shapes"] = {key: document["shapes"][key] for key in SHAPES if key in document["shapes"]}
        if not arguments.smoke:
            kept.write_text(json.dumps(document) + "\n")
            kept.with_suffix(".md").write_text(render(document))
    print(render(document))


if __name__ == "__main__":
    main()
