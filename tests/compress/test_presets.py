"""Presets are recipes: they are whole, and what is given beside them wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from compress.errors import RecipeError
from compress.presets import PRESETS, preset_fields
from compress.recipe import Recipe
from tests import tiny_models
from tests.runs import LENGTH, Halve, calibration


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
    assert "training_samples: 768" in halve("methods").stdout
