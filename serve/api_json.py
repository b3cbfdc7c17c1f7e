"""JSON of answers that may be long, written piece by piece.

`json.dumps` is one call of C, during which no other thread of Python runs: neither the event loop nor the engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

SLICE = 1024
"""Items of a long list in one piece."""
_DEEP = 4
"""From the answer down to the lists of log-probabilities: choices, choice, logprobs, list."""


def dumps(value: Any) -> str:
    """Compact, with characters as they are. Raises ValueError: a number is not finite."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps_in_pieces(value: Any) -> str:
    """The same text, for what may be long."""
    return "".join(pieces(value))


def pieces(value: Any, depth: int = 0) -> Iterator[str]:
    """The text of an answer in pieces, of which none is longer than `SLICE` items."""
    if isinstance(value, dict) and depth < _DEEP:
        for number, (key, item) in enumerate(value.items()):
            yield f"{',' if number else '{'}{dumps(key)}:"
            yield from pieces(item, depth + 1)
        yield "}" if value else "{}"
    elif isinstance(value, list) and depth < _DEEP:
        for number, item in enumerate(value):
            yield "," if number else "["
            yield from pieces(item, depth + 1)
        yield "]" if value else "[]"
    elif isinstance(value, list):
        for start in range(0, len(value), SLICE):
            yield f"{',' if start else '['}{dumps(value[start : start + SLICE])[1:-1]}"
        yield "]" if value else "[]"
    else:
        yield dumps(value)
