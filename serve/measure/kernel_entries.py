"""What is known of one layer shape, sparse against dense: the records of the kernel table, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

WINS = 1.03
"""How much faster counts as faster; less is within what a machine's moods do to a measurement."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, order=True)
class Shape:
    """The weight of a linear layer: N output and K input features; ``conv1d``: multiplied as GPT-2's layers are."""

    n: int
    k: int
    conv1d: bool = False

    def __str__(self) -> str:
        return f"{self.n} x {self.k}{' (Conv1D)' if self.conv1d else ''}"


class Spread(BaseModel):
    """A ratio over the rounds."""

    model_config = ConfigDict(extra="forbid")

    median: Positive
    p25: Positive
    p75: Positive


class OfShape(BaseModel):
    """What is said of one layer shape in one dtype; ``dtype``: see `kind_name`."""

    model_config = ConfigDict(extra="forbid")

    n: Count
    k: Count
    conv1d: bool
    dtype: str

    @property
    def shape(self) -> Shape:
        return Shape(self.n, self.k, self.conv1d)


class Entry(OfShape):
    """One layer shape at one number of rows, by one backend.

    Attributes:
        ratio: how many times as fast sparse is as dense.
        backend: what multiplied the packed weight, and ``reason``: what it does with so many rows.
        baseline: what multiplied the dense one.
    """

    rows: Count
    ratio: Spread
    sparse_seconds: Positive
    dense_seconds: Positive
    backend: str
    reason: str
    baseline: str
    rounds: Count
    date: str

    @property
    def wins(self) -> bool:
        """Sparse is faster, by more than noise."""
        return self.ratio.median >= WINS and self.ratio.p25 > 1


class Failure(OfShape):
    """A backend that could not multiply a layer shape at some number of rows, and so does not serve it at any. To find no memory is none."""

    backend: str
    reason: str
    date: str


class Way(OfShape):
    """The way that a backend multiplies up to ``rows`` rows of x by a layer shape, and how many times as fast it is as the guess
    (`serve.kernels.ways`)."""

    rows: Count
    backend: str
    way: str
    gain: Positive
    date: str


@dataclass(frozen=True)
class Measured:
    """What `serve.measure.kernel_table.measure` found.

    Attributes:
        entries: one for each shape, number of rows and backend that can run it.
        skipped: what there was no time for.
    """

    entries: list[Entry]
    skipped: list[tuple[Shape, int]]
    failures: Sequence[Failure] = ()
    ways: Sequence[Way] = ()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kind_name(dtype: torch.dtype, value_dtype: torch.dtype | None = None, quantizes_x: bool = False) -> str:
    """What a layer is looked up by besides its shape: the dtype of x, and before it that of its packed values where it is another one,
    ``int8/bfloat16``; and between them what x is rounded to where it is, ``int8/int8/bfloat16``."""
    if value_dtype in (None, dtype):
        return dtype_name(dtype)
    return "/".join([dtype_name(value_dtype)] * (1 + quantizes_x) + [dtype_name(dtype)])


def dtypes_of(kind: str) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the packed values of a kind, and that of x."""
    names = kind.split("/")
    return getattr(torch, names[0]), getattr(torch, names[-1])


def wins_at(entries: Sequence[Entry]) -> str:
    """In words: the numbers of rows at which sparse is faster, of those that were measured for a shape."""
    measured = sorted(entries, key=lambda entry: entry.rows)
    runs: list[list[int]] = []
    before = False
    for entry in measured:
        if entry.wins:
            if before:
                runs[-1].append(entry.rows)
            else:
                runs.append([entry.rows])
        before = entry.wins
    if not runs:
        return "never"
    if len(runs) == 1 and len(runs[0]) == len(measured):
        return f"always ({measured[0].rows} to {measured[-1].rows})" if len(measured) > 1 else f"at {measured[0].rows}"
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def document_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    return [entry.model_dump() for entry in entries]
