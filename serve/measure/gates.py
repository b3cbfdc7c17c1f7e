"""Gates: what has to hold of a comparison, in the form ``FIGURE<=LIMIT`` or ``FIGURE>=LIMIT``.

``perplexity<=1.10x`` bounds the ratio of the candidate to the baseline, ``tpot.p50<=0.02`` (no ``x``) the
candidate's own value. A gate is judged by the value; where it has to hold *confidently*, the whole 95 % interval has
to be on the right side, and a figure whose interval is not known does not pass. Neither does one that is not defined, because
requests failed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import UsageError
from serve.measure.statistics import Interval

_FORM = re.compile(
    r"\s*(?P<figure>[^<>\s]*[^<>=\s])\s*(?P<sign><=|>=)\s*(?P<limit>[^\sx]+?)\s*(?P<ratio>x?)\s*", re.ASCII
)


@dataclass(frozen=True)
class Gate:
    """``ratio``: the limit is of candidate / baseline, else of the candidate's value."""

    text: str
    figure: str
    sign: Literal["<=", ">="]
    limit: float
    ratio: bool

    def judge(self, value: float | None, interval: Interval | None, *, confident: bool) -> tuple[bool, str]:
        """Whether it holds, and why. ``value`` None: the ratio is not defined."""
        if value is None:
            return False, "the ratio is not defined: the baseline is 0"
        if not confident:
            return self._clears(value), f"{value:.6g}"
        if interval is None:
            return False, f"{value:.6g}, and its interval is not known (too few samples, or none were kept)"
        decisive = interval.high if self.sign == "<=" else interval.low
        return self._clears(decisive), f"{value:.6g}, {interval.low:.6g} to {interval.high:.6g}"

    def _clears(self, value: float) -> bool:
        return value <= self.limit if self.sign == "<=" else value >= self.limit


def parse(text: str) -> Gate:
    """Raises UsageError where a gate cannot be read."""
    found = _FORM.fullmatch(text)
    limit = _number(found["limit"]) if found else None
    if found is None or limit is None:
        raise UsageError(
            f"--gate {text!r} is not FIGURE<=LIMIT or FIGURE>=LIMIT, where LIMIT is a number, with an x behind it for a "
            "ratio: 'perplexity<=1.10x'"
        )
    sign: Any = found["sign"]
    return Gate(text.strip(), found["figure"], sign, limit, bool(found["ratio"]))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
