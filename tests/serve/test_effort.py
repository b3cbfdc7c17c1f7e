"""What pruning would take: operations counted by hand, and by torch's own counter in a real block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compress import rotation
from compress.architecture import find_blocks
from compress.recipe import Recipe
from serve.measure import effort, gpus, shapes
from serve.measure.effort import Rates
from tests import tiny_models
from tests.runs import Halve, load
from tests.serve.test_advise import LLAMA_8B, llama

RATES = Rates(1e12, 1e11, "a test")


def stages(shape: shapes.ModelShape, **fields: Any) -> dict[str, dict[str, Any]]:
    found = effort.estimate(shape, Recipe.create(**fields), RATES)
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    return {stage["name"]: stage for stage in found["stages"]}


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_a_pass_has_the_operations_that_torch_counts(family: str, tmp_path: Path) -> None:
    model = load(tiny_models.build(family, tmp_path / "model", layers=2))
    shape = shapes.read(str(tmp_path / "model"))
    length = 24
    model.set_attn_implementation("eager")  # which multiplies everything, the causal half too
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.arange(3, 3 + length)[None])
    head = model.get_output_embeddings().weight
    counted = counter.get_total_flops() - 2 * head.numel() * length
    whole = effort._pass_operations(shape, 2 * length)  # as many as of twice the length, half of which is seen
    assert whole * length == pytest.approx(counted, rel=0.02)


def test_the_stages_of_an_8b_llama_by_hand(tmp_path: Path) -> None:
    shape = shapes.read(llama(tmp_path))
    hidden, inner, blocks = LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"], LLAMA_8B["num_hidden_layers"]
    samples, length = 16, 1024
    tokens = samples * length
    weights = blocks * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * inner)
    forward = 2 * weights + 2 * length * hidden * blocks
    found = stages(shape, reconstruction="sparsegpt", samples=samples, length=length)
    assert found["forward passes"]["low"] == pytest.approx(2 * forward * tokens)
    squares = blocks * (3 * hidden**2 + inner**2)  # q k v; o; gate and up; down
    assert found["Gram matrices"]["single"] == pytest.approx(squares * tokens)
    assert found["Gram matrices"]["seconds"] == pytest.approx(squares * tokens / 1e11 / effort.GRAM_REACHES)
    assert "training of blocks" not in found
    assert set(stages(shape, metric="wanda", reconstruction="none", samples=16, length=1024)) == {
        "forward passes",
        "files",
    }

    found = stages(
        shape, reconstruction="none", samples=samples, length=length, repair="block", repair_options={"passes": 3}
    )
    assert found["training of blocks"]["low"] == pytest.approx(forward * tokens * (3 * (2.7 + 0.1) + 0.1))
    assert found["forward passes"]["low"] == pytest.approx(3 * forward * tokens)
    head = LLAMA_8B["vocab_size"] * hidden
    found = stages(shape, samples=samples, length=length, distill=5000)
    assert found["distillation"]["low"] == pytest.approx(4 * (forward + 2 * head) * 5000)
    learning = {"repair": "block", "repair_options": {"predictions": 4000}}
    found = stages(shape, reconstruction="none", samples=samples, length=length, **learning)
    learned, checked = (2 * head * 3 + 3 * forward / blocks) * 4000, (2 * 2 * head + forward / blocks) * 2 * tokens / 10
    assert found["predictions of the last block"]["low"] == pytest.approx(learned + checked)


def test_rotations_of_an_8b_llama_by_hand(tmp_path: Path) -> None:
    """Of 8 heads the values' 128 x 4096 weights, and as many of the output projection's four times 4096 rows as are judged by."""
    found = stages(
        shapes.read(llama(tmp_path)), rotation="heads", rotation_options={"steps": 50}, samples=4, length=512
    )
    judged = 8 * 128 * (rotation.ROWS + 4096)
    expected = LLAMA_8B["num_hidden_layers"] * 50 * judged * (4 * 128 + effort.ROTATION_OPERATIONS)
    assert found["rotations"]["single"] == pytest.approx(expected)
    observation = found["observation for rotations"]
    assert observation["single"] == pytest.approx(LLAMA_8B["num_hidden_layers"] * 4096**2 * 2048)
    assert observation["low"] == pytest.approx(found["forward passes"]["low"] / 2), "(which are passed on, too)"


def test_more_of_anything_takes_longer(tmp_path: Path) -> None:
    shape = shapes.read(llama(tmp_path))

    def seconds(**fields: Any) -> float:
        return effort.estimate(shape, Recipe.create(**{"samples": 16, "length": 512, **fields}), RATES)["seconds"]

    plain = seconds()
    for more in (
        {"samples": 32},
        {"length": 1024},
        {"reconstruction": "admm"},
        {"reconstruction": "apt"},
        {"targets": "dense"},
        {"rotation": "heads"},
        {"rotation": "heads", "rotation_options": {"steps": 1000}},
        {"repair": "block"},
        {"repair": "block", "repair_options": {"predictions": 1_000_000}},
        {"distill": 1000},
        {"allocate": 0.1},
    ):
        assert seconds(**more) > plain, more


def test_what_it_would_hold(tmp_path: Path) -> None:
    shape = shapes.read(llama(tmp_path))
    fields: dict[str, Any] = {"samples": 16, "length": 512, "metric": "wanda", "reconstruction": "none"}
    plain = effort.estimate(shape, Recipe.create(**fields), RATES)
    assert plain["disk_bytes"] == shape.sparse_weights
    assert plain["activation_bytes"] == 16 * 512 * LLAMA_8B["hidden_size"] * 2
    dense = effort.estimate(shape, Recipe.create(**fields, format="dense"), RATES)
    assert dense["disk_bytes"] == shape.weights
    repaired = effort.estimate(shape, Recipe.create(**fields, repair="block"), RATES)
    assert repaired["activation_bytes"] == 2 * plain["activation_bytes"]
    assert repaired["device_bytes"] - plain["device_bytes"] == pytest.approx(shape.block_bytes / 2 * effort.ADAM_BYTES)
    predicting = effort.estimate(
        shape, Recipe.create(**fields, repair="block", repair_options={"predictions": 1000}), RATES
    )
    assert predicting["device_bytes"] - repaired["device_bytes"] == 3 * 2048 * LLAMA_8B["vocab_size"] * 2


def test_this_device_is_measured() -> None:
    rates = effort.measured(torch.bfloat16, torch.device("cpu"), features=64, rows=32)
    assert rates.low > 0
    assert rates.single > 0
    assert rates.kind == "cpu"
    assert effort.measured(torch.float32, torch.device("cpu"), 64, 32).low > 0
    h100 = effort.of_gpu(gpus.find("h100"))
    assert h100.low > 10 * h100.single


def test_advise_says_it(tmp_path: Path, halve: Halve) -> None:
    config = llama(tmp_path)
    found = halve("advise", config, "--device", "h100", "--json").document["pruning"]
    assert list(found) == ["fast", "balanced", "best"]
    assert found["fast"]["seconds"] < found["balanced"]["seconds"] < found["best"]["seconds"]
    told = halve("advise", config, "--device", "h100").stdout
    assert "pruning it there (estimate, by h100's data sheet)" in told
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({"metric": "ria", "reconstruction": "none", "samples": 8}))
    found = halve("advise", config, "--device", "h100", "--recipe", recipe, "--json").document["pruning"]
    assert list(found) == ["mine.yaml"]
    refused = halve("advise", config, "--device", "h100", "--recipe", tmp_path / "none.yaml")
    assert "cannot read the recipe" in refused.message


def test_what_is_estimated_without_measuring_has_no_rates(tmp_path: Path) -> None:
    model = tiny_models.build("llama", tmp_path / "model", layers=2)
    assert find_blocks(load(model))[1]
    from serve.measure.advise import Place, _pruning

    assert _pruning(shapes.read(str(model)), Place.of("cpu"), False, None) == {}
    assert set(_pruning(shapes.read(str(model)), Place.of("cpu"), True, None)) == {"fast", "balanced", "best"}
