"""pack and unpack: between the two artefacts of one recipe, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import CheckError, OutputError, SourceError
from compress.verify import verify
from tests import tiny_models
from tests.runs import Halve, compress, identical, load, logits, stored, tree

COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def same_checkpoint(one: Path, two: Path) -> None:
    a, b = stored(one), stored(two)
    assert a.keys() == b.keys()
    assert all(identical(a[name], b[name]) for name in a)
    for name in COPIED:
        assert json_or_bytes(one / name) == json_or_bytes(two / name), name


def json_or_bytes(path: Path) -> object:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"dtype": torch.float32}),
        ("gpt2", {}),
        ("gpt2", {"hub_gpt2_keys": True, "max_shard_size": "100KB"}),
        ("gpt_neox", {"dtype": torch.float16}),
        ("phi3", {"max_shard_size": "100KB"}),
    ],
)
@pytest.mark.parametrize("ignore", [(), ("*.1.*",)])
def test_both_ways(family: str, settings: dict, ignore: tuple[str, ...], tmp_path: Path) -> None:
    source = tiny_models.build(family, tmp_path / "source", layers=2, **settings)
    packed = compress(source, tmp_path / "packed", ignore=ignore).directory
    dense = compress(source, tmp_path / "dense", ignore=ignore, format="dense").directory
    counts = pack_checkpoint(dense, tmp_path / "packed-again")
    same_checkpoint(tmp_path / "packed-again", packed)
    layers = 2 * {"llama": 7, "qwen2": 7}.get(family, 4)
    pruned = layers // 2 if ignore else layers
    assert counts == {"packed": pruned, "dense": layers - pruned}
    assert unpack_checkpoint(packed, tmp_path / "dense-again") == {"unpacked": pruned}
    same_checkpoint(tmp_path / "dense-again", dense)
    for directory, kind in (("packed-again", "packed"), ("dense-again", "dense")):
        verdict = verify(tmp_path / directory)
        assert verdict.kind == kind
        assert len(verdict.sparse) == pruned
        assert verdict.sealed_files == verdict.files
    assert identical(logits(load(tmp_path / "packed-again")), logits(load(tmp_path / "dense-again")))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "calibration.txt",
        "dense",
        "dense-again",
        "packed",
        "packed-again",
        "source",
    ]


def test_negative_zero_and_missing_values(tmp_path: Path) -> None:
    """Groups with fewer than two values, and -0.0, which the packed format stores as +0.0."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    dense = compress(source, tmp_path / "dense", format="dense").directory
    tensors = stored(dense)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    weight[0] = 0
    weight[1, 0:4] = torch.tensor([0, 0, 0, 5])
    weight[2] = -0.0
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    (dense / "report.json").unlink()
    pack_checkpoint(dense, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    again = stored(tmp_path / "again")
    weight[2] = 0.0
    assert all(identical(again[name], tensors[name]) for name in tensors)
    assert verify(tmp_path / "packed").kind == "packed"


def test_refusals(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    packed = compress(source, tmp_path / "packed").directory
    with pytest.raises(CheckError, match=r"no layer of .*source is 2:4"):
        pack_checkpoint(source, tmp_path / "out")
    with pytest.raises(SourceError, match="packed or quantized already"):
        pack_checkpoint(packed, tmp_path / "out")
    with pytest.raises(SourceError, match="is not packed by halve"):
        unpack_checkpoint(source, tmp_path / "out")
    with pytest.raises(SourceError, match="there is no model directory"):
        unpack_checkpoint(tmp_path / "none", tmp_path / "out")
    before = tree(tmp_path)
    for out in (packed, source / "config.json"):
        with pytest.raises(OutputError, match="not empty"):
            unpack_checkpoint(packed, out)
    with pytest.raises(OutputError, match="cannot write"):
        unpack_checkpoint(packed, source / "config.json" / "out")
    assert tree(tmp_path) == before


def test_command(halve: Halve, tmp_path: Path) -> None:
    source = tiny_models.build("gpt2", tmp_path / "source", layers=1)
    packed = compress(source, tmp_path / "packed").directory
    called = halve("unpack", packed, "--out", tmp_path / "dense", "--json")
    assert (called.code, called.document) == (0, {"out": str(tmp_path / "dense"), "unpacked": 4})
    called = halve("pack", tmp_path / "dense", "--out", tmp_path / "again", "--json")
    assert (called.code, called.document) == (0, {"out": str(tmp_path / "again"), "packed": 4, "dense": 0})
    same_checkpoint(tmp_path / "again", packed)
    called = halve("pack", source, "--out", tmp_path / "none")
    assert called.code == 1
    assert "no layer of" in called.message
    called = halve("unpack", packed, "--out", packed)
    assert called.code == 2
    assert "not empty" in called.message
    called = halve("unpack", packed, "--out", ".")
    assert called.code == 2
    assert "--out" in called.message
    assert "4 layers unpacked" in halve("unpack", packed, "--out", tmp_path / "more").stdout
