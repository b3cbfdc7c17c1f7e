"""Models with packed values of 8 bits in memory: loaded, moved, cast, saved, measured, and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.convert import unpack_checkpoint
from compress.packed import FLOAT_DTYPES, bytes_of
from serve.engines.loading import load_checkpoint
from serve.kernels.cpu import library
from serve.linear import Sparse24Linear, backends, prepare_for_serving
from serve.loading import load_model
from serve.measure import kernel_table, shapes, tuned
from serve.measure.kernel_entries import Shape, dtypes_of, kind_name
from serve.measure.kernel_table import measure
from tests import tiny_models
from tests.runs import Halve, compress, generated, identical, load, logits

CPU = torch.device("cpu")
SCALED = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
needs_kernels = pytest.mark.skipif(library.load() is None, reason=library.status())


@pytest.fixture(scope="module", params=[(f, v) for f in ("llama", "gpt2", "gpt_neox") for v in SCALED], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the dense one that `halve unpack` makes of it."""
    family, value_dtype = request.param
    directory = tmp_path_factory.mktemp("scaled")
    source = tiny_models.build(family, directory / "source", layers=2, dtype=torch.bfloat16)
    packed = compress(source, directory / "packed", value_dtype=value_dtype).directory
    unpack_checkpoint(packed, directory / "dense")
    return packed, directory / "dense"


def sparse(model: PreTrainedModel) -> dict[str, Sparse24Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}


def near(one: torch.Tensor, two: torch.Tensor, part: float) -> bool:
    return bool((one.double() - two.double()).norm() <= part * two.double().norm())


