"""SIGTERM ends a process at once, with all that it would have cleaned up left behind. Here it unwinds, as an interruption does."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


@contextmanager
def unwinding() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit, unless somebody handles it already."""
    before = unwind()
    try:
        yield
    finally:
        restore(before)


def unwind() -> Handler:
    """Lets SIGTERM raise SystemExit, unless somebody handles it already; returns what is to be restored, None for nothing."""
    if threading.current_thread() is not threading.main_thread():
        return None  # (only the main thread may set handlers, and only it gets them)
    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_DFL:
        return None
    signal.signal(signal.SIGTERM, _end)
    return before


def restore(before: Handler) -> None:
    """Puts back what `unwind` returned."""
    if before is not None:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would end the clean-up
    sys.exit(128 + number)
