"""Blocks that learn to give the dense block's output again: what falls, what stays, what is never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from compress import activations, course, pipeline, pruner, repair
from compress import calibration as texts
from compress.architecture import find_blocks, linears_of
from compress.course import relative_error
from compress.errors import CalibrationError, NumericalError, RecipeError
from compress.journal import Journal
from compress.recipe import Recipe
from compress.repair import held_out_batches
from compress.training import MaskedAdam
from tests.runs import LENGTH, Halve, calibration, compress, report, stored, tree, turn_last_windows
from tests.runs import build_with_text as build
from tests.runs import load as load_model

SAMPLES = 36
OPTIONS = {"passes": 3, "rate": 0.02}
SETTINGS: dict[str, Any] = {"repair": "block", "repair_options": OPTIONS, "samples": SAMPLES}
FAMILIES = ["llama", "qwen3", "gemma2", "opt", "gpt2", "gpt_neox", "phi3", "mamba"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window a batch, so that there are some to hold out."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH)


def block_outputs(directory: Path, windows: torch.Tensor, names: list[str]) -> list[list[torch.Tensor]]:
    """[block][window]: the hidden states that leave each block, as the whole model computes them."""
    model = load_model(directory)
    seen: list[list[torch.Tensor]] = [[] for _ in names]
    for into, name in zip(seen, names, strict=True):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, into=into: into.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        for window in windows:
            model(window[None])
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_falls_and_is_what_the_models_say(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reported errors, computed again from the two finished models by transformers."""
    drawn: list[torch.Tensor] = []
    load_windows = texts.load_windows
    monkeypatch.setattr(texts, "load_windows", lambda *a, **k: drawn.append(load_windows(*a, **k)) or drawn[-1])
    source = build(family, tmp_path)
    out = compress(source, tmp_path / "out", **SETTINGS).directory
    repairs = report(out)["repairs"]
    prefix, blocks = find_blocks(load_model(source))
    names = [f"{prefix}.{index}" for index in range(len(blocks))]
    assert [r["name"] for r in repairs] == names
    held_out = held_out_batches(SAMPLES)
    windows = drawn[0][-held_out:]
    for record, dense, sparse in zip(
        repairs, block_outputs(source, windows, names), block_outputs(out, windows, names), strict=True
    ):
        assert record["status"] == "repaired"
        assert record["held_out_error"] < record["held_out_error_before"]
        errors = [
            (s.double() - d.double()).square().sum(-1) / d.double().square().sum(-1)
            for d, s in zip(dense, sparse, strict=True)
        ]
        assert float(torch.cat(errors).mean()) == pytest.approx(record["held_out_error"], rel=2e-3)
        assert record["tokens"] == (SAMPLES - held_out) * LENGTH


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mamba"])
def test_what_is_not_trained_stays_to_the_bit(family: str, tmp_path: Path) -> None:
    source = build(family, tmp_path)
    linears = linears_of(find_blocks(load_model(source))[1], "")
    ignored = sorted({name.rpartition(".")[2] for name in linears})[0]
    out = compress(source, tmp_path / "out", format="dense", ignore=(f"*.{ignored}",), **SETTINGS).directory
    before, after = stored(source), stored(out)
    assert before.keys() == after.keys()
    prefix = find_blocks(load_model(source))[0]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    pruned = {layer["name"] for layer in report(out)["layers"] if layer["status"] == "pruned"}
    assert all(any(part in name for name in moved) for part in ("norm", "ln_") if any(part in n for n in before))
    for name in moved:
        layer = name.rpartition(".")[0]
        full = layer if layer.startswith(prefix) else f"{prefix.split('.')[0]}.{layer}"
        norm = any(part in layer.rpartition(".")[2] for part in ("norm", "ln_"))
        assert full in pruned or norm, name
        assert f".{ignored}." not in name
    outside = [name for name in before if not any(piece.isdigit() for piece in name.split("."))]
    assert outside
    assert not moved & set(outside)


