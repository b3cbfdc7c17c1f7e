"""What every stage of the accurate presets buys: perplexities, errors and time, on SmolLM2-135M or any model.

    python -m benchmarks.accuracy [--model DIR] [--only NAME ...] [--seeds 0 1 2] [--threads 2] [--keep DIR] [--render]

Each run is a process of its own and is kept as soon as it is done; started again, the script goes on with what is missing.
Times count the compression alone. Texts: WikiText-2 (test, first 40 windows of 2,048), windows of the calibration text
that no stage of the run saw, and Python code (modules of the standard library, so another Python has slightly other windows), which
the calibration text lacks. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from compress.files import write_text
from compress.presets import PRESETS
from compress.version import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
UNSEEN = 48
"""Windows of the calibration text, the last ones of the draw, that measure."""
CODE_MODULES = 40
"""Of Python's standard library, drawn; the windows that measure are of the first ones."""
CODE_WINDOWS = 20
MEASURED = ("perplexity_wikitext2", "perplexity_c4", "perplexity_code")

_LAYERS: dict[str, Any] = dict(PRESETS["balanced"].fields)
_LONG: dict[str, Any] = dict(PRESETS["best"].fields)
_OWN: dict[str, Any] = {**_LONG, "training_samples": 160, "repair_options": {"passes": 2}, "substitute": 0.0}
"""All blocks are trained on their own outputs, the last one, too, and on the text as it is."""
_TEXT: dict[str, Any] = {**_OWN, "training_samples": 144, "repair_options": {"passes": 2, "predictions": 40_000}}
"""No tokens are exchanged."""
_SHORT: dict[str, Any] = {**_TEXT, "substitute": _LONG["substitute"]}

