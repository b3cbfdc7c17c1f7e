"""`halve eval` on a real model: the known perplexity, in time, and tasks through the endpoint as in process.

    python -m benchmarks.evaluation --task-data DIR [--limit 50] [--sparse DIR]

On SmolLM2-135M-Instruct (bfloat16, made from a package): the perplexity of WikiText-2 over the first 40 windows of
2,048 tokens against the float32 figure, 20.38, and the seconds it takes. Then LAMBADA and ARC-easy in this process
and through the endpoint, which have to be equal to the last digit: both are the same engine, one prompt at a time.
``--task-data`` holds lambada_openai*.jsonl[.gz] and arc_easy*.jsonl[.gz] in the form of their Hugging Face data
sets; ``--sparse`` is a packed checkpoint of the model, whose agreement and scores are measured beside it.
Writes benchmarks/results/evaluation.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.demo import halve, prepare_smollm2
from compress.console import out

RESULTS = Path(__file__).parent / "results"
FLOAT32 = 20.38  # of the same weights over the same windows
TASKS = "lambada_openai,arc_easy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--sparse", type=Path)
    arguments = parser.parse_args()
    model = prepare_smollm2(Path("runs") / "smollm2-135m")
    if arguments.sparse and arguments.sparse.name == model.name:
        parser.error(
            f"--sparse: results go by the directory's name, and the dense one's is {model.name}, too; rename it"
        )
    started = time.perf_counter()
    text = halve("eval", model, "--windows", 40)
    seconds = time.perf_counter() - started
    options = ["--no-perplexity", "--tasks", TASKS, "--limit", arguments.limit, "--task-data", arguments.task_data]
    measured = {}
    for path in filter(None, (model, arguments.sparse)):
        ways = {
            way: halve("eval", path, *options, "--through", way)["models"][0]["tasks"]
            for way in ("process", "endpoint")
        }
        measured[path.name] = {**ways, "equal": ways["process"] == ways["endpoint"]}
    report: dict[str, Any] = {
        "float32": FLOAT32,
        "perplexity": text["perplexity"],
        "interval": text["interval"],
        "seconds": seconds,
        "windows_seconds": text["models"][0]["seconds"],
        "tasks": measured,
        "limit": arguments.limit,
        "environment": text["environment"],
    }
    if arguments.sparse:
        beside = halve("eval", arguments.sparse, "--against", model, "--windows", 40)
        report["sparse"] = {name: beside[name] for name in ("perplexity", "interval", "ratio", "ratio_interval")}
        report["sparse"]["agreement"] = beside["agreement"]
    (RESULTS / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "evaluation.md").write_text(summary(report))
    out.print(f"report: {RESULTS / 'evaluation.md'}", highlight=False)
    close = abs(report["perplexity"] / FLOAT32 - 1) <= 0.002
    sys.exit(not (close and all(found["equal"] for found in measured.values())))


def summary(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    place = report["environment"]
    low, high = report["interval"]
    lines = [
        "# `halve eval` on SmolLM2-135M-Instruct",
        "",
        f"`python -m benchmarks.evaluation`, {place['date']}, {place['machine']}, {place['threads']} threads, bfloat16.",
        "",
        f"- Perplexity of WikiText-2, 40 windows of 2,048: **{report['perplexity']:.3f}** (95 % interval {low:.2f} to "
        f"{high:.2f}); float32 {report['float32']}, a difference of {report['perplexity'] / report['float32'] - 1:+.2%}; "
        f"the windows took {report['windows_seconds']:.0f} s, the whole command {report['seconds']:.0f} s.",
    ]
    if "sparse" in report:
        found = report["sparse"]
        low, high = found["ratio_interval"]
        top1, kl = found["agreement"]["top1"]["value"], found["agreement"]["kl"]["value"]
        lines.append(
            f"- The packed model beside it: perplexity {found['perplexity']:.2f}, {found['ratio']:.3f} times the dense "
            f"one's (95 % interval {low:.3f} to {high:.3f}); the same likeliest token at {top1:.1%} of the positions, "
            f"KL {kl:.3f} nats a token."
        )
    lines += [
        "",
        f"The first {report['limit']} examples of each task, in process and through the endpoint:",
        "",
        "| checkpoint | task | metric | in process | through the endpoint | all samples equal |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in report["tasks"].items():
        for task, own in found["process"].items():
            served = found["endpoint"][task]["metrics"]
            for metric, figure in own["metrics"].items():
                equal = "yes" if figure["samples"] == served[metric]["samples"] else "no"
                lines.append(
                    f"| {name} | {task} | {metric} | {figure['value']:.4f} | {served[metric]['value']:.4f} | {equal} |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