def test_every_step_keeps_two_of_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = MaskedAdam.step, []

    def watched(self: MaskedAdam) -> None:
        step(self)
        masked = [t for t in self.parameters.values() if t.mask is not None]
        assert masked
        for trainable in masked:
            assert trainable.mask is not None
            assert not trainable.parameter.detach()[~trainable.mask].any()
            assert bool((trainable.mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all())
        steps.append(len(masked))

    monkeypatch.setattr(MaskedAdam, "step", watched)
    out = compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS).directory
    held_out = held_out_batches(SAMPLES)
    assert len(steps) == 2 * OPTIONS["passes"] * (SAMPLES - held_out)
    for name, tensor in stored(out).items():
        if name.endswith("weight_mask"):
            bits = torch.stack([(tensor >> bit) & 1 for bit in range(8)], dim=-1)
            assert bool((bits.unflatten(-1, (2, 4)).sum(-1) == 2).all())


def test_a_leak_of_the_optimizer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = MaskedAdam.step

    def leaking(self: MaskedAdam) -> None:
        step(self)
        with torch.no_grad():
            next(t for t in self.parameters.values() if t.mask is not None).parameter.add_(1e-6)

    monkeypatch.setattr(MaskedAdam, "step", leaking)
    with pytest.raises(AssertionError, match="training moved a weight that was pruned"):
        compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS)


def test_held_out_windows_are_never_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens in them change no layer and no step of the first block, only what is measured on them."""
    source = build("llama", tmp_path, layers=1)
    monkeypatch.setattr(repair, "PATIENCE", 10**6)
    a = compress(source, tmp_path / "a", **SETTINGS).directory
    turn_last_windows(monkeypatch, held_out_batches(SAMPLES))
    b = compress(source, tmp_path / "b", **SETTINGS).directory
    assert report(a)["layers"] == report(b)["layers"]
    assert report(a)["repairs"][0]["training_error"] == report(b)["repairs"][0]["training_error"]
    assert report(a)["repairs"][0]["held_out_error"] != report(b)["repairs"][0]["held_out_error"]


def test_more_windows_train_than_give_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: set[int] = set()
    prune_layer = pruner.prune_layer

    def watched(name: str, weight: torch.Tensor, statistics: Any, *rest: Any) -> Any:
        counts.add(statistics.count)
        return prune_layer(name, weight, statistics, *rest)

    monkeypatch.setattr(pruner, "prune_layer", watched)
    given = SETTINGS | {"samples": 10, "training_samples": SAMPLES}
    out = compress(build("llama", tmp_path), tmp_path / "out", **given).directory
    assert counts == {10 * LENGTH}
    assert report(out)["repairs"][0]["tokens"] == (SAMPLES - held_out_batches(SAMPLES)) * LENGTH


def test_a_state_that_is_worse_is_not_kept(tmp_path: Path) -> None:
    """Steps far too long ruin a block: it stays as the reconstruction made it."""
    source = build("llama", tmp_path)
    wild = SETTINGS | {"repair_options": {"passes": 5, "rate": 1.0}}
    out = compress(source, tmp_path / "out", **wild).directory
    plain = compress(source, tmp_path / "plain", **SETTINGS | {"repair_options": {"passes": 1, "rate": 1e-9}}).directory
    for repaired, untouched in zip(report(out)["repairs"][:1], report(plain)["repairs"][:1], strict=True):
        assert repaired["held_out_error"] == repaired["held_out_error_before"]
        assert repaired["held_out_error"] == pytest.approx(untouched["held_out_error"], rel=1e-4)
        assert repaired["steps"] == repair.PATIENCE * (SAMPLES - held_out_batches(SAMPLES))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.9])
def test_a_block_whose_error_still_falls_is_trained_again(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the last of its passes lowered the held-out error by that share, and at most so often; said in the report."""
    monkeypatch.setattr(repair, "STILL_FALLING", share)
    errors: dict[str, list[float]] = {}
    train = repair._train

    def watched(course: Any, passes: int, rate: float, clip: float, best: float, generator: Any) -> Any:
        seen = errors.setdefault(next(iter(course.masks)).partition(".self_attn")[0], [best])
        for done in train(course, passes, rate, clip, best, generator):
            seen.append(done.best)
            yield done

    monkeypatch.setattr(repair, "_train", watched)
    given = SETTINGS | {"repair_options": {"passes": 2, "rate": 0.02, "cycles": 3}}
    repairs = report(compress(build("llama", tmp_path), tmp_path / "out", **given).directory)["repairs"]
    for record in repairs:
        seen = errors[record["name"]]
        assert len(seen) == 1 + 2 * record["cycles"]
        assert record["steps"] == 2 * record["cycles"] * (SAMPLES - held_out_batches(SAMPLES))
        assert record["held_out_error"] == seen[-1] == min(seen)
        falling = [seen[last] <= seen[last - 1] * (1 - share) for last in range(2, len(seen), 2)]
        assert all(falling[:-1])
        assert record["cycles"] == 3 or not falling[-1]
    if share != 0.05:
        assert {record["cycles"] for record in repairs} == {3 if share == 0 else 1}


