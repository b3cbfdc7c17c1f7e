"""Decoding at batch 1: halve's 2:4 and dense engine, plain transformers, torch.compile and llama.cpp, in turn.

    python -m benchmarks.llama_shape --llama-python ENV/bin/python      # once: the model in every form
    python -m benchmarks.decode --llama-python ENV/bin/python [--threads 1 2] [--rounds 5] [--sides NAME ...] [--prompt 128] [--smoke]

The model has the shape of Llama-3.2-1B and random weights (speed does not depend on their values), the same ones for all:
2:4 packed (with kept values in bfloat16, in int8, and with activations in int8, too), dense bfloat16, and GGUF files in BF16, Q8_0 and Q4_0. A round gives each side, in a process of its own, one
prompt of 128 tokens and then has it decode 128 tokens one by one; the sides take turns, and wait idle in between. A side's
time for a token is the median of a round; figures are medians over rounds, ratios medians of the ratios within a round.
How to get llama.cpp is in `llama_cpp_side`; without ``--llama-python`` its sides are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from serve.measure.environment import environment
from serve.measure.speed import ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
OURS = {
    "halve, 2:4": ("halve", "sparse"),
    "halve, 2:4, int8": ("halve", "int8"),
    "halve, 2:4, int8, activations too": ("halve", "int8-both"),
    "halve, dense": ("halve", "dense"),
    "transformers": ("eager", "dense"),
    "transformers, torch.compile": ("compile", "dense"),
    "transformers, torch.compile, freezing": ("freeze", "dense"),
}
ONNX = {
    "ONNX Runtime, 2:4 by halve's operator": ("onnx", "onnx-packed"),
    "ONNX Runtime, the same, int8, activations too": ("onnx", "onnx-int8-both"),
    "ONNX Runtime, zeros": ("onnx", "onnx-zeros"),
}
"""Only where they are named by ``--sides``: `python -m benchmarks.llama_shape --onnx` makes their graphs."""
GGUFS = ("BF16", "Q8_0", "Q4_0")
OF = "halve, 2:4"


class Side:
    """A process that generates once when it is told to."""

    def __init__(self, command: list[str], threads: int) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        if "-m" in command:
            del environ["GLIBC_TUNABLES"]  # llama.cpp asks for no huge pages itself; halve does
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a side ended with exit code {self.process.wait()}: {self.process.args}")

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.answer()
        tokens = answer.get("token_seconds") or answer["decode_seconds"]
        return {"prefill": answer["prefill_seconds"], "token": statistics.median(tokens), "tokens": tokens}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def commands(directory: Path, llama: Path | None, threads: int, prompt: int, output: int) -> dict[str, list[str]]:
    lengths = ["--threads", str(threads), "--prompt", str(prompt)]
    every = {
        name: [
            sys.executable,
            "-m",
            "benchmarks.decode_side",
            kind,
            str(directory / form),
            *lengths,
            "--output",
            str(output),
        ]
        for name, (kind, form) in (OURS | ONNX).items()
        if name in OURS or (directory / form).is_dir()
    }
    if llama is not None:
        script = [str(llama), "-I", "benchmarks/llama_cpp_side.py", "bench"]
        for kind in GGUFS:
            every[f"llama.cpp, {kind}"] = [
                *script,
                str(directory / f"{kind}.gguf"),
                *lengths,
                *("--decode", str(output), "--serve"),
            ]
    return every


def weights_bytes(directory: Path, name: str) -> int:
    """Of the file or files that a side reads."""
    if name.startswith("llama.cpp"):
        return (directory / f"{name.rpartition(' ')[2]}.gguf").stat().st_size
    form = (OURS | ONNX)[name][1]
    files = "model.onnx*" if name in ONNX else "*.safetensors"
    return sum(file.stat().st_size for file in (directory / form).glob(files))


def run(
    directory: Path, llama: Path | None, threads: int, prompt: int, output: int, rounds: int, sides: list[str] | None
) -> dict[str, Any]:
    """All sides, or those named, for one number of threads."""
    every: dict[str, Side] = {}
    try:
        for name, command in commands(directory, llama, threads, prompt, output).items():
            if name in ONNX if sides is None else name not in sides:
                continue
            every[name] = Side(command, threads)
            print(f"{threads} threads: {name} is ready", file=sys.stderr, flush=True)
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in every}
        for turn in range(rounds):
            for name in list(every) if turn % 2 else reversed(every):
                samples[name].append(every[name].round())
            now = ", ".join(f"{name} {1e3 * taken[-1]['token']:.1f}" for name, taken in samples.items())
            print(f"{threads} threads, round {turn + 1}/{rounds}, ms a token: {now}", file=sys.stderr, flush=True)
    finally:
        for side in every.values():
            side.close()
    ours = samples[OF]
    return {
        "threads": threads,
        "sides": {
            name: {
                "bytes": weights_bytes(directory, name),
                "prefill_seconds": statistics.median(r["prefill"] for r in taken),
                "tokens_per_second": 1 / statistics.median(r["token"] for r in taken),
                "decode_speedup": ratio([r["token"] for r in ours], [r["token"] for r in taken]),
                "prefill_speedup": ratio([r["prefill"] for r in ours], [r["prefill"] for r in taken]),
                "facts": every[name].facts,
                "rounds": taken,
            }
            for name, taken in samples.items()
        },
    }


def render(document: dict[str, Any]) -> str:
    lines = [
        "# Decoding at batch 1: Llama-3.2-1B's shape, random weights",
        "",
        f"Prompt of {document['prompt']} tokens, {document['output']} decoded; {document['rounds']} rounds in turn; medians. The last "
        "two columns say how many times as long (or as short) a side takes as halve with 2:4 does, with the quartiles over the "
        "rounds: above 1, halve's 2:4 is faster.",
        "",
        "| threads | side | weights, GB | time to first token, ms | tokens per second | decoding, 2:4 faster by | prompt, 2:4 faster by |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]

    def spread(value: dict[str, float]) -> str:
        return f"{value['median']:.2f} ({value['p25']:.2f} to {value['p75']:.2f})"

    for one in document["runs"]:
        for name, side in one["sides"].items():
            gains = [spread(side[key]) if name != OF else "" for key in ("decode_speedup", "prefill_speedup")]
            lines.append(
                f"| {one['threads']} | {name} | {side['bytes'] / 1e9:.2f} | {1e3 * side['prefill_seconds']:.0f} | "
                f"{side['tokens_per_second']:.1f} | {gains[0]} | {gains[1]} |"
            )
    env = document["environment"]
    lines += [
        "",
        f"{env['machine']}, {env['cores']} cores, torch {env['versions']['torch']}, transformers "
        f"{env['versions']['transformers']}, {env['date']}."
        + (
            " llama.cpp is built for this processor and has huge pages."
            if any(name.startswith("llama.cpp") for one in document["runs"] for name in one["sides"])
            else ""
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "llama-shape", help="what llama_shape made")
    parser.add_argument("--llama-python", type=Path, help="the Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", metavar="NAME", help=f"only these, of which one is {OF!r}")
    parser.add_argument("--name", default="decode", help="of the results files")
    parser.add_argument("--smoke", action="store_true", help="few tokens, printed and not kept: does it run?")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.prompt, arguments.output, arguments.rounds = 8, 4, 2
    known = [*OURS, *ONNX, *(f"llama.cpp, {kind}" for kind in GGUFS)]
    if arguments.sides and (OF not in arguments.sides or not set(arguments.sides) <= set(known)):
        parser.error(f"--sides takes {OF!r} and any of: {', '.join(known)}")
    directory = arguments.model.resolve()
    llama = arguments.llama_python and arguments.llama_python.absolute()
    document = {
        "prompt": arguments.prompt,
        "output": arguments.output,
        "rounds": arguments.rounds,
        "environment": environment(),
        "runs": [
            run(directory, llama, threads, arguments.prompt, arguments.output, arguments.rounds, arguments.sides)
            for threads in arguments.threads
        ],
    }
    text = render(document)
    if not arguments.smoke:
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(document) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