RUNS: dict[str, dict[str, Any]] = {
    "fast": dict(PRESETS["fast"].fields),
    "sparsegpt": {"reconstruction": "sparsegpt", "samples": 128, "length": 512},
    "sparsegpt, dense targets": {"reconstruction": "sparsegpt", "samples": 128, "length": 512, "targets": "dense"},
    "balanced": _LAYERS,
    "balanced, not rotated": {**_LAYERS, "rotation": "none", "samples": 48},
    "balanced, targets of its own": {**_LAYERS, "targets": "own"},
    "balanced, 128 windows": {**_LAYERS, "samples": 128},
    "balanced, channels as they were": {**_LAYERS, "permutation": "none"},
    "balanced, alps": {**_LAYERS, "reconstruction": "alps"},
    "best, short": _SHORT,
    "best, short, text as it is": _TEXT,
    "best, short, text as it is, not rotated": {**_TEXT, "rotation": "none"},
    "best, short, text as it is, no predictions": _OWN,
    "best, short, text as it is, not rotated, no predictions": {**_OWN, "rotation": "none"},
    "best, short, text as it is, dense targets": {**_TEXT, "targets": "dense"},
    "best, short, text as it is, after wanda": {**_TEXT, "metric": "wanda", "reconstruction": "none"},
    "best, short, text as it is, after sparsegpt": {**_TEXT, "reconstruction": "sparsegpt"},
    "best, short, text as it is, fewer windows more often": {
        **_TEXT,
        "repair_options": {"passes": 4, "predictions": 40_000},
        "training_samples": 80,
    },
    "best, short, text as it is, new masks": {
        **_TEXT,
        "repair_options": {"passes": 2, "rounds": 1, "predictions": 40_000},
        "training_samples": 64,
    },
    "best, short, text as it is, channels as they were": {**_TEXT, "permutation": "none"},
    "best": _LONG,
    "best, text as it is": {**_LONG, "substitute": 0.0},
    "best, text as it is, not rotated": {**_LONG, "substitute": 0.0, "rotation": "none", "training_samples": 848},
    "best, text as it is, not rotated, no predictions": {
        **_LONG,
        "substitute": 0.0,
        "rotation": "none",
        "repair_options": {"passes": 2, "rate": 0.02, "cycles": 2},
        "training_samples": 896,
    },
    "an hour, text as it is, not rotated, distilled": {
        **_OWN,
        "rotation": "none",
        "repair_options": {"passes": 1},
        "training_samples": 576,
        "distill": 430_000,
    },
    "an hour, distilled longer": {**_SHORT, "distill": 640_000, "distill_options": {"windows": 924}},
}
"""Ablations at equal compute are those of one prefix: the passes over windows come to about the same number. (A round of new
masks is one forward and two backward passes, and then a pass of training: about as much as 2.7 passes.)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "smollm2-135m")
    parser.add_argument("--name", default="accuracy", help="of the results files")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--keep", type=Path, help="a directory where the checkpoints are left, for `benchmarks.zero_shot`"
    )
    parser.add_argument("--render", action="store_true", help="only write the table again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measure(**json.loads(arguments.child))))
        return
    path = RESULTS / f"{arguments.name}.json"
    document = json.loads(path.read_text()) if path.is_file() else {"model": arguments.model.name, "runs": {}}
    if not arguments.render:
        if document["model"] != arguments.model.name:
            parser.error(f"{path} is of {document['model']}, not of {arguments.model.name}; give another --name")
        if not (arguments.model / "config.json").is_file() and arguments.model.name == "smollm2-135m":
            from benchmarks.demo import prepare_smollm2

            prepare_smollm2(arguments.model)
        document["dense"] = document.get("dense") or _run(arguments, None, 0)
        for seed in arguments.seeds:
            for name in arguments.only:
                key = f"{name}, seed {seed}"
                if key not in document["runs"]:
                    document["runs"][key] = {"name": name, "seed": seed, **_run(arguments, name, seed)}
                    write_text(path, json.dumps(document, indent=1) + "\n")
                    print(key, document["runs"][key], file=sys.stderr)
    write_text(path, json.dumps(document, indent=1) + "\n")
    write_text(path.with_suffix(".md"), render(document))


def _run(arguments: argparse.Namespace, name: str | None, seed: int) -> dict[str, Any]:
    kept = None if name is None or arguments.keep is None else arguments.keep / f"{name}, seed {seed}"
    request = {"model": str(arguments.model), "name": name, "seed": seed, "kept": kept and str(kept.resolve())}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy", "--child", json.dumps(request)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "threads": arguments.threads}


def _measure(model: str, name: str | None, seed: int, kept: str | None) -> dict[str, Any]:
    from compress.pipeline import compress_model
    from serve import attention
    from serve.measure.environment import peak_memory

    found: dict[str, Any] = {"versions": versions()}
    undistilled: _Undistilled | None = None
    directory = Path(tempfile.mkdtemp(prefix="halve-accuracy-"))
    try:
        place = Path(model)
        if name is not None:
            fields = RUNS[name]
            before = time.process_time()
            started = time.perf_counter()
            undistilled = _Undistilled(directory / "undistilled", started)
            with undistilled.watch():
                done = compress_model(
                    model,
                    directory / "out",
                    **{**fields, "seed": seed},
                    attention=attention.name(),
                    progress=lambda done, total, text: print(
                        f"{time.perf_counter() - started:.0f}s {text}", file=sys.stderr, flush=True
                    ),
                )
            found |= {
                "fields": fields,
                "seconds": time.perf_counter() - started,
                "processor_seconds": time.process_time() - before,
                "peak_bytes": peak_memory(),
                **{
                    key: value
                    for key, value in done.report["summary"].items()
                    if key.startswith("mean_") or key == "blocks_repaired"
                },
                "distillation": done.report.get("distillation"),
            }
            place = done.directory
        found |= perplexities(place, seed)
        if undistilled is not None and undistilled.seconds is not None:
            found["before_distillation"] = {"seconds": undistilled.seconds, **perplexities(undistilled.directory, seed)}
        if kept is not None:
            shutil.rmtree(kept, ignore_errors=True)
            Path(kept).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(place, kept)
        return found
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def perplexities(place: Path, seed: int) -> dict[str, float]:
    """Of a checkpoint on the three texts."""
    from compress.calibration import evaluation_windows, load_windows
    from compress.sources import load_tokenizer
    from serve.loading import load_model
    from serve.measure.perplexity import perplexity

    tokenizer, model = load_tokenizer(place), load_model(place)
    # The whole text in the order of the draw: what is at its end, no stage was given.
    total = _available(tokenizer, 512)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "code.txt"
        file.write_text(_code(), encoding="utf-8")
        texts = {
            "wikitext2": evaluation_windows("wikitext2", tokenizer, length=2048, windows=40),
            "c4": load_windows("c4", tokenizer, samples=total, length=512, seed=seed)[-UNSEEN:],
            "code": evaluation_windows(str(file), tokenizer, length=2048, windows=CODE_WINDOWS),
        }
    return {f"perplexity_{text}": perplexity(model, windows).value for text, windows in texts.items()}


def _code() -> str:
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    random.Random(0).shuffle(modules)
    return "\n\n".join(module.read_text(encoding="utf-8") for module in modules[:CODE_MODULES])


class _Undistilled:
    """Keeps what a run has before it is distilled as an artefact of its own, to measure what the stages before gave."""

    def __init__(self, directory: Path, started: float) -> None:
        self.directory = directory
        self.seconds: float | None = None
        self._started = started

    def watch(self) -> contextlib.AbstractContextManager[Any]:
        from compress import pipeline
        from compress.assembly import assemble

        distill = pipeline._Run._distill

        def before(run: Any, options: Any) -> None:
            self.seconds = time.perf_counter() - self._started
            assemble(self.directory, run.model_name, run.model, run.recipe, run.samples, run.journal)
            distill(run, options)

        return mock.patch.object(pipeline._Run, "_distill", before)


def _available(tokenizer: Any, length: int) -> int:
    """Windows of the built-in calibration text."""
    from compress.calibration import read_documents, tokenize

    return len(tokenize("\n\n".join(read_documents("c4")), tokenizer)) // length


def render(document: dict[str, Any]) -> str:
    """Two tables: each recipe over its seeds, and every run."""
    dense, runs = document["dense"], document["runs"]
    lines = [
        f"# Accuracy of the presets and what each stage buys, {document['model']}",
        "",
        "Pure 2:4 in all linears of all blocks, calibrated on the built-in part of C4 alone. Perplexity of WikiText-2 (first 40 "
        f"windows of 2,048), of {UNSEEN} windows of C4 that no stage saw, and of Python code ({CODE_WINDOWS} windows of 2,048 of the "
        "standard library; empty where it was not measured). Seeds draw the windows, those of unseen C4, too, and their order "
        "(dense: seed 0); where there are several, the mean, and in brackets the lowest and the highest.",
        "",
        "| recipe | seeds | WikiText-2 | C4, unseen | code | seconds |",
        "|---|---:|---:|---:|---:|---:|",
        f"| dense | | {' | '.join(_perplexities(dense))} | |",
        *_over_seeds(runs.values()),
        "",
        "Every run. Block error: against the dense model's activations, on held-out windows, mean over the blocks, before and after "
        "the repair. Layer error: each layer's output against that of the weights that it was pruned from; in brackets where these "
        "were fitted to the dense model first (dense targets), which is another quantity. It is of a sample of the tokens that has the first ones "
        "of windows far too often, which versions since then have not.",
        "",
        "| run | WikiText-2 | C4, unseen | code | layer error | block error before | after | seconds | of the processor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, run in sorted(runs.items(), key=lambda item: item[1]["perplexity_wikitext2"]):
        errors = [
            run.get(f"mean_{name}") for name in ("relative_output_error", "held_out_error_before", "held_out_error")
        ]
        said = ["" if error is None else f"{error:.4f}" for error in errors]
        if run.get("fields", {}).get("targets") == "dense" and said[0]:
            said[0] = f"({said[0]})"
        cells = " | ".join(said)
        lines.append(
            f"| {key} | {' | '.join(_perplexities(run))} | {cells} | {run['seconds']:.0f} | {run['processor_seconds']:.0f} |"
        )
        if before := run.get("before_distillation"):
            lines.append(
                f"| the same, before it was distilled | {' | '.join(_perplexities(before))} | | | | {before['seconds']:.0f} | |"
            )
    return "\n".join(lines) + "\n"


def _perplexities(found: dict[str, Any]) -> list[str]:
    return [f"{found[name]:.2f}" if name in found else "" for name in MEASURED]


def _over_seeds(runs: Iterable[dict[str, Any]]) -> list[str]:
    """A row for each recipe, the most accurate first."""
    named: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        named.setdefault(run["name"], []).append(run)

    def spread(group: list[dict[str, Any]], key: str, digits: int) -> str:
        values = [run[key] for run in group if key in run]
        if not values:
            return ""
        around = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{around}"

    lines = []
    for name, group in sorted(named.items(), key=lambda item: statistics.mean(run[MEASURED[0]] for run in item[1])):
        cells = " | ".join([*(spread(group, key, 2) for key in MEASURED), spread(group, "seconds", 0)])
        lines.append(f"| {name} | {len(group)} | {cells} |")
    return lines


if __name__ == "__main__":
    main()