@pytest.mark.usefixtures("plain_backend")
class TestPlain:
    def test_the_bits_of_the_dense_checkpoint(self, pair: tuple[Path, Path]) -> None:
        packed, dense = map(load, pair)
        assert packed.dtype == torch.bfloat16
        assert identical(logits(packed), logits(dense))
        assert torch.equal(generated(packed), generated(dense))
        value_dtype = SCALED[json.loads((pair[0] / "config.json").read_text())["quantization_config"]["value_dtype"]]
        for module in sparse(packed).values():
            assert module.weight_packed.dtype == module.value_dtype == value_dtype
            assert module.weight_scale is not None
            assert module.weight_scale.dtype == torch.float32
            assert module.dtype == module.weight.dtype == torch.bfloat16
            held = sum(t.nbytes for name, t in module.named_parameters() if name != "bias")
            assert held == bytes_of(module.out_features, module.in_features, value_dtype)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES.values(), ids=list(FLOAT_DTYPES))
    def test_any_dtype_can_be_asked_for(self, pair: tuple[Path, Path], dtype: torch.dtype) -> None:
        """Values and scales are those of the file, whatever is computed in."""
        asked = AutoModelForCausalLM.from_pretrained(pair[0], dtype=dtype).eval()
        cast = load(pair[0]).to(dtype)
        assert {p.dtype for n, p in asked.named_parameters() if "weight_" not in n} == {dtype}
        assert logits(asked).dtype == logits(cast).dtype == dtype
        for model in (asked, cast):
            assert near(logits(model), logits(AutoModelForCausalLM.from_pretrained(pair[1], dtype=dtype).eval()), 0.05)
        own = load(pair[0]).state_dict()
        for model in (asked, cast):
            for name, tensor in model.state_dict().items():
                if name.endswith((".weight_packed", ".weight_mask", ".weight_scale")):
                    assert identical(tensor, own[name]), name

    def test_casts_do_not_add_up(self, pair: tuple[Path, Path]) -> None:
        model = load(pair[0])
        inputs = {name: torch.randn(3, module.in_features).bfloat16() for name, module in sparse(model).items()}
        before = {name: module(inputs[name]) for name, module in sparse(model).items()}
        model.to(torch.float32).to(torch.bfloat16)
        assert before
        for name, module in sparse(model).items():
            assert module.dtype == torch.bfloat16
            assert identical(module(inputs[name]), before[name])

    def test_saved_again(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        model = load(pair[0])
        model.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
        assert identical(logits(again), logits(model))
        for name, tensor in model.state_dict().items():
            assert identical(tensor, again.state_dict()[name])

    def test_state_dict_goes_in_and_out(self, pair: tuple[Path, Path]) -> None:
        model, other = load(pair[0]), load(pair[0])
        for module in sparse(other).values():
            assert module.weight_scale is not None
            module.weight_scale.data.mul_(3)
        assert not identical(logits(other), logits(model))
        other.load_state_dict(model.state_dict())
        assert identical(logits(other), logits(model))


@needs_kernels
class TestPrepared:
    def test_the_kernels_give_the_same_within_rounding(self, pair: tuple[Path, Path]) -> None:
        model, dense = load_model(pair[0]), load_model(pair[1])
        assert all(module.prepared_for == "cpu" for module in sparse(model).values())
        assert near(logits(model), logits(dense), 0.03)
        reasons = {row["backend"] for row in backends(model, {"prefill": 96, "decode": 1})}
        assert reasons == {"cpu"}

    def test_moves_and_casts_keep_the_bits(self, pair: tuple[Path, Path]) -> None:
        model, files = load_model(pair[0]), load(pair[0]).state_dict()
        model.to(torch.float32).to(torch.float16).to(torch.bfloat16)
        assert all(module.prepared_for == "cpu" for module in sparse(model).values())
        after = model.state_dict()
        names = [name for name in files if name.endswith((".weight_packed", ".weight_mask", ".weight_scale"))]
        assert names
        assert all(identical(after[name], files[name]) for name in names)

    def test_what_the_engine_loads(self, pair: tuple[Path, Path]) -> None:
        for wish, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
            model, _, choices = load_checkpoint(str(pair[0]), "cpu", wish)
            assert model.dtype == dtype
            assert any(str(dtype)[6:] in choice for choice in choices)
            assert near(logits(model), logits(load_model(pair[1], dtype=dtype)), 0.05)

    def test_served_dense_where_that_was_measured(
        self, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By what is known of values of 8 bits, not by what is known of others."""
        first = next(iter(sparse(load(pair[0])).values()))
        kind = kind_name(torch.bfloat16, first.value_dtype)
        for key, is_dense in ((kind, True), ("bfloat16", False)):
            decision = tuned.Decision(None, "it was measured")
            conv1d = type(first).__name__ == "Sparse24Conv1D"
            shape = Shape(first.out_features, first.in_features, conv1d)
            monkeypatch.setattr(tuned, "decisions", lambda device, k=(shape, key), d=decision: {k: d})
            model = load(pair[0])
            before, replaced = logits(model), tuned.serve_as_measured(model)
            assert bool(replaced) is is_dense
            prepare_for_serving(model)
            assert near(logits(model), before, 0.03)


@needs_kernels
@pytest.mark.parametrize("value_dtype", SCALED.values(), ids=list(SCALED))
def test_layers_are_measured_with_their_values(value_dtype: torch.dtype) -> None:
    kind = kind_name(torch.bfloat16, value_dtype)
    assert dtypes_of(kind) == (value_dtype, torch.bfloat16)
    assert dtypes_of(kind_name(torch.float16)) == (torch.float16, torch.float16)
    found = measure([(Shape(64, 128), 1)], dtype=torch.bfloat16, value_dtype=value_dtype, device=CPU, budget=60)
    [entry] = found.entries
    assert (entry.dtype, entry.backend) == (kind, "cpu")
    sides = kernel_table._Sides(Shape(64, 128), torch.bfloat16, value_dtype, CPU).sides
    assert all(isinstance(layer, Sparse24Linear) and layer.value_dtype == value_dtype for layer in sides["cpu"])
    assert {layer.weight.dtype for layer in sides["dense"]} == {torch.bfloat16}


def tpot(advice: dict[str, Any]) -> float:
    return advice["times"]["sparse"]["tpot_seconds"]["median"]


def test_what_the_command_says(halve: Halve, pair: tuple[Path, Path]) -> None:
    value_dtype = json.loads((pair[0] / "config.json").read_text())["quantization_config"]["value_dtype"]
    shape = shapes.read(str(pair[0]))
    assert (shape.dtype, shape.value_dtype) == (torch.bfloat16, SCALED[value_dtype])
    assert shape.packed_bytes == sum(
        layers.count * bytes_of(layers.shape.n, layers.shape.k, SCALED[value_dtype]) for layers in shape.prunable
    )
    dense = halve("advise", pair[1], "--device", "h100", "--prompt", "8", "--output", "8", "--json").document
    scaled = [
        halve("advise", path, "--device", "h100", "--prompt", "8", "--output", "8", *more, "--json").document
        for path, more in ((pair[0], ()), (pair[1], ("--value-dtype", value_dtype)))
    ]
    for document in scaled:
        assert document["model"]["dtype"] == f"{value_dtype}/bfloat16"
        assert document["memory"]["weights_bytes"]["sparse"] < dense["memory"]["weights_bytes"]["sparse"]
        assert tpot(document) < tpot(dense)
        assert document["times"]["dense"] == dense["times"]["dense"]
