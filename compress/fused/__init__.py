"""Inner loops of pruning as single kernels on a GPU, where in torch each step of them is some launches.

A Python loop over the columns of a weight launches about ten kernels a column, and waits for launches rather than for work. The
kernels here (Triton's) do a block of columns at once. They prove themselves against torch's operators before they are used, and
where they cannot be had or prove wrong, torch's are used, with one line that says why.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Kind = Literal["masks", "columns"]

MOST_COLUMNS = 128
"""Of a block of columns: it stays in the registers of some warps."""
GROUP_SIZES = (2, 4, 8)
"""m of the patterns that there are kernels for; larger groups would not stay in registers."""
SCORES = (torch.float32, torch.float64, torch.uint8)
"""Of which the kernel for masks is proven."""
_OUTPUTS = 32
_GROUPS = 1024
_WARPS = 4


@dataclass(frozen=True)
class Kernels:
    """The kernels, launched on the device of the tensors."""

    module: ModuleType

    @staticmethod
    def takes(m: int) -> bool:
        """Whether there are kernels for groups of ``m``."""
        return m in GROUP_SIZES

    def keep_largest(self, scores: Tensor, keep_n: int, m: int) -> Tensor:
        """`NMPattern.mask`: scores [..., K] -> [..., K] bool.

        Raises:
            ValueError: K is no multiple of m.
        """
        if scores.shape[-1] % m:
            raise ValueError(f"{scores.shape[-1]} columns are no multiple of {m}")
        scores = scores.contiguous()
        mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        groups = scores.numel() // m
        if groups:
            with _guard(scores.device):
                self.module.keep_largest[(-(-groups // _GROUPS),)](
                    scores, mask.view(torch.uint8), groups, keep_n, M=m, GROUPS=_GROUPS, num_warps=_WARPS
                )
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
        floats = (columns, upper, inverse_diagonal, errors)
        assert all(tensor.dtype is torch.float32 and tensor.is_contiguous() for tensor in floats)
        assert mask.dtype is torch.bool
        assert mask.is_contiguous()
        n, size = columns.shape[1], len(errors)
        assert size <= MOST_COLUMNS
        if not n:
            return
        with _guard(columns.device):
            self.module.prune_block[(-(-n // _OUTPUTS),)](
                *(columns, upper, inverse_diagonal, mask.view(torch.uint8), errors, start, size, n, len(upper)),
                keep_n or 0,
                GIVEN=keep_n is None,
                M=m,
                BLOCK=MOST_COLUMNS,
                OUTPUTS=_OUTPUTS,
                num_warps=_WARPS,
            )


def _guard(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device. (On a processor, where it only interprets, this does nothing.)"""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def on(device: torch.device, kind: Kind) -> Kernels | None:
    """The kernels for masks, or for columns, on a device; None where torch's operators have to do. Compiles them at the first call."""
    if device.type != "cuda":
        return None
    return _on_gpu(torch.cuda.current_device() if device.index is None else device.index, kind)


@cache
def _on_gpu(index: int, kind: Kind) -> Kernels | None:
    from compress.fused import proof

    proofs: dict[Kind, Callable[[Kernels, torch.device], str | None]] = {
        "masks": proof.wrong_masks,
        "columns": proof.wrong_columns,
    }
    try:
        found = Kernels(importlib.import_module("compress.fused.kernels"))
        problem = proofs[kind](found, torch.device("cuda", index))
    except Exception as error:  # Triton, its compilers and the driver raise what they like; torch's operators remain
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        if problem is None:
            return found
    log.warning("pruning goes on without fused kernels for %s, more slowly: %s", kind, problem)
    return None
