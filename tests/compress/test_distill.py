"""The whole pruned model learns the dense model's predictions: what falls, what stays, what the artefact says."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from compress import distill, pipeline, pruner
from compress.errors import HalveError, RecipeError
from compress.recipe import Recipe
from compress.repair import held_out_batches
from compress.training import MaskedAdam
from tests import tiny_models
from tests.runs import LENGTH, compress, stored, tree
from tests.runs import load as load_model

SAMPLES, STEPS, BATCH = 24, 12, 2
SETTINGS: dict[str, Any] = {
    "samples": SAMPLES,
    "distill": STEPS * BATCH * LENGTH,
    "distill_options": {"batch": BATCH, "rate": 0.01},
}


def build(family: str, directory: Path, **settings: Any) -> Path:
    (directory / "calibration.txt").write_text(tiny_models.text(4))
    return tiny_models.build(family, directory / "source", layers=2, dtype=torch.float32, **settings)


def report(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    drawn: list[torch.Tensor] = []
    load_windows = pipeline.calibration.load_windows
    monkeypatch.setattr(
        pipeline.calibration, "load_windows", lambda *a, **k: drawn.append(load_windows(*a, **k)) or drawn[-1]
    )
    return drawn


def divergence(source: Path, out: Path, windows: torch.Tensor) -> float:
    """Mean over tokens of Σ p (log p − log q), float64, from the two models as transformers loads them."""
    dense, sparse = load_model(source), load_model(out)
    total = []
    with torch.no_grad():
        for window in windows:
            p, q = (model(window[None]).logits[0].double().log_softmax(-1) for model in (dense, sparse))
            total.append((p.exp() * (p - q)).sum(-1).mean())
    return float(torch.stack(total).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
@pytest.mark.parametrize("format", ["packed", "dense"])
def test_the_divergence_falls_and_is_what_the_models_say(
    family: str, format: str, tmp_path: Path, windows: list[torch.Tensor]
) -> None:
    source = build(family, tmp_path)
    out = compress(source, tmp_path / "out", format=format, **SETTINGS).directory
    plain = compress(source, tmp_path / "plain", format=format, samples=SAMPLES).directory
    record = report(out)["distillation"]
    assert record["held_out_divergence"] < record["held_out_divergence_before"]
    held_out = windows[0][-held_out_batches(SAMPLES) :]
    assert divergence(source, plain, held_out) == pytest.approx(record["held_out_divergence_before"], rel=1e-3)
    assert divergence(source, out, held_out) == pytest.approx(record["held_out_divergence"], rel=1e-3)
    assert (record["steps"], record["tokens"]) == (STEPS, STEPS * BATCH * LENGTH)


def test_masks_embeddings_and_head_stay(tmp_path: Path) -> None:
    source = build("phi3", tmp_path)  # not tied
    out = stored(compress(source, tmp_path / "out", **SETTINGS).directory)
    plain = stored(compress(source, tmp_path / "plain", samples=SAMPLES).directory)
    assert out.keys() == plain.keys()
    moved = {name for name in out if not torch.equal(out[name], plain[name])}
    assert not {name for name in moved if name.endswith(".weight_mask")}
    assert not {name for name in moved if "embed" in name or "lm_head" in name}
    assert {name for name in moved if name.endswith(".weight_packed")}
    assert "model.norm.weight" in moved


def test_the_artefact_says_what_it_is(tmp_path: Path) -> None:
    done = compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS)
    card = (done.directory / "README.md").read_text()
    assert "distilled" in card
    assert "without retraining" not in card
    assert yaml.safe_load((done.directory / "recipe.yaml").read_text())["recipe"]["distill"] == SETTINGS["distill"]


def test_a_run_killed_while_it_distils_gives_the_same_bytes(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if f"step {STEPS // 2} " in text:
            raise Killed

    source = build("llama", tmp_path)
    expected = tree(compress(source, tmp_path / "whole" / "out", **SETTINGS).directory)
    out = tmp_path / "killed" / "out"
    with pytest.raises(Killed):
        compress(source, out, progress=stop, **SETTINGS)
    assert tree(compress(source, out, resume=True, **SETTINGS).directory) == expected


def test_a_run_killed_while_blocks_are_written_again_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    source = build("llama", tmp_path)
    expected = tree(compress(source, tmp_path / "whole" / "out", **SETTINGS).directory)
    out = tmp_path / "killed" / "out"
    with monkeypatch.context() as patch:
        entries = distill.weight_entries

        def killing(key: str, *args: Any) -> Any:
            if "layers.1." in key:
                raise Killed
            return entries(key, *args)

        patch.setattr(distill, "weight_entries", killing)
        with pytest.raises(Killed):
            compress(source, out, **SETTINGS)
    assert tree(compress(source, out, resume=True, **SETTINGS).directory) == expected


def test_a_state_that_is_worse_is_not_kept(tmp_path: Path) -> None:
    source = build("llama", tmp_path)
    wild = SETTINGS | {"distill": BATCH * LENGTH, "distill_options": {"batch": BATCH, "rate": 1.0}}
    out = compress(source, tmp_path / "out", **wild).directory
    record = report(out)["distillation"]
    assert record["held_out_divergence"] == record["held_out_divergence_before"]
    plain = stored(compress(source, tmp_path / "plain", samples=SAMPLES).directory)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in stored(out).items())


def test_held_out_windows_are_never_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: list[torch.Tensor]
) -> None:
    counts: set[int] = set()
    prune_layer = pruner.prune_layer
    monkeypatch.setattr(pruner, "prune_layer", lambda *a: counts.add(a[2].count) or prune_layer(*a))
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH)
    learned: set[int] = set()
    learn = distill._Course.learn

    def watched(self: Any, numbers: list[int]) -> float:
        learned.update(numbers)
        return learn(self, numbers)

    monkeypatch.setattr(distill._Course, "learn", watched)
    compress(build("llama", tmp_path), tmp_path / "a", **SETTINGS)
    assert learned == set(range(SAMPLES - held_out_batches(SAMPLES)))
    assert counts == {(SAMPLES - held_out_batches(SAMPLES)) * LENGTH}
    counts.clear()
    compress(tmp_path / "source", tmp_path / "b", **SETTINGS | {"samples": 8, "training_samples": SAMPLES})
    assert counts == {8 * LENGTH}


def test_blocks_run_again_give_the_same_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing saves memory and changes nothing: against a graph that keeps everything."""
    gradients: list[dict[str, torch.Tensor]] = []
    step = MaskedAdam.step

    def watched(self: MaskedAdam) -> None:
        gradients.append(
            {n: t.parameter.grad.clone() for n, t in self.parameters.items() if t.parameter.grad is not None}
        )
        step(self)

    monkeypatch.setattr(MaskedAdam, "step", watched)
    source = build("llama", tmp_path)
    one = SETTINGS | {"distill": BATCH * LENGTH}
    compress(source, tmp_path / "a", **one)

    monkeypatch.setattr(distill, "_checkpointed", lambda model: contextlib.nullcontext())
    compress(source, tmp_path / "b", **one)
    with_, without = gradients
    assert with_.keys() == without.keys()
    for name, gradient in with_.items():
        torch.testing.assert_close(gradient, without[name], rtol=1e-5, atol=1e-9)


def test_too_little_memory_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(HalveError, match=r"whole model in float32.*free"):
        compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS)


def test_an_image_classifier_is_refused(tmp_path: Path) -> None:
    from tests.compress.test_vision import pictures

    source = tiny_models.build("vit", tmp_path / "source")
    with pytest.raises(RecipeError, match="image classifier"):
        compress(source, tmp_path / "out", calibration=str(pictures(tmp_path / "pictures")), samples=8, distill=100)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"distill_options": {"rate": 0.1}}, "distill is 0"),
        ({"distill": 100, "distill_options": {"rates": 0.1}}, "rate"),
        ({"distill": -1}, "distill"),
    ],
)
def test_wrong_options(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.create(**fields)
