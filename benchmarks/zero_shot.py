"""What pruning costs in zero-shot tasks: LAMBADA, ARC-easy, PIQA and WinoGrande, of any checkpoints beside the dense model.

    python -m benchmarks.zero_shot --task-data DIR --dense MODEL --sparse NAME=DIR ... [--limit 500] [--name zero_shot]

DIR holds ``lambada_openai*.jsonl[.gz]`` and so on, in the form of their Hugging Face data sets; the first ``--limit`` examples
of each are asked, zero-shot, through `halve eval`. ``benchmarks.accuracy --keep DIR`` leaves the checkpoints of its runs. Names
that are in the results already, with the same limit, are not asked again. A standard error is that of a mean over examples; the
differences to dense are of the same examples, and so are their errors.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.demo import halve
from compress.console import out
from compress.files import write_text

RESULTS = Path(__file__).parent / "results"
TASKS = {"lambada_openai": "acc", "arc_easy": "acc", "piqa": "acc", "winogrande": "acc"}
"""With the metric that is told; the document has the others, too."""
DENSE = "dense"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--sparse", nargs="*", default=[], metavar="NAME=DIR")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--name", default="zero_shot", help="of the results files")
    arguments = parser.parse_args()
    checkpoints = {
        DENSE: arguments.dense,
        **{n: Path(d) for n, _, d in (one.partition("=") for one in arguments.sparse)},
    }
    path = RESULTS / f"{arguments.name}.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if document.get("limit") != arguments.limit:
        document = {"limit": arguments.limit, "model": arguments.dense.name, "checkpoints": {}}
    if document["model"] != arguments.dense.name:
        parser.error(f"{path} is of {document['model']}, not of {arguments.dense.name}; give another --name")
    for name, directory in checkpoints.items():
        if name in document["checkpoints"]:
            continue
        found = halve(
            *("eval", directory, "--no-perplexity", "--tasks", ",".join(TASKS), "--limit", arguments.limit),
            *("--task-data", arguments.task_data),
        )
        document["checkpoints"][name] = {
            task: {metric: figure["samples"] for metric, figure in one["metrics"].items()}
            for task, one in found["models"][0]["tasks"].items()
        }
        document["environment"] = found["environment"]
        write_text(path, json.dumps(document) + "\n")
        write_text(path.with_suffix(".md"), render(document))
    out.print(render(document), markup=False, highlight=False)


def render(document: dict[str, Any]) -> str:
    """The table."""
    found = document["checkpoints"]
    dense = found[DENSE]
    place = document["environment"]
    lines = [
        f"# Zero-shot tasks, {document['model']}",
        "",
        f"`python -m benchmarks.zero_shot`, {place['date']}, {place['machine']}. The first {document['limit']} examples of each task, "
        "accuracy in percent with its standard error; in brackets the difference to dense over the same examples, with its own.",
        "",
        f"| checkpoint | {' | '.join(TASKS)} | mean |",
        f"|---|{'---:|' * (len(TASKS) + 1)}",
    ]
    for name, tasks in found.items():
        cells = [_cell(tasks[task][metric], dense[task][metric], name == DENSE) for task, metric in TASKS.items()]
        mean = 100 * statistics.mean(statistics.mean(tasks[task][metric]) for task, metric in TASKS.items())
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.1f} |")
    return "\n".join(lines) + "\n"


def _cell(samples: list[float], dense: list[float], is_dense: bool) -> str:
    said = f"{100 * statistics.mean(samples):.1f} ± {100 * _error(samples):.1f}"
    if is_dense:
        return said
    change = [one - other for one, other in zip(samples, dense, strict=True)]
    return f"{said} ({100 * statistics.mean(change):+.1f} ± {100 * _error(change):.1f})"


def _error(samples: list[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(samples) / math.sqrt(len(samples))


if __name__ == "__main__":
    main()
