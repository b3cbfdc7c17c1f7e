"""`halve compare`: a candidate (A) beside a baseline (B).

Of each figure that both sides have: the ratio A / B, its 95 % interval, and whether there is a difference at all. A
difference is called one where the interval misses 1 and a permutation test finds it at 2 % (`statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import UsageError, did_you_mean
from serve.measure import documents
from serve.measure.documents import DocumentError, Figure, Side
from serve.measure.gates import Gate, parse
from serve.measure.statistics import (
    CONFIDENCE,
    SIGNIFICANT,
    STATISTICS,
    Interval,
    interval,
    ratio_interval,
    ratio_of,
    significance,
)


def compare(a: Path, b: Path | None = None, *, gates: Sequence[str] = (), confident: bool = False) -> dict[str, Any]:
    """Two results of one kind and protocol, or two checkpoints; without ``b``, A beside its own document's dense model.

    Returns:
        A document with both sides, each figure's values, ratio, interval, p value and verdict, the judged gates, notes
        on what may explain a difference, and ``ok``: whether all gates hold.

    Raises:
        UsageError: the two cannot be compared, or a gate cannot be read or names no figure.
        DocumentError: a file is no result, or damaged.
    """
    asked = [parse(gate) for gate in gates]
    candidate, own = documents.read(a)
    if b is not None:
        baseline, _ = documents.read(b)
    elif own is not None:
        baseline = own
    else:
        raise UsageError(f"{a} holds one model; name the baseline to compare it with, as the second argument")
    _require_one_protocol(candidate, baseline)
    shared = [name for name in candidate.figures if name in baseline.figures]
    if not shared and not asked:
        raise DocumentError(
            f"{candidate.name} and {baseline.name} have no figure in common: {_listed(candidate)} against {_listed(baseline)}"
        )
    _require_known(asked, candidate, baseline)
    figures = {name: compared(candidate.figures[name], baseline.figures[name]) for name in shared}
    judged = [_judged(gate, candidate, figures, confident) for gate in asked]
    return {
        "kind": "compare",
        "of": candidate.kind,
        "a": {"name": candidate.name, **candidate.about},
        "b": {"name": baseline.name, **baseline.about},
        "confidence": CONFIDENCE,
        "significant": SIGNIFICANT,
        "figures": figures,
        "confident": confident,
        "gates": judged,
        "notes": _notes(candidate, baseline),
        "ok": all(gate["holds"] for gate in judged),
    }


def _require_one_protocol(a: Side, b: Side) -> None:
    if a.kind != b.kind:
        raise UsageError(f"{a.name} is of kind {a.kind!r} and {b.name} of kind {b.kind!r}; compare like with like")
    for part in [part for part in a.protocol if part in b.protocol]:
        left, right = a.protocol[part], b.protocol[part]
        differing = [key for key in {**left, **right} if left.get(key) != right.get(key)]
        if differing:
            told = ", ".join(f"{key} {left.get(key)!r} against {right.get(key)!r}" for key in differing)
            raise UsageError(
                f"{a.name} and {b.name} were measured by different protocols and cannot be compared: {part}: {told}; "
                "measure one of them again"
            )


def _require_known(gates: Sequence[Gate], a: Side, b: Side) -> None:
    for gate in gates:
        for side in (a, b) if gate.ratio else (a,):
            if gate.figure not in side.figures:
                raise UsageError(
                    f"--gate {gate.text!r}: {side.name} has no figure {gate.figure!r}"
                    f"{did_you_mean(gate.figure, side.figures)}"
                )


def compared(a: Figure, b: Figure) -> dict[str, Any]:
    """A figure beside the same one of a baseline: values, ratio a / b, 95 % interval, p value and verdict."""
    paired = a.pairing is not None and a.pairing == b.pairing and len(a.samples) == len(b.samples)
    ratio = a.value / b.value if b.value else None
    found: dict[str, Any] = {
        "a": a.value, "b": b.value, "ratio": ratio, "interval": None, "p": None, "better": a.better,
        "paired": paired, "samples": [len(a.samples), len(b.samples)],
    }  # fmt: skip
    if not (a.sampled or b.sampled):
        found["interval"] = None if ratio is None else Interval(ratio, ratio)
        return {**found, "verdict": _direction(a, b) if a.value != b.value else "equal"}
    if a.statistic is None or a.statistic != b.statistic:
        return {**found, "verdict": "unknown", "why": "no samples were kept"}
    found["ratio"] = ratio_of(a.samples, b.samples, a.statistic, paired=paired)
    found["interval"] = ratio_interval(a.samples, b.samples, a.statistic, paired=paired)
    found["p"] = significance(a.samples, b.samples, a.statistic, paired=paired)
    if found["p"] is None:
        fewest = STATISTICS[a.statistic].fewest
        return {**found, "verdict": "unknown", "why": f"{min(found['samples'])} samples, and it takes {fewest}"}
    outside = found["interval"] is None or found["interval"].misses(1.0)
    differ = outside and found["p"] <= SIGNIFICANT
    return {**found, "verdict": _direction(a, b) if differ else "no difference"}


def _direction(a: Figure, b: Figure) -> str:
    return "better" if (a.value > b.value) == (a.better == "higher") else "worse"


def _judged(gate: Gate, a: Side, figures: dict[str, dict[str, Any]], confident: bool) -> dict[str, Any]:
    if gate.ratio:
        value, bounds = figures[gate.figure]["ratio"], figures[gate.figure]["interval"]
    else:
        figure = a.figures[gate.figure]
        value = figure.value
        bounds = _own_interval(figure) if confident else None
    holds, why = gate.judge(value, bounds, confident=confident)
    return {"gate": gate.text, "figure": gate.figure, "value": value, "interval": bounds, "holds": holds, "why": why}


def _own_interval(figure: Figure) -> Interval | None:
    if not figure.sampled:
        return Interval(figure.value, figure.value)
    return interval(figure.samples, figure.statistic) if figure.statistic else None


def _notes(a: Side, b: Side) -> list[str]:
    """What differs beside the models, and may be why figures do; and what only one side has."""
    notes = [
        f"{key}: {a.about[key]} against {b.about[key]}"
        for key in a.about
        if key in b.about and a.about[key] != b.about[key]
    ]
    for one, other in ((a, b), (b, a)):
        alone = [name for name in one.figures if name not in other.figures]
        if alone:
            notes.append(f"only {one.name} has {', '.join(alone)}")
    return notes


def _listed(side: Side) -> str:
    return ", ".join(side.figures) or "none"
