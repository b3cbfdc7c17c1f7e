"""halve's version, also where nothing was installed."""

from __future__ import annotations

import importlib.metadata
import tomllib
from typing import Any

import pytest

from compress import version
from tests.runs import ROOT


def test_a_checkout_from_which_nothing_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def bare(name: str) -> Any:
        if name == "halve":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", bare)
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version.version() == said
    assert version.versions()["halve"] == said
    assert version.versions()["torch"] == real("torch")
