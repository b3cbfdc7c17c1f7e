"""pack and unpack: between the two artefacts of one recipe, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress import artefact
from compress import packed as packing
from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import CheckError, CorruptCheckpointError, NumericalError, OutputError, SourceError
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


RECORDS = ("recipe.yaml", "report.json", "README.md")


def test_the_records_are_those_of_the_other_artefact(tmp_path: Path) -> None:
    """What `halve compress` says of a format, conversion into it says, too: recipe, report and card, to the byte."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    made = {
        format: compress(source, tmp_path / format, format=format, ignore=("*.o_proj",)).directory
        for format in ("packed", "dense")
    }
    unpack_checkpoint(made["packed"], tmp_path / "dense-again")
    pack_checkpoint(made["dense"], tmp_path / "packed-again")
    for format, directory in made.items():
        again = tree(tmp_path / f"{format}-again")
        for name in RECORDS:
            assert again[name] == tree(directory)[name], (format, name)


def test_what_a_person_wrote_on_the_card_stays(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    packed = compress(source, tmp_path / "packed").directory
    card = packed / "README.md"
    generated = card.read_text()
    measured = "<!-- halve report: begin -->\n## Measured\n\n1.9 times as fast\n<!-- halve report: end -->"
    card.write_text(f"{generated}\n{measured}\n\n## Thanks\n\nTo my cat.\n")
    report = json.loads((packed / "report.json").read_text())
    (packed / "report.json").write_text(artefact.account(packed, report))
    unpack_checkpoint(packed, tmp_path / "dense")
    text = (tmp_path / "dense" / "README.md").read_text()
    assert "To my cat." in text
    assert "1.9 times" not in text  # it was measured of the packed one
    assert "as a dense checkpoint with zeros" in text
    assert verify(tmp_path / "dense").notes == []


def test_records_of_others_are_copied(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    dense = compress(source, tmp_path / "dense", format="dense").directory
    (dense / "report.json").unlink()
    (dense / "recipe.yaml").write_text("stages: {sparsity: 0.5}\n")
    (dense / "README.md").write_text("# Mine\n")
    pack_checkpoint(dense, tmp_path / "packed")
    for name in ("recipe.yaml", "README.md"):
        assert (tmp_path / "packed" / name).read_bytes() == (dense / name).read_bytes()
    assert not (tmp_path / "packed" / "report.json").exists()


def test_two_into_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One comes while the other writes: the later one to end is refused, and what is there is whole."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    dense = compress(source, tmp_path / "dense", format="dense").directory
    out, copy = tmp_path / "out", artefact.copy_companions

    def meanwhile(source: Path, directory: Path) -> None:
        monkeypatch.undo()
        pack_checkpoint(dense, out)
        copy(source, directory)

    monkeypatch.setattr(artefact, "copy_companions", meanwhile)
    with pytest.raises(OutputError, match="in the meantime"):
        pack_checkpoint(dense, out)
    assert len(verify(out).sparse) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "dense", "out", "source"]


def test_a_packed_layer_outside_of_the_blocks(tmp_path: Path) -> None:
    """Not of halve's making, but the format allows it: an output layer that is packed, too."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1, tie_word_embeddings=False)
    packed_dir = compress(source, tmp_path / "packed").directory
    (packed_dir / "report.json").unlink()
    config = json.loads((packed_dir / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (packed_dir / "config.json").write_text(json.dumps(config))
    tensors = stored(packed_dir)
    head = tensors.pop("lm_head.weight")
    groups = head.unflatten(-1, (-1, 4)).clone()
    groups[..., 1:3] = 0
    sparse = groups.flatten(-2)
    both = packing.pack(sparse)
    tensors |= {"lm_head.weight_packed": both.values, "lm_head.weight_mask": both.mask}
    save_file(tensors, packed_dir / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head" in {layer["name"] for layer in verify(packed_dir).sparse}
    assert unpack_checkpoint(packed_dir, tmp_path / "dense") == {"unpacked": 8}
    again = stored(tmp_path / "dense")
    assert identical(again["lm_head.weight"], sparse)
    assert not [name for name in again if "_packed" in name or "_mask" in name]
    tensors["lm_head.weight_mask"] = torch.zeros_like(both.mask)
    save_file(tensors, packed_dir / "model.safetensors", metadata={"format": "pt"})
    for read in (verify, lambda path: unpack_checkpoint(path, tmp_path / "more")):
        with pytest.raises(CorruptCheckpointError, match="lm_head: the mask does not have two bits"):
            read(packed_dir)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("format", ["packed", "dense"])
def test_values_that_are_not_finite_get_no_digest(name: str, format: str, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    directory = compress(source, tmp_path / "made", format=format).directory
    (directory / "report.json").unlink()
    tensors = stored(directory)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    convert = unpack_checkpoint if format == "packed" else pack_checkpoint
    for read in (verify, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(NumericalError, match=f"{name}: 1 values are NaN"):
            read(directory)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "made", "source"]


def test_a_changed_source_is_not_accounted_for_anew(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    packed = compress(source, tmp_path / "packed").directory
    tokenizer = packed / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(CorruptCheckpointError, match=r"tokenizer_config\.json.*remove report\.json"):
        unpack_checkpoint(packed, tmp_path / "dense")


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
    assert (called.code, called.document) == (0, {"out": str(tmp_path / "again"), "packed": 4, "dense": 0, "notes": []})
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
