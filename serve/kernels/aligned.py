"""Memory as kernels read it: in a row, 16 bytes at a time."""

from __future__ import annotations

from torch import Tensor

_BYTES = 16


def aligned(tensor: Tensor) -> Tensor:
    """The tensor in a row, beginning at a multiple of 16 bytes; a copy only where it does not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _BYTES else tensor
