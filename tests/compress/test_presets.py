"""Presets are recipes: they are whole, and what is given beside them wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import CalibrationError, RecipeError
from compress.pipeline import compress_model
from compress.presets import PRESETS, preset_fields
from compress.recipe import Recipe
from tests import tiny_models
from tests.runs import LENGTH, Halve, calibration, tree


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe(name: str) -> None:
    recipe = Recipe.create(**preset_fields(name, {}))
    assert recipe.pattern == "2:4"
    assert recipe.distill == 0, "no preset trains the model as a whole without being asked"


def test_what_is_given_wins() -> None:
    best = PRESETS["best"].fields
    assert preset_fields("best", {})["repair_options"] == best["repair_options"]
    changed = preset_fields("best", {"samples": 7, "repair_options": {"passes": 9}})
    assert changed["samples"] == 7
    assert changed["repair_options"] == {**best["repair_options"], "passes": 9}
    assert best["repair_options"]["passes"] != 9, "the preset itself stays"
    assert "repair_options" not in preset_fields("best", {"repair": "none"})


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(RecipeError, match=r"no preset 'bset'.*best"):
        preset_fields("bset", {})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    halve = Halve(capsys, monkeypatch)
    source = tiny_models.build("llama", tmp_path / "source")
    given = ["--calibration", calibration(tmp_path), "--samples", "6", "--length", str(LENGTH), "--json"]
    done = halve("compress", source, "--out", tmp_path / "out", "--preset", "fast", *given)
    assert done.code == 0, done.stderr
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["recipe"]
    assert (saved["metric"], saved["reconstruction"], saved["samples"]) == ("wanda", "none", 6)
    file = tmp_path / "recipe.yaml"
    file.write_text("metric: wanda\n")
    both = halve("compress", source, "--out", tmp_path / "no", "--preset", "fast", "--recipe", file, *given)
    assert both.code == 2
    assert "not both" in both.message
    assert halve("methods", "--json").document["presets"]["fast"]["fields"]["metric"] == "wanda"
    assert "training_samples: 800" in halve("methods").stdout


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("best", {"repair": "none"}, {"training_samples": None, "repair": "none", "samples": 64}),
        ("best", {"repair": "none", "distill": 100}, {"training_samples": 800}),
        ("best", {"samples": 1000}, {"samples": 1000, "training_samples": 1000}),
        ("best", {"length": 2048}, {"samples": 16, "training_samples": 200}),
        ("best", {"length": 2048, "samples": 5}, {"samples": 5, "training_samples": 200}),
        ("best", {"length": 2048, "samples": 300}, {"samples": 300, "training_samples": 300}),
        (
            "best",
            {"pattern": "unstructured", "sparsity": 0.5, "format": "dense"},
            {"permutation": "none", "rotation": "none", "pattern": "unstructured"},
        ),
        ("best", {"metric": "gblm"}, {"metric": "gblm", "rotation": "none", "permutation": "fold"}),
        ("best", {"metric": "pruner-zero"}, {"metric": "pruner-zero", "rotation": "none"}),
        ("balanced", {"metric": "wanda"}, {"metric": "wanda", "rotation": "heads"}),
        ("balanced", {"reconstruction": "sparsegpt", "targets": "own"}, {"targets": "own", "samples": 40}),
    ],
)
def test_what_a_preset_says_for_the_sake_of_something_goes_with_it(
    preset: str, given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    """No complaint about a field that nobody wrote; from the preset by name, and from its recipe in a file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(dict(PRESETS[preset].fields)))
    for recipe in (Recipe.create(**preset_fields(preset, given)), Recipe.load(file, **given)):
        assert {name: getattr(recipe, name) for name in expected} == expected


def test_another_number_keeps_its_options(tmp_path: Path) -> None:
    """Of more tokens, or another share, they are the same; of none there are none."""
    file = tmp_path / "recipe.yaml"
    file.write_text("distill: 1000\ndistill_options: {windows: 900}\nallocate: 0.1\nallocate_options: {by: latency}\n")
    more = Recipe.load(file, distill=2000, allocate=0.2)
    assert (more.distill_options, more.allocate_options) == ({"windows": 900}, {"by": "latency"})
    none = Recipe.load(file, distill=0, allocate=0.0)
    assert (none.distill_options, none.allocate_options) == ({}, {})


def test_a_length_in_quotes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("samples: 128\nlength: '512'\n")
    assert Recipe.load(file).length == 512
    assert Recipe.load(file, length=1024).length == 1024


def test_options_of_rotations_go_with_them(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("rotation: heads\nrotation_options: {steps: 8}\n")
    assert Recipe.load(file).rotation_options == {"steps": 8}
    loaded = Recipe.load(file, metric="gblm")
    assert (loaded.rotation, loaded.rotation_options) == ("none", {})


def test_a_field_that_was_written_is_not_dropped(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing trains"):
        Recipe.create(**preset_fields("fast", {"training_samples": 300}))
    file = tmp_path / "recipe.yaml"
    file.write_text("pattern: unstructured\nsparsity: 0.5\nformat: dense\npermutation: fold\n")
    with pytest.raises(RecipeError, match="leave --permutation out"):
        Recipe.load(file)
    with pytest.raises(RecipeError, match="leave --rotation out"):
        Recipe.create(**preset_fields("balanced", {"metric": "gblm", "rotation": "heads"}))


@pytest.mark.parametrize(
    ("preset", "widest", "samples", "windows"),
    [("balanced", 1536, 40, 40), ("balanced", 14336, 224, 224), ("best", 1536, 64, 800), ("best", 28672, 896, 896)],
)
def test_wide_models_get_more_windows(preset: str, widest: int, samples: int, windows: int) -> None:
    """So many tokens for each input of the widest layer: SmolLM2, an 8B Llama, a 70B one."""
    fields = preset_fields(preset, {})
    recipe = Recipe.create(**fields).fitted_to(widest)
    assert (recipe.samples, recipe.windows) == (samples, windows)
    assert recipe.samples * recipe.length >= fields["tokens_per_input"] * widest >= 8 * widest
    assert recipe.fitted_to(widest) == recipe


def test_as_many_windows_as_the_text_has(tmp_path: Path) -> None:
    """The recipe that is saved says how many there were, and gives the same again."""
    source = tiny_models.build("llama", tmp_path / "source")
    given = {"calibration": str(calibration(tmp_path)), "length": LENGTH, "samples": 4}
    wide = compress_model(source, tmp_path / "wide", tokens_per_input=2, **given)
    saved = yaml.safe_load((tmp_path / "wide" / "recipe.yaml").read_text())
    widest = max(layer["shape"][1] for layer in wide.report["layers"])
    assert saved["recipe"]["samples"] == -(-2 * widest // LENGTH)
    assert saved["calibration"]["tokens"] == saved["recipe"]["samples"] * LENGTH
    more = compress_model(source, tmp_path / "more", tokens_per_input=10_000, **given)
    found = yaml.safe_load((tmp_path / "more" / "recipe.yaml").read_text())
    assert 4 < found["recipe"]["samples"] < 10_000 * widest // LENGTH
    assert found["calibration"]["tokens"] == found["recipe"]["samples"] * LENGTH
    again = compress_model(source, tmp_path / "again", recipe=Recipe.load(tmp_path / "more" / "recipe.yaml"))
    assert tree(again.directory) == tree(more.directory)
    with pytest.raises(CalibrationError, match="samples"):
        compress_model(source, tmp_path / "no", tokens_per_input=2, **given | {"samples": 10**6})
