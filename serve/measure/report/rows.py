"""A figure of a report: one of a checkpoint, beside the dense model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from serve.measure.compare import own_interval
from serve.measure.report.results import Result
from serve.measure.statistics import Interval

Unit = Literal["seconds", "bytes", "rate", "number", "share"]


@dataclass(frozen=True)
class Row:
    """A figure beside the dense model's.

    Attributes:
        dense: None where no dense model was measured beside it.
        ratio: this / dense; ``interval``: the 95 % one of that, None with ``why``, which says why there is none.
        own: the 95 % interval of the value itself, where it was sampled and there is no dense model.
        load: what it was measured under, and ``source``: in which file.
        failures: how many of the requests failed (they count as longer than all others); empty where none did.
    """

    label: str
    unit: Unit
    value: float
    dense: float | None = None
    ratio: float | None = None
    interval: Interval | None = None
    verdict: str | None = None
    why: str | None = None
    own: Interval | None = None
    load: str = ""
    source: str = ""
    failures: str = ""
    key: str = ""
    """The figure's name, without its load and statistic: ``tpot``."""

    @property
    def times_as_fast(self) -> float | None:
        """Of a duration: dense / this. Of a rate: this / dense."""
        if not self.ratio:
            return None
        return self.ratio if self.unit == "rate" else 1 / self.ratio

    @property
    def speed_interval(self) -> tuple[float, float] | None:
        if self.interval is None or self.unit == "rate":
            return self.interval
        return (1 / self.interval.high, 1 / self.interval.low) if self.interval.low > 0 else None


def row_of(result: Result, name: str, label: str, unit: Unit, load: str, failures: str = "") -> Row | None:
    """The figure of that name in a result, called ``label``; None where it has none."""
    figure = result.measured.figures.get(name)
    if figure is None:
        return None
    key = name.removesuffix(f".{figure.statistic}").rpartition(".")[2]
    shared: dict[str, Any] = {"load": load, "source": str(result.path), "key": key, "failures": failures}
    other = result.dense.figures.get(name) if result.dense else None
    if other is None:
        own = own_interval(figure) if figure.sampled else None
        return Row(label, unit, figure.value, own=own, **shared)
    found = result.beside_dense[name]
    return Row(
        label, unit, figure.value, other.value, found["ratio"], found["interval"] if figure.sampled else None,
        found["verdict"], found.get("why"), **shared,
    )  # fmt: skip
