"""The server as a process: how it starts, what it says when it cannot, how it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from compress.errors import HalveError, SourceError, UsageError
from serve.server import BackgroundServer, run
from tests.serve.helpers import metrics, wait_until


def test_what_keeps_it_from_starting_is_said(tmp_path, model_dir):
    with pytest.raises(SourceError, match="no model directory"):
        run(str(tmp_path / "absent"), port=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match=r"Port \d+ of 127\.0\.0\.1 cannot be used"):
            run(str(model_dir), port=taken.getsockname()[1])
    with pytest.raises(UsageError, match="not an address"):
        run(str(model_dir), host="no such host", port=0)
    with pytest.raises(UsageError, match="not a port"):
        run(str(model_dir), port=70000)


def test_a_background_server_that_fails_says_why(tmp_path):
    with (
        pytest.raises(HalveError, match=r"ended with code 2(.|\n)*no model directory"),
        BackgroundServer(str(tmp_path / "absent")),
    ):
        pass


def test_a_signal_lets_running_requests_end(model_dir):
    with BackgroundServer(str(model_dir), device="cpu") as server:
        answers = []
        body = {"prompt": "x", "max_tokens": 250, "ignore_eos": True}
        url = server.base_url + "/completions"
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=30)))
        thread.start()
        wait_until(lambda: metrics(server.base_url)["vllm:generation_tokens_total"] > 0)
        os.kill(server.pid, signal.SIGTERM)
        thread.join()
        assert answers[0].json()["usage"]["completion_tokens"] == 250
        assert server.stop() == 0


def test_it_stops_when_its_parent_dies(model_dir):
    script = (
        "import sys, time\nfrom serve.server import BackgroundServer\n"
        "server = BackgroundServer(sys.argv[1], device='cpu').__enter__()\n"
        "print(server.base_url, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(model_dir)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    url = parent.stdout.readline().strip() + "/models"
    assert httpx.get(url).status_code == 200
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def gone() -> bool:
        try:
            httpx.get(url, timeout=2)
        except httpx.HTTPError:
            return True
        return False

    wait_until(gone)
