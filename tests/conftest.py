"""Fixtures of all tests."""

from __future__ import annotations

import pytest

from tests.runs import Halve


@pytest.fixture
def halve(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Halve:
    """The command, called inside of the test's process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Halve(capsys, monkeypatch)


@pytest.fixture
def plain_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed layers multiply as torch does, so that results have the bits of the dense model with zeros."""
    monkeypatch.setenv("HALVE_BACKEND", "plain")
