"""What is said of a processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from compress import device
from serve.measure.environment import processor

FLAGS = {"AMX": "amx_tile", "AVX-512 BF16": "avx512_bf16", "AVX-512": "avx512f", "AVX2": "avx2"}
"""In the order in which they count, by the names that Linux gives them."""
ASKED = ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_avx512_supported", "_is_avx2_supported")


@pytest.mark.parametrize(
    ("there", "said"), [(4, "AMX"), (3, "AVX-512 BF16"), (2, "AVX-512"), (1, "AVX2"), (0, "no AVX2")]
)
def test_the_widest_instructions_are_said(there: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for position, name in enumerate(ASKED):
        monkeypatch.setattr(torch.cpu, name, lambda found=position >= len(ASKED) - there: found)
    assert device.instructions() == said
    assert processor().endswith(f" (x86_64, {said})")


def test_of_other_processors_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert device.instructions() is None
    assert processor().endswith(" (aarch64)")


def test_linux_says_the_same_of_this_one() -> None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no x86-64")
    assert device.instructions() == next((name for name, flag in FLAGS.items() if flag in flags), "no AVX2")
