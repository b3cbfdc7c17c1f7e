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
from serve.engines.access import check_access
from serve.server import BackgroundServer, _bind, run
from tests.serve.helpers import metrics, wait_until


def test_what_keeps_it_from_starting_is_said(tmp_path, model_dir):
    with pytest.raises(SourceError, match="no model directory"):
        run(str(tmp_path / "absent"), port=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match=r"Port \d+ of 127\.0\.0\.1 cannot be used"):
            run(str(model_dir), port=taken.getsockname()[1])
    for host in ("no such host", "127.0..1", "a" * 70):
        with pytest.raises(UsageError, match="not an address"):
            run(str(model_dir), host=host, port=0)
    with pytest.raises(UsageError, match="not a port"):
        run(str(model_dir), port=70000)


def test_modules_of_the_users_directory_are_not_imported(model_dir, tmp_path, monkeypatch):
    """Not those that are called as ours are, nor what a checkpoint brings that is served from within."""
    for name in ("serve", "compress", "uvicorn", "fastapi"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # what a user puts there is meant
    with BackgroundServer(str(model_dir), device="cpu") as server:
        assert httpx.get(server.base_url + "/models").status_code == 200


def test_a_port_is_taken_once_it_is_bound():
    """Before the model is loaded, not after."""
    first = _bind("127.0.0.1", 0)
    with first, pytest.raises(UsageError, match=r"Port \d+ of 127\.0\.0\.1 cannot be used"):
        _bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize("key", ["", " ", "secret\n"])
def test_an_empty_key_is_no_key(key, model_dir, halve, monkeypatch):
    with pytest.raises(UsageError, match="API key"):
        run(str(model_dir), port=0, api_key=key)
    for engine in ("transformers", "vllm"):
        called = halve("serve", model_dir, "--engine", engine, "--port", "0", "--api-key", key)
        assert (called.code, "API key" in called.message) == (2, True)
        monkeypatch.setenv("HALVE_API_KEY", key)
        called = halve("serve", model_dir, "--engine", engine, "--port", "0")
        assert (called.code, "HALVE_API_KEY" in called.message) == (2, True)
        monkeypatch.delenv("HALVE_API_KEY")


def test_other_machines_without_a_key_are_warned_of(caplog):
    for host, key, warned in (
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", "sesame", False),
        ("0.0.0.0", None, True),
        ("192.0.2.1", None, True),
        ("", None, True),
    ):
        caplog.clear()
        check_access(host, key)
        assert bool(caplog.records) is warned, (host, key)


def test_engines_that_are_not_there(halve, model_dir):
    for engine, words in (("onnx", "`halve export"), ("tensorrt", "not built"), ("vlm", "did you mean 'vllm'")):
        called = halve("serve", model_dir, "--engine", engine)
        assert (called.code, words in called.message) == (2, True)


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
