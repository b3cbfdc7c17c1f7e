"""Pruning on a GPU that is pretended: every method and stage puts its tensors where they belong, and waits no more often for wider layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.verify import verify
from tests.pretended import is_on_gpu, pretended
from tests.runs import build_with_text, compress, stored

LAYERS = {"reconstruction": "admm", "permutation": "fold", "rotation": "heads"}
BLOCK = {"passes": 1, "rate": 0.02, "cycles": 1, "predictions": 200}
RUNS: dict[str, dict[str, Any]] = {
    "wanda": {"metric": "wanda", "reconstruction": "none"},
    "sparsegpt": {"reconstruction": "sparsegpt"},
    "apt": {"reconstruction": "apt"},
    "swaps": {"metric": "wanda", "reconstruction": "swaps"},
    "dsnot": {"metric": "wanda", "reconstruction": "dsnot"},
    "alps": {"reconstruction": "alps"},
    "gblm": {"metric": "gblm", "reconstruction": "none"},
    "wanda++": {"metric": "wanda++", "reconstruction": "none"},
    "int8": {"metric": "wanda", "reconstruction": "none", "value_dtype": "int8"},
    "allocate": {"metric": "wanda", "reconstruction": "none", "allocate": 0.1},
    "balanced": {**LAYERS, "targets": "dense", "samples": 8, "tokens_per_input": 8},
    "best": {**LAYERS, "samples": 10, "repair": "block", "repair_options": BLOCK, "training_samples": 12, "substitute": 0.2},
    "distill": {**LAYERS, "samples": 10, "distill": 2, "training_samples": 12},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_every_tensor_is_where_it_belongs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = 2 if name in ("best", "distill") else 1
    source = build_with_text("llama", tmp_path, layers=layers, dtype=torch.bfloat16)
    with pretended(monkeypatch) as gpu:
        done = compress(source, tmp_path / "gpu", device="cuda", **RUNS[name])
    assert sum(gpu.ran.values()) > 500, "it ran elsewhere"
    assert len(verify(done.directory).sparse) >= 4 * layers  # (of 7; `allocate` leaves some dense)


def test_masks_are_those_of_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for ties and rounding, in which products of floats differ."""
    source = build_with_text("llama", tmp_path, dtype=torch.bfloat16)
    here = stored(compress(source, tmp_path / "cpu", **RUNS["wanda"]).directory)
    with pretended(monkeypatch):
        there = stored(compress(source, tmp_path / "gpu", device="cuda", **RUNS["wanda"]).directory)
    for name, mask in here.items():
        if name.endswith("weight_mask"):
            assert float((mask != there[name]).float().mean()) < 0.02, name


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "apt"])
def test_waits_do_not_grow_with_the_width(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for each column would be most of the time of a run. (apt's refit waits twice a step, and takes as many as gain.)"""
    counts = []
    for width in (64, 128):
        directory = tmp_path / str(width)
        directory.mkdir()
        source = build_with_text(
            "llama", directory, layers=1, dtype=torch.bfloat16, hidden_size=width, intermediate_size=2 * width
        )
        with pytest.MonkeyPatch.context() as patch, pretended(patch) as gpu:
            compress(source, directory / "gpu", device="cuda", **RUNS[name])
        counts.append({line: count for line, count in gpu.waits.items() if "refit.py" not in line})
    assert counts[0] == counts[1]


def refused() -> dict[str, Callable[[torch.Tensor, torch.Tensor], Any]]:
    generator = torch.Generator()
    return {
        "two devices": lambda there, here: there + here,
        "a product": lambda there, here: there @ here,
        "a mask": lambda there, here: here[there > 0],
        "a place": lambda there, here: here[0, 0].add_(there[0, 0]),
        "an array": lambda there, here: there.numpy(),
        "a generator": lambda there, here: torch.randn(3, device="cuda", generator=generator),
        "drawn in place": lambda there, here: there.normal_(generator=generator),
    }


@pytest.mark.parametrize("name", refused())
def test_what_a_gpu_refuses_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch):
        there, here = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
        assert is_on_gpu(there)
        assert not is_on_gpu(here)
        with pytest.raises((RuntimeError, TypeError)):
            refused()[name](there, here)


def test_what_a_gpu_takes_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch) as gpu:
        there, here = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
        assert is_on_gpu(there * here[0, 0] + 1)
        assert is_on_gpu(here.to("cuda") @ there)
        assert is_on_gpu(there.T.contiguous())
        assert not is_on_gpu(there.cpu() + here)
        assert is_on_gpu(there[torch.arange(2, device="cuda")])
        here.copy_(there)
        assert not is_on_gpu(here)
        assert there.device == torch.device("cuda", 0)
        before = sum(gpu.waits.values())
        assert bool((there > 0).all())
        assert sum(gpu.waits.values()) == before + 1


def test_it_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch):
        there = torch.ones(2, device="cuda")
    assert there.device.type == "cpu"
