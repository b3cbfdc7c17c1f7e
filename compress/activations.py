"""The activations of the whole calibration set between two blocks, in memory or in a file that is mapped into it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import Tensor

SHARE = 0.25
"""Of the free memory: what is larger goes into a file, whose pages the system writes out and reads again as it must."""


def spilled(batches: list[Tensor], file: Path, limit: int | None = None) -> list[Tensor]:
    """The tensors themselves, or where all together are larger than the limit, copies of them that lie in the file.

    Args:
        batches: of one dtype, on the CPU.
        file: made or overwritten where it is needed; lives as long as the tensors are used.
        limit: bytes; left out, a share of the memory that is free now.
    """
    size = sum(states.nbytes for states in batches)
    if limit is None:
        limit = int(SHARE * psutil.virtual_memory().available)
    if size <= limit:
        return batches
    flat = torch.from_file(str(file), shared=True, size=sum(map(Tensor.numel, batches)), dtype=batches[0].dtype)
    views = flat.split([states.numel() for states in batches])
    return [view.view(states.shape).copy_(states) for view, states in zip(views, batches, strict=True)]