@pytest.mark.parametrize(
    ("batches", "tokens", "held_out"),
    [(1, 10, 0), (2, 10, 1), (36, 10, 4), (1000, 10, 100), (224, 2048, 12), (900, 512, 48)],
)
def test_how_much_is_held_out(batches: int, tokens: int, held_out: int) -> None:
    """A tenth, until more would tell no more."""
    assert held_out_batches(batches, tokens) == held_out


def test_more_windows_than_the_text_holds(tmp_path: Path) -> None:
    """All of them are taken to train on, but the statistics get as many as were asked for, or nothing is done."""
    source = build("llama", tmp_path, layers=1)
    some = report(compress(source, tmp_path / "out", **SETTINGS | {"training_samples": 10**6}).directory)
    taken = some["repairs"][0]["tokens"] // LENGTH
    assert SAMPLES < taken < 10**4
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["recipe"]
    assert recipe["samples"] == SAMPLES
    assert recipe["training_samples"] - held_out_batches(recipe["training_samples"], LENGTH) == taken
    again = report(
        compress(source, tmp_path / "again", **SETTINGS | {"training_samples": recipe["training_samples"]}).directory
    )
    assert again["repairs"] == some["repairs"]
    with pytest.raises(CalibrationError, match=f"is {recipe['training_samples']} windows of {LENGTH}"):
        compress(source, tmp_path / "no", **SETTINGS | {"samples": 10**5, "training_samples": 10**6})


