"""What keeping a few linears dense buys: those that `--allocate` chooses, against others of the same bytes.

    python -m benchmarks.allocation [--model DIR] [--share 0.1] [--samples 32] [--windows 20] [--only NAME ...]

Sides, all with SparseGPT on the same calibration: ``none`` prunes all; ``allocate`` keeps what the allocation chooses; ``random`` keeps
units drawn at random, ``first`` those of the first blocks and ``last`` those of the last ones, each as many as fit into the same
budget. Perplexity of WikiText-2, and of windows of C4 that no side saw. Kept as soon as a side is done.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SIDES = ("none", "allocate", "random", "first", "last")
LENGTH = 512
UNSEEN = 24
"""Windows of C4, the last ones of the draw."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "smollm2-135m")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=20, help="of WikiText-2, of 2,048 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(SIDES), choices=SIDES)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file() and arguments.model.name == "smollm2-135m":
        from benchmarks.demo import prepare_smollm2

        prepare_smollm2(arguments.model)
    path = RESULTS / "allocation.json"
    settings = {name: getattr(arguments, name) for name in ("share", "samples", "windows", "seed")}
    settings["model"] = arguments.model.name
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if document.get("settings") != settings:
        document = {"settings": settings, "sides": {}}
    for side in ("allocate", *SIDES):  # whose record says which units there are
        if side in document["sides"] or (side not in arguments.only and side != "allocate"):
            continue
        document["sides"][side] = _side(side, arguments, document)
        write_text(path, json.dumps(document, indent=1) + "\n")
        print(side, document["sides"][side]["perplexity_wikitext2"], file=sys.stderr)
    write_text(path.with_suffix(".md"), render(document))


def _side(side: str, arguments: argparse.Namespace, document: dict[str, Any]) -> dict[str, Any]:
    from compress.calibration import evaluation_windows, load_windows, read_documents, tokenize
    from compress.pipeline import compress_model
    from compress.sources import load_tokenizer
    from serve import attention
    from serve.loading import load_model
    from serve.measure.environment import environment
    from serve.measure.perplexity import perplexity

    fields: dict[str, Any] = {
        "reconstruction": "sparsegpt", "samples": arguments.samples, "length": LENGTH, "seed": arguments.seed,
    }  # fmt: skip
    if side == "allocate":
        fields["allocate"] = arguments.share
    elif side != "none":
        record = document["sides"]["allocate"]["allocation"]
        fields["ignore"] = tuple(name for unit in _others(side, record, arguments.seed) for name in unit)
    directory = Path(tempfile.mkdtemp(prefix="halve-allocation-"))
    try:
        done = compress_model(arguments.model, directory / "out", attention=attention.name(), **fields)
        tokenizer = load_tokenizer(done.directory)
        total = len(tokenize("\n\n".join(read_documents("c4")), tokenizer)) // LENGTH
        unseen = load_windows("c4", tokenizer, samples=total, length=LENGTH, seed=arguments.seed)[-UNSEEN:]
        texts = {
            "wikitext2": evaluation_windows("wikitext2", tokenizer, length=2048, windows=arguments.windows),
            "c4": unseen,
        }
        model = load_model(done.directory)
        dense = [layer for layer in done.report["layers"] if layer["status"] == "dense"]
        return {
            **{f"perplexity_{name}": perplexity(model, windows).value for name, windows in texts.items()},
            "dense_layers": [layer["name"] for layer in dense],
            "dense_bytes": sum(layer["bytes_before"] for layer in dense),
            "bytes": done.report["bytes"]["total"],
            "allocation": done.report.get("allocation"),
            "environment": environment(),
        }
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _others(side: str, record: dict[str, Any], seed: int) -> list[Sequence[str]]:
    """Units in another order, as many as the budget of an allocation holds."""
    units = [(candidate["names"], candidate["saves"]) for candidate in record["candidates"]]

    def block(unit: tuple[Sequence[str], float]) -> int:
        return next(int(part) for part in unit[0][0].split(".") if part.isdigit())

    if side == "random":
        units.sort(key=lambda unit: unit[0][0])
        random.Random(seed).shuffle(units)
    else:
        units.sort(key=block, reverse=side == "last")
    kept, left = [], record["budget"] * record["saves_all"]
    for names, saves in units:
        if saves <= left:
            kept.append(names)
            left -= saves
    return kept


def render(document: dict[str, Any]) -> str:
    """The table."""
    settings = document["settings"]
    lines = [
        f"# Linears that are kept dense, {settings['model']}",
        "",
        f"SparseGPT 2:4 on {settings['samples']} windows of {LENGTH} tokens of C4, seed {settings['seed']}; at most {settings['share']:.0%} of what pruning saves is "
        f"given back. Perplexity of WikiText-2 (first {settings['windows']} windows of 2,048) and of {UNSEEN} windows of C4 that no side saw.",
        "",
        "| kept dense | linears | MB on disk | WikiText-2 | C4, unseen |",
        "|---|---:|---:|---:|---:|",
    ]
    for side in SIDES:
        if (run := document["sides"].get(side)) is not None:
            lines.append(
                f"| {side} | {len(run['dense_layers'])} | {run['bytes'] / 1e6:.1f} | {run['perplexity_wikitext2']:.2f} | "
                f"{run['perplexity_c4']:.2f} |"
            )
    if found := document["sides"].get("allocate"):
        kinds: dict[str, int] = {}
        for name in found["dense_layers"]:
            kinds[name.rpartition(".")[2]] = kinds.get(name.rpartition(".")[2], 0) + 1
        lines += [
            "",
            "The allocation keeps: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) + ".",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
