"""The whole pruned model learns the dense model's predictions: what falls, what stays, what the artefact says."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from compress import calibration as texts
from compress import distill, pipeline, pruner
from compress.blocks import BlockModel
from compress.divergence import KLDivergence
from compress.errors import CalibrationError, NumericalError, RecipeError, UsageError
from compress.recipe import Recipe
from compress.repair import held_out_batches
from compress.sources import Source
from compress.training import MaskedAdam, precision
from tests import tiny_models
from tests.runs import LENGTH, compress, report, stored, tree
from tests.runs import build_with_text as build
from tests.runs import load as load_model

SAMPLES, STEPS, BATCH = 24, 12, 2
FITTED = SAMPLES - held_out_batches(SAMPLES)
"""Windows that are not held out, where one is a batch."""
SETTINGS: dict[str, Any] = {
    "samples": SAMPLES,
    "distill": STEPS * BATCH * LENGTH,
    "distill_options": {"batch": BATCH, "rate": 0.01},
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window a batch, so that there are some to hold out."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    drawn: list[torch.Tensor] = []
    load_windows = texts.load_windows
    monkeypatch.setattr(texts, "load_windows", lambda *a, **k: drawn.append(load_windows(*a, **k)) or drawn[-1])
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
    plain = compress(source, tmp_path / "plain", format=format, samples=FITTED).directory
    record = report(out)["distillation"]
    assert record["held_out_divergence"] < record["held_out_divergence_before"]
    held_out = windows[0][-held_out_batches(SAMPLES) :]
    assert divergence(source, plain, held_out) == pytest.approx(record["held_out_divergence_before"], rel=1e-3)
    assert divergence(source, out, held_out) == pytest.approx(record["held_out_divergence"], rel=1e-3)
    assert (record["steps"], record["tokens"]) == (STEPS, STEPS * BATCH * LENGTH)


def test_masks_embeddings_and_head_stay(tmp_path: Path) -> None:
    source = build("phi3", tmp_path)  # not tied
    out = stored(compress(source, tmp_path / "out", **SETTINGS).directory)
    plain = stored(compress(source, tmp_path / "plain", samples=FITTED).directory)
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


@pytest.mark.parametrize("moment", [f"step {STEPS // 2} ", "writing the checkpoint"])
def test_a_killed_run_gives_the_same_bytes(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it distils, and once it has, when it needs no memory for that any more."""

    class Killed(BaseException):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if moment in text:
            raise Killed

    source = build("llama", tmp_path)
    expected = tree(compress(source, tmp_path / "whole" / "out", **SETTINGS).directory)
    out = tmp_path / "killed" / "out"
    with pytest.raises(Killed):
        compress(source, out, progress=stop, **SETTINGS)
    if "step" not in moment:
        monkeypatch.setattr(distill, "_free_memory", lambda device: 0)
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
    plain = stored(compress(source, tmp_path / "plain", samples=FITTED).directory)
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