@pytest.mark.parametrize("moment", ["in the first block", "in the second block", "after the first block"])
def test_a_killed_run_goes_on_to_the_same_bytes(moment: str, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def stop(done: int, total: int, text: str) -> None:
        here = {
            "in the first block": done == 0 and "pass 2" in text,
            "in the second block": done == 1 and "pass 2" in text,
            "after the first block": done == 1 and "repaired" in text,
        }
        if here[moment]:
            raise Killed

    source = build("llama", tmp_path)
    expected = compress(source, tmp_path / "whole" / "out", **SETTINGS).directory
    out = tmp_path / "killed" / "out"
    with pytest.raises(Killed):
        compress(source, out, checkpoint_seconds=0, progress=stop, **SETTINGS)
    assert not out.exists()
    assert tree(compress(source, out, resume=True, **SETTINGS).directory) == tree(expected)


def test_activations_on_the_disk_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build("llama", tmp_path)
    expected = tree(compress(source, tmp_path / "a" / "out", **SETTINGS).directory)
    monkeypatch.setattr(activations, "SHARE", 0)
    files: list[str] = []
    save = Journal.save_block

    def watched(self: Journal, *args: Any) -> None:
        files.extend(path.name for path in self.directory.glob("*.activations"))
        save(self, *args)

    monkeypatch.setattr(Journal, "save_block", watched)
    assert tree(compress(source, tmp_path / "b" / "out", **SETTINGS).directory) == expected
    assert set(files) == {"hidden.activations", "dense.activations"}


def test_targets_are_the_dense_model_s_and_inputs_the_pruned_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded in the run, and computed by transformers from the finished models (bfloat16: to its rounding)."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    run = pipeline.repair_block

    def watched(model: Any, index: int, masks: Any, inputs: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
        seen[index] = inputs[0].clone(), targets[0].clone()
        return run(model, index, masks, inputs, targets, *args, **kwargs)

    drawn: list[torch.Tensor] = []
    load_windows = texts.load_windows
    monkeypatch.setattr(texts, "load_windows", lambda *a, **k: drawn.append(load_windows(*a, **k)) or drawn[-1])
    monkeypatch.setattr(pipeline, "repair_block", watched)
    source = build("llama", tmp_path, layers=3, dtype=torch.bfloat16)
    out = compress(source, tmp_path / "out", **SETTINGS).directory
    names = [f"model.layers.{index}" for index in range(3)]
    dense = block_outputs(source, drawn[0][:1], names)
    sparse = block_outputs(out, drawn[0][:1], names)
    for index in range(3):
        inputs, targets = seen[index]
        assert float(relative_error(targets, dense[index][0]).mean()) < 1e-4
        if index:
            assert float(relative_error(inputs, sparse[index - 1][0]).mean()) < 1e-4
            assert float(relative_error(inputs, dense[index - 1][0]).mean()) > 1e-3


def test_an_image_classifier(tmp_path: Path) -> None:
    from tests.compress.test_vision import pictures

    source = build("vit", tmp_path)
    out = compress(
        source,
        tmp_path / "out",
        calibration=str(pictures(tmp_path / "pictures")),
        repair="block",
        repair_options=OPTIONS,
        samples=8,
    ).directory
    assert [r["status"] for r in report(out)["repairs"]] == ["repaired", "repaired"]


def test_too_few_tokens_are_said_and_are_not_learned_by_heart(tmp_path: Path) -> None:
    given = SETTINGS | {"samples": 12, "repair_options": {"passes": 40}}
    done = compress(build("llama", tmp_path), tmp_path / "out", **given)
    record = done.report["repairs"][0]
    widest = max(layer["shape"][1] for layer in done.report["layers"])
    assert record["passes"] == 40 * record["tokens"] // (repair.FEW_TOKENS * widest)
    assert record["passes"] < 40
    assert "few" in record["warning"]
    assert any("blocks" in warning and "few" in warning for warning in done.report["warnings"])


def test_a_single_window_leaves_nothing_to_hold_out(tmp_path: Path) -> None:
    """And that the repair was not done is said, not only written down."""
    source = build("llama", tmp_path)
    repaired = compress(source, tmp_path / "out", **SETTINGS | {"samples": 1})
    assert "single calibration window" in repaired.report["repairs"][0]["status"]
    assert any("2 of 2 blocks" in warning and "not repaired" in warning for warning in repaired.report["warnings"])
    plain = compress(source, tmp_path / "plain", samples=1)
    assert stored(repaired.directory).keys() == stored(plain.directory).keys()
    for name, tensor in stored(plain.directory).items():
        assert torch.equal(tensor, stored(repaired.directory)[name])


@pytest.mark.parametrize("samples", [2, 11, 36])
def test_few_windows_go_through_in_small_batches(samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are some to hold out: a tenth at least, and never all."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 10**6)
    done = compress(build("llama", tmp_path, layers=1), tmp_path / "out", **SETTINGS | {"samples": samples})
    fitted = done.report["repairs"][0]["tokens"] // LENGTH
    assert samples / 10 <= samples - fitted <= samples / 2


def test_what_another_dtype_holds_stays_as_it_is(tmp_path: Path) -> None:
    """A Mamba whose A and D are float32, as published ones are: neither is trained, so neither is rounded."""
    source = build("mamba", tmp_path, dtype=torch.bfloat16)
    file = source / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    wide = [name for name in tensors if name.endswith(("A_log", ".D"))]
    for name in wide:
        tensors[name] = tensors[name].float() * (1 + 1e-3 * torch.randn(tensors[name].shape, generator=generator))
    save_file(tensors, file, metadata={"format": "pt"})
    out = compress(source, tmp_path / "out", **SETTINGS).directory
    after = stored(out)
    assert wide
    for name in wide:
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], tensors[name])


def test_a_loss_that_is_not_finite_names_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "relative_error", lambda output, target: (output * float("nan")).sum(-1))
    with pytest.raises(NumericalError, match=r"model\.layers\.0: its error .* is not finite"):
        compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_ends_the_training_of_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second pass of the second block: what the first pass gave is kept, and so is everything before it."""
    taken: list[int] = []
    step = MaskedAdam.step
    fitted = SAMPLES - held_out_batches(SAMPLES)
    bad = (OPTIONS["passes"] + 1) * fitted + 3

    def failing(self: MaskedAdam) -> None:
        taken.append(len(taken))
        if len(taken) == bad:
            next(iter(self.parameters.values())).parameter.grad.fill_(float("inf"))  # type: ignore[union-attr]
        step(self)

    monkeypatch.setattr(MaskedAdam, "step", failing)
    source = build("llama", tmp_path)
    done = compress(source, tmp_path / "out", **SETTINGS)
    first, second = done.report["repairs"]
    assert "warning" not in first
    assert "not finite" in second["warning"]
    assert second["steps"] == fitted
    assert second["held_out_error"] < second["held_out_error_before"]
    assert any("ended early" in warning for warning in done.report["warnings"])


def test_training_error_is_that_of_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On windows that were trained on, as many as were held out, by transformers from the finished models."""
    drawn: list[torch.Tensor] = []
    load_windows = texts.load_windows
    monkeypatch.setattr(texts, "load_windows", lambda *a, **k: drawn.append(load_windows(*a, **k)) or drawn[-1])
    source = build("llama", tmp_path)
    out = compress(source, tmp_path / "out", **SETTINGS).directory
    names = ["model.layers.0", "model.layers.1"]
    windows = drawn[0][: held_out_batches(SAMPLES)]
    for record, dense, sparse in zip(
        report(out)["repairs"], block_outputs(source, windows, names), block_outputs(out, windows, names), strict=True
    ):
        errors = [
            (s.double() - d.double()).square().sum(-1) / d.double().square().sum(-1)
            for d, s in zip(dense, sparse, strict=True)
        ]
        assert float(torch.cat(errors).mean()) == pytest.approx(record["training_error"], rel=2e-3)


