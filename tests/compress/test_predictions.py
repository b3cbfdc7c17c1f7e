"""The last block learns what the model predicts: the divergence falls and is what the models say, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import calibration as texts
from compress import pipeline, predictions, repair
from compress.architecture import find_blocks
from compress.blocks import BlockModel
from compress.calibration import text_set
from compress.predictions import divergence_of_predictions
from compress.repair import held_out_batches
from compress.sources import Source
from compress.training import MaskedAdam
from tests import tiny_models
from tests.runs import LENGTH, Halve, calibration, compress, report, stored, tree, turn_last_windows
from tests.runs import build_with_text as build
from tests.runs import load as load_model

SAMPLES = 36
FITTED = SAMPLES - held_out_batches(SAMPLES)
OPTIONS: dict[str, Any] = {"passes": 2, "rate": 0.02}
LEARNED = {**OPTIONS, "predictions": 2 * FITTED * LENGTH, "predictions_rate": 0.005}
SETTINGS: dict[str, Any] = {"repair": "block", "samples": SAMPLES}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window a batch, so that there are some to hold out."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "opt", "gpt2", "mamba"])
def test_the_divergence_falls_and_is_what_the_models_say(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reported divergence, computed again in float64 from the two finished models by transformers; and all but the last
    block is to the bit what it is without this stage."""
    drawn: list[torch.Tensor] = []
    load_windows = texts.load_windows
    monkeypatch.setattr(texts, "load_windows", lambda *a, **k: drawn.append(load_windows(*a, **k)) or drawn[-1])
    source = build(family, tmp_path)
    out = compress(source, tmp_path / "out", repair_options=LEARNED, format="dense", **SETTINGS).directory
    plain = compress(source, tmp_path / "plain", repair_options=OPTIONS, format="dense", **SETTINGS).directory
    first, last = report(out)["repairs"]
    assert "predictions" not in first
    record = last["predictions"]
    assert record["steps"] == 2 * FITTED
    assert record["tokens"] == LEARNED["predictions"]
    assert record["held_out_divergence"] < record["held_out_divergence_before"]
    windows = drawn[0][-held_out_batches(SAMPLES) :]
    for directory, said in ((plain, "held_out_divergence_before"), (out, "held_out_divergence")):
        assert _divergence(source, directory, windows) == pytest.approx(record[said], rel=5e-3)
    _, blocks = find_blocks(load_model(source))
    mine, theirs = stored(out), stored(plain)
    moved = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    number = f".{len(blocks) - 1}."
    assert moved, "the last block learned something"
    assert all(number in name for name in moved), moved
    assert last["held_out_error_before"] == report(plain)["repairs"][-1]["held_out_error_before"]


def _divergence(dense: Path, sparse: Path, windows: torch.Tensor) -> float:
    """Mean of KL(p ‖ q) over the tokens, float64."""
    with torch.no_grad():
        p, q = (load_model(place)(windows).logits.double().log_softmax(-1) for place in (dense, sparse))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (5 * LENGTH, 5), (FITTED * LENGTH + 1, FITTED)])
def test_as_many_tokens_as_asked_for(tokens: int, steps: int, tmp_path: Path) -> None:
    source = build("llama", tmp_path, layers=1)
    options = {**OPTIONS, "predictions": tokens}
    out = compress(source, tmp_path / "out", repair_options=options, **SETTINGS).directory
    record = report(out)["repairs"][0]["predictions"]
    assert (record["steps"], record["tokens"]) == (steps, steps * LENGTH)
    summary = report(out)["summary"]
    assert summary["predictions_tokens"] == steps * LENGTH
    assert summary["predictions_held_out_divergence"] == record["held_out_divergence"]
    assert (
        f"last block trained on the dense model's logits** | {steps * LENGTH:,} tokens"
        in (out / "README.md").read_text()
    )


