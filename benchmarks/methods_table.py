"""The results of `benchmarks.methods` as Markdown: the table, every run, and which of the papers' orders hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """A paper reports that ``better`` has a lower perplexity than ``worse`` (keys of cells), or about the same."""

    paper: str
    """And what is otherwise here than there."""
    better: str
    worse: str
    tie: bool = False


SCORE_ALONE = "(there with its regional optimization, here the score alone)"
ALL_LINEARS = "(there in attention alone by default, here in all linears)"

CLAIMS = (
    Claim("Wanda", "wanda + none 2:4", "magnitude + none 2:4"),
    Claim("any", "magnitude + none 2:4", "random + none 2:4"),
    Claim("SparseGPT, Wanda", "own + sparsegpt 2:4", "wanda + none 2:4"),
    Claim("RIA", "ria + none 2:4", "wanda + none 2:4"),
    Claim("STADE", "stade-w + none 2:4", "wanda + none 2:4"),
    Claim("SymWanda, stochRIA: about equal", "stochria + none 2:4", "ria + none 2:4", tie=True),
    Claim("GBLM-Pruner", "gblm + none 2:4", "wanda + none 2:4"),
    Claim("Pruner-Zero", "pruner-zero + none 2:4", "wanda + none 2:4"),
    Claim(f"Wanda++ {SCORE_ALONE}", "wanda++ + none 2:4", "wanda + none 2:4"),
    Claim(f"Wanda++ {SCORE_ALONE}", "wanda++ + none 2:4", "gblm + none 2:4"),
    Claim("DSnoT, in attention alone", "wanda + dsnot skip=mlp 2:4", "wanda + none 2:4"),
    Claim(f"DSnoT {ALL_LINEARS}", "wanda + dsnot 2:4", "wanda + none 2:4"),
    Claim(f"DSnoT {ALL_LINEARS}", "magnitude + dsnot 2:4", "magnitude + none 2:4"),
    Claim("R²-DSnoT (there mostly at 60 % unstructured)", "wanda + r2-dsnot 2:4", "wanda + dsnot 2:4"),
    Claim("SparseSwaps", "wanda + swaps 2:4", "wanda + none 2:4"),
    Claim("APT", "own + apt 2:4", "own + sparsegpt 2:4"),
    Claim("APT", "own + apt variant=SM 2:4", "own + sparsegpt 2:4"),
    Claim("APT", "own + apt variant=MS 2:4", "own + sparsegpt 2:4"),
    Claim("RIA, channel permutation", "wanda + none 2:4 permuted", "wanda + none 2:4"),
    Claim("RIA, channel permutation", "own + sparsegpt 2:4 permuted", "own + sparsegpt 2:4"),
    Claim("RIA, channel permutation", "own + apt 2:4 permuted", "own + apt 2:4"),
    Claim("all", "wanda + none 4:8", "wanda + none 2:4"),
    Claim("all", "own + sparsegpt 4:8", "own + sparsegpt 2:4"),
    Claim("all", "wanda + none 50%", "wanda + none 4:8"),
    Claim("all", "own + sparsegpt 50%", "own + sparsegpt 4:8"),
)


def render(document: dict[str, Any], plan: Sequence[Any], metrics: Sequence[str], columns: Sequence[str]) -> str:
    """The whole page. ``plan`` are the cells that there should be."""
    done: dict[str, dict[str, Any]] = document.get("cells", {})
    protocol = document["protocol"]
    lines = [
        f"# Every metric with every reconstruction, {document['model']}",
        "",
        f"2:4 in all linears of all blocks; {protocol['samples']} windows of {protocol['length']} tokens of "
        f"{protocol['calibration']}, seed {protocol['seed']}. Perplexity of {protocol['text']}, first "
        f"{protocol['windows']} windows of {protocol['window_length']}; dense {document['dense']:.2f}. In brackets the "
        "relative output error, the mean over the layers, each on the inputs that its own pruned prefix gives, and of every 128th token: that has the first ones of windows a hundred "
        "times too often, which versions since then have not. What is empty was not run (yet).",
        "",
        *_matrix(done, metrics, columns),
        "",
    ]
    lines += ["## What the papers report, and what was measured", "", *_claims(done), "", "## Every run", ""]
    lines += _runs(done)
    if done:
        lines += ["", *_circumstances(done)]
    missing = [cell.key for cell in plan if cell.key not in done]
    if missing:
        lines += ["", f"Not run yet: {len(missing)} of {len(plan)} cells ({'; '.join(missing)})."]
    return "\n".join(lines) + "\n"


def _circumstances(done: dict[str, dict[str, Any]]) -> list[str]:
    """Dates, versions and attentions of all the runs: they were not made on one day."""
    environments = [run["environment"] for run in done.values()]
    dates = sorted({environment["date"] for environment in environments})
    places = sorted({f"{place['machine']}, {place['cores']} cores" for place in environments})
    versions: dict[str, set[str]] = {}
    for environment in environments:
        for name, version in environment["versions"].items():
            versions.setdefault(name, set()).add(version)
    named = ", ".join(f"{name} {' or '.join(sorted(found))}" for name, found in versions.items())
    return [
        f"{dates[0]} to {dates[-1]}, {'; '.join(places)}; {named}. Seconds are of the run of `compress_model` (no imports, no "
        "evaluation). Other work went on beside many of the runs, and some were halted for a while: seconds say little, and the "
        "processor's seconds are what compares, among runs with the same attention (sdpa: torch's, halve: the faster one that "
        "came later; a model's outputs differ by rounding). Peak memory is the resident set of the run's process."
    ]


def _matrix(done: dict[str, dict[str, Any]], metrics: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The table of metrics and reconstructions; rows of which nothing has been run yet are left out."""
    own = "the reconstruction's own"
    labels = {**{metric: metric for metric in metrics}, "own": own}
    rows = []
    for metric, label in labels.items():
        for suffix, addition in (("", ""), (" permuted", ", channels reordered")):
            found = [done.get(f"{metric} + {column} 2:4{suffix}") for column in columns]
            cells = [f"{_number(f['perplexity'])} ({f['relative_output_error']:.3f})" if f else "" for f in found]
            if any(cells):
                rows.append(f"| {label}{addition} | " + " | ".join(cells) + " |")
    return ["| metric | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|", *rows]


