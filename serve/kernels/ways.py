"""Ways to cut a product that were measured to be the fastest on a device.

A backend may have several kernels for some rows of x, and cut the sums along K into more blocks or fewer. Which way is the fastest depends
on the device and the shape. A backend guesses it, by a model of the device; `halve tune` times all of them (`serve.measure.settling`), and
what it found is taken here, from then on, by each product of that shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch


@dataclass
class Ways:
    """Of one backend on one device, for one dtype of values and one of x.

    Attributes:
        made: what the backend has made of them, by keys of its own; emptied when another way is taken.
    """

    made: dict[Any, Any] = field(default_factory=dict)
    _taken: dict[tuple[int, int, int], str] = field(default_factory=dict)

    def take(self, rows: int, n: int, k: int, way: str | None) -> None:
        """From now on that way is taken for weights [n, k] and up to ``rows`` rows of x, one of `Choices.rows`; None: what is guessed."""
        if way is None:
            self._taken.pop((rows, n, k), None)
        else:
            self._taken[rows, n, k] = way
        self.made.clear()

    def find(self, rows: int, n: int, k: int) -> str | None:
        """What was taken, if anything was."""
        return self._taken.get((rows, n, k))


@cache
def of(backend: str, index: int | None, values: torch.dtype, dtype: torch.dtype) -> Ways:
    """Those of a backend on the device of that index, for values and x of those dtypes."""
    return Ways()


@dataclass(frozen=True)
class Choices:
    """The ways that a backend has.

    Attributes:
        rows: of x, for which it has the same ways: up to the first number, from there up to the second, and so on.
        names: (device, dtype of values, dtype of x, one of ``rows``, n, k) -> by what name it has them, the one first that it guesses.
    """

    rows: tuple[int, ...]
    names: Callable[[torch.device, torch.dtype, torch.dtype, int, int, int], list[str]]
