"""Proxies of the environment are for other machines: what is on this one is reached without them."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from serve.loopback import is_loopback
from serve.measure.endpoint import EndpointRunner
from serve.measure.memory import told_by
from tests.serve.mocks import mock_endpoint


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True), ("http://127.9.9.9/v1", True), ("https://[::1]:80/v1", True),
        ("http://localhost:8000/v1", True), ("http://a.localhost/v1", True), ("http://10.0.0.1:8000/v1", False),
        ("http://localhost.example/v1", False), ("http://example.com/127.0.0.1", False), ("file:///x", False),
    ],
)  # fmt: skip
def test_addresses_of_this_machine(url: str, here: bool) -> None:
    assert is_loopback(url) is here


def test_an_endpoint_here_is_not_asked_for_at_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody is
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with mock_endpoint() as mock, EndpointRunner(mock.url, max_length=100, timeout=10) as runner:
        assert runner.model == "mock"

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"halve:weight_bytes 1234\n")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        assert told_by(f"http://127.0.0.1:{server.server_port}/v1") == {"weights": 1234}
        thread.join(10)
