"""Endpoints whose delays and faults are known, as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.runs import ROOT, environment


@dataclass(frozen=True)
class MockEndpoint:
    url: str

    @property
    def completions(self) -> str:
        return f"{self.url}/completions"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=10) as answer:
            return json.load(answer)

    @property
    def truth(self) -> list[dict[str, Any]]:
        """Requests in the order of their arrival: ``arrived``, ``sent`` (each token), ``prompt``."""
        return self.get("/truth")["requests"]


@contextmanager
def mock_endpoint(*arguments: str | float) -> Iterator[MockEndpoint]:
    """`benchmarks.mock_endpoint` with these arguments."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.mock_endpoint", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield MockEndpoint(process.stdout.readline().strip())
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()
