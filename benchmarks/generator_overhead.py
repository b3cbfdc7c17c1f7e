"""What the load generator costs, and what it adds to the latencies that it measures, beside vLLM's.

    python -m benchmarks.generator_overhead [--seconds 20] [--tokenizer DIRECTORY]

The endpoint is `benchmarks.mock_endpoint`: it knows when it sent each token, by the clock that all processes share. Each
generator sends 50 requests a second of 128 tokens each, evenly; the answers have 1, 8, 16 or 32 tokens.

    processor   of one core: what the generator used while the load ran. Of the other generators, which are programs of their
                own, it is the difference between a long run and a short one, so that their start does not count.
    added       median of what was measured less what the mock did. TTFT: from when the request was due to its first token,
                less the time that the mock took. Token: from its sending to its arrival.
    told        the medians that a generator reports; the mock was told 50 ms to the first token and 20 between tokens.

``vllm bench serve`` is measured beside it where vLLM is installed and ``--tokenizer`` names a model directory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from serve.engines.vllm import installed
from serve.measure.environment import environment
from serve.measure.generator import Generator
from serve.measure.latency import round_of
from serve.measure.loads import Shape, asks
from serve.measure.outcomes import Load

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
RATE, PROMPT, TTFT, ITL = 50, 128, 0.05, 0.02
OUTPUTS = (1, 8, 16, 32)
COMPARED_OUTPUT = 8


@contextmanager
def mock(*arguments: str) -> Iterator[str]:
    """The address of a mock endpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.mock_endpoint", "--ttft", str(TTFT), "--itl", str(ITL), *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def truth(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/truth") as answer:
        return json.load(answer)["requests"]


def own(generator: Generator, output: int, seconds: float) -> dict[str, Any]:
    """Our generator, against what the mock says of each request."""
    count = round(seconds * RATE)
    rng = np.random.default_rng(0)
    with mock() as url:
        tokens = np.arange(50_000)
        warm = asks([Shape(PROMPT, output)] * 32, tokens, "mock", rng)
        generator(Load(f"{url}/completions", warm, 8))
        due = [Shape(PROMPT, output, number / RATE) for number in range(count)]
        requests = asks(due, tokens, "mock", rng)
        outcomes = generator(Load(f"{url}/completions", requests))
        by_prompt = {tuple(request["prompt"]): request for request in truth(url)}
    first, token = [], []
    for request, outcome in zip(requests, outcomes.requests, strict=True):
        did = by_prompt[tuple(json.loads(request.body)["prompt"])]
        sent = np.asarray(did["sent"]) - did["arrived"]
        first.append(outcome.tokens[0] - outcome.intended - sent[0])
        token += (np.asarray(outcome.tokens) - outcome.sent - sent).tolist()
    figures = round_of(outcomes, {})["figures"]
    return {
        "output": output,
        "requests": count,
        "errors": sum(outcome.error is not None for outcome in outcomes.requests),
        "processor": outcomes.cpu_seconds / outcomes.seconds,
        "added_ttft_ms": statistics.median(first) * 1e3,
        "added_token_ms": statistics.median(token) * 1e3,
        "late_ms": statistics.median(outcome.late for outcome in outcomes.requests) * 1e3,
        "told_ttft_ms": figures["ttft"]["p50"] * 1e3,
        "told_tpot_ms": figures["tpot"]["p50"] * 1e3 if output > 1 else None,
    }