@pytest.mark.parametrize("repair", ["none", "block"])
def test_windows_of_its_own_come_first(
    repair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: list[torch.Tensor]
) -> None:
    """Those that no stage has seen, then the others, then all again; what comes before it is as it was with fewer."""
    more, held_out = SAMPLES + 20, held_out_batches(SAMPLES)
    learned: list[int] = []
    learn = distill._Course.learn

    def watched(self: Any, numbers: list[int]) -> float:
        learned.extend(numbers)
        return learn(self, numbers)

    monkeypatch.setattr(distill._Course, "learn", watched)
    source = build("llama", tmp_path)
    blocks: dict[str, Any] = {"repair": repair}
    given = SETTINGS | blocks | {"distill": 2 * more * LENGTH}
    done = compress(source, tmp_path / "out", **given | {"distill_options": {"batch": 1, "windows": more}})
    new = more - held_out - FITTED
    assert set(learned[:new]) == set(range(FITTED, more - held_out))
    assert set(learned[new : new + FITTED]) == set(range(FITTED))
    assert set(learned[new + FITTED :]) == set(range(more - held_out))
    plain = compress(source, tmp_path / "plain", **SETTINGS | blocks)
    assert done.report["layers"] == plain.report["layers"]
    assert done.report.get("repairs") == plain.report.get("repairs")
    assert (done.report["distillation"]["windows"], plain.report["distillation"]["windows"]) == (
        more - held_out,
        FITTED,
    )
    everything = windows[0]
    expected = divergence(source, done.directory, everything[-held_out:])
    assert expected == pytest.approx(done.report["distillation"]["held_out_divergence"], rel=1e-3)
    drawn = len(windows)
    compress(source, tmp_path / "all", **SETTINGS | {"distill_options": {"windows": 10**6}})
    assert len(windows[drawn]) > more  # as many as there are


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Of every step."""
    seen: list[dict[str, torch.Tensor]] = []
    step = MaskedAdam.step

    def watched(self: MaskedAdam) -> None:
        seen.append({n: t.parameter.grad.clone() for n, t in self.parameters.items() if t.parameter.grad is not None})
        step(self)

    monkeypatch.setattr(MaskedAdam, "step", watched)
    return seen


ONE = SETTINGS | {"distill": BATCH * LENGTH}
"""A single step."""


def test_blocks_that_are_run_twice_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradients: list[dict[str, torch.Tensor]]
) -> None:
    """What is free decides, so it may change nothing."""
    twice: list[bool] = []
    real = distill._checkpointed
    monkeypatch.setattr(distill, "_checkpointed", lambda model: twice.append(True) or real(model))
    source = build("llama", tmp_path)
    compress(source, tmp_path / "a", **ONE)
    assert not twice
    monkeypatch.setattr(distill, "KEPT_SHARE", 0.0)
    compress(source, tmp_path / "b", **ONE)
    assert twice
    once, again = gradients
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_what_is_kept_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the weights apart from what every window adds; twice the blocks keep twice as much."""
    found: list[tuple[int, int]] = []
    real = distill._Course._measure_kept_bytes
    monkeypatch.setattr(distill._Course, "_measure_kept_bytes", lambda self: found.append(real(self)) or found[-1])
    for layers, dtype in ((2, torch.float32), (4, torch.float32), (2, torch.bfloat16)):
        directory = tmp_path / f"{layers} {dtype}"
        directory.mkdir()
        (directory / "calibration.txt").write_text(tiny_models.text(4))
        source = tiny_models.build("llama", directory / "source", layers=layers, dtype=dtype)
        compress(source, directory / "out", **ONE)
    (two, four, half) = found
    assert four == (2 * two[0], 2 * two[1])
    assert two[0] == 0  # float32 weights are used as they are
    hidden = LENGTH * tiny_models.HIDDEN * 4
    assert 2 * 8 * hidden < two[1] < 2 * 80 * hidden
    if precision(torch.bfloat16, torch.device("cpu")) is not None:
        linears = sum(p.numel() for n, p in tiny_models.llama(2).named_parameters() if "proj" in n)
        assert half[0] == 2 * linears  # their 16-bit copies
        assert half[1] < two[1]


def test_windows_together_and_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradients: list[dict[str, torch.Tensor]]
) -> None:
    source = build("llama", tmp_path)
    compress(source, tmp_path / "a", **ONE)
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 1)
    compress(source, tmp_path / "b", **ONE)
    together, apart = gradients
    for name, gradient in together.items():
        assert (gradient - apart[name]).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("tokens", [1, 3, 700])
