"""`halve compare`: a candidate (A) beside a baseline (B).

Of each figure that both sides have: the ratio A / B, its 95 % interval, and whether there is a difference at all. A
difference is called one where the interval misses 1 and a permutation test finds it among all figures of the comparison
(`significance`). Two runs are compared by the dense model that both measured; without one, what differs may be the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import UsageError, did_you_mean
from serve.measure import documents, pooled
from serve.measure.contrast import Contrast
from serve.measure.documents import DocumentError, Figure, Side
from serve.measure.gates import Gate, parse
from serve.measure.pooled import TAILS
from serve.measure.significance import SIGNIFICANT, adjusted
from serve.measure.statistics import CONFIDENCE, Interval, interval

TWO_RUNS = (
    "measured in two runs without the same dense model beside them, and the machine of one may not be that of the other; "
    "measure both with --against"
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
        baseline, others = documents.read(b)
    elif own is not None:
        baseline, others = own, own
    else:
        raise UsageError(f"{a} holds one model; name the baseline to compare it with, as the second argument")
    _require_one_protocol(candidate, baseline)
    _require_known(asked, candidate, baseline)
    figures = compared(candidate, baseline, own, others)
    if not figures and not asked:
        raise DocumentError(
            f"{candidate.name} and {baseline.name} have no figure in common: {_listed(candidate)} against {_listed(baseline)}"
        )
    judged = [_judged(gate, candidate, baseline, figures, confident) for gate in asked]
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
        "notes": [*_notes(candidate, baseline), *_by_dense(figures)],
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
            known = [*side.figures, *side.undefined]
            if gate.figure not in known:
                raise UsageError(
                    f"--gate {gate.text!r}: {side.name} has no figure {gate.figure!r}{did_you_mean(gate.figure, known)}"
                )


def compared(a: Side, b: Side, own: Side | None = None, others: Side | None = None) -> dict[str, dict[str, Any]]:
    """The figures of a side beside the same ones of a baseline: values, ratio a / b, 95 % interval, p value and verdict.

    ``own``, ``others``: the dense sides of the documents of ``a`` and ``b``, where there are some.
    """
    shared = [name for name in a.figures if name in b.figures]
    by_dense = own is not None and others is not None and _same_weights(own, others)
    contrasts: dict[str, Contrast] = {}
    asked: dict[str, Contrast] = {}
    for name in shared:
        left, right = a.figures[name], b.figures[name]
        if left.statistic is None or left.statistic != right.statistic:
            continue
        two_runs = a.kind == "bench" and left.pairing != right.pairing
        found = Contrast(left, right)
        if two_runs and by_dense and own is not None and others is not None:
            found = Contrast(left, right, own.figures.get(name), others.figures.get(name))
        contrasts[name] = found
        if not found.too_few and (found.relative or not two_runs):
            asked[name] = found
    p = adjusted(asked)
    return {name: _beside(a.figures[name], b.figures[name], contrasts.get(name), p.get(name)) for name in shared}


def _same_weights(a: Side, b: Side) -> bool:
    sealed = a.entry.get("weights_sha256")
    return isinstance(sealed, str) and sealed == b.entry.get("weights_sha256")


def _beside(a: Figure, b: Figure, contrast: Contrast | None, p: float | None) -> dict[str, Any]:
    ratio = a.value / b.value if b.value else None
    found: dict[str, Any] = {
        "a": a.value, "b": b.value, "ratio": ratio, "interval": None, "p": p, "better": a.better,
        "paired": contrast is not None and contrast.paired, "samples": [len(a.samples), len(b.samples)],
    }  # fmt: skip
    if not (a.sampled or b.sampled):
        found["interval"] = None if ratio is None else Interval(ratio, ratio)
        return {**found, "verdict": _direction(a, b, ratio) if a.value != b.value else "equal"}
    if contrast is None:
        return {**found, "verdict": "unknown", "why": "no samples were kept"}
    found |= {"ratio": contrast.ratio, "samples": contrast.counts}
    if contrast.relative:
        found["relative_to"] = "dense"
    if p is None:
        return {**found, "verdict": "unknown", "why": contrast.too_few or TWO_RUNS}
    found["interval"] = contrast.interval
    differ = p <= SIGNIFICANT and (found["interval"] is None or found["interval"].misses(1.0))
    return {**found, "verdict": _direction(a, b, found["ratio"]) if differ else "no difference"}


def _direction(a: Figure, b: Figure, ratio: float | None) -> str:
    larger = a.value > b.value if ratio is None or ratio == 1 else ratio > 1
    return "better" if larger == (a.better == "higher") else "worse"


def _judged(gate: Gate, a: Side, b: Side, figures: dict[str, dict[str, Any]], confident: bool) -> dict[str, Any]:
    sides = [(a, "")] if not gate.ratio else [(a, " of A"), (b, " of B")]
    told: dict[str, Any] = {"gate": gate.text, "figure": gate.figure, "value": None, "interval": None, "holds": False}
    for side, which in sides:
        if gate.figure in side.undefined:
            return {**told, "why": f"it is not defined{which}: {side.undefined[gate.figure]}"}
    if gate.ratio:
        value, bounds = figures[gate.figure]["ratio"], figures[gate.figure]["interval"]
    else:
        figure = a.figures[gate.figure]
        value = figure.value
        bounds = own_interval(figure) if confident else None
    holds, why = gate.judge(value, bounds, confident=confident)
    if value is None and gate.ratio and figures[gate.figure]["b"]:
        why = "the ratio is not defined: no round has it on both sides"
    if not holds and confident and bounds is None and gate.ratio and (reason := figures[gate.figure].get("why")):
        why = f"{why}: {reason}"
    failed = [f"{side.figures[gate.figure].failed}{which}" for side, which in sides if side.figures[gate.figure].failed]
    return {**told, "value": value, "interval": bounds, "holds": holds, "why": "; ".join([why, *failed])}


def own_interval(figure: Figure) -> Interval | None:
    """Of the value itself; None where there are too few samples."""
    if not figure.sampled:
        return Interval(figure.value, figure.value)
    if figure.statistic in TAILS:
        return pooled.interval(figure.rounds, figure.statistic)
    known = [sample for sample in figure.samples if not math.isnan(sample)]
    return interval(known, figure.statistic) if figure.statistic else None


def _notes(a: Side, b: Side) -> list[str]:
    """What differs beside the models, and may be why figures do; and what only one side has."""
    notes = [
        f"{key}: {a.about[key]} against {b.about[key]}"
        for key in a.about
        if key in b.about and a.about[key] != b.about[key]
    ]
    for one, other in ((a, b), (b, a)):
        alone = [name for name in one.figures if name not in {**other.figures, **other.undefined}]
        if alone:
            notes.append(f"only {one.name} has {', '.join(alone)}")
    notes += [*a.notes, *b.notes]
    return notes


def _by_dense(figures: dict[str, dict[str, Any]]) -> list[str]:
    """How two runs were compared, where they were by their dense model."""
    if not any("relative_to" in found for found in figures.values()):
        return []
    return [
        "two runs: A / B of times and rates is of sparse / dense in one to sparse / dense in the other, as the machine may have "
        "been faster in one of them"
    ]


def _listed(side: Side) -> str:
    return ", ".join(side.figures) or "none"
