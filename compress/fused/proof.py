"""The fused kernels against torch's operators, on the device where they are to be used: each way that they are compiled for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.columns import PANEL, prune_columns
from compress.fused import MOST_COLUMNS, SCORES, Kernels
from compress.patterns import NMPattern, Pattern, UnstructuredPattern

_PATTERNS = (NMPattern(1, 2), NMPattern(2, 4), NMPattern(4, 8))


def _normal(*shape: int) -> Tensor:
    """Always the same numbers, whatever torch's default dtype and device are where this is called."""
    random = torch.Generator("cpu").manual_seed(0)
    exact: dict[str, Any] = {"generator": random, "dtype": torch.float32, "device": "cpu"}
    return torch.randn(*shape, **exact)


def wrong_masks(kernels: Kernels, device: torch.device) -> str | None:
    """What the kernel for masks computes otherwise than `NMPattern.mask`, or None."""
    normal = _normal(70, 136).abs()
    for dtype in SCORES:
        scores = normal.mul(4).floor().to(dtype)  # ties included
        for pattern in _PATTERNS:
            found = kernels.keep_largest(scores.to(device), pattern.keep_n, pattern.m)
            if not torch.equal(found.cpu(), pattern.mask(scores)):
                return f"the kernel for masks is wrong for {pattern} on this device; please report it"
    return None


def wrong_columns(kernels: Kernels, device: torch.device) -> str | None:
    """What the kernel for columns computes otherwise than the loop over them, or None."""
    k = MOST_COLUMNS + 2 * PANEL  # a whole block and a part of one
    upper = 0.05 * _normal(k, k).triu() + torch.eye(k, dtype=torch.float32, device="cpu")
    columns = _normal(k, 70)
    for pattern in (*_PATTERNS, UnstructuredPattern(0.5)):
        expected, kept = _pruned(columns, upper, pattern, None, None)
        for given in (None, kept):
            pruned, mask = _pruned(columns.to(device), upper.to(device), pattern, given, kernels)
            if not torch.equal(mask.cpu(), kept) or not torch.allclose(pruned.cpu(), expected, rtol=1e-3, atol=1e-4):
                return f"the kernel for SparseGPT is wrong for {pattern} on this device; please report it"
    return None


def _pruned(
    columns: Tensor, upper: Tensor, pattern: Pattern, given: Tensor | None, kernels: Kernels | None
) -> tuple[Tensor, Tensor]:
    mask = None if given is None else given.to(columns.device)
    return prune_columns(columns.clone(), upper, pattern, "block", mask, MOST_COLUMNS, kernels)