def test_relative_error_of_a_token_that_is_zero() -> None:
    errors = relative_error(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0]]))
    assert errors.tolist() == [0.0, pytest.approx(10 / 25)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"repair_options": {"passes": 2}}, "no repair"),
        ({"repair": "block", "repair_options": {"pases": 2}}, "passes"),
        ({"repair": "block", "repair_options": {"rate": 0}}, "rate"),
        ({"repair": "blok"}, "repair"),
        ({"training_samples": 500}, "nothing trains"),
        ({"repair": "block", "samples": 64, "training_samples": 32}, "fewer"),
    ],
)
def test_wrong_options(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.create(**fields)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = build("llama", tmp_path)
    given = [
        "compress",
        source,
        "--out",
        tmp_path / "out",
        "--calibration",
        calibration(tmp_path),
        "--samples",
        str(SAMPLES),
    ]
    halve = Halve(capsys, monkeypatch)
    done = halve(*given, "--length", str(LENGTH), "--repair", "block", "--repair-options", "passes=2", "--json")
    assert done.code == 0, done.stderr
    assert done.document["blocks_repaired"] == 2
    assert done.document["mean_held_out_error"] < done.document["mean_held_out_error_before"]
    assert "pass 2 of 2" in done.stderr
    listed = halve("methods", "--json").document["methods"]
    assert next(m for m in listed if m["kind"] == "repair")["options"]["passes"]["default"] == 4


def test_masks_come_through_where_a_kept_weight_is_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept weight that happens to be zero is trained; it is the mask that says what is kept, not the value."""
    masks: dict[str, torch.Tensor] = {}
    run = pipeline.repair_block

    def watched(model: Any, index: int, given: Any, *args: Any, **kwargs: Any) -> Any:
        masks.update(given)
        return run(model, index, given, *args, **kwargs)

    prune_layer = pruner.prune_layer

    def zeroing(*args: Any) -> Any:
        done = prune_layer(*args)
        done.weight[0] = 0
        return done

    monkeypatch.setattr(pipeline, "repair_block", watched)
    monkeypatch.setattr(pruner, "prune_layer", zeroing)
    source = build("llama", tmp_path, layers=1)
    out = compress(source, tmp_path / "out", format="dense", **SETTINGS).directory
    name = next(iter(masks))
    assert isinstance(load_model(source).get_submodule(name), nn.Linear)
    assert bool((masks[name].unflatten(-1, (-1, 4)).sum(-1) == 2).all())
    row = stored(out)[f"{name}.weight"][0]
    assert bool((row[masks[name][0]] != 0).all())
    assert not bool(row[~masks[name][0]].any())