def test_held_out_windows_are_never_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens in them change no step, only what is measured on them."""
    source = build("llama", tmp_path, layers=1)
    monkeypatch.setattr(repair, "PATIENCE", 10**6)
    a = compress(source, tmp_path / "a", repair_options=LEARNED, **SETTINGS).directory
    turn_last_windows(monkeypatch, held_out_batches(SAMPLES))
    b = compress(source, tmp_path / "b", repair_options=LEARNED, **SETTINGS).directory
    mine, theirs = (report(place)["repairs"][0] for place in (a, b))
    assert mine["predictions"]["held_out_divergence"] != theirs["predictions"]["held_out_divergence"]
    assert mine["training_error"] == theirs["training_error"]
    changed = {name for name, value in stored(a).items() if not torch.equal(value, stored(b)[name])}
    assert not changed


def test_steps_that_ruin_predictions_are_not_kept(tmp_path: Path) -> None:
    source = build("llama", tmp_path, layers=1)
    wild = {**LEARNED, "predictions_rate": 1.0}
    out = compress(source, tmp_path / "out", repair_options=wild, **SETTINGS).directory
    plain = compress(source, tmp_path / "plain", repair_options=OPTIONS, **SETTINGS).directory
    record = report(out)["repairs"][0]["predictions"]
    assert record["held_out_divergence"] == record["held_out_divergence_before"]
    mine, theirs = stored(out), stored(plain)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_masks_hold_in_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, taken = MaskedAdam.step, []

    def watched(self: MaskedAdam) -> None:
        step(self)
        for trainable in self.parameters.values():
            if trainable.mask is not None:
                assert not trainable.parameter.detach()[~trainable.mask].any()
                assert bool((trainable.mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all())
        taken.append(1)

    monkeypatch.setattr(MaskedAdam, "step", watched)
    compress(build("llama", tmp_path, layers=1), tmp_path / "out", repair_options=LEARNED, **SETTINGS)
    assert len(taken) == 4 * FITTED


def test_a_gradient_that_is_not_finite_keeps_the_repaired_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        predictions.KLDivergence, "apply", lambda found, expected: (found * float("inf")).sum(-1) - found.sum(-1)
    )
    source = build("llama", tmp_path, layers=1)
    done = compress(source, tmp_path / "out", repair_options=LEARNED, **SETTINGS)
    record = done.report["repairs"][0]
    assert "not finite" in record["warning"]
    assert "predictions" not in record
    assert record["held_out_error"] < record["held_out_error_before"]


def test_what_was_learned_before_a_gradient_that_is_not_finite_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second pass: the state after the first one is saved, and the record is of it."""
    source = build("llama", tmp_path, layers=1)
    whole = compress(source, tmp_path / "whole", repair_options=LEARNED, **SETTINGS).report["repairs"][0]
    step, taken = MaskedAdam.step, []

    def failing(self: MaskedAdam) -> None:
        taken.append(1)
        if len(taken) == whole["steps"] + FITTED + 2:
            next(iter(self.parameters.values())).parameter.grad.fill_(float("nan"))  # type: ignore[union-attr]
        step(self)

    monkeypatch.setattr(MaskedAdam, "step", failing)
    out = compress(source, tmp_path / "out", repair_options=LEARNED, **SETTINGS).directory
    record = report(out)["repairs"][0]
    learned = record["predictions"]
    assert "not finite" in record["warning"]
    assert learned["steps"] == FITTED
    assert learned["held_out_divergence"] < learned["held_out_divergence_before"]
    assert record["held_out_error"] == learned["held_out_error"]
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH)
    half = {**LEARNED, "predictions": FITTED * LENGTH}
    once = compress(source, tmp_path / "once", repair_options=half, **SETTINGS).report["repairs"][0]
    # (another schedule of the rate: only about the same)
    assert learned["held_out_divergence"] == pytest.approx(once["predictions"]["held_out_divergence"], rel=0.1)
    card = (out / "README.md").read_text()
    assert "without training it as a whole" in card
    assert "without retraining" not in card


def test_gradients_do_not_vanish_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the mean over as many tokens as a batch has, against float32; where no product is made in bfloat16."""
    monkeypatch.setattr(predictions, "precision", lambda dtype, device: None)
    source = build("llama", tmp_path, layers=1, dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(5, tiny_models.VOCABULARY, (2, 16384), generator=generator)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        model = BlockModel(Source(source), dtype, torch.device("cpu"))
        hidden = model.config.hidden_size
        target = torch.randn(2, 16384, hidden, generator=torch.Generator().manual_seed(1)).half()
        noise = 0.05 * torch.randn(target.shape, generator=torch.Generator().manual_seed(2))
        output = (target.float() + noise).requires_grad_()
        batches = list(text_set(windows).batches(2))
        with divergence_of_predictions(model, batches, [target.to(dtype)]) as divergence:
            divergence(output, 0).mean().backward()
        gradients.append(output.grad)
    exact, found = gradients
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if "predictions, pass 1 of 2" in text:
            raise Killed

    source = build("llama", tmp_path)
    given = {"repair_options": LEARNED, **SETTINGS}
    expected = compress(source, tmp_path / "whole" / "out", **given).directory
    out = tmp_path / "killed" / "out"
    with pytest.raises(Killed):
        compress(source, out, checkpoint_seconds=0, progress=stop, **given)
    assert not out.exists()
    assert tree(compress(source, out, resume=True, **given).directory) == tree(expected)


def test_an_image_classifier(tmp_path: Path) -> None:
    from tests.compress.test_vision import pictures

    source = build("vit", tmp_path)
    given = {"calibration": str(pictures(tmp_path / "pictures")), "repair": "block", "samples": 8}
    options = {**OPTIONS, "predictions": 10_000, "predictions_rate": 0.005}
    out = compress(source, tmp_path / "out", repair_options=options, **given).directory
    record = report(out)["repairs"][-1]["predictions"]
    assert record["held_out_divergence"] <= record["held_out_divergence_before"]
    assert record["steps"] > 0


def test_the_command_says_what_it_bought(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("compress", build("llama", tmp_path), "--calibration", calibration(tmp_path), "--length", str(LENGTH))
    repair = ("--samples", str(SAMPLES), "--repair", "block", "--repair-options", "predictions=200")
    monkeypatch.setenv("COLUMNS", "200")
    halve = Halve(capsys, monkeypatch)
    done = halve(*given, *repair, "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "divergence of the predictions, held out" in done.stdout
    assert "200 tokens of the last block" in done.stdout
    refused = halve(
        *given, "--samples", "8", "--repair", "block", "--repair-options", "predictions=-1", "--out", tmp_path / "b"
    )
    assert refused.code != 0
    assert "predictions" in refused.stderr
    assert "Traceback" not in refused.stderr
