"""A server as a process of its own, whatever program it is: started, waited for, listened to, stopped, with its workers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

from compress.errors import HalveError
from serve import terminate

GRACE_SECONDS = 20  # from the request to stop until it is killed
_POLL_SECONDS = 0.05
_TOLD = 4000  # the end of the log that an error shows


class Address(NamedTuple):
    """Where a server that is ready is reached: ``base_url`` ends in ``/v1``."""

    base_url: str
    model: str


class ServerProcess(ABC):
    """Runs a server for as long as a ``with`` block lasts; it is ready when the block begins.

    Its output goes to a file that ends with it; `log` has the text, also afterwards. It leads a process group, so that
    its workers end with it. SIGTERM to this process, which would end it at once, ends the block instead, and so the server.
    Its standard input is a pipe whose other end closes when this process dies, however it dies: halve's own server looks at
    that, others do not, and outlive a parent that is killed by SIGKILL.

    A subclass says in `_find` how the server is known to be ready. Raises `HalveError` with the end of the log where it
    ends before that, or is not ready in time.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], *, name: str, timeout: float) -> None:
        self._command, self._environment, self._name, self._timeout = list(command), environment, name, timeout
        self._file: Path | None = None
        self._before: terminate.Handler = None
        self._said = ""
        self.base_url = ""
        self.model = ""

    @abstractmethod
    def _find(self) -> Address | None:
        """The address, once the server is ready."""

    @property
    def log(self) -> str:
        """What it said so far, or up to its end."""
        return self._said if self._file is None else self._file.read_text(errors="replace")

    @property
    def pid(self) -> int:
        return self._process.pid

    def processes(self) -> list[psutil.Process]:
        """The server's process and those that it started."""
        try:
            leader = psutil.Process(self.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def __enter__(self) -> Self:
        self._before = terminate.unwind()
        descriptor, name = tempfile.mkstemp(prefix="halve-server-", suffix=".log")
        self._file = Path(name)
        with os.fdopen(descriptor, "wb") as log:  # the process keeps its own
            try:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except BaseException:
                self._close_log()
                terminate.restore(self._before)
                raise
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self._timeout
        while (found := self._find()) is None:
            ended = self._process.poll()
            if ended is not None:
                raise HalveError(f"{self._name} ended with code {ended}. It said:\n{self.log[-_TOLD:]}")
            if time.monotonic() > end:
                raise HalveError(f"{self._name} was not ready after {self._timeout:g} s. It said:\n{self.log[-_TOLD:]}")
            time.sleep(_POLL_SECONDS)
        self.base_url, self.model = found

    def wait(self, timeout: float = GRACE_SECONDS) -> int:
        """Waits until the server ends by itself, and returns its exit code."""
        return self._process.wait(timeout)

    def stop(self) -> int:
        """Asks the server to stop, makes sure that it and its workers have, and returns its exit code."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(GRACE_SECONDS)
        finally:  # whoever does not want to wait so long, and interrupts it again, still leaves nothing
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._close_log()
            terminate.restore(self._before)
        return code

    def _close_log(self) -> None:
        if self._file is not None:
            self._said, file, self._file = self.log, self._file, None
            file.unlink(missing_ok=True)