def _claims(done: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| reported by | lower perplexity | than | perplexities | layer errors | holds |",
        "|---|---|---|---:|---:|---|",
    ]
    for claim in CLAIMS:
        a, b = done.get(claim.better), done.get(claim.worse)
        if a is None or b is None:
            figures, errors, verdict = "not run", "", ""
        else:
            figures = f"{_number(a['perplexity'])} / {_number(b['perplexity'])}"
            errors = f"{a['relative_output_error']:.4f} / {b['relative_output_error']:.4f}"
            ratio = a["perplexity"] / b["perplexity"]
            verdict = f"{ratio:.2f} times" if claim.tie else "yes" if ratio < 1 else "**no**"
        lines.append(f"| {claim.paper} | {claim.better} | {claim.worse} | {figures} | {errors} | {verdict} |")
    return lines


def _runs(done: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| run | perplexity | layer error | seconds | of the processor | attention | threads | peak MB | sparsity |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for key, run in sorted(done.items(), key=lambda item: item[1]["perplexity"]):
        gathered = " with the gradients" if run.get("gathered_gradients") else ""
        lines.append(
            f"| {key} | {_number(run['perplexity'])} | {run['relative_output_error']:.4f} | {run['seconds']:.0f}{gathered} | "
            f"{run['processor_seconds']:.0f} | {run['attention']} | {run['environment']['threads']} | {run['peak_bytes'] / 1e6:.0f} | {run['sparsity_reached']:.4f} |"
        )
    return lines


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"
