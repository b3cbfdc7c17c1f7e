"""Kept values of 8 bits with a scale for each row: the rounding, the checks, and the checkpoints that hold them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import CorruptCheckpointError, RecipeError, SourceError
from compress.packed import LARGEST, PackedWeight, bytes_of, pack, quantize, unpack, unpack_bits, validate
from compress.patterns import NMPattern
from compress.recipe import Recipe
from compress.verify import verify
from tests import tiny_models
from tests.runs import Halve, compress, identical, report, stored, tree

SCALED = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
BOTH = pytest.mark.parametrize("dtype", SCALED.values(), ids=list(SCALED))
NAMED = pytest.mark.parametrize("value_dtype", SCALED)


def random_packed(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return pack(weight * NMPattern(2, 4).mask(weight.abs()))


def values_of_float8() -> dict[int, Fraction]:
    """By the definition of e4m3fn: a sign, four bits of exponent with bias 7, three of mantissa; no infinity, one NaN a sign."""
    found = {}
    for code in range(256):
        sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
        if code & 127 == 127:
            continue
        size = (
            Fraction(mantissa, 8) * Fraction(1, 64)
            if exponent == 0
            else Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)
        )
        found[code] = sign * size
    return found


def nearest(target: Fraction, dtype: torch.dtype) -> Fraction:
    """Of all values the nearest one, of two the one with an even code."""
    if dtype == torch.int8:
        candidates = {code: Fraction(code) for code in range(-127, 128)}
    else:
        candidates = {code: value for code, value in values_of_float8().items() if code != 0x80}
    return candidates[min(candidates, key=lambda code: (abs(candidates[code] - target), code & 1))]


@BOTH
@given(seed=st.integers(0, 2**20), factor=st.sampled_from([1.0, 1e-4, 3e4, 0.0]))
def test_rounding_against_a_search_through_all_values(dtype: torch.dtype, seed: int, factor: float) -> None:
    weight = random_packed(3, 16, seed)
    weight = PackedWeight((weight.values * factor).to(torch.bfloat16), weight.mask)
    rounded = quantize(weight, dtype)
    validate(rounded, "w")
    assert rounded.scale is not None
    assert rounded.scale.dtype == torch.float32
    assert torch.equal(rounded.mask, weight.mask)
    for row, scale, values in zip(weight.values.float(), rounded.scale[:, 0], rounded.values, strict=True):
        largest = float(row.abs().max())
        assert float(scale) == (torch.tensor(largest) / LARGEST[dtype] if largest else 1.0)
        for before, after in zip(row, values, strict=True):
            # the quotient is rounded to float32 first
            assert Fraction(float(after)) == nearest(Fraction(float(before / scale)), dtype)


@BOTH
def test_how_far_a_weight_moves(dtype: torch.dtype) -> None:
    weight = random_packed(64, 256)
    rounded = quantize(weight, dtype)
    assert rounded.scale is not None
    moved = (rounded.values.float() * rounded.scale - weight.values.float()).abs()
    allowed = (
        rounded.scale / 2
        if dtype == torch.int8
        else torch.maximum(weight.values.float().abs() / 16, rounded.scale * 2.0**-10)
    )
    assert (moved <= allowed * (1 + 1e-4)).all()
    assert (moved > allowed / 4).any()


@BOTH
def test_rows_of_zeros_and_of_tiny_numbers(dtype: torch.dtype) -> None:
    weight = random_packed(4, 16, dtype=torch.float32)
    values = weight.values.clone()
    values[0] = 0
    values[1] *= 1e-42  # denormal
    values[2] = -0.0
    values[3] = 3.3e38
    rounded = quantize(PackedWeight(values, weight.mask), dtype)
    validate(rounded, "w")
    assert rounded.scale is not None
    dense = rounded.values.float() * rounded.scale
    assert dense[0].eq(0).all()
    assert not dense[[0, 2]].signbit().any()
    assert dense.isfinite().all()
    assert dense[3].gt(3.2e38).all()
    assert quantize(PackedWeight(values[:, :0], weight.mask[:, :0]), dtype).shape == (4, 0)


@BOTH
def test_bytes_and_rows(dtype: torch.dtype) -> None:
    rounded = quantize(random_packed(32, 512), dtype)
    assert rounded.nbytes == bytes_of(32, 512, dtype) == 32 * 512 * 2 * 5 // 16 + 4 * 32
    part = rounded.rows(slice(8, 16))
    validate(part, "w")
    assert torch.equal(unpack(part, torch.float32), unpack(rounded, torch.float32)[8:16])
    assert unpack(rounded, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(unpack(rounded, torch.bfloat16), unpack(rounded, torch.float32).bfloat16())


def broken(weight: PackedWeight, **change: Tensor | None) -> PackedWeight:
    return PackedWeight(**{"values": weight.values, "mask": weight.mask, "scale": weight.scale, **change})  # pyright: ignore[reportArgumentType]


@BOTH
def test_what_is_refused(dtype: torch.dtype) -> None:
    good = quantize(random_packed(8, 32), dtype)
    assert good.scale is not None
    validate(good, "lm.up")
    bad_value = good.values.view(torch.uint8).clone()
    bad_value[3, 5] = 0x80 if dtype == torch.int8 else 0xFF
    cases = [
        ({"scale": None}, "there is no scale"),
        ({"values": random_packed(8, 32).values}, "there is a scale"),
        ({"scale": good.scale.double()}, "the scale is torch.float64"),
        ({"scale": good.scale[:, 0]}, r"the scale is torch.float32 \[8\]"),
        ({"scale": good.scale[:4]}, r"\[4, 1\]; a weight with values \[8, 16\] has a scale torch.float32 \[8, 1\]"),
        ({"values": bad_value.view(dtype)}, r"lm.up: 1 packed values .*\(the first at \[3, 5\]\)"),
    ]
    for wrong in (0.0, -1.0, torch.inf, torch.nan):
        scale = good.scale.clone()
        scale[6] = wrong
        cases.append(({"scale": scale}, r"1 scales are not finite and above zero \(the first is of row 6\)"))
    for change, words in cases:
        with pytest.raises(CorruptCheckpointError, match=words):
            validate(broken(good, **change), "lm.up")


def made(tmp_path: Path, family: str = "llama", **settings: Any) -> tuple[Path, Path, Path]:
    """A tiny model, and what its pruning gives dense and packed."""
    source = tiny_models.build(family, tmp_path / "source", layers=2, dtype=torch.bfloat16)
    dense = compress(source, tmp_path / "dense", format="dense", **settings).directory
    return source, dense, compress(source, tmp_path / "packed", **settings).directory


@NAMED
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_every_way_to_the_same_checkpoint(family: str, value_dtype: str, tmp_path: Path) -> None:
    source, dense, packed = made(tmp_path, family, ignore=("*.1.*",))
    ours = compress(source, tmp_path / "ours", ignore=("*.1.*",), value_dtype=value_dtype).directory
    pack_checkpoint(dense, tmp_path / "from-dense", value_dtype)
    pack_checkpoint(packed, tmp_path / "from-packed", value_dtype)
    wanted = stored(ours)
    for other in ("from-dense", "from-packed"):
        found = stored(tmp_path / other)
        assert found.keys() == wanted.keys()
        assert all(identical(found[name], wanted[name]) for name in wanted), other
        assert verify(tmp_path / other).ok
        config = json.loads((tmp_path / other / "config.json").read_text())
        assert config == json.loads((ours / "config.json").read_text())
        assert config["quantization_config"]["value_dtype"] == value_dtype
        assert config["dtype"] == "bfloat16"
        differences = {key for key, value in report(tmp_path / other).items() if value != report(ours)[key]}
        assert differences <= {"files", "bytes", "name"}
    for name in (name for name in wanted if name.endswith(".weight_packed")):
        stem = name.removesuffix(".weight_packed")
        before = stored(packed)
        rounded = quantize(PackedWeight(before[name], before[f"{stem}.weight_mask"]), SCALED[value_dtype])
        assert identical(wanted[name], rounded.values)
        assert rounded.scale is not None
        assert identical(wanted[f"{stem}.weight_scale"], rounded.scale)


@NAMED
def test_bytes_of_a_checkpoint(value_dtype: str, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2, dtype=torch.bfloat16)
    out = compress(source, tmp_path / "out", value_dtype=value_dtype).directory
    said = report(out)
    layers = [layer for layer in said["layers"] if layer["status"] == "pruned"]
    assert layers
    for layer in layers:
        n, k = layer["shape"]
        assert layer["bytes_after"] == n * k // 2 + n * k // 8 + 4 * n
    assert said["summary"]["pruned_bytes_after"] == sum(layer["bytes_after"] for layer in layers)
    kinds = {"packed_values": "weight_packed", "packed_masks": "weight_mask", "packed_scales": "weight_scale"}
    for kind, suffix in kinds.items():
        assert said["bytes"][kind] == sum(t.nbytes for name, t in stored(out).items() if name.endswith(suffix)) > 0
    assert f"the kept values as {value_dtype}" in " ".join((out / "README.md").read_text().split())


@NAMED
def test_unpacked_it_is_what_the_values_stand_for(value_dtype: str, tmp_path: Path) -> None:
    source, dense, _ = made(tmp_path)
    ours = compress(source, tmp_path / "ours", value_dtype=value_dtype).directory
    counts = unpack_checkpoint(ours, tmp_path / "unpacked")
    assert counts == {"unpacked": 14}
    tensors, before, files = stored(tmp_path / "unpacked"), stored(dense), stored(ours)
    assert tensors.keys() == before.keys()
    assert verify(tmp_path / "unpacked").kind == "dense"
    for name, weight in tensors.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.weight_packed" not in files:
            assert identical(weight, before[name])
            continue
        kept = unpack_bits(files[f"{stem}.weight_mask"])
        values = files[f"{stem}.weight_packed"].float() * files[f"{stem}.weight_scale"]
        assert identical(weight[kept].view(values.shape), values.to(torch.bfloat16))
        assert weight[~kept].eq(0).all()
        off = (weight.double() - before[name].double()).norm() / before[name].double().norm()
        assert 0 < off < (0.01 if value_dtype == "int8" else 0.04)
    recipe = (tmp_path / "unpacked" / "recipe.yaml").read_text()
    assert "format: dense" in recipe
    assert "value_dtype: auto" in recipe


@NAMED
def test_a_checkpoint_that_names_no_dtype_names_it_then(value_dtype: str, tmp_path: Path) -> None:
    _, dense, _ = made(tmp_path)
    config = json.loads((dense / "config.json").read_text())
    del config["dtype"]
    (dense / "config.json").write_text(json.dumps(config))
    for name in ("report.json", "recipe.yaml"):
        (dense / name).unlink()
    pack_checkpoint(dense, tmp_path / "packed8", value_dtype)
    assert json.loads((tmp_path / "packed8" / "config.json").read_text())["dtype"] == "bfloat16"


def test_it_is_not_rounded_twice(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    ours = compress(source, tmp_path / "ours", value_dtype="int8").directory
    before = tree(tmp_path)
    for value_dtype, words in (("float8_e4m3fn", "are int8 already"), ("auto", "packed or quantized already")):
        with pytest.raises(SourceError, match=words):
            pack_checkpoint(ours, tmp_path / "again", value_dtype)
    assert tree(tmp_path) == before


def test_a_dense_artefact_has_no_such_values() -> None:
    with pytest.raises(RecipeError, match="value_dtype='int8' is of packed weights"):
        Recipe.create(format="dense", value_dtype="int8")
    with pytest.raises(RecipeError, match="value_dtype"):
        Recipe.create(value_dtype="int4")


@NAMED
@pytest.mark.parametrize("fault", ["missing", "float16", "zero", "negative", "a value"])
def test_damage_is_found(value_dtype: str, fault: str, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1, dtype=torch.bfloat16)
    ours = compress(source, tmp_path / "ours", value_dtype=value_dtype).directory
    tensors = stored(ours)
    key = "model.layers.0.mlp.up_proj.weight_scale"
    if fault == "missing":
        del tensors[key]
    elif fault == "float16":
        tensors[key] = tensors[key].half()
    elif fault in ("zero", "negative"):
        tensors[key][3] = 0.0 if fault == "zero" else -1.0
    else:
        values = tensors[key.replace("scale", "packed")].view(torch.uint8)
        values[2, 2] = 0x80 if value_dtype == "int8" else 0x7F
    save_file(tensors, ours / "model.safetensors", {"format": "pt"})
    (ours / "report.json").unlink()
    for read in (verify, lambda path: unpack_checkpoint(path, tmp_path / "more")):
        with pytest.raises(CorruptCheckpointError, match="up_proj"):
            read(ours)
    assert not (tmp_path / "more").exists()


def test_the_command(halve: Halve, tmp_path: Path) -> None:
    _, dense, packed = made(tmp_path)
    done = halve("pack", packed, "--out", tmp_path / "eight", "--value-dtype", "int8", "--json")
    assert done.document["packed"] == 14
    assert halve("verify", tmp_path / "eight", "--json").document["ok"]
    refused = halve("pack", dense, "--out", tmp_path / "four", "--value-dtype", "int4")
    assert refused.code == 2
    assert "int4" in refused.stderr
