"""`verify` and loading notice what was truncated, tampered with, removed or exchanged, and name it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.artefact import account
from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import CorruptCheckpointError, HalveError, SourceError
from compress.files import read_header
from compress.verify import verify
from serve.loading import load_model
from tests import tiny_models
from tests.runs import Halve, compress, identical, load, logits, stored


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`packed` and `dense` of one recipe, with biases, an untied output layer and one layer left dense."""
    directory = tmp_path_factory.mktemp("made")
    source = tiny_models.build("qwen2", directory / "source", layers=1, tie_word_embeddings=False)
    for format in ("packed", "dense"):
        compress(source, directory / format, format=format, ignore=("*.o_proj",))
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(made / kind, tmp_path / kind))


def readers(directory: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads a checkpoint and must notice."""
    out = directory.with_name("converted")
    both = {"verify": lambda: verify(directory), "load_model": lambda: load_model(directory)}
    if directory.name == "packed":
        return {
            **both,
            "from_pretrained": lambda: load(directory),
            "unpack": lambda: unpack_checkpoint(directory, out),
        }
    return {**both, "pack": lambda: pack_checkpoint(directory, out)}


def all_notice(directory: Path, *words: str, but: tuple[str, ...] = ()) -> None:
    for reader, read in readers(directory).items():
        if reader in but:
            continue
        with pytest.raises(HalveError) as caught:
            read()
        for word in words:
            assert word in str(caught.value), (reader, str(caught.value))
        assert not directory.with_name("converted").exists()
        assert not list(directory.parent.glob("*.converting"))


def spans(file: Path) -> dict[str, tuple[int, int]]:
    """First byte and length of each tensor in a safetensors file."""
    info, _, offset = read_header(file)
    found = {}
    for name, tensor in info.items():
        found[name] = (offset, tensor.nbytes)
        offset += tensor.nbytes
    return found


def flip(file: Path, position: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= bit
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_whole(kind: str, made: Path) -> None:
    verdict = verify(made / kind)
    assert (verdict.kind, len(verdict.sparse), len(verdict.layers)) == (kind, 6, 7)
    (dense,) = [layer for layer in verdict.layers if layer["status"] == "dense"]
    assert dense["name"] == "model.layers.0.self_attn.o_proj"
    assert dense["reason"] == "ignored by the recipe (*.o_proj)"
    assert verdict.bytes["directory"] == sum(file.stat().st_size for file in (made / kind).iterdir())
    assert verdict.bytes["all_tensors"] == sum(tensor.nbytes for tensor in stored(made / kind).values())
    assert verdict.sealed_files == verdict.files == 1
    load_model(made / kind)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight_packed",
        "model.layers.0.mlp.up_proj.weight_mask",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_one_bit_of_a_packed_tensor(name: str, copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    file = directory / "model.safetensors"
    begin, length = spans(file)[name]
    flip(file, begin + length // 2)
    all_notice(directory, "model.safetensors", "SHA-256")


def test_one_bit_of_a_dense_tensor(copy: Callable[[str], Path]) -> None:
    directory = copy("dense")
    file = directory / "model.safetensors"
    begin, _ = spans(file)["model.norm.weight"]
    flip(file, begin)
    all_notice(directory, "model.safetensors", "SHA-256")


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_every_truncation(kind: str, copy: Callable[[str], Path]) -> None:
    directory = copy(kind)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        all_notice(directory, "model.safetensors", "truncated or damaged")
    file.write_bytes(content + b"0")
    all_notice(directory, "model.safetensors", "truncated or damaged")
    file.unlink()
    all_notice(directory, ".safetensors", but=("from_pretrained",))


def test_every_part_of_the_header(copy: Callable[[str], Path]) -> None:
    """`verify` notices any change; loading notices it or is not affected (the digest's own name is in the header)."""
    directory = copy("packed")
    file = directory / "model.safetensors"
    content, expected = file.read_bytes(), logits(load(directory))
    length = read_header(file)[2]
    unaffected = 0
    for position in [*range(140), *range(140, length, 97)]:
        file.write_bytes(content)
        flip(file, position)
        with pytest.raises(CorruptCheckpointError):
            verify(directory)
        try:
            model = load(directory)
        except CorruptCheckpointError:
            continue
        assert identical(logits(model), expected)
        unaffected += 1
    assert unaffected < 60


def names_of(directory: Path) -> list[str]:
    return sorted(read_header(directory / "model.safetensors")[0])


def rebuild(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Writes the weights anew without halve: no digest, no report to compare with."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    (directory / "report.json").unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_rebuilt_without_a_change(kind: str, copy: Callable[[str], Path]) -> None:
    directory = copy(kind)
    rebuild(directory, lambda tensors: None)
    verdict = verify(directory)
    assert "carry no digest" in verdict.notes[0]
    load_model(directory)


@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.parametrize("damage", ["removed", "reshaped", "dtype"])
def test_every_tensor_in_turn(kind: str, damage: str, copy: Callable[[str], Path]) -> None:
    directory = copy(kind)
    content = (directory / "model.safetensors").read_bytes()
    names = names_of(directory)
    assert len(names) == 15 + (6 if kind == "packed" else 0)
    for name in names:
        (directory / "model.safetensors").write_bytes(content)

        def change(tensors: dict[str, torch.Tensor], name: str = name) -> None:
            tensor = tensors.pop(name)
            if damage == "reshaped":
                tensors[name] = tensor.reshape(-1, 2) if tensor.ndim == 2 else tensor[:-1]
            elif damage == "dtype":
                tensors[name] = tensor.to(torch.int32)

        rebuild(directory, change)
        but = ("load_model",) if damage == "dtype" and kind == "dense" else ()  # transformers casts, whole numbers too
        all_notice(directory, name, but=but)


def test_mask_and_values(copy: Callable[[str], Path]) -> None:
    name = "model.layers.0.self_attn.k_proj"
    for damage, words in {
        "three bits": "two bits in every group",
        "one bit": "two bits in every group",
        "nan": "NaN or infinite",
        "infinity": "NaN or infinite",
    }.items():
        directory = copy("packed")

        def change(tensors: dict[str, torch.Tensor], damage: str = damage) -> None:
            mask, values = tensors[f"{name}.weight_mask"], tensors[f"{name}.weight_packed"]
            if damage in ("nan", "infinity"):
                values[3, 4] = float(damage)
            else:
                mask[2, 1] = 0b00110111 if damage == "three bits" else 0b00110001

        rebuild(directory, change)
        all_notice(directory, name, words)
        shutil.rmtree(directory)


def test_dense_that_is_not_sparse(copy: Callable[[str], Path]) -> None:
    directory = copy("dense")
    name = "model.layers.0.self_attn.k_proj"
    rebuild(directory, lambda tensors: tensors[f"{name}.weight"].fill_(1))
    verdict = verify(directory)
    assert {layer["name"]: layer["reason"] for layer in verdict.layers if layer["status"] == "dense"} == {
        name: "it is not 2:4",
        "model.layers.0.self_attn.o_proj": "it is not 2:4",
    }
    rebuild(directory, lambda tensors: tensors[f"{name}.weight"].fill_(float("nan")))
    with pytest.raises(HalveError, match=name):
        verify(directory)


@pytest.mark.parametrize(
    "file",
    ["tokenizer.json", "generation_config.json", "recipe.yaml", "README.md", "config.json", "chat_template.jinja"],
)
def test_files_beside_the_weights(file: str, copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    content = (directory / file).read_text()
    (directory / file).write_text(content + "\n")
    with pytest.raises(CorruptCheckpointError, match=file):
        verify(directory)
    (directory / file).write_text(content.replace("e", "a", 1) if file != "config.json" else content[:-1] + " ")
    with pytest.raises(CorruptCheckpointError, match=f"{file}.*SHA-256"):
        verify(directory)
    (directory / file).unlink()
    with pytest.raises(HalveError, match=file):
        verify(directory)


@pytest.mark.parametrize("content", ["{", "[]", '{"files": 3}', '{"layers": [1]}', '{"files": {"a": 1}}', "\xff"])
def test_report_is_damaged(content: str, copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    (directory / "report.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CorruptCheckpointError, match=r"report\.json"):
        verify(directory)


def test_extra_file_is_a_note(copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    (directory / "notes.txt").write_text("mine")
    assert verify(directory).notes == ["1 files are not in report.json: notes.txt"]


@pytest.mark.parametrize("outside", ["../packed/model.safetensors", "/etc/hostname", "a/../../b"])
def test_files_outside_of_the_checkpoint(outside: str, copy: Callable[[str], Path]) -> None:
    """Another checkpoint's files are not this one's, wherever they are."""
    directory = copy("dense")
    report = directory / "report.json"
    whole = json.loads(report.read_text())
    report.write_text(json.dumps({**whole, "files": {outside: {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(CorruptCheckpointError, match=r"report\.json names .*outside of"):
        verify(directory)
    report.unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
    all_notice(directory, "index.json names", outside, "outside of")


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [({"pattern": "4:8"}, "4:8"), ({"pattern": "unstructured", "sparsity": 0.6}, "unstructured 0.6")],
)
def test_another_pattern_is_what_the_recipe_says(
    settings: dict[str, Any], pattern: str, halve: Halve, tmp_path: Path
) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    directory = compress(source, tmp_path / "dense", format="dense", ignore=("*.o_proj",), **settings).directory
    called = halve("verify", directory, "--json")
    assert (called.code, called.document["ok"], called.document["pattern"]) == (0, True, pattern)
    assert (called.document["layers_2_4"], called.document["layers_sparse"], called.document["layers_dense"]) == (
        0,
        6,
        1,
    )
    assert f"layers that are {pattern}" in halve("verify", directory).stdout
    # Too few zeros in one layer, accounted for as if it were meant.
    tensors = stored(directory)
    tensors["model.layers.0.mlp.up_proj.weight"][:, :20] = 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    report = json.loads((directory / "report.json").read_text())
    (directory / "report.json").write_text(account(directory, report))
    called = halve("verify", directory)
    assert (called.code, called.stdout) == (1, "")
    assert f"up_proj is not {pattern}, and report.json says that it was pruned" in called.message


def test_a_model_that_nobody_pruned(halve: Halve, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    called = halve("verify", source, "--json")
    assert (called.code, called.document["ok"], called.document["layers_2_4"]) == (1, False, 0)
    called = halve("verify", source)
    assert (called.code, "no layer of it is 2:4" in " ".join(called.stdout.split())) == (1, True)


def test_a_buffer_may_hold_infinity(tmp_path: Path) -> None:
    """As masks do. It is said, and no more."""
    source = tiny_models.build("gpt2", tmp_path / "source", layers=1, hub_gpt2_keys=True)
    directory = compress(source, tmp_path / "packed").directory
    (directory / "report.json").unlink()
    tensors = stored(directory)
    tensors["h.0.attn.bias"][0, 0, 0, 1] = float("-inf")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    verdict = verify(directory)
    assert verdict.ok
    assert [note for note in verdict.notes if note.startswith("h.0.attn.bias, which is no parameter")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, ["version 2", "version 1"]),
        ({"format_version": None}, ["version None"]),
        ({"format_version": "1"}, ["version '1'"]),
        ({"format_version": True}, ["format_version"]),
        ({"format_version": 1.0}, ["format_version"]),
        ({"sparsity_config": {}}, ["unknown key 'sparsity_config'"]),
        ({"igore": []}, ["unknown key 'igore'", "did you mean 'ignore'"]),
        ({"sparsity": "1:4"}, ["sparsity", "2:4"]),
        ({"value_dtype": "int4"}, ["value_dtype"]),
        ({"value_dtype": "int8"}, ["bfloat16", "int8"]),
        ({"value_dtype": "float16"}, ["bfloat16", "float16"]),
        ({"value_dtype": None}, ["value_dtype"]),
        ({"ignore": "lm_head"}, ["ignore"]),
        ({"ignore": [1]}, ["ignore"]),
        ({"ignore": None}, ["ignore"]),
        ({"ignore": ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.7.mlp"]}, ["model.layers.7.mlp"]),
        ({"ignore": ["lm_head"]}, ["model.layers.0.self_attn.o_proj"]),
        ({"ignore": ["model.layers.0.self_attn.o_proj"]}, ["lm_head"]),
    ],
)
def test_quantization_config(change: dict[str, Any], words: list[str], copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    all_notice(directory, *words)


@pytest.mark.parametrize("key", ["format_version", "sparsity", "value_dtype", "ignore"])
def test_quantization_config_without_a_key(key: str, copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"][key]
    path.write_text(json.dumps(config))
    all_notice(directory, "version" if key == "format_version" else key)


def test_no_quantization_config(copy: Callable[[str], Path]) -> None:
    """A packed checkpoint that says nothing of it must not load with random weights."""
    directory = copy("packed")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    quantization = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    for read in (verify, load_model):
        with pytest.raises(HalveError, match=r"model\.layers\.0\."):
            read(directory)
    path.write_text(json.dumps({**config, "quantization_config": {**quantization, "quant_method": "gptq"}}))
    with pytest.raises(SourceError, match="gptq"):
        verify(directory)


def test_config_of_another_model(copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for change, word in (
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "model.layers.1."),
        ({"intermediate_size": 80}, "mlp."),
        ({"vocab_size": 100}, "embed_tokens"),
        ({"hidden_size": "64"}, "hidden_size"),
    ):
        path.write_text(json.dumps({**config, **change}))
        all_notice(directory, word, but=("from_pretrained",) if word == "hidden_size" else ())


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_config_is_not_json(content: str, copy: Callable[[str], Path]) -> None:
    directory = copy("packed")
    (directory / "config.json").write_bytes(content.encode("latin-1"))
    all_notice(directory, "config.json", but=("from_pretrained",))


def test_command(halve: Halve, copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("packed")
    called = halve("verify", directory, "--json")
    assert called.code == 0
    document = called.document
    assert (document["ok"], document["kind"], document["layers_2_4"], document["layers_dense"]) == (
        True,
        "packed",
        6,
        1,
    )
    assert document["dense"][0]["reason"] == "ignored by the recipe (*.o_proj)"
    assert "is whole" in halve("verify", directory).stdout

    flip(directory / "model.safetensors", -1)
    called = halve("verify", directory, "--json")
    assert (called.code, called.stdout) == (1, "")
    assert "SHA-256" in called.message
    called = halve("verify", tmp_path / "none")
    assert (called.code, called.stdout) == (2, "")
    assert "there is no model directory" in called.message