def test_the_divergence_against_float64(tokens: int) -> None:
    """And its gradient, by autograd through the formula; several chunks of tokens, the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    found, expected = (torch.randn(tokens, 3000, generator=generator).bfloat16().float() * 4 for _ in range(2))
    slopes = torch.randn(tokens, generator=generator)

    def run(function: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = found.detach().clone().to(dtype).requires_grad_()
        divergences = function(leaf, expected.to(dtype))
        divergences.backward(slopes.to(divergences.dtype))
        assert leaf.grad is not None
        return divergences.detach(), leaf.grad

    def formula(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    wanted, gradient = run(formula, torch.float64)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        found_divergence, found_gradient = run(KLDivergence.apply, dtype)
        assert (found_divergence.dtype, found_gradient.dtype) == (torch.float32, dtype)
        assert (found_divergence - wanted).norm() < close * wanted.norm()
        assert (found_gradient - gradient).norm() < close * gradient.norm()
    with torch.no_grad():
        assert torch.equal(KLDivergence.apply(found, found), torch.zeros(tokens))


def test_a_second_backward_pass_is_refused() -> None:
    leaf = torch.randn(2, 10, requires_grad=True)
    loss = KLDivergence.apply(leaf, torch.randn(2, 10)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for twice"):
        loss.backward()


def test_too_little_memory_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 1000

    def never(*args: Any) -> Any:
        raise AssertionError("pruning began")

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    monkeypatch.setattr(pruner, "prune_layer", never)
    with pytest.raises(UsageError, match=r"whole model in float32.*free"):
        compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out.partial").exists()


def test_a_window_that_is_longer_than_what_goes_together_is_counted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One goes through the models in any case."""

    class Memory:
        available = 0

    model = BlockModel(Source(build("llama", tmp_path)), torch.float32, torch.device("cpu"))
    windows = torch.zeros(4, 8192, dtype=torch.int64)
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 1000)
    vocabulary = model.config.vocab_size
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    need = parameters * 25 + 3 * 8192 * vocabulary * 4
    for Memory.available, fits in ((need, True), (need - 1, False)):
        with nullcontext() if fits else pytest.raises(UsageError, match="whole model"):
            distill.require_room(model, windows, 1, distill.DistillOptions())


def test_what_was_pruned_is_kept_where_distilling_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = build("llama", tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(distill._Course, "divergence", lambda *_: (_ for _ in ()).throw(NumericalError("no number")))
        with pytest.raises(NumericalError, match=r"no number \(what was finished is kept in .*out\.partial"):
            compress(source, out, **SETTINGS)
    pruned: list[str] = []
    compress(source, out, resume=True, progress=lambda done, total, text: pruned.append(text), **SETTINGS)
    assert not [text for text in pruned if "relative output error" in text], "no block is pruned again"


def test_a_single_window_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruner, "prune_layer", None)
    with pytest.raises(CalibrationError, match="at least two calibration windows"):
        compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS | {"samples": 1})
    assert not (tmp_path / "out.partial").exists()


def test_a_gradient_that_is_not_finite_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a check: the state that was best then is what is saved, and the run comes to its end."""
    step, taken = MaskedAdam.step, []

    def failing(self: MaskedAdam) -> None:
        taken.append(1)
        if len(taken) == steps // 2 + 1:
            next(iter(self.parameters.values())).parameter.grad.fill_(float("nan"))  # type: ignore[union-attr]
        step(self)

    source = build("llama", tmp_path)
    whole = compress(source, tmp_path / "whole", **SETTINGS).report["distillation"]
    steps = whole["steps"]
    monkeypatch.setattr(MaskedAdam, "step", failing)
    done = compress(source, tmp_path / "out", **SETTINGS)
    record = done.report["distillation"]
    assert "not finite" in record["warning"]
    assert record["warning"] in done.report["warnings"]
    assert whole["held_out_divergence"] <= record["held_out_divergence"] < record["held_out_divergence_before"]


def test_what_the_blocks_held_out_is_held_out_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole batches of several windows."""
    learn, seen = distill._Course.learn, set()

    def watched(self: Any, windows: list[int]) -> float:
        seen.update(windows)
        return learn(self, windows)

    monkeypatch.setattr(distill._Course, "learn", watched)
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 3 * LENGTH)
    given = SETTINGS | {"samples": 31, "repair": "block", "repair_options": {"passes": 1}, "distill": 4000}
    done = compress(build("llama", tmp_path), tmp_path / "out", **given)
    fitted = done.report["repairs"][0]["tokens"] // LENGTH
    assert fitted == 27  # ten batches of three, and one of one: two of them are held out
    assert seen == set(range(fitted))


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
