"""Servers of other programs end with what started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from serve.engines.process import Address, ServerProcess
from tests.runs import ROOT, environment

SCRIPT = """
import os, sys, time
from serve.engines.process import Address, ServerProcess

READY = sys.argv[1] == "ready"

class Deaf(ServerProcess):
    def _find(self):
        print(self.pid, flush=True)
        return Address("http://127.0.0.1:1/v1", "m") if READY else None

worker = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
with Deaf([sys.executable, "-c", worker], dict(os.environ), name="deaf", timeout=600):
    time.sleep(600)
"""


CONVERTING = """
import sys, time
from pathlib import Path
from compress import sources
from serve.commands.shared import dense_model

def resolve(against, place):
    place.mkdir()
    (place / "model.safetensors").write_text("half of it")
    print(place.parent, flush=True)
    time.sleep(600)

sources.resolve = resolve
with dense_model("model.gguf"):
    pass
"""


class Ready(ServerProcess):
    def _find(self) -> Address | None:
        return Address("http://127.0.0.1:1/v1", "m")


def sleeper() -> Ready:
    return Ready([sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ), name="sleeper", timeout=60)


@pytest.mark.parametrize("moment", ["ready", "starting"])
def test_terminated_parent_leaves_no_server(moment: str) -> None:
    """One that reads no pipe, and its worker; while it is waited for, and afterwards."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, moment], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            server = psutil.Process(int(parent.stdout.readline()))
            while not (workers := server.children()):
                pass
            parent.send_signal(signal.SIGTERM)
            assert parent.wait(60) == 128 + signal.SIGTERM
        finally:
            parent.kill()
    gone, left = psutil.wait_procs([server, *workers], timeout=10)
    assert (len(gone), left) == (2, [])


def test_terminated_while_a_model_is_converted_for_it_leaves_no_file() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CONVERTING], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            scratch = Path(parent.stdout.readline().strip())
            assert scratch.is_dir()
            parent.send_signal(signal.SIGTERM)
            assert parent.wait(60) == 128 + signal.SIGTERM
        finally:
            parent.kill()
    assert not scratch.exists()


def test_a_second_interruption_leaves_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one that does not stop when it is asked to is waited for."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    server = Ready([sys.executable, "-c", stubborn], dict(os.environ), name="stubborn", timeout=60)
    before = signal.getsignal(signal.SIGTERM)
    with server:
        while "ready" not in server.log:
            time.sleep(0.01)
        wait, [process] = server._process.wait, server.processes()
        waits = iter([KeyboardInterrupt])

        def interrupted(timeout: float | None = None) -> int:
            if (error := next(waits, None)) is not None:
                raise error
            return wait(timeout)

        monkeypatch.setattr(server._process, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.stop()
        assert not process.is_running()
        assert signal.getsignal(signal.SIGTERM) == before
        assert "ready" in server.log


def test_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with sleeper():
            inside = signal.getsignal(signal.SIGTERM)
            with sleeper():
                assert signal.getsignal(signal.SIGTERM) is inside
            assert signal.getsignal(signal.SIGTERM) is inside
        assert inside != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        own = signal.signal(signal.SIGTERM, lambda *_: None)
        assert own == signal.SIG_DFL
        with sleeper():
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, inside)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_may_start_one() -> None:
    failures: list[BaseException] = []

    def start() -> None:
        try:
            with sleeper() as server:
                assert server.processes()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert not failures
