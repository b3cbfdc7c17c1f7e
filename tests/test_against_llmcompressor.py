"""The comparison must not be able to flatter: its own checks, without llm-compressor."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import against_llmcompressor as comparison
from benchmarks import llmcompressor_runs as runs_of
from tests import tiny_models


@pytest.fixture
def dense_and_pruned(tmp_path: Path) -> tuple[Path, Path]:
    dense = tiny_models.build("llama", tmp_path / "dense", layers=2)
    pruned = shutil.copytree(dense, tmp_path / "pruned")
    weights = load_file(pruned / "model.safetensors")
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            groups = weight.unflatten(1, (-1, 4))
            groups.scatter_(-1, groups.abs().topk(2, dim=-1, largest=False).indices, 0)
    save_file(weights, pruned / "model.safetensors", metadata={"format": "pt"})
    return dense, pruned


def change(directory: Path, name: str, value: torch.Tensor | None) -> None:
    weights = load_file(directory / "model.safetensors")
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_check_accepts_what_is_2_4(dense_and_pruned: tuple[Path, Path]) -> None:
    dense, pruned = dense_and_pruned
    assert runs_of.check_24(pruned, dense) == {"block_linears": 14, "sparsity": 0.5}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", torch.ones(160, 64, dtype=torch.bfloat16), "is not 2:4"),
        ("model.embed_tokens.weight", torch.ones(384, 64, dtype=torch.bfloat16), "no linear of a block"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(160, 64), "changed its dtype"),
        ("model.layers.0.mlp.up_proj.weight", None, "other tensors"),
    ],
)
def test_check_refuses(
    dense_and_pruned: tuple[Path, Path], name: str, value: torch.Tensor | None, message: str
) -> None:
    dense, pruned = dense_and_pruned
    change(pruned, name, value)
    with pytest.raises(runs_of.Failure, match=message):
        runs_of.check_24(pruned, dense)


def test_other_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(runs_of.Failure, match="does not say which windows"):
        runs_of.check_windows(tmp_path, "ab")
    (tmp_path / "recipe.yaml").write_text("recipe: {seed: 0}\ncalibration: {tokens: 512, sha256: ab}\n")
    runs_of.check_windows(tmp_path, "ab")
    with pytest.raises(runs_of.Failure, match="other windows"):
        runs_of.check_windows(tmp_path, "cd")


def test_a_failing_child_is_explained(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('out of luck')"]
    with pytest.raises(runs_of.Failure, match=r"(?s)the side ended with exit code 1.*out of luck"):
        runs_of.run(command, tmp_path / "child.log", {}, "the side")


def test_a_child_is_measured_and_its_json_read(tmp_path: Path) -> None:
    code = "b = b'x' * 200_000_000; print('noise'); print('{\"seconds\": 1.5}')"
    finished = runs_of.run([sys.executable, "-c", code], tmp_path / "child.log", {}, "the side")
    assert finished.peak_rss_bytes > 200_000_000
    assert runs_of.last_json(finished, "it", "seconds") == {"seconds": 1.5}
    with pytest.raises(runs_of.Failure, match="has no perplexity"):
        runs_of.last_json(finished, "it", "perplexity")


def test_ratios_pair_the_rounds(tmp_path: Path) -> None:
    def one(number: int, side: str, value: float) -> dict:
        measures = dict.fromkeys(("seconds", "wall_seconds", "peak_rss_bytes", "process_peak_rss_bytes"), value)
        return {"round": number, "method": "wanda", "side": side, "out": tmp_path / side, **measures}

    runs = [one(0, "halve", 1), one(0, "other", 4), one(1, "halve", 2), one(1, "other", 4)]
    outcomes = {tmp_path / "halve": {"perplexity": 9.0}, tmp_path / "other": {"perplexity": 10.0}}
    found = comparison.ratios("wanda", "other", runs, outcomes)
    assert found["seconds"] == [0.25, 0.375, 0.5]
    assert found["perplexity"] == 0.9
    assert comparison.summary("wanda", "halve", runs, outcomes)["seconds"] == 1.5
