"""Every metric with every reconstruction on one model and one protocol: accuracy, layer error, time and memory.

    python -m benchmarks.methods [--model DIR] [--workers 2] [--threads 1] [--budget SECONDS] [--only NAME ...]

Each cell of the table is one run of `compress_model` in a process of its own, followed by the perplexity of what it
wrote. Results are written after every cell, and cells that are there already are not run again, so the script can be
interrupted and started again; ``--budget`` starts no new cell after so many seconds. Cells that have not been run are
shown as such. ``--workers`` cells run side by side with ``--threads`` threads each; times compare within one table only.

The gradients of the dense model, which GBLM and Pruner-Zero need, are kept for all cells in one work directory: the time of
the cell that gathers them has them in it, and the page says so there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.methods_table import render
from compress.console import run_app
from compress.errors import HalveError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"

METRICS = (
    *("random", "magnitude", "wanda", "ria", "stade", "stade-w", "symwanda", "stochria"),
    *("gblm", "pruner-zero", "wanda++"),
)
GRADIENT_METRICS = ("gblm", "pruner-zero")
"""Those that need the gradients of the dense model's loss."""
RECONSTRUCTIONS = ("none", "sparsegpt", "apt", "dsnot", "r2-dsnot")
SELECTION = (("magnitude", "none"), ("wanda", "none"), ("ria", "none"), (None, "sparsegpt"), (None, "apt"))
"""What is also run at 4:8 and at 50 % unstructured."""


@dataclass(frozen=True)
class Protocol:
    """What all cells share."""

    samples: int = 128
    length: int = 512
    calibration: str = "c4"
    seed: int = 0
    text: str = "wikitext2"
    windows: int = 40
    window_length: int = 2048


@dataclass(frozen=True)
class Cell:
    """One run. ``metric`` None: the reconstruction's own."""

    metric: str | None
    reconstruction: str
    pattern: str = "2:4"
    sparsity: float | None = None
    permutation: str = "none"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Unique, and readable."""
        options = "".join(f" {name}={value}" for name, value in sorted(self.options.items()))
        pattern = self.pattern if self.sparsity is None else f"{self.sparsity:.0%}"
        permuted = " permuted" if self.permutation != "none" else ""
        return f"{self.metric or 'own'} + {self.reconstruction}{options} {pattern}{permuted}"


def cells() -> list[Cell]:
    """The whole plan, what matters most first: what the papers claim before the rest of the table."""
    none = [Cell(metric, "none") for metric in METRICS]
    papers = [
        *(Cell(None, "sparsegpt"), Cell(None, "apt"), Cell("wanda", "none")),
        *(Cell("wanda", "none", permutation="fold"), Cell(None, "sparsegpt", permutation="fold")),
        *(cell for cell in none if cell.metric not in ("random", "stochria")),
        *(Cell("wanda", "dsnot"), Cell("wanda", "dsnot", options={"skip": "mlp"})),
        *(Cell("wanda", "r2-dsnot"), Cell("wanda", "swaps")),
        *none,
        *(Cell("wanda", reconstruction) for reconstruction in ("sparsegpt", "apt", "bias")),
        Cell(None, "apt", permutation="fold"),
        *(Cell(None, name, permutation=order) for order in ("fold", "none") for name in ("admm", "alps")),
        Cell("wanda", "refit"),
        *(Cell(None, "apt", options={"variant": variant}) for variant in ("SM", "MS")),
    ]
    others = [
        Cell(metric, reconstruction, pattern, sparsity)
        for pattern, sparsity in (("4:8", None), ("unstructured", 0.5))
        for metric, reconstruction in SELECTION
    ]
    table = [Cell(metric, reconstruction) for reconstruction in RECONSTRUCTIONS for metric in METRICS]
    return list({cell.key: cell for cell in [*papers, *others, *table]}.values())


def run_cell(cell: Cell, model: Path, work: Path, protocol: Protocol, threads: int) -> dict[str, Any]:
    """Runs a cell in a process of its own."""
    request = {"cell": asdict(cell), "model": str(model), "work": str(work), "protocol": asdict(protocol)}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.methods", "--child", json.dumps(request)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HalveError(f"{cell.key} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(request: dict[str, Any]) -> dict[str, Any]:
    """What the process of a cell does."""
    from compress import compress_model
    from serve import attention
    from serve.measure.environment import environment, peak_memory
    from serve.measure.evaluation import evaluate

    protocol, model, work = Protocol(**request["protocol"]), request["model"], Path(request["work"])
    settings: dict[str, Any] = {
        "samples": protocol.samples,
        "length": protocol.length,
        "calibration": protocol.calibration,
        "seed": protocol.seed,
        "format": "dense",
    }
    cell = Cell(**request["cell"])
    if cell.metric in GRADIENT_METRICS:
        settings["gradients"] = work / "gradients"
    metric_first = cell.metric is not None and cell.reconstruction == "none"
    options = {"metric_options" if metric_first else "reconstruction_options": cell.options}
    out = work / cell.key.replace(" ", "_").replace(":", "-")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    started, processor_started = time.perf_counter(), time.process_time()
    done = compress_model(
        model,
        out,
        metric=cell.metric,
        reconstruction=cell.reconstruction,
        pattern=cell.pattern,
        sparsity=cell.sparsity,
        permutation=cell.permutation,
        attention=attention.name(),
        **options,
        **settings,
    )
    seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor_started
    memory = peak_memory()
    measured = evaluate(out, text=protocol.text, length=protocol.window_length, windows=protocol.windows, device="cpu")
    layers = [layer for layer in done.report["layers"] if layer["status"] == "pruned"]
    shutil.rmtree(out)
    return {
        **asdict(cell),
        "key": cell.key,
        "perplexity": measured["perplexity"],
        "relative_output_error": done.report["summary"]["mean_relative_output_error"],
        "sparsity_reached": sum(layer["sparsity"] for layer in layers) / len(layers),
        "layers_pruned": len(layers),
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "peak_bytes": memory,
        "attention": attention.name(),
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="left out: SmolLM2-135M-Instruct from its package")
    parser.add_argument("--name", default="methods", help="of the results files")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no cell is started")
    parser.add_argument("--only", nargs="*", default=[], help="cells whose key contains one of these")
    parser.add_argument(
        "--smoke", action="store_true", help="few tokens, results into the work directory: does it run?"
    )
    parser.add_argument("--render", action="store_true", help="only write the table again from the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_app(lambda: print(json.dumps(child(json.loads(arguments.child)))))
        return
    run_app(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Runs what is missing, a cell at a time for each worker, and keeps the results up to date."""
    from benchmarks.demo import prepare_smollm2
    from serve.measure.evaluation import evaluate

    work: Path = arguments.work.resolve() / ("smoke" if arguments.smoke else "full")
    work.mkdir(parents=True, exist_ok=True)
    protocol = Protocol(samples=4, length=128, windows=2, window_length=256) if arguments.smoke else Protocol()
    results = work if arguments.smoke else RESULTS
    path = results / f"{arguments.name}.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    plan = cells()
    if not arguments.render:
        model = arguments.model or prepare_smollm2(ROOT / "runs" / "smollm2-135m")
        if document.setdefault("protocol", asdict(protocol)) != asdict(protocol):
            raise HalveError(f"{path} was made with another protocol; remove it or give another --name")
        if document.setdefault("model", model.name) != model.name:
            raise HalveError(f"{path} is of {document['model']}, not of {model.name}; give another --name")
        document.setdefault("cells", {})
        if "dense" not in document:
            settings = {"length": protocol.window_length, "windows": protocol.windows, "device": "cpu"}
            document["dense"] = evaluate(model, text=protocol.text, **settings)["perplexity"]
        wanted = [cell for cell in plan if not arguments.only or any(part in cell.key for part in arguments.only)]
        missing = [cell for cell in wanted if cell.key not in document["cells"]]
        _run_missing(missing, model, work, protocol, arguments, document, path)
    write(path, document, render(document, plan, METRICS, RECONSTRUCTIONS))
    print(render(document, plan, METRICS, RECONSTRUCTIONS))


