"""Activations of 8 bits: how they are rounded, and what checkpoints and recipes say of them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoint import parse_config
from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import CorruptCheckpointError, RecipeError, SourceError, UsageError
from compress.packed import LARGEST, quantize_rows
from compress.recipe import Recipe
from compress.verify import verify
from tests import tiny_models
from tests.compress.test_scaled import BOTH, NAMED, made, nearest
from tests.runs import Halve, compress, identical, report, stored, tree

OF_X = pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@BOTH
@OF_X
@given(seed=st.integers(0, 2**20), factor=st.sampled_from([1.0, 1e-3, 3e3, 0.0]))
def test_rounding_against_a_search_through_all_values(
    dtype: torch.dtype, x_dtype: torch.dtype, seed: int, factor: float
) -> None:
    x = (torch.randn(3, 12, generator=torch.Generator().manual_seed(seed)) * factor).to(x_dtype)
    values, scale = quantize_rows(x, dtype)
    assert (values.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (3, 1))
    for row, step, rounded in zip(x.float(), scale[:, 0], values, strict=True):
        largest = row.abs().max().clamp(min=2.0**-100)
        end = torch.tensor(LARGEST[dtype])
        assert step == largest / end
        for before, after in zip(row, rounded, strict=True):
            # what multiplies, and the product, are rounded to float32 first
            product = Fraction(float(before * (end / largest)))
            within = max(min(product, Fraction(LARGEST[dtype])), Fraction(-LARGEST[dtype]))
            assert Fraction(float(after)) == nearest(within, dtype)


@BOTH
def test_halves_go_to_the_even_value(dtype: torch.dtype) -> None:
    """The inverse of the scale is exactly one here."""
    end = LARGEST[dtype]
    x = torch.tensor([[end, 0.5, 1.5, 2.5, -0.5, -1.5, 17.0, 19.0, 25.0, 2.0**-10, 3 * 2.0**-10]])
    values, scale = quantize_rows(x, dtype)
    assert scale.item() == 1
    wanted = (
        [127, 0, 2, 2, 0, -2, 17, 19, 25, 0, 0]
        if dtype == torch.int8
        else [448, 0.5, 1.5, 2.5, -0.5, -1.5, 16, 20, 24, 0, 2.0**-8]
    )
    assert values.float().tolist() == [wanted]


@BOTH
@OF_X
def test_what_is_not_finite_and_what_is_tiny(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    x = torch.ones(6, 16, dtype=x_dtype)
    x[0, 3], x[1, 4], x[2, 5] = torch.inf, -torch.inf, torch.nan
    x[3] = 0
    x[4] = torch.finfo(x_dtype).tiny
    values, scale = quantize_rows(x, dtype)
    assert scale[:3].isnan().all()
    assert scale[3:].isfinite().all()
    assert (scale[3:] > 0).all()
    assert values[3].float().eq(0).all()
    assert values[5].float().eq(LARGEST[dtype]).all()
    dense = values.float() * scale
    assert (dense[4] - x[4].float()).abs().max() <= 2.0**-100
    assert quantize_rows(x[:, :0], dtype)[0].shape == (6, 0)


@BOTH
def test_any_number_of_dimensions(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8)
    values, scale = quantize_rows(x, dtype)
    flat, flat_scale = quantize_rows(x.view(6, 8), dtype)
    assert torch.equal(values.view(6, 8).view(torch.uint8), flat.view(torch.uint8))
    assert torch.equal(scale, flat_scale.view(2, 3, 1))


@NAMED
def test_every_way_to_the_same_checkpoint(value_dtype: str, tmp_path: Path) -> None:
    source, dense, packed = made(tmp_path)
    both = {"value_dtype": value_dtype, "activation_dtype": value_dtype}
    ours = compress(source, tmp_path / "ours", **both).directory
    pack_checkpoint(dense, tmp_path / "from-dense", **both)
    pack_checkpoint(packed, tmp_path / "from-packed", **both)
    pack_checkpoint(packed, tmp_path / "weights", value_dtype)
    pack_checkpoint(tmp_path / "weights", tmp_path / "from-scaled", activation_dtype=value_dtype)
    wanted, config = stored(ours), json.loads((ours / "config.json").read_text())
    assert config["quantization_config"]["activation_dtype"] == value_dtype
    for name in ("from-dense", "from-packed", "from-scaled"):
        found = stored(tmp_path / name)
        assert found.keys() == wanted.keys()
        assert all(identical(found[key], wanted[key]) for key in wanted), name
        assert json.loads((tmp_path / name / "config.json").read_text()) == config
        verdict = verify(tmp_path / name)
        assert (verdict.ok, verdict.value_dtype, verdict.activation_dtype) == (True, value_dtype, value_dtype)
        assert f"activation_dtype: {value_dtype}" in (tmp_path / name / "recipe.yaml").read_text()
        assert f"activations are multiplied in {value_dtype}" in " ".join(
            (tmp_path / name / "README.md").read_text().split()
        )
        differences = {key for key, value in report(tmp_path / name).items() if value != report(ours)[key]}
        assert differences <= {"files", "bytes", "name"}


@NAMED
def test_and_back(value_dtype: str, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1, dtype=torch.bfloat16)
    both = compress(source, tmp_path / "both", value_dtype=value_dtype, activation_dtype=value_dtype).directory
    weights = compress(source, tmp_path / "weights", value_dtype=value_dtype).directory
    pack_checkpoint(both, tmp_path / "back", activation_dtype="none")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (weights / "config.json").read_text()
    )
    for directory in (both, weights):
        unpack_checkpoint(directory, tmp_path / f"dense-{directory.name}")
    one, other = (stored(tmp_path / f"dense-{name}") for name in ("both", "weights"))
    assert all(identical(one[key], other[key]) for key in other)
    assert "activation_dtype: none" in (tmp_path / "dense-both" / "recipe.yaml").read_text()


def test_calls_that_are_wrong(tmp_path: Path) -> None:
    _, dense, packed = made(tmp_path)
    pack_checkpoint(packed, tmp_path / "eight", "int8", "int8")
    before = tree(tmp_path)
    for source, value_dtype, activation_dtype, error, words in (
        (dense, "auto", "int8", UsageError, "--activation-dtype int8 needs kept values of the same dtype"),
        (dense, "int8", "float8_e4m3fn", UsageError, "and they are 'int8'; add --value-dtype float8_e4m3fn"),
        (packed, "auto", "int8", UsageError, "and they are 'bfloat16'"),
        (packed, "auto", "none", SourceError, "packed already, with values in bfloat16"),
        (tmp_path / "eight", "auto", "int8", SourceError, "packed already, with values in int8"),
        (tmp_path / "eight", "int8", "auto", SourceError, "packed already, with values in int8"),
        (tmp_path / "eight", "float8_e4m3fn", "auto", UsageError, "--activation-dtype int8 needs"),
        (tmp_path / "eight", "float8_e4m3fn", "none", SourceError, "are int8 already"),
    ):
        with pytest.raises(error, match=words):
            pack_checkpoint(source, tmp_path / "out", value_dtype, activation_dtype)
    assert tree(tmp_path) == before
    with pytest.raises(RecipeError, match="activation_dtype='int8' needs kept values of the same dtype"):
        Recipe.create(activation_dtype="int8")
    with pytest.raises(RecipeError, match="and value_dtype is 'int8'"):
        Recipe.create(activation_dtype="float8_e4m3fn", value_dtype="int8")


def test_a_config_that_contradicts_itself() -> None:
    good = {"quant_method": "halve", "format_version": 1, "sparsity": "2:4", "value_dtype": "int8", "ignore": []}
    assert not parse_config(good).quantizes_x
    assert parse_config({**good, "activation_dtype": "int8"}).quantizes_x
    for value_dtype, activation_dtype, words in (
        ("bfloat16", "int8", "activation_dtype is 'int8' and value_dtype 'bfloat16'"),
        ("int8", "float8_e4m3fn", "same dtype"),
        ("int8", "int4", "activation_dtype"),
        ("int8", "bfloat16", "activation_dtype"),
    ):
        with pytest.raises(CorruptCheckpointError, match=words):
            parse_config({**good, "value_dtype": value_dtype, "activation_dtype": activation_dtype})


def test_the_command(halve: Halve, tmp_path: Path) -> None:
    _, dense, _ = made(tmp_path)
    both = ("--value-dtype", "int8", "--activation-dtype", "int8")
    assert halve("pack", dense, "--out", tmp_path / "eight", *both, "--json").document["packed"] == 14
    document = halve("verify", tmp_path / "eight", "--json").document
    assert (document["value_dtype"], document["activation_dtype"]) == ("int8", "int8")
    assert "activations" in halve("verify", tmp_path / "eight").stdout
    refused = halve("pack", dense, "--out", tmp_path / "half", "--activation-dtype", "int8")
    assert refused.code == 2
    assert "--value-dtype int8" in refused.stderr
