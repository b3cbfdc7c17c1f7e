"""The recipe: the same fields from Python, flags and YAML; and every refusal says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import RecipeError
from compress.patterns import NMPattern, UnstructuredPattern
from compress.recipe import Recipe

RECIPES: list[dict[str, Any]] = [
    {},
    {"metric": "wanda", "reconstruction": "none", "calibration": "texte/ä.txt", "ignore": ("*.k_proj", "lm.0")},
    {"pattern": "4:8", "format": "dense", "reconstruction_options": {"damping": 0.1, "block_size": 64}},
    {"metric": "wanda", "reconstruction": "dsnot", "reconstruction_options": {"max_cycles": 5, "skip": "mlp"}},
    {
        "pattern": "unstructured",
        "sparsity": 0.5,
        "format": "dense",
        "metric": "wanda",
        "reconstruction": "dsnot",
        "reconstruction_options": {"overshoot": False},
    },
    {"reconstruction": "r2-dsnot", "reconstruction_options": {"relative": "grow", "gamma_grow": 0.001, "threshold": 0}},
    {"reconstruction": "swaps", "reconstruction_options": {"max_sweeps": 3}},
    {"pattern": "16:32", "format": "dense", "metric": "magnitude", "dtype": "bfloat16"},
    {"pattern": "unstructured", "sparsity": 0.6, "group": "row", "format": "dense", "seed": 7, "samples": 1},
]


@pytest.mark.parametrize("fields", RECIPES)
def test_yaml_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.create(**fields)
    path = tmp_path / "recipe.yaml"
    dumped = recipe.model_dump(mode="json")
    for data in (dumped, {"recipe": dumped, "versions": {"halve": "0"}}):  # by hand, and as an artefact records it
        path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
        again = Recipe.load(path)
        assert again == recipe
        assert again.digest == recipe.digest
        assert again.differences(recipe) == []


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "16:32", "1:60"])
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_pattern_needs_no_quotes_in_yaml(pattern: str, quote: str, tmp_path: Path) -> None:
    """YAML 1.1 reads a bare 2:4 as a number to the base 60."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"pattern: {quote}{pattern}{quote}\nformat: dense\nsamples: 64\n")
    recipe = Recipe.load(path)
    assert recipe.pattern == pattern
    assert recipe.samples == 64


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("metric: magnitude\nsamples: 64\nseed: 3\n")
    recipe = Recipe.load(path, samples=16, metric="wanda")
    assert (recipe.metric, recipe.samples, recipe.seed) == ("wanda", 16, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping of fields"),
        (b"- metric\n", "must be a mapping of fields"),
        (b"metric: [\n", "is not YAML"),
        (b"metric: \xff\n", "is not YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        (b"metrik: wanda\n", "no field 'metrik'; did you mean 'metric'"),
        (b"3: wanda\n", "no field '3'"),
        (b"samples: many\n", r"samples: Input should be a valid integer.*\(got 'many'\)"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "wnda"}, "unknown metric 'wnda'; did you mean 'wanda' or .*known: gblm, magnitude, .*wanda"),
        ({"reconstruction": "sparse-gpt"}, "unknown reconstruction 'sparse-gpt'; did you mean 'sparsegpt'"),
        ({"recons": "none"}, "no field 'recons'; did you mean 'reconstruction'"),
        ({"pattern": "2/4"}, "unknown pattern '2/4'; did you mean '2:4'"),
        ({"pattern": "4:8"}, "only 2:4 can be packed, and the pattern is '4:8'; add format='dense'"),
        ({"pattern": "unstructured", "sparsity": 0.5}, "only 2:4 can be packed"),
        ({"pattern": "unstructured", "format": "dense"}, "needs a sparsity"),
        ({"pattern": "unstructured", "sparsity": 1.5, "format": "dense"}, "between 0 and 1"),
        ({"sparsity": 0.7}, "has a sparsity of 0.5, but sparsity=0.7"),
        (
            {"pattern": "unstructured", "sparsity": 0.5, "format": "dense", "group": "layer"},
            "cannot compare a whole layer; use group 'block' or 'row', or choose a metric",
        ),
        ({"metric_options": {"alpha": 1}}, "metric_options were given, but no metric: sparsegpt uses its own"),
        ({"metric": "magnitude", "metric_options": {"alpha": 1}}, r"magnitude has no option 'alpha' \(it has none\)"),
        ({"metric": "wanda", "metric_options": {"alpha": 1}}, r"wanda has no option 'alpha' \(known: variant\)"),
        ({"reconstruction_options": {"dampening": 0.1}}, "sparsegpt has no option 'dampening'; did you mean 'damping'"),
        ({"reconstruction_options": {"damping": 0}}, "option 'damping' of sparsegpt: .*greater than 0.*got 0"),
        ({"reconstruction_options": {"damping": 1.5}}, "option 'damping' of sparsegpt"),
        ({"reconstruction_options": {"block_size": 0}}, "option 'block_size' of sparsegpt"),
        ({"reconstruction": "swaps", "reconstruction_options": {"max_sweeps": 0}}, "option 'max_sweeps' of swaps"),
        ({"reconstruction": "dsnot", "reconstruction_options": {"max_cycle": 9}}, "did you mean 'max_cycles'"),
        (
            {"reconstruction": "r2-dsnot", "reconstruction_options": {"relative": "both"}},
            "option 'relative' of r2-dsnot",
        ),
        ({"reconstruction_options": {"damping": "much"}}, "option 'damping' of sparsegpt: .*valid number"),
        ({"samples": 0}, r"samples: .*greater than or equal to 1 \(got 0\)"),
        ({"length": 0}, "length: "),
        ({"seed": -1}, "seed: "),
        ({"dtype": "float8"}, r"dtype: Input should be 'auto', 'bfloat16', 'float16' or 'float32' \(got 'float8'\)"),
        ({"format": "zip"}, "format: Input should be 'packed' or 'dense'"),
        ({"group": "matrix"}, "group: "),
        ({"group": "layer"}, "group='layer' is of unstructured patterns: .* in '2:4' are the groups of 4"),
        ({"group": "block", "pattern": "4:8", "format": "dense", "metric": "ria"}, "group='block' is of unstructured"),
        (
            {
                "pattern": "unstructured",
                "sparsity": 0.5,
                "format": "dense",
                "group": "row",
                "metric": "wanda",
                "metric_options": {"variant": True},
            },
            "the options of the metric compare the weights of a whole layer, and group is 'row'",
        ),
        (
            {"reconstruction": "dsnot", "reconstruction_options": {"overshoot": True}},
            "overshoot is of unstructured patterns: in 2:4 ",
        ),
        (
            {"reconstruction": "r2-dsnot", "reconstruction_options": {"overshoot": False}},
            "overshoot is of unstructured patterns",
        ),
        (
            {"reconstruction": "apt", "reconstruction_options": {"variant": "SS", "refit_steps": 10}},
            "refit_steps is of the joint refit.*variant SS compensates for one weight at a time",
        ),
        (
            {"reconstruction": "apt", "reconstruction_options": {"variant": "MS", "refit_tolerance": 0.1}},
            "refit_tolerance is of the joint refit",
        ),
        ({"add_bias": True}, "neither the metric nor the reconstruction would change it"),
        ({"metric": 3}, "metric: Input should be a valid string"),
        ({"ignore": "lm_head"}, "ignore: "),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.create(**fields)


def test_what_auto_means() -> None:
    default = Recipe.create()
    assert default.chosen_metric is None
    assert (default.chosen_group, default.needs, default.parsed_pattern) == ("block", {"gram"}, NMPattern(2, 4))
    plain = Recipe.create(reconstruction="none")
    assert plain.chosen_metric is not None
    assert (plain.chosen_metric.name, plain.chosen_group, plain.needs) == ("wanda", "row", {"sum_of_squares"})
    for method, needs in {
        "bias": {"moments"},
        "dsnot": {"moments"},
        "r2-dsnot": {"moments"},
        "swaps": {"gram"},
    }.items():
        recipe = Recipe.create(reconstruction=method)  # they mend a mask, and the usual one is Wanda's
        assert recipe.chosen_metric is not None
        assert (recipe.chosen_metric.name, recipe.needs) == ("wanda", {"sum_of_squares", *needs})
    both = Recipe.create(metric="wanda")
    assert (both.chosen_reconstruction.name, both.needs) == ("sparsegpt", {"gram", "sum_of_squares"})
    layer = Recipe.create(metric="magnitude", pattern="unstructured", sparsity=0.5, format="dense")
    assert (layer.chosen_group, layer.needs, layer.parsed_pattern) == ("layer", {"gram"}, UnstructuredPattern(0.5))
    assert Recipe.create(metric="magnitude", group="row").chosen_group == "row"


CHANGES: dict[str, Any] = {
    "metric": "wanda",
    "reconstruction": "none",
    "pattern": " 2:4",
    "sparsity": 0.5,
    "group": "row",
    "reconstruction_options": {"damping": 0.1},
    "permutation": "fold",
    "rotation": "heads",
    "allocate": 0.1,
    "targets": "dense",
    "repair": "block",
    "distill": 1000,
    "add_bias": True,
    "calibration": "texts.jsonl",
    "samples": 64,
    "tokens_per_input": 4,
    "length": 512,
    "substitute": 0.2,
    "seed": 1,
    "ignore": ("*.k_proj",),
    "dtype": "float32",
    "format": "dense",
    "value_dtype": "int8",
    "activation_dtype": "int8",
}


def test_every_field_is_in_the_digest_and_the_differences() -> None:
    default = Recipe.create()
    digests = {default.digest}
    options = {f"{stage}_options" for stage in ("metric", "rotation", "targets", "allocate", "repair", "distill")}
    assert CHANGES.keys() | options | {"training_samples"} == Recipe.model_fields.keys(), (
        "a new field belongs in this test"
    )
    for name, value in CHANGES.items():
        # (which alone would be refused)
        beside = {"add_bias": {"reconstruction": "bias"}, "activation_dtype": {"value_dtype": "int8"}}.get(name, {})
        before, changed = Recipe.create(**beside), Recipe.create(**beside, **{name: value})
        digests.add(changed.digest)
        [difference] = changed.differences(before)
        old, new = (recipe.model_dump(mode="json")[name] for recipe in (before, changed))
        assert difference == f"{name}: {new!r} instead of {old!r}"
    assert len(digests) == 1 + len(CHANGES)


def test_the_digest_does_not_hang_on_order_or_on_what_was_spelled_out() -> None:
    options = {"damping": 0.1, "block_size": 64}
    one = Recipe.create(seed=1, samples=64, reconstruction_options=options)
    two = Recipe.create(reconstruction_options=dict(reversed(options.items())), samples=64, seed=1, pattern="2:4")
    assert one.digest == two.digest
    assert len(one.digest) == 64
