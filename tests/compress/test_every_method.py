"""Any metric with any reconstruction, on every pattern, and each of them on every family from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.layers import PrunedLayer, prune_layer
from compress.metrics import METRICS
from compress.pipeline import compress_model
from compress.recipe import Recipe
from compress.reconstruction import RECONSTRUCTIONS
from tests import tiny_models
from tests.compress.metric_cases import case
from tests.runs import block_linears, calibration, kept_in_groups, load, stored

MOVES_WEIGHTS = {"sparsegpt", "apt", "refit", "admm", "alps"}
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "row": {"pattern": "unstructured", "sparsity": 0.5, "group": "row"},
    "block": {"pattern": "unstructured", "sparsity": 0.5, "group": "block"},
    "layer": {"pattern": "unstructured", "sparsity": 0.5, "group": "layer"},
}


def pruned(metric: str, reconstruction: str, pattern: str) -> tuple[Tensor, Tensor, LayerStatistics, PrunedLayer]:
    """A layer with a bias that any method can prune; its weight, its inputs, and what became of it."""
    given = case(n=10, k=136, t=900, samples=3)
    statistics = given.statistics()
    statistics.bias = torch.linspace(-1, 1, 10)
    recipe = Recipe.create(metric=metric, reconstruction=reconstruction, format="dense", **PATTERNS[pattern])
    return given.weight, given.x, statistics, prune_layer("layer", given.weight, statistics, recipe)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_any_metric_with_any_reconstruction(metric: str, reconstruction: str, pattern: str) -> None:
    weight, x, statistics, done = pruned(metric, reconstruction, pattern)
    kept = done.weight != 0
    if ":" in pattern:
        keep_n, m = map(int, pattern.split(":"))
        assert int(kept_in_groups(done.weight, m).max()) <= keep_n
    elif pattern == "row":
        assert bool((kept.sum(dim=1) == 68).all())
    elif pattern == "block" and reconstruction not in ("dsnot", "r2-dsnot"):  # those keep the count of a row
        assert [int(block.sum()) for block in kept.split(128, dim=1)] == [640, 40]
    assert int(kept.sum()) == kept.numel() // 2
    assert torch.equal(done.weight[kept], weight[kept]) is (reconstruction not in MOVES_WEIGHTS)

    # The report's error, computed again in float64 with the bias.
    corrected = RECONSTRUCTIONS[reconstruction].corrects_bias or METRICS[metric].corrects_bias
    assert (done.bias is not None) is corrected
    shift = 0.0 if done.bias is None else (done.bias - statistics.bias).double()
    sample = statistics.sample.double()
    change = sample @ (done.weight - weight).double().T + shift
    expected = float(change.square().sum() / (sample @ weight.double().T).square().sum())
    assert done.record["relative_output_error"] == pytest.approx(expected, rel=1e-4)
    if corrected:  # the mean of the output over the calibration is what it was
        outputs = x.double() @ (done.weight - weight).double().T + shift
        assert float(outputs.mean(dim=0).abs().max()) < 1e-4 * float((x.double() @ weight.double().T).abs().max())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("metric", ["wanda", "magnitude", "stade"])
def test_repairs_help(metric: str, pattern: str) -> None:
    """On the layer's own inputs: what changes weights or swaps by the Gram matrix lowers the error of any mask."""
    errors = {name: pruned(metric, name, pattern)[3].record["relative_output_error"] for name in RECONSTRUCTIONS}
    assert errors["apt"] < errors["sparsegpt"] < errors["none"]
    assert errors["alps"] < errors["admm"] < errors["refit"] < errors["sparsegpt"]
    if metric != "stade":  # which corrects the bias by itself, so that swaps pursue another error than is left
        assert errors["swaps"] < errors["none"]
        assert errors["bias"] < errors["none"]


EVERYWHERE = ["llama", "qwen2", "gemma2", "opt", "opt with norms at the end", "gpt2", "gpt_neox", "mamba", "vit"]
METHODS = [
    *((name, "none") for name in METRICS),
    *((None if r.own_metric else "wanda", n) for n, r in RECONSTRUCTIONS.items()),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("sources")
    made = {}
    for name in EVERYWHERE:
        family = name.split()[0]
        overrides = {"do_layer_norm_before": False} if "end" in name else {}
        made[name] = tiny_models.build(family, directory / name.replace(" ", "-"), layers=1, **overrides)
    return made


@pytest.mark.parametrize(("metric", "reconstruction"), METHODS, ids=lambda value: str(value))
@pytest.mark.parametrize("family", EVERYWHERE)
def test_every_method_on_every_family(
    family: str, metric: str | None, reconstruction: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[family]
    images = family == "vit"
    done = compress_model(
        source,
        tmp_path / "out",
        metric=metric,
        reconstruction=reconstruction,
        format="dense",
        calibration="random" if images else str(calibration(source.parent)),
        samples=3,
        length=24,
    )
    report = json.loads((done.directory / "report.json").read_text())
    assert report["summary"]["layers_pruned"] == report["summary"]["layers"] == len(report["layers"])
    original, now = block_linears(load(source)), block_linears(load(done.directory))
    names = {layer["name"] for layer in report["layers"]}
    assert names <= now.keys()
    for name in names:
        assert int(kept_in_groups(now[name], 4).max()) <= 2, name
        kept = now[name] != 0
        assert float(kept.float().mean()) > 0.4, name
        if reconstruction not in MOVES_WEIGHTS:
            assert torch.equal(now[name][kept], original[name][kept]), name
    corrects = RECONSTRUCTIONS[reconstruction].corrects_bias or (metric is not None and METRICS[metric].corrects_bias)
    before, after = stored(source), stored(done.directory)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    biases = {name for name in changed if name.endswith("bias")}
    model = load(source)
    has_bias = {name for name in names if model.get_submodule(name).bias is not None}
    assert len(changed - biases) == len(names)
    assert bool(biases) is (corrects and bool(has_bias))


@pytest.mark.parametrize("family", ["qwen2", "opt", "vit"])
def test_permutations_with_gradients_and_outputs(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """What a metric needs beyond the inputs' statistics moves with the channels."""
    source = sources[family]
    for metric in ("gblm", "symwanda", "wanda++", "stade"):
        done = compress_model(
            source,
            tmp_path / metric,
            metric=metric,
            reconstruction="none",
            permutation="fold",
            calibration="random" if family == "vit" else str(calibration(source.parent)),
            samples=3,
            length=24,
        )
        permuted = [layer for layer in done.report["layers"] if "permutation" in layer]
        assert len(permuted) == done.report["summary"]["layers_permuted"] == 2
        assert all(layer["permutation"]["kept_score_gain"] >= 0 for layer in permuted)
        assert all(layer["relative_output_error"] < 0.7 for layer in done.report["layers"])
