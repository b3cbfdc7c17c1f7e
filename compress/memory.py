"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Returns the freed pages of the heap to the system.

    glibc keeps what lies below the last block in use: between the tensors of one decoder block and the next some
    small object always survives, and resident memory would creep up with the number of blocks. Elsewhere nothing
    is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