def _run_missing(
    missing: list[Cell],
    model: Path,
    work: Path,
    protocol: Protocol,
    arguments: argparse.Namespace,
    document: dict[str, Any],
    path: Path,
) -> None:
    started = time.perf_counter()
    lock = threading.Lock()
    from compress.gradients import RECORD

    record = work / "gradients" / RECORD
    gradients = threading.Lock()  # the first that needs the shared gradients gathers them, the others wait

    def one(cell: Cell) -> None:
        if time.perf_counter() - started > arguments.budget:
            return
        with contextlib.ExitStack() as held:
            gathers = cell.metric in GRADIENT_METRICS and not record.is_file()
            if gathers:
                held.enter_context(gradients)
                gathers = not record.is_file()  # the one that was waited for may have gathered them
            if not gathers:
                held.close()
            try:
                result = run_cell(cell, model, work, protocol, arguments.threads)
            except HalveError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                return
        result["gathered_gradients"] = gathers
        result["workers"] = arguments.workers
        with lock:
            document["cells"][cell.key] = result
            write(path, document, render(document, cells(), METRICS, RECONSTRUCTIONS))
            print(
                f"{len(document['cells'])}: {cell.key}: perplexity {result['perplexity']:.2f}, layer error "
                f"{result['relative_output_error']:.4f}, {result['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    # One that needs the gradients goes first and gathers them; the others come last, so that no worker waits for it.
    needing = [cell for cell in missing if cell.metric in GRADIENT_METRICS]
    order = needing[:1] + [cell for cell in missing if cell not in needing] + needing[1:]
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(one, order))


def write(path: Path, document: dict[str, Any], text: str) -> None:
    """Both files whole or not at all."""
    for target, content in ((path, json.dumps(document, indent=1) + "\n"), (path.with_suffix(".md"), text)):
        partial = target.with_name(target.name + ".partial")
        partial.write_text(content)
        partial.replace(target)


if __name__ == "__main__":
    main()