def processor_seconds(command: list[str]) -> float:
    """Of a program and all that it started."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read()[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def of_vllm(url: str, count: int, tokenizer: Path, directory: Path) -> tuple[list[str], Any]:
    """The command, and what reads its result."""
    command = [
        *(sys.executable, "-m", "benchmarks.vllm_command", "bench", "serve", "--backend", "openai"),
        *("--base-url", url.removesuffix("/v1"), "--model", "mock", "--tokenizer", str(tokenizer), "--ignore-eos"),
        *("--dataset-name", "random", "--random-input-len", str(PROMPT), "--random-output-len", str(COMPARED_OUTPUT)),
        *("--num-prompts", str(count), "--request-rate", str(RATE), "--burstiness", "1e9", "--disable-tqdm"),
        *("--num-warmups", "32", "--temperature", "0", "--percentile-metrics", "ttft,tpot", "--save-result"),
        *("--result-dir", str(directory), "--result-filename", "vllm.json"),
    ]

    def read() -> dict[str, Any]:
        found = json.loads((directory / "vllm.json").read_text())
        return {
            "answered": found["completed"],
            "told_ttft_ms": found["median_ttft_ms"],
            "told_tpot_ms": found["median_tpot_ms"],
        }

    return command, read


def other(name: str, make: Any, seconds: float) -> dict[str, Any]:
    """Another generator: a long and a short run, and one in which every second answer has half of its tokens."""
    with tempfile.TemporaryDirectory() as folder:
        used = {}
        for length in (seconds / 4, seconds):
            with mock() as url:
                command, read = make(url, round(length * RATE), Path(folder))
                used[length] = processor_seconds(command)
        told = read()
        with mock("--fault", "short", "--every", "2") as url:
            command, read = make(url, 60, Path(folder))
            processor_seconds(command)
            short = read()["answered"]
    return {
        "name": name,
        "output": COMPARED_OUTPUT,
        "processor": (used[seconds] - used[seconds / 4]) / (0.75 * seconds),
        **told,
        "answered_of_60_when_half_are_short": short,
    }


def render(document: dict[str, Any]) -> str:
    lines = [
        "# What the load generator costs",
        "",
        f"`python -m benchmarks.generator_overhead`: {RATE} requests a second of {PROMPT} tokens for "
        f"{document['seconds']:g} s, against an endpoint that was told {TTFT * 1e3:.0f} ms to the first token and "
        f"{ITL * 1e3:.0f} between tokens. {document['environment']['machine']}, {document['environment']['cores']} cores.",
        "",
        "| tokens in an answer | of one core | added to TTFT, median | added to a token, median | TTFT told | TPOT told |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for one in document["own"]:
        tpot = "" if one["told_tpot_ms"] is None else f"{one['told_tpot_ms']:.2f} ms"
        lines.append(
            f"| {one['output']} | {one['processor'] * 100:.2f} % | {one['added_ttft_ms']:.2f} ms | "
            f"{one['added_token_ms']:.2f} ms | {one['told_ttft_ms']:.2f} ms | {tpot} |"
        )
    if document["others"]:
        lines += [
            "",
            f"Others, answers of {COMPARED_OUTPUT} tokens; and how many of 60 requests they call answered when 30 of "
            "the answers have half of the tokens that were asked for:",
            "",
            "| generator | of one core | TTFT told | TPOT told | \"answered\" |",
            "|---|---:|---:|---:|---:|",
        ]  # fmt: skip
        for one in document["others"]:
            lines.append(
                f"| {one['name']} | {one['processor'] * 100:.1f} % | {one['told_ttft_ms']:.2f} ms | "
                f"{one['told_tpot_ms']:.2f} ms | {one['answered_of_60_when_half_are_short']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tokenizer", type=Path, help="a model directory, for vLLM's prompts")
    parser.add_argument("--smoke", action="store_true", help="a second each, and nothing is written: does it run?")
    arguments = parser.parse_args()
    seconds = 1.0 if arguments.smoke else arguments.seconds
    document: dict[str, Any] = {"seconds": seconds, "environment": environment(), "own": [], "others": []}
    with Generator() as generator:
        document["own"] = [own(generator, output, seconds) for output in OUTPUTS]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer = arguments.tokenizer and arguments.tokenizer.resolve()
    if (vllm := installed()) and tokenizer:
        name = f"vllm bench serve {vllm[1]}"
        document["others"].append(
            other(name, lambda url, count, folder: of_vllm(url, count, tokenizer, folder), seconds)
        )
    document["httptools"] = importlib.metadata.version("httptools")
    text = render(document)
    print(text)
    if not arguments.smoke:
        (RESULTS / "generator_overhead.json").write_text(json.dumps(document, indent=2) + "\n")
        (RESULTS / "generator_overhead.md").write_text(text)


if __name__ == "__main__":
    main()
