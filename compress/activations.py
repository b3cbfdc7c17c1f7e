"""The activations of the whole calibration set between two blocks, in memory or in a file that is mapped into it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import Tensor

SHARE = 0.25
"""Of the free memory: what is larger goes into a file, whose pages the system writes out and reads again as it must."""


class Growing:
    """Batches of activations that come one after the other, in memory or, where all will be larger than the limit, in a
    file. The first one is the largest.

    Args:
        batches: how many will come.
        file: made or overwritten where it is needed; lives as long as the tensors are used.
        limit: bytes; left out, a share of the memory that is free when the first comes.
    """

    def __init__(self, batches: int, file: Path, limit: int | None = None) -> None:
        self._batches = batches
        self._file = file
        self._limit = limit
        self._room: Tensor | None = None
        self._used = 0
        self.tensors: list[Tensor] = []

    def append(self, states: Tensor) -> None:
        """Keeps a tensor, which must not be written to afterwards."""
        if not self.tensors and self._batches * states.nbytes > (_share() if self._limit is None else self._limit):
            size = self._batches * states.numel()
            self._room = torch.from_file(str(self._file), shared=True, size=size, dtype=states.dtype)
        if self._room is None:
            self.tensors.append(states.to("cpu"))
            return
        place = self._room[self._used : self._used + states.numel()]
        self._used += states.numel()
        self.tensors.append(place.view(states.shape).copy_(states))


def _share() -> int:
    return int(SHARE * psutil.virtual_memory().available)


def spilled(batches: list[Tensor], file: Path, limit: int | None = None) -> list[Tensor]:
    """The tensors themselves, or where all together are larger than the limit, copies of them that lie in the file.

    Args:
        batches: of one dtype, on the CPU.
        file: made or overwritten where it is needed; lives as long as the tensors are used.
        limit: bytes; left out, a share of the memory that is free now.
    """
    size = sum(states.nbytes for states in batches)
    if limit is None:
        limit = _share()
    if size <= limit:
        return batches
    flat = torch.from_file(str(file), shared=True, size=sum(map(Tensor.numel, batches)), dtype=batches[0].dtype)
    views = flat.split([states.numel() for states in batches])
    return [view.view(states.shape).copy_(states) for view, states in zip(views, batches, strict=True)]


def first_tokens(batches: list[Tensor], tokens: int) -> list[Tensor]:
    """The first batches [batch, length, hidden] that hold so many tokens together; all where there are fewer."""
    some, seen = 0, 0
    while some < len(batches) and seen < tokens:
        seen += batches[some].shape[:-1].numel()
        some += 1
    return batches[:some]
