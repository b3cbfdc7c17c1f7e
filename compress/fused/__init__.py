"""Inner loops of pruning as single kernels on a GPU, where in torch each step of them is some launches.

A Python loop over the columns of a weight launches about ten kernels a column, and waits for launches rather than for work. The
kernels here (Triton's) do a block of columns at once. They prove themselves against torch's operators before they are used, and
where they cannot be had or prove wrong, torch's are used, with one line that says why.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)

MOST_COLUMNS = 128
"""Of a block of columns: it stays in the registers of some warps."""
_OUTPUTS = 32
_GROUPS = 1024
_WARPS = 4
_MOST_M = 16


def power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


@dataclass(frozen=True)
class Kernels:
    """The kernels, for the current device."""

    module: ModuleType

    def keeps(self, keep_n: int, m: int) -> bool:
        """Whether there are kernels for that pattern."""
        return power_of_two(m) and m <= _MOST_M

    def keep_largest(self, scores: Tensor, keep_n: int, m: int) -> Tensor:
        """`NMPattern.mask`: scores [..., K] -> [..., K] bool."""
        scores = scores.contiguous()
        mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        groups = scores.numel() // m
        if groups:
            grid = (-(-groups // _GROUPS),)
            self.module.keep_largest[grid](
                *(scores, mask.view(torch.uint8), groups), KEEP=keep_n, M=m, GROUPS=_GROUPS, num_warps=_WARPS, enable_fp_fusion=True
            )  # fmt: skip
        return mask

    def prune_block(
        self, columns: Tensor, upper: Tensor, inverse_diagonal: Tensor, mask: Tensor, errors: Tensor, start: int,
        keep_n: int | None, m: int,
    ) -> None:  # fmt: skip
        """The columns ``start`` to ``start`` + B of `compress.columns.prune_columns`, one after the other.

        Args:
            columns: [K, N] float32 in a row, overwritten: pruned weights are zero.
            upper: [K, K] float32 in a row, the factor U.
            inverse_diagonal: [K] float32, 1 / U_jj.
            mask: [K, N] bool in a row, written where ``keep_n`` is given and read where it is not.
            errors: [B, N] float32 in a row, written; B is `MOST_COLUMNS` at most.
            keep_n: of each ``m`` columns; None where the mask is given, and then ``m`` is only how many columns go together.
        """
        n = columns.shape[1]
        if not n:
            return
        size = len(errors)
        block = max(1 << (size - 1).bit_length(), m)
        self.module.prune_block[(-(-n // _OUTPUTS),)](
            *(columns, upper, inverse_diagonal, mask.view(torch.uint8), errors, start, size, n, len(upper)),
            KEEP=0 if keep_n is None else keep_n,
            GIVEN=keep_n is None,
            M=m,
            BLOCK=block,
            OUTPUTS=_OUTPUTS,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )


def on(device: torch.device) -> Kernels | None:
    """The kernels for a device, or None where torch's operators have to do. Compiles them at the first call."""
    if device.type != "cuda":
        return None
    return _on_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _on_gpu(index: int) -> Kernels | None:
    try:
        found = Kernels(importlib.import_module("compress.fused.kernels"))
        with torch.cuda.device(index):
            problem = wrong(found, torch.device("cuda", index))
    except Exception as error:  # Triton, its compilers and the driver raise what they like; torch's operators remain
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        if problem is None:
            return found
    log.warning("pruning goes on without fused kernels, more slowly: %s", problem)
    return None


def wrong(found: Kernels, device: torch.device) -> str | None:
    """What the kernels compute otherwise than torch's operators do, or None."""
    from compress.columns import prune_columns
    from compress.patterns import NMPattern, UnstructuredPattern

    random = torch.Generator().manual_seed(0)
    columns = torch.randn(136, 70, generator=random)
    upper = torch.randn(136, 136, generator=random).triu_() * 0.05 + torch.eye(136)
    for pattern in (NMPattern(2, 4), NMPattern(4, 8), UnstructuredPattern(0.5)):
        if isinstance(pattern, NMPattern):
            scores = columns.T.abs().contiguous()
            if not torch.equal(
                found.keep_largest(scores.to(device), pattern.keep_n, pattern.m).cpu(), pattern.mask(scores)
            ):
                return f"the kernel for masks is wrong for {pattern} on this device; please report it"
        expected, kept = prune_columns(columns.clone(), upper, pattern, "block", None, 64, None)
        given = [None] if isinstance(pattern, NMPattern) else [None, kept]
        for mask in given:
            on_device = None if mask is None else mask.to(device)
            pruned, mask = prune_columns(columns.to(device), upper.to(device), pattern, "block", on_device, 64, found)
            if not torch.equal(mask.cpu(), kept) or not torch.allclose(pruned.cpu(), expected, rtol=1e-3, atol=1e-4):
                return f"the kernel for SparseGPT is wrong for {pattern} on this device; please report it"
    return None
