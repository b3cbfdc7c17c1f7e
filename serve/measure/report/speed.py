"""What benches say of speed: latencies under the lightest load, every load, and in words what a load was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from serve.measure.documents import Figure, Side
from serve.measure.report.results import Result
from serve.measure.report.rows import Row, Unit, row_of

_FAMILIES = ("concurrency", "rate", "trace")
_SHOWN: tuple[tuple[str, str, Unit], ...] = (
    ("ttft.p50", "time to first token", "seconds"),
    ("tpot.p50", "time per output token", "seconds"),
    ("output_tokens_per_second", "output tokens a second", "rate"),
)


@dataclass(frozen=True)
class Level:
    """What was measured at one load: latencies by name and statistic, for each model by name (``dense``, ``sparse``).

    ``source``: the file. Files are of different sittings, and of different lengths or machines, so their levels make no one curve.
    """

    label: str
    number: float | None
    """How many requests at once, or a second; None of a trace."""
    source: str
    times: dict[str, dict[str, dict[str, float]]]
    rows: list[Row] = field(default_factory=list)
    requests: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """``concurrency``, ``rate`` or ``trace``."""
        return self.label.partition("=")[0]


def latencies(results: Iterable[Result]) -> list[Row]:
    """Time to first token and per output token under the lightest load, the load being named in each row.

    Of several results the first one counts, and one with a dense model beside it before others.
    """
    benches = [result for result in results if result.kind == "bench"]
    rows = []
    for name, said, unit in _SHOWN[:2]:
        found = [row for result in benches if (row := _latency(result, name, said, unit))]
        if found:
            rows.append(min(found, key=lambda row: row.dense is None))
    return rows


def not_at_the_top(results: Iterable[Result]) -> list[str]:
    """Notes on the benches whose latencies `latencies` does not give."""
    benches = [result for result in results if result.kind == "bench"]
    chosen = {row.source for row in latencies(benches)}
    return [
        f"{result.path} holds another bench ({load_of(result)}); the times at the top are those of {' and '.join(sorted(chosen))}"
        for result in benches
        if chosen and str(result.path) not in chosen
    ]


def levels(results: Iterable[Result]) -> list[Level]:
    """The loads of the benches, file by file, lightest first."""
    return [
        _level(result, label)
        for result in results
        if result.kind == "bench"
        for label in sorted(result.measured.entry.get("loads") or {}, key=_weight)
    ]


def load_of(result: Result, label: str | None = None) -> str:
    """The load of a bench in words; without ``label``, all of its loads."""
    if result.kind != "bench":
        return ""
    load = result.document["load"]
    labels = list(result.measured.entry.get("loads") or {})
    shown = labels if label is None else [label]
    parts = [str(load["engine"])] if load.get("engine") else []
    told = [{**load, **(load.get("shapes") or {}).get(one, {})} for one in shown] or [load]
    lengths = [{name: of[name] for name in ("prompt", "output") if name in of} for of in told]
    if all(one == lengths[0] for one in lengths):
        up_to = "up to " if shown == ["trace"] else ""
        words = {"prompt": f"prompt of {up_to}{{}}", "output": f"{up_to}{{}} tokens out"}
        parts += [words[name].format(tokens) for name, tokens in lengths[0].items()]
    if load.get("batch", 1) != 1:
        parts.append(f"batch of {load['batch']}")
    parts += _rounds(result, labels)
    if result.document.get("through") == "endpoint":
        parts.append("through the endpoint")
    return ", ".join([*parts, *shown])


def _rounds(result: Result, labels: list[str]) -> list[str]:
    """How many rounds there were; where it was cut off, of how many."""
    asked = result.document["load"].get("rounds")
    if result.document.get("complete", True) or asked is None:
        return [] if asked is None else [f"{asked} rounds"]
    done = result.document.get("rounds_done")
    if done is None and labels:
        done = len(result.measured.entry["loads"][labels[0]].get("rounds") or [])
    return [f"{done} of {asked} rounds (interrupted)"]


def _weight(label: str) -> tuple[int, float]:
    """To sort loads by: closed ones, then open ones, each by how much they ask; a trace last."""
    family = label.partition("=")[0]
    return _FAMILIES.index(family) if family in _FAMILIES else len(_FAMILIES), _number(label) or 0.0


def _number(label: str) -> float | None:
    try:
        return float(label.partition("=")[2])
    except ValueError:
        return None


def _latency(result: Result, name: str, said: str, unit: Unit) -> Row | None:
    labels = list(result.measured.entry.get("loads") or {})
    if not labels:
        return row_of(result, name, said, unit, load_of(result))
    lightest = min(labels, key=_weight)
    failures = _failures(result, lightest)
    return row_of(result, _prefix(labels, lightest) + name, said, unit, load_of(result, lightest), failures)


def _failures(result: Result, label: str) -> str:
    """``"7 of 8 requests failed, and 0 of 8 of the dense model's"``; empty where none did."""
    entries = [(side.entry.get("loads") or {}).get(label) or {} for side in (result.measured, result.dense) if side]
    if not any(entry.get("errors") for entry in entries):
        return ""
    told = [f"{entry.get('errors', 0)} of {entry.get('requests', '?')}" for entry in entries]
    return f"{told[0]} requests failed" + "".join(f", and {dense} of the dense model's" for dense in told[1:])


def _prefix(labels: Iterable[str], label: str) -> str:
    """What comes before the names of a load's figures (`documents`): nothing where there is only one load."""
    return f"{label}." if len(list(labels)) > 1 else ""


def _level(result: Result, label: str) -> Level:
    sides = {"sparse": result.measured, **({"dense": result.dense} if result.dense else {})}
    prefix = _prefix(result.measured.entry.get("loads") or {}, label)
    times: dict[str, dict[str, dict[str, float]]] = {
        name: {key: dict(_statistics(side, prefix + name)) for key, side in sides.items()}
        for name in (shown.removesuffix(".p50") for shown, _, _ in _SHOWN)
    }
    entries = {key: (side.entry.get("loads") or {}).get(label) or {} for key, side in sides.items()}
    rows = [row_of(result, prefix + name, said, unit, label) for name, said, unit in _SHOWN]
    return Level(
        label, _number(label), str(result.path), times, [row for row in rows if row],
        {key: entry.get("requests") for key, entry in entries.items()},
        {key: entry.get("errors") for key, entry in entries.items()},
    )  # fmt: skip


def _statistics(side: Side, prefix: str) -> Iterator[tuple[str, float]]:
    rate = side.figures.get(prefix)
    if rate is not None:  # a rate is one figure, the median over the rounds
        yield "mean", rate.value
    for statistic in ("mean", "p50", "p90", "p99"):
        figure: Figure | None = side.figures.get(f"{prefix}.{statistic}")
        if figure is not None:
            yield statistic, figure.value
