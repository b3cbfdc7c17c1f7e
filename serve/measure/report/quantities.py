"""How the report writes numbers: four digits at most, with a unit."""

from __future__ import annotations

from compress.console import human_bytes
from serve.measure.report.rows import Row, Unit


def quantity(value: float, unit: Unit) -> str:
    """``"31.4 ms"``, ``"176.1 MB"``, ``"83.25"``."""
    match unit:
        case "seconds":
            return f"{value:.2f} s" if value >= 10 else f"{value * 1e3:,.{_decimals(value * 1e3)}f} ms"
        case "bytes":
            return human_bytes(value).replace(" ", "\u00a0")
        case "rate":
            return f"{value:,.{_decimals(value)}f} / s"
        case "share":
            return f"{value:.1%}"
        case "number":
            return f"{value:,.{4 if value < 10 else 2 if value < 1000 else 0}f}"


def gain(row: Row) -> tuple[float, str, str] | None:
    """The ratio as it is told: (number, text, what it is), "times as fast" of times and rates; None where there is none."""
    if row.unit in ("seconds", "rate"):
        faster = row.times_as_fast
        return None if faster is None else (faster, f"{faster:.2f}", "times as fast")
    if row.ratio is None:
        return None
    if row.unit == "bytes":
        return row.ratio, f"{row.ratio * 100:.1f}\u00a0%", "of dense"
    text = f"{row.ratio:,.{3 if row.ratio < 2 else 2 if row.ratio < 100 else 0}f}"
    return row.ratio, text, "times dense"


def bounds(row: Row) -> str:
    """The 95 % interval of the ratio, or why there is none."""
    found = row.speed_interval if row.unit in ("seconds", "rate") else row.interval
    if found is None:
        return f"no interval: {row.why}" if row.why else ""
    digits = 2 if row.unit in ("seconds", "rate") else 3
    return f"95 % interval {found[0]:.{digits}f} to {found[1]:.{digits}f}"


def _decimals(value: float) -> int:
    return 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0
