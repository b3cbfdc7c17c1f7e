"""2:4 against dense in vLLM, through vLLM's own load generator: decode, prefill, many requests at once, memory.

    python -m benchmarks.vllm_speed [--model runs/llama-shape] [--rounds 5] [--threads default 2] [--smoke]

MODEL/dense and MODEL/sparse are the same weights, dense and as the 2:4 twin that `halve compress` packs
(`benchmarks.llama_shape` makes them: Llama-3.2-1B's shape, random weights; speed does not depend on their values). Both
are served by vLLM's OpenAI server as `halve serve --engine vllm` starts it, each in processes of its own and both at the
same time; they take turns, and the one that waits is idle. In a round each gets each load once, by `vllm bench serve`:

    decode    one request at a time, 128 tokens in, 64 out: time per output token (TPOT)
    prefill   one request at a time, 1,024 tokens in, 1 out: time to first token (TTFT)
    eight     eight requests at once, 128 tokens in, 64 out: output tokens per second

Figures are medians over rounds, ratios medians of the ratios within a round, with the smallest and the largest. What was measured
in fewer than three rounds is told without a ratio. Threads: "default" is
what vLLM takes by itself (it leaves one core to its server); a number binds the engine to as many cores. vLLM's cache of prefixes
is off: the generator warms up with the first prompt of a load, which would then be no work.

`vllm bench latency` runs each model alone in a process of its own, in turn, the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.vllm_command import DONE
from serve.engines.vllm import CACHE_VARIABLE, VllmServer, installed
from serve.measure.environment import environment
from serve.measure.speed import ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SIDES = ("dense", "sparse")
LOADS = {
    "decode": {"input": 128, "output": 64, "requests": 2, "concurrency": 1},
    "prefill": {"input": 1024, "output": 1, "requests": 2, "concurrency": 1},
    "eight": {"input": 128, "output": 64, "requests": 8, "concurrency": 8},
}
SMOKE = {"decode": {"input": 16, "output": 4, "requests": 2, "concurrency": 1}}
FIGURE = {"decode": "median_tpot_ms", "prefill": "median_ttft_ms", "eight": "output_throughput"}
FEWEST = 3
"""Rounds from which a ratio is quoted."""
BINDING = "VLLM_CPU_OMP_THREADS_BIND"


class Commands:
    """The command `vllm`, again and again in one process."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm_command"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __call__(self, *arguments: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        said = []
        for line in self._process.stdout:
            if line.startswith(DONE):
                return
            said.append(line)
        self._log.seek(0)
        raise SystemExit(
            f"vllm {' '.join(arguments)} ended with {self._process.wait()}:\n{''.join(said)[-2000:]}{self._log.read()[-4000:]}"
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def bench_serve(vllm: Commands, server: VllmServer, tokenizer: Path, load: dict[str, int], seed: int) -> dict[str, Any]:
    """One load on one server, by `vllm bench serve`: its own result."""
    with tempfile.TemporaryDirectory() as directory:
        vllm(
            *("bench", "serve", "--backend", "openai", "--base-url", server.root, "--model", server.model),
            *("--tokenizer", str(tokenizer), "--dataset-name", "random", "--seed", str(seed), "--ignore-eos"),
            *("--random-input-len", str(load["input"]), "--random-output-len", str(load["output"])),
            *("--num-prompts", str(load["requests"]), "--max-concurrency", str(load["concurrency"])),
            *("--num-warmups", "1", "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el"),
            *("--metric-percentiles", "50,90,99", "--save-result", "--save-detailed", "--disable-tqdm"),
            *("--result-dir", directory, "--result-filename", "result.json"),
        )
        result = json.loads((Path(directory) / "result.json").read_text())
    if result["completed"] != load["requests"]:
        raise SystemExit(
            f"{server.model}: {result['completed']} of {load['requests']} requests were answered: {result.get('errors')}"
        )
    kept = ("ttft", "tpot", "itl", "e2el", "throughput", "total_input", "total_output", "duration")
    return {
        key: value
        for key, value in result.items()
        if isinstance(value, int | float) and any(part in key for part in kept)
    } | {"ttfts": result["ttfts"], "itls": result["itls"]}


def bench_latency(vllm: Commands, model: Path, load: dict[str, int]) -> float:
    """Seconds of one batch of one, by `vllm bench latency`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        vllm(
            *("bench", "latency", "--model", str(model), "--input-len", str(load["input"])),
            *("--output-len", str(load["output"]), "--batch-size", "1", "--num-iters-warmup", "1", "--num-iters", "3"),
            *("--max-model-len", str(context({"": load})), "--output-json", out.name),
        )
        return json.loads(Path(out.name).read_text())["avg_latency"]


def context(loads: dict[str, dict[str, int]]) -> int:
    """The longest sequence, with room for what the generator's text becomes when it is made tokens again."""
    return max(load["input"] + load["output"] for load in loads.values()) + 512


def memory(server: VllmServer) -> int:
    """Bytes that the server's processes hold, memory shared between them counted once."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes)


def server_of(model: Path, loads: dict[str, dict[str, int]]) -> VllmServer:
    return VllmServer(
        str(model),
        max_model_len=context(loads),
        max_num_seqs=16,
        timeout=1200,
        extra=["--no-enable-prefix-caching"],
    )


def measure(model: Path, threads: str, rounds: int, loads: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Both sides with so many threads."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ.pop(BINDING, None)
    if threads != "default":
        os.environ[BINDING] = ",".join(map(str, cores[: int(threads)]))
    found: dict[str, Any] = {"rounds": [], "memory": {}, "said": {}}
    vllm = Commands()
    with ExitStack() as stack:
        stack.callback(vllm.close)
        servers = {}
        for side in SIDES:
            servers[side] = stack.enter_context(server_of(model / side, loads))
            lines = servers[side].log.splitlines()
            found["said"][side] = [line.partition("] ")[2] for line in lines if "halve:" in line]
        for number in range(rounds + 1):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            answers = {
                name: {side: bench_serve(vllm, servers[side], model / side, load, number) for side in order}
                for name, load in loads.items()
            }
            if number:  # the first one warms up
                found["rounds"].append(answers)
                print(number, json.dumps(summary({"rounds": [answers]}, loads)["ratios"]), file=sys.stderr, flush=True)
        found["memory"] = {side: memory(server) for side, server in servers.items()}
    return {**found, **summary(found, loads)}


def summary(found: dict[str, Any], loads: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Figures by load and side, and how many times as fast the sparse side is."""
    figures: dict[str, dict[str, float]] = {}
    ratios: dict[str, Any] = {}
    for name in loads:
        values = by_round(found, name)
        figures[name] = {side: statistics.median(values[side]) for side in SIDES}
        dense, sparse = values["dense"], values["sparse"]
        ratios[name] = ratio(dense, sparse) if is_rate(name) else ratio(sparse, dense)
    return {"figures": figures, "ratios": ratios}


def by_round(found: dict[str, Any], load: str) -> dict[str, list[float]]:
    """A load's figure in each round, by side."""
    return {side: [answers[load][side][FIGURE[load]] for answers in found["rounds"]] for side in SIDES}


def is_rate(load: str) -> bool:
    """Whether more is faster."""
    return FIGURE[load] == "output_throughput"


def times_as_fast(values: dict[str, list[float]], *, is_rate: bool = False) -> str:
    """The median over rounds of how many times as fast 2:4 is, the range, and how many rounds; without a ratio where they are few."""
    ratios = [dense / sparse for dense, sparse in zip(values["dense"], values["sparse"], strict=True)]
    ratios = [1 / one for one in ratios] if is_rate else ratios
    rounds = f"{len(ratios)} round{'s' * (len(ratios) != 1)}"
    if len(ratios) < FEWEST:
        return f"{rounds}, too few for a ratio"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {rounds})"


def render(document: dict[str, Any]) -> str:
    lines = [
        f"# 2:4 against dense in vLLM {document['vllm'][1]} ({document['vllm'][0]}), {document['model']}",
        "",
        "`python -m benchmarks.vllm_speed`: vLLM's own server and load generator, dense and sparse in turn. Times as fast: the "
        "median of the rounds' ratios, in brackets the smallest and the largest.",
        "",
        "| threads | load | dense | 2:4 | times as fast |",
        "|---|---|---:|---:|---:|",
    ]
    units = {"median_tpot_ms": "ms a token", "median_ttft_ms": "ms to the first token", "output_throughput": "tokens/s"}
    for threads, found in document["threads"].items():
        for name, figures in found["figures"].items():
            load = document["loads"][name]
            what = f"{load['concurrency']} at once, {load['input']} in, {load['output']} out: {units[FIGURE[name]]}"
            fast = times_as_fast(by_round(found, name), is_rate=is_rate(name))
            lines.append(f"| {threads} | {what} | {figures['dense']:.1f} | {figures['sparse']:.1f} | {fast} |")
    if latency := document.get("latency"):
        dense, sparse = (statistics.median(latency[side]) for side in SIDES)
        load = document["loads"]["decode"]
        what, fast = f"`vllm bench latency`, {load['input']} in, {load['output']} out", times_as_fast(latency)
        if len(latency["dense"]) < FEWEST:  # no line of the table, which is quoted elsewhere
            lines += ["", f"{what}, threads {latency['threads']}: dense {dense:.2f} s, 2:4 {sparse:.2f} s ({fast})."]
        else:
            lines.append(f"| {latency['threads']} | {what}: seconds | {dense:.2f} | {sparse:.2f} | {fast} |")
    last = list(document["threads"].values())[-1]
    held = last["memory"]
    lines += [
        "",
        f"Memory of all processes of a server, {document['cache_gib']} GiB of it for keys and values: dense "
        f"{held['dense'] / 2**30:.2f} GiB, 2:4 {held['sparse'] / 2**30:.2f} GiB.",
        "",
        *(f"- {line}" for line in last["said"]["sparse"]),
    ]
    return "\n".join(lines) + "\n"


def pruned_share(document: dict[str, Any]) -> float | None:
    """Bytes of the pruned layers' weights in the engine over the dense ones, as the plugin said."""
    said = " ".join(list(document["threads"].values())[-1]["said"]["sparse"])
    found = re.search(r"([0-9.]+) of the dense ones", said)
    return float(found[1]) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "llama-shape")
    parser.add_argument("--name", default="vllm_speed", help="of the results files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", nargs="*", default=["default", str(len(os.sched_getaffinity(0)))])
    parser.add_argument("--latency", type=int, default=FEWEST, help="rounds of `vllm bench latency`; 0 leaves it out")
    parser.add_argument("--smoke", action="store_true", help="few tokens, nothing is written: does it run?")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault(CACHE_VARIABLE, "1")
    model, loads = arguments.model.resolve(), SMOKE if arguments.smoke else LOADS
    document: dict[str, Any] = {
        "model": arguments.model.name,
        "vllm": installed(),
        "loads": loads,
        "environment": environment(),
        "cache_gib": int(os.environ[CACHE_VARIABLE]),
        "threads": {},
    }
    for threads in arguments.threads:
        document["threads"][threads] = measure(model, threads, arguments.rounds, loads)
    document["pruned_layers_bytes_ratio"] = pruned_share(document)
    if arguments.latency and not arguments.smoke:
        latency: dict[str, Any] = {side: [] for side in SIDES}
        for number in range(arguments.latency):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                vllm = Commands()  # of its own, so that each model is loaded into a clean process
                latency[side].append(bench_latency(vllm, model / side, loads["decode"]))
                vllm.close()
        document["latency"] = {**latency, "threads": arguments.threads[-1] if arguments.threads else "default"}
    text = render(document)
    print(text)
    if not arguments.smoke:
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(document) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text(text)


if __name__ == "__main__":
    main()
