"""How far the estimates of `halve advise` for pruning are off, on this machine: recipes that are run, and what was said before.

    python -m benchmarks.effort [--model DIR] [--threads 2] [--only NAME ...]

Each recipe is a process of its own; the rates are measured in it, just before. Nothing else may run beside it. What is left out
keeps the result that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compress.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

RECIPES: dict[str, dict[str, Any]] = {
    "wanda": {"metric": "wanda", "reconstruction": "none", "samples": 32, "length": 512},
    "sparsegpt": {"reconstruction": "sparsegpt", "samples": 32, "length": 512},
    "apt": {"reconstruction": "apt", "samples": 32, "length": 512},
    "admm": {"reconstruction": "admm", "samples": 32, "length": 512},
    "admm, heads rotated": {"reconstruction": "admm", "samples": 32, "length": 512, "rotation": "heads"},
    "admm, dense targets": {"reconstruction": "admm", "samples": 32, "length": 512, "targets": "dense"},
    "admm, blocks trained": {
        "reconstruction": "admm", "samples": 16, "training_samples": 32, "length": 512,
        "repair": "block", "repair_options": {"passes": 2},
    },
    "sparsegpt, allocated": {"reconstruction": "sparsegpt", "samples": 32, "length": 512, "allocate": 0.1},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "smollm2-135m")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measure(**json.loads(arguments.child))))
        return
    if not (arguments.model / "config.json").is_file() and arguments.model.name == "smollm2-135m":
        from benchmarks.demo import prepare_smollm2

        prepare_smollm2(arguments.model)
    path = RESULTS / "effort.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    same = {"model": arguments.model.name, "threads": arguments.threads}
    if any(document.get(key) != value for key, value in same.items()):
        document = {**same, "runs": {}}
    for name in arguments.only:
        request = json.dumps({"model": str(arguments.model), "name": name})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.effort", "--child", request],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        run = document["runs"][name] = json.loads(done.stdout.splitlines()[-1])
        document["runs"] = {name: document["runs"][name] for name in RECIPES if name in document["runs"]}
        write_text(path, json.dumps(document, indent=1) + "\n")
        write_text(path.with_suffix(".md"), render(document))
        print(name, run["seconds"], run["estimate"]["seconds"], file=sys.stderr)


def _measure(model: str, name: str) -> dict[str, Any]:
    import torch

    from compress.pipeline import compress_model
    from compress.recipe import Recipe
    from serve import attention
    from serve.measure import effort, shapes
    from serve.measure.environment import environment

    recipe, shape = Recipe.create(**RECIPES[name]), shapes.read(model)
    estimate = effort.estimate(shape, recipe, effort.measured(shape.dtype, torch.device("cpu")))
    with tempfile.TemporaryDirectory(prefix="halve-effort-") as directory:
        started = time.perf_counter()
        compress_model(model, Path(directory) / "out", recipe=recipe, attention=attention.name())
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "estimate": estimate, "environment": environment()}


def render(document: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"# What pruning takes: estimated and measured, {document['model']}",
        "",
        "| recipe | estimated, s | measured, s | error | most of it, by the estimate | measured on |",
        "|---|---:|---:|---:|---|---|",
    ]
    for name, run in document["runs"].items():
        said, took = run["estimate"]["seconds"], run["seconds"]
        most = max(run["estimate"]["stages"], key=lambda stage: stage["seconds"])["name"]
        place = f"{run['environment']['machine']}, {run['environment']['date']}"
        lines.append(f"| {name} | {said:.0f} | {took:.0f} | {said / took - 1:+.0%} | {most} | {place} |")
    lines += ["", f"{document['threads']} threads."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
