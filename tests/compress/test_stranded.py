"""Checkpoints of compressed-tensors, as llm-compressor 0.5.1 wrote them (`tests/data/stranded/make.py`), packed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import packed, stranded
from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import CheckError, CorruptCheckpointError, HalveError, NumericalError, SourceError, UsageError
from compress.sources import Source
from compress.verify import verify
from serve.loading import load_model
from tests.runs import Halve, identical, load, stored

DATA = Path(__file__).parent.parent / "data" / "stranded"
DENSE = "model.layers.1.self_attn.o_proj"
LINEAR = "model.layers.0.self_attn.q_proj"
QUANTIZED = ("float8-bitmask", "float8-dense", "float8-static-bitmask", "int8-bitmask", "int8-dense")
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def altered(name: str, directory: Path, change: Change) -> Path:
    """A copy of a checkpoint with other tensors, or another ``quantization_config``."""
    shutil.copytree(DATA / name, directory)
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def expected(name: str) -> dict[str, Tensor]:
    """Every linear of the blocks in float64, by its own tensors, weight by weight."""
    tensors = load_file(DATA / name / "model.safetensors")
    found = {}
    for key, values in tensors.items():
        stem, _, kind = key.rpartition(".")
        if "proj" not in stem or kind not in ("weight", "compressed"):
            continue
        scale = tensors.get(f"{stem}.weight_scale", torch.ones(1)).double().reshape(-1, 1)
        if kind == "weight":
            found[stem] = values.double() * scale
            continue
        n, k = tensors[f"{stem}.shape"].flatten().tolist()
        dense = torch.zeros(n, k, dtype=torch.float64)
        for row in range(n):
            left = iter(values[row].double().tolist())
            for column in range(k):
                if int(tensors[f"{stem}.bitmask"][row, column // 8]) >> (column % 8) & 1:
                    dense[row, column] = next(left)
        found[stem] = dense * scale
    assert len(found) == 14
    return found


def logits(directory: Path) -> Tensor:
    """Of 32 words."""
    with torch.inference_mode():
        return load(directory)(torch.arange(32)[None]).logits


def packed_weights(directory: Path) -> dict[str, packed.PackedWeight]:
    tensors = stored(directory)
    return {
        key.removesuffix(".weight_packed"): packed.PackedWeight(
            values,
            tensors[key.replace("weight_packed", "weight_mask")],
            tensors.get(key.replace("weight_packed", "weight_scale")),
        )
        for key, values in tensors.items()
        if key.endswith(".weight_packed")
    }


@pytest.mark.parametrize("name", ["plain-bitmask", *QUANTIZED])
def test_every_weight_is_what_it_was(name: str, tmp_path: Path) -> None:
    notes: list[str] = []
    assert pack_checkpoint(DATA / name, tmp_path / "packed", note=notes.append) == {"packed": 13, "dense": 1}
    weights, theirs = packed_weights(tmp_path / "packed"), expected(name)
    assert weights.keys() == theirs.keys() - {DENSE}
    lowest = 0
    for stem, weight in weights.items():
        values = weight.values.double() * (1 if weight.scale is None else weight.scale.double())
        found = packed.unpack(packed.PackedWeight(values, weight.mask))
        wrong = found != theirs[stem]
        if bool(wrong.any()):  # -128 of int8, and nothing else
            assert weight.scale is not None
            assert torch.equal(theirs[stem][wrong], (-128 * weight.scale.double().expand_as(wrong))[wrong])
            assert torch.equal(found[wrong], (-127 * weight.scale.double().expand_as(wrong))[wrong])
            lowest += int(wrong.sum())
        assert identical(packed.pack(found).mask, weight.mask)  # the one form that a weight has
    dense = stored(tmp_path / "packed")[f"{DENSE}.weight"]
    assert identical(dense, theirs[DENSE].to(torch.float32).to(torch.bfloat16))
    assert (lowest > 0) == (name == "int8-dense")
    assert any(note.startswith(f"{lowest} values are -127") for note in notes) == (lowest > 0)
    verdict = verify(tmp_path / "packed")
    kind = name.partition("-")[0]
    values = {"plain": "bfloat16", "float8": "float8_e4m3fn", "int8": "int8"}[kind]
    assert (verdict.value_dtype, verdict.activation_dtype) == (values, None if kind == "plain" else values)
    assert len(verdict.sparse) == 13
    others = {key for key in stored(DATA / name) if "proj" not in key}
    assert all(identical(stored(tmp_path / "packed")[key], stored(DATA / name)[key]) for key in others)


@pytest.mark.parametrize("name", ["plain-bitmask", "float8-bitmask", "float8-dense", "int8-dense"])
def test_it_is_the_model_that_was_quantized(name: str, tmp_path: Path) -> None:
    pack_checkpoint(DATA / name, tmp_path / "packed", activation_dtype="none")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "dense")
    ours, base = logits(tmp_path / "packed"), logits(DATA / "base")
    assert identical(ours, logits(tmp_path / "dense")) or name != "plain-bitmask"
    error = float((ours.double() - base.double()).norm() / base.double().norm())
    assert error < {"plain": 1e-9, "float8": 0.05, "int8": 0.02}[name.partition("-")[0]]


def test_what_the_bitmask_of_int8_lost_is_said(tmp_path: Path) -> None:
    """compressed-tensors took the absolute value of -128 in int8, which is -128, for the smallest."""
    whole, kept = expected("int8-dense"), expected("int8-bitmask")
    rows = sum(int((kept[stem].abs().amax(1) < 0.99 * whole[stem].abs().amax(1)).sum()) for stem in kept)
    assert rows > 100
    notes: list[str] = []
    pack_checkpoint(DATA / "int8-bitmask", tmp_path / "packed", note=notes.append)
    assert any(note.startswith(f"{rows} rows of weights lack their largest value") for note in notes)
    for name in ("int8-dense", "float8-bitmask"):
        pack_checkpoint(DATA / name, tmp_path / name, note=notes.append)
    assert sum("lack their largest" in note for note in notes) == 1


def test_a_scale_of_the_calibration_becomes_one_of_each_token(tmp_path: Path) -> None:
    notes: list[str] = []
    pack_checkpoint(DATA / "float8-static-bitmask", tmp_path / "packed", note=notes.append)
    assert [note for note in notes if "each token has its own" in note]
    assert verify(tmp_path / "packed").activation_dtype == "float8_e4m3fn"
    assert not any("input_scale" in key for key in stored(tmp_path / "packed"))
    notes.clear()
    pack_checkpoint(DATA / "float8-static-bitmask", tmp_path / "without", activation_dtype="none", note=notes.append)
    assert not notes
    assert verify(tmp_path / "without").activation_dtype is None


def test_values_may_be_rounded_once(tmp_path: Path) -> None:
    pack_checkpoint(DATA / "plain-bitmask", tmp_path / "packed", "int8", "int8")
    pack_checkpoint(DATA / "plain-bitmask", tmp_path / "plain")
    for stem, weight in packed_weights(tmp_path / "packed").items():
        before = packed_weights(tmp_path / "plain")[stem]
        assert identical(weight.values, packed.quantize(before, torch.int8).values)
    assert verify(tmp_path / "packed").activation_dtype == "int8"
    with pytest.raises(SourceError, match="float8_e4m3fn already"):
        pack_checkpoint(DATA / "float8-bitmask", tmp_path / "twice", "int8")
    with pytest.raises(UsageError, match="--activation-dtype int8"):
        pack_checkpoint(DATA / "float8-bitmask", tmp_path / "mixed", activation_dtype="int8")
    assert not (tmp_path / "twice").exists()


def test_rows_of_zeros_need_no_scale(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[f"{LINEAR}.weight"].view(torch.uint8)[3] = 0x80  # -0.0
        tensors[f"{LINEAR}.weight_scale"][3] = 0

    source = altered("float8-dense", tmp_path / "source", change)
    pack_checkpoint(source, tmp_path / "packed")
    weight = packed_weights(tmp_path / "packed")[LINEAR]
    assert weight.scale is not None
    assert weight.scale[3] == 1
    assert not weight.values[3].view(torch.uint8).any()


def test_without_any_sparsity_config_the_weights_tell(tmp_path: Path) -> None:
    """As llm-compressor writes them today."""
    assert "sparsity_config" not in json.loads((DATA / "int8-dense" / "config.json").read_text())["quantization_config"]

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for tensor in tensors.values():
            if tensor.dtype == torch.int8:
                tensor.fill_(1)

    with pytest.raises(CheckError, match=r"no layer of .* is 2:4"):
        pack_checkpoint(altered("int8-dense", tmp_path / "full", change), tmp_path / "packed")


def test_a_pruned_layer_that_was_not_quantized_stays_dense(tmp_path: Path) -> None:
    base = stored(DATA / "base")

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors[f"{LINEAR}.weight_scale"]
        tensors[f"{LINEAR}.weight"] = base[f"{LINEAR}.weight"]

    source = altered("int8-dense", tmp_path / "source", change)
    assert pack_checkpoint(source, tmp_path / "packed") == {"packed": 12, "dense": 2}
    assert identical(stored(tmp_path / "packed")[f"{LINEAR}.weight"], base[f"{LINEAR}.weight"])


def group(**changes: Any) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for path, value in changes.items():
            where, _, field = path.partition("__")
            config["config_groups"]["group_0"][where][field] = value

    return change


def whole(**changes: Any) -> Change:
    return lambda tensors, config: config.update(changes)


def second_group(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    other = copy.deepcopy(config["config_groups"]["group_0"])
    config["config_groups"]["group_1"] = {**other, "input_activations": None}


def without(key: str) -> Change:
    return lambda tensors, config: tensors.pop(key)  # type: ignore[return-value]


def with_tensor(key: str, value: Callable[[dict[str, Tensor]], Tensor]) -> Change:
    return lambda tensors, config: tensors.update({key: value(tensors)})


def crowded(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{LINEAR}.bitmask"][0, 0] = 0x37


def not_a_number(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{LINEAR}.compressed"].view(torch.uint8)[0, 0] = 0x7F


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (whole(kv_cache_scheme={"num_bits": 8}), SourceError, "kv_cache_scheme"),
        (whole(transform_config={"config_groups": {}}), SourceError, "transform_config"),
        (whole(sparsity_config={"format": "sparse-bitmask"}), SourceError, "'sparse-bitmask'"),
        (whole(config_groups=[1]), CorruptCheckpointError, "config_groups is"),
        (group(weights__num_bits=4), SourceError, r"group_0.weights.num_bits is 4"),
        (group(weights__symmetric=False), SourceError, "symmetric"),
        (group(weights__strategy="group"), SourceError, "strategy is 'group'"),
        (group(weights__actorder="static"), SourceError, "actorder"),
        (group(weights__type="complex"), SourceError, "type is 'complex'"),
        (group(input_activations__type="int"), SourceError, "of the same type"),
        (group(input_activations__num_bits=4), SourceError, "input_activations.num_bits"),
        (second_group, SourceError, "differently"),
        (without(f"{LINEAR}.bitmask"), CorruptCheckpointError, rf"no tensor {LINEAR}.bitmask"),
        (without(f"{LINEAR}.weight_scale"), CorruptCheckpointError, rf"no tensor {LINEAR}.weight_scale"),
        (without(f"{LINEAR}.compressed"), SourceError, "belongs to no linear layer"),
        (without("model.norm.weight"), CorruptCheckpointError, "no tensor model.norm.weight"),
        (with_tensor(f"{LINEAR}.weight_zero_point", lambda t: torch.ones(32, 1)), SourceError, "is not zero"),
        (with_tensor(f"{LINEAR}.weight_scale", lambda t: torch.ones(32, 4)), SourceError, r"is \[32, 4\]"),
        (with_tensor(f"{LINEAR}.weight_scale", lambda t: -torch.ones(32, 1)), CorruptCheckpointError, "above zero"),
        (with_tensor(f"{LINEAR}.bitmask", lambda t: t[f"{LINEAR}.bitmask"][:, :2].clone()), CorruptCheckpointError, "32, 2"),
        (with_tensor("model.experts.3.compressed", lambda t: torch.ones(4, 4)), SourceError, "belongs to no linear"),
        (crowded, CorruptCheckpointError, "two bits in every group"),
        (not_a_number, CorruptCheckpointError, "NaN"),
    ],
)  # fmt: skip
def test_what_it_cannot_say_is_refused(change: Change, error: type[HalveError], says: str, tmp_path: Path) -> None:
    source = altered("float8-bitmask", tmp_path / "source", change)
    with pytest.raises(error, match=says):
        pack_checkpoint(source, tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_packed_words_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors[f"{LINEAR}.compressed"], tensors[f"{LINEAR}.bitmask"]
        tensors[f"{LINEAR}.weight_packed"] = torch.zeros(32, 8, dtype=torch.int32)

    with pytest.raises(SourceError, match="weight_packed is in a format of fewer bits"):
        pack_checkpoint(altered("float8-bitmask", tmp_path / "source", change), tmp_path / "packed")


def test_infinity_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors[f"{LINEAR}.compressed"][0, 0] = float("inf")

    with pytest.raises(NumericalError, match="q_proj"):
        pack_checkpoint(altered("plain-bitmask", tmp_path / "source", change), tmp_path / "packed")


@pytest.mark.parametrize("name", ["plain-bitmask", "float8-bitmask"])
def test_elsewhere_it_is_said_what_to_do(name: str) -> None:
    for read in (load_model, verify, Source):
        with pytest.raises(SourceError, match=r"`halve pack .* --out PACKED`"):
            read(DATA / name)


def test_sparsity_alone_without_a_pattern(tmp_path: Path) -> None:
    """What llm-compressor says where fewer than four fifths of the layers are 2:4."""

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["sparsity_config"] |= {"sparsity_structure": "unstructured", "format": "dense"}

    source = altered("plain-bitmask", tmp_path / "source", change)
    base = stored(DATA / "base")
    save_file(base, source / "model.safetensors")
    with pytest.raises(SourceError, match="with sparsity alone"):
        load_model(source)
    assert pack_checkpoint(source, tmp_path / "packed") == {"packed": 13, "dense": 1}
    assert identical(logits(tmp_path / "packed"), logits(DATA / "base"))


def test_of_config() -> None:
    said = {"quant_method": "compressed-tensors"}
    assert stranded.of_config({"compression_config": said}) == said
    assert stranded.is_theirs({"sparsity_config": {}})
    assert not stranded.is_theirs({"quant_method": "fp8"})
    assert not stranded.is_theirs({})


def test_the_command(halve: Halve, tmp_path: Path) -> None:
    done = halve("pack", DATA / "int8-dense", "--out", tmp_path / "packed", "--json")
    assert done.code == 0
    said = json.loads(done.stdout)
    assert said["packed"] == 13
    assert [note for note in said["notes"] if "-127 in place of -128" in note]
