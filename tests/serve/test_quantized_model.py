"""Models whose activations are rounded to 8 bits where they meet packed weights: loaded, moved, saved, measured, and served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.convert import pack_checkpoint
from compress.packed import quantize_rows, unpack
from serve.linear import Sparse24Linear, prepare_for_serving
from serve.loading import load_model
from serve.measure import kernel_table, shapes, tuned
from serve.measure.kernel_entries import Shape, dtypes_of, kind_name
from serve.measure.kernel_table import measure
from tests import tiny_models
from tests.runs import Halve, compress, identical, load, logits
from tests.serve.test_scaled_model import CPU, SCALED, near, needs_kernels, sparse


@pytest.fixture(scope="module", params=[(f, v) for f in ("llama", "gpt2") for v in SCALED], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the same with activations as they are."""
    family, value_dtype = request.param
    directory = tmp_path_factory.mktemp("quantized")
    source = tiny_models.build(family, directory / "source", layers=2, dtype=torch.bfloat16)
    both = {"value_dtype": value_dtype, "activation_dtype": value_dtype}
    ours = compress(source, directory / "ours", **both).directory
    pack_checkpoint(ours, directory / "weights", activation_dtype="none")
    return ours, directory / "weights"


def rounded_by_hand(model: PreTrainedModel, *arguments: Tensor) -> Tensor:
    """Logits of a model in float32 where a hook rounds what goes into each packed layer."""

    def hook(module: Sparse24Linear, inputs: tuple[Tensor]) -> tuple[Tensor]:
        values, scale = quantize_rows(inputs[0], module.value_dtype)
        return (values.float() * scale,)

    for module in sparse(model).values():
        module.register_forward_pre_hook(hook)
    return logits(model, *arguments)


@pytest.mark.usefixtures("plain_backend")
def test_the_plain_backend_rounds_what_goes_into_each_layer(pair: tuple[Path, Path]) -> None:
    ours, weights = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in pair)
    assert all(module.quantizes_x for module in sparse(ours).values())
    assert not any(module.quantizes_x for module in sparse(weights).values())
    as_they_are = logits(weights)
    by_hand = rounded_by_hand(weights)
    assert near(logits(ours), by_hand, 0.01)
    assert not near(as_they_are, by_hand, 0.002)


@needs_kernels
class TestPrepared:
    def test_the_kernels_give_the_same_within_rounding(self, pair: tuple[Path, Path]) -> None:
        ours, weights = (load_model(path, dtype=torch.float32) for path in pair)
        assert all(module.prepared_for == "cpu" for module in sparse(ours).values())
        by_hand = rounded_by_hand(weights)
        assert near(logits(ours), by_hand, 0.01)

    def test_each_layer_multiplies_as_it_says(self, pair: tuple[Path, Path]) -> None:
        for rows in (1, 5, 40):
            for module in sparse(load_model(pair[0])).values():
                x = torch.randn(2, rows, module.in_features).bfloat16()
                values, scale = quantize_rows(x, module.value_dtype)
                dense = unpack(module.packed, torch.float32).double()
                exact = (values.double() * scale.double()) @ dense.T
                exact = exact if module.bias is None else exact + module.bias.double()
                assert near(module(x), exact, 0.004)

    def test_moves_casts_and_files_keep_it(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        model = load_model(pair[0])
        inputs = {name: torch.randn(3, module.in_features).bfloat16() for name, module in sparse(model).items()}
        before = {name: module(inputs[name]) for name, module in sparse(model).items()}
        model.save_pretrained(tmp_path / "saved")
        model.to(torch.float32).to(torch.bfloat16)
        for name, module in sparse(model).items():
            assert module.quantizes_x
            assert module.packed.quantizes_x
            assert "as x" in repr(module)
            assert identical(module(inputs[name]), before[name])
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert config["quantization_config"]["activation_dtype"] == config["quantization_config"]["value_dtype"]
        for name, module in sparse(load_model(tmp_path / "saved")).items():
            assert identical(module(inputs[name]), before[name])

    def test_served_dense_where_that_was_measured(
        self, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By what is known of such products, not by what is known of the same values with activations as they are."""
        first = next(iter(sparse(load(pair[0])).values()))
        shape = Shape(first.out_features, first.in_features, type(first).__name__ == "Sparse24Conv1D")
        for quantizes_x in (True, False):
            key = (shape, kind_name(torch.bfloat16, first.value_dtype, quantizes_x))
            monkeypatch.setattr(tuned, "decisions", lambda device, key=key: {key: tuned.Decision(None, "measured")})
            model = load(pair[0])
            assert bool(tuned.serve_as_measured(model)) is quantizes_x
            prepare_for_serving(model)
            assert logits(model).isfinite().all()


@needs_kernels
def test_layers_are_measured_as_they_multiply() -> None:
    value_dtype = torch.int8
    kind = kind_name(torch.bfloat16, value_dtype, True)
    assert kind.count("/") == 2
    assert dtypes_of(kind) == (value_dtype, torch.bfloat16)
    found = measure(
        [(Shape(64, 128), 1)],
        dtype=torch.bfloat16,
        value_dtype=value_dtype,
        quantizes_x=True,
        device=CPU,
        budget=20,
    )
    [entry] = found.entries
    assert (entry.dtype, entry.backend) == (kind, "cpu")
    sides = kernel_table._Sides(Shape(64, 128), torch.bfloat16, value_dtype, CPU, (), True).sides
    assert all(isinstance(layer, Sparse24Linear) and layer.packed.quantizes_x for layer in sides["cpu"])


def test_what_the_commands_say(halve: Halve, pair: tuple[Path, Path]) -> None:
    ours, weights = map(shapes.read, map(str, pair))
    assert (ours.quantizes_x, weights.quantizes_x) == (True, False)
    assert replace(ours, quantizes_x=False, name=weights.name).kind == weights.kind
    value_dtype = str(ours.value_dtype).removeprefix("torch.")
    assert shapes.read(str(pair[1]), activation_dtype=value_dtype).quantizes_x
    assert not shapes.read(str(pair[0]), activation_dtype="none").quantizes_x
    options = ("--device", "h100", "--prompt", "8", "--output", "8")
    said = halve("advise", pair[0], *options, "--json").document
    assert said["model"]["dtype"] == f"{value_dtype}/{value_dtype}/bfloat16"
    other = "int8" if value_dtype != "int8" else "float8_e4m3fn"
    refused = halve("advise", pair[1], *options, "--activation-dtype", other)
    assert refused.code == 2
    assert f"--value-dtype {other}" in refused.stderr
