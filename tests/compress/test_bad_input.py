"""Bad input: the right exit code, one message that says what, where and what next, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MptConfig, MptForCausalLM

from compress import files, pruner
from tests import tiny_models
from tests.runs import Halve, beside, calibration, call, compress, flags, stored, tree

USAGE, CHECK = 2, 1


def edit_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites the single weight file, without halve."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


class Case:
    """A call of `halve compress` that must fail."""

    def __init__(self, halve: Halve, directory: Path) -> None:
        self.halve, self.directory = halve, directory

    def model(self, family: str = "llama", **settings: Any) -> Path:
        return tiny_models.build(family, self.directory / "model", **{"layers": 1, **settings})

    def fails(self, model: Path | str, code: int, *words: str, finished: int = 0, **settings: Any) -> str:
        """Calls, and checks code, message, and that the directory is as it was; but for the blocks that were finished, which
        are kept, and named in the message."""
        calibration(self.directory)
        before = tree(self.directory)
        defaults = {"calibration": self.directory / "calibration.txt"}
        called = self.halve(
            *flags(self.directory / "x", self.directory / "out", **{**defaults, **settings})[2:], model=model
        )
        assert called.code == code, called
        assert called.stdout == ""
        for word in words:
            assert word in called.message, called.message
        partial = self.directory / "out.partial"
        if finished:
            assert f"kept in {partial}" in called.message
            assert len(list(partial.glob("block-*.safetensors"))) == finished
            shutil.rmtree(partial)
        assert tree(self.directory) == before
        assert not [name for name in beside(self.directory / "out") if name.startswith("out")]
        return called.message


@pytest.fixture
def case(halve: Halve, tmp_path: Path) -> Case:
    def with_model(*arguments: str | Path, model: Path | str) -> Any:
        return halve("compress", model, *arguments)

    return Case(with_model, tmp_path)  # pyright: ignore[reportArgumentType]


# The model


def test_missing_directory(case: Case) -> None:
    case.fails(case.directory / "no" / "such", USAGE, "there is no model directory", "no/such")
    case.fails("no-such-model", USAGE, "there is no model directory no-such-model")


def test_unreachable_hub(case: Case) -> None:
    case.fails(
        "someone/some-model", USAGE, "someone/some-model", "is not a directory here, and the hub cannot be reached"
    )


def test_empty_directory(case: Case) -> None:
    (case.directory / "model").mkdir()
    case.fails(case.directory / "model", USAGE, "is empty", "config.json and safetensors")


def test_file_instead_of_directory(case: Case) -> None:
    (case.directory / "model").write_text("")
    case.fails(case.directory / "model", USAGE, "is a file; a model is a directory")


@pytest.mark.parametrize("bytes_kept", [0, 3, 20, 150, 2000])
def test_a_gguf_file_that_is_cut_off(bytes_kept: int, case: Case) -> None:
    file = case.directory / "model.gguf"
    write_gguf_of_a_llama(file)
    whole = file.read_bytes()
    assert len(whole) > 2000
    file.write_bytes(whole[:bytes_kept])
    case.fails(file, USAGE, "cannot read", "model.gguf", f"({bytes_kept:,} bytes; a download may be cut off)")


def write_gguf_of_a_llama(file: Path) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_token_list([f"token{number}" for number in range(300)])
    writer.add_tensor("token_embd.weight", torch.zeros(300, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_no_safetensors(case: Case) -> None:
    model = case.model()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    case.fails(model, USAGE, "has no .safetensors files", "pytorch_model.bin has to be converted")


def test_packed_already(case: Case) -> None:
    packed = compress(case.model(), case.directory / "packed").directory
    case.fails(packed, USAGE, "is packed by halve already", "halve unpack")


def test_quantized(case: Case) -> None:
    model = case.model()
    edit_config(model, lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    case.fails(model, USAGE, "is quantized (gptq)")


@pytest.mark.parametrize("value", ["halve", [], 3])
def test_quantization_config_of_a_wrong_type(value: Any, case: Case) -> None:
    model = case.model()
    edit_config(model, lambda config: config.update(quantization_config=value))
    case.fails(model, CHECK, "config.json", "quantization_config")


def test_encoder_decoder(case: Case) -> None:
    model = case.model()
    edit_config(model, lambda config: config.update(is_encoder_decoder=True, model_type="t5"))
    case.fails(model, USAGE, "encoder-decoder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("model_type"), ["config.json"]),
        (lambda c: c.update(model_type="nonesuch"), ["nonesuch", "config.json"]),
        (lambda c: c.update(model_type="bert"), ["config.json"]),
        (lambda c: c.update(hidden_size="wide"), ["hidden_size"]),
        (lambda c: c.update(hidden_size=-64), ["config.json"]),
        (lambda c: c.update(dtype="int4"), ["int4", "--dtype"]),
        (lambda c: c.update(dtype=["bfloat16"]), ["dtype"]),
        (lambda c: c.update(num_hidden_layers=0), ["no repeated blocks"]),
        (
            lambda c: c.update(num_hidden_layers=2),
            ["model.layers.1.", "no tensor", "config.json belongs to another model"],
        ),
        (lambda c: c.update(intermediate_size=80), ["mlp.gate_proj.weight", "[160, 64]", "[80, 64]"]),
    ],
)
def test_config_that_fits_no_model(change: Any, words: list[str], case: Case) -> None:
    model = case.model()
    edit_config(model, change)
    case.fails(model, USAGE, *words)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff\xfe", "null"])
def test_config_is_not_json(content: str, case: Case) -> None:
    model = case.model()
    (model / "config.json").write_bytes(content.encode("latin-1"))
    case.fails(model, CHECK, "config.json", "is not")


def test_truncated_source(case: Case) -> None:
    model = case.model(max_shard_size="100KB")
    shard = sorted(model.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for size in (0, 4, 40, len(content) - 1):
        shard.write_bytes(content[:size])
        case.fails(model, CHECK, shard.name, "truncated or damaged")
    shard.write_bytes(content + b"\0")
    case.fails(model, CHECK, shard.name, "truncated or damaged")
    shard.unlink()
    case.fails(model, CHECK, "model.safetensors.index.json", shard.name, "not there")
    (model / "model.safetensors.index.json").write_text("{}")
    case.fails(model, CHECK, "model.safetensors.index.json", "is not a safetensors index")


def test_tampered_source_with_a_digest(case: Case) -> None:
    dense = compress(case.model(), case.directory / "dense", format="dense").directory
    shard = dense / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    case.fails(dense, CHECK, "model.safetensors", "SHA-256")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_missing_tensor_outside_of_the_blocks(name: str, case: Case) -> None:
    model = case.model(tie_word_embeddings=False)
    edit_tensors(model, lambda tensors: tensors.pop(name))
    case.fails(model, USAGE, name, "no tensor")


def test_missing_tensor_in_a_later_block(case: Case) -> None:
    model = case.model(layers=3)
    edit_tensors(model, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    case.fails(model, USAGE, "model.layers.2.mlp.up_proj.weight", "no tensor")


# Too narrow


def test_all_layers_are_too_narrow(case: Case) -> None:
    model = case.model(hidden_size=60, num_attention_heads=2, num_key_value_heads=2, head_dim=30, intermediate_size=156)
    case.fails(model, USAGE, "can be pruned to 2:4", "model.layers.0.self_attn.q_proj", "60", "multiple of 8")
    case.fails(model, USAGE, "can be pruned to 4:8", "not a multiple of 8", pattern="4:8", format="dense")


def test_some_layers_are_too_narrow(tmp_path: Path, halve: Halve) -> None:
    model = tiny_models.build("llama", tmp_path / "model", layers=1, intermediate_size=158)
    called = halve(*flags(model, tmp_path / "out", format="dense"), "--json")
    assert called.code == 0
    assert (called.document["layers_pruned"], called.document["layers"]) == (6, 7)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (dense,) = [layer for layer in report["layers"] if layer["status"] == "dense"]
    assert dense["name"] == "model.layers.0.mlp.down_proj"
    assert dense["reason"] == "158 input features are not a multiple of 4"
    called = halve(*flags(model, tmp_path / "again"))
    assert "model.layers.0.mlp.down_proj" in called.stdout  # which, and why, without asking


# The recipe


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "wnda"}, ["unknown metric 'wnda'", "did you mean 'wanda'", "magnitude"]),
        ({"reconstruction": "sparsgpt"}, ["unknown reconstruction 'sparsgpt'", "did you mean 'sparsegpt'"]),
        ({"pattern": "2of4"}, ["unknown pattern '2of4'", "2:4"]),
        ({"pattern": "4:2"}, ["4:2", "0 < N < M"]),
        ({"pattern": "unstructured", "format": "dense"}, ["--sparsity"]),
        ({"pattern": "4:8"}, ["only 2:4 can be packed", "--format dense"]),
        ({"pattern": "2:4", "sparsity": 0.7}, ["0.7", "0.5"]),
        ({"samples": 0}, ["samples", "greater than or equal to 1"]),
        ({"length": 0}, ["length"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": 2**64}, ["seed"]),
        ({"dtype": "bf16"}, ["dtype", "bfloat16"]),
        ({"format": "zip"}, ["format", "packed"]),
        ({"device": "tpu9"}, ["tpu9"]),
        ({"device": "meta"}, ["'meta'", "processors and CUDA devices"]),
        ({"device": "cpu:3"}, ["'cpu:3'"]),
        ({"reconstruction_options": "dampening=0.1"}, ["dampening", "did you mean 'damping'"]),
        ({"reconstruction_options": "damping"}, ["NAME=VALUE"]),
        ({"reconstruction_options": "damping=much"}, ["damping", "much"]),
        ({"reconstruction_options": "damping=-1"}, ["damping"]),
        ({"metric_options": "a=1"}, ["metric"]),
        ({"ignore": "*.k_prj"}, ["*.k_prj", "matches no linear layer", "k_proj"]),
        ({"calibration": "wikitext2"}, ["test text", "halve eval", "c4"]),
        ({"calibration": "c5"}, ["unknown text 'c5'", "c4"]),
        ({"calibration": "missing.txt"}, ["there is no text file missing.txt"]),
        ({"length": 2000}, ["at most 1024 tokens", "--length 2000"]),
    ],
)
def test_recipe_field(settings: dict[str, Any], words: list[str], case: Case) -> None:
    case.fails(case.model(), USAGE, *words, **settings)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("metric: [", ["is not YAML"]),
        ("- metric", ["must be a mapping"]),
        ("", ["must be a mapping"]),
        ("metrics: wanda", ["no field 'metrics'", "did you mean 'metric"]),
        ("seed: many", ["seed", "many"]),
        ("seed: 1.5", ["seed"]),
        ("metric: 3", ["metric"]),
        ("ignore: {a: 1}", ["ignore"]),
        ("metric_options: wanda", ["metric_options"]),
    ],
)
def test_recipe_file(content: str, words: list[str], case: Case) -> None:
    path = case.directory / "recipe.yaml"
    path.write_text(content)
    case.fails(case.model(), USAGE, *words, recipe=path)


def test_recipe_file_is_missing_or_binary(case: Case) -> None:
    model = case.model()
    case.fails(model, USAGE, "cannot read the recipe", "none.yaml", recipe=case.directory / "none.yaml")
    (case.directory / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    case.fails(model, USAGE, "binary.yaml", recipe=case.directory / "binary.yaml")


# Calibration and tokenizer


def test_text_is_too_short(case: Case) -> None:
    message = case.fails(case.model(), USAGE, "windows of 40, and 1000 were asked for", samples=1000)
    tokens = len(tiny_models.tokenizer()(calibration(case.directory).read_text()).input_ids)
    assert f"has {tokens} tokens, which is {tokens // 40} windows" in message
    assert f"--samples {tokens // 40}" in message
    short = case.directory / "short.txt"
    short.write_text("Once.")
    message = case.fails(case.directory / "model", USAGE, "0 windows of 40", "--length below 40", calibration=short)
    assert "--samples 0" not in message


def test_windows_are_longer_than_the_model_reads(case: Case) -> None:
    """MPT has a name of its own for it."""
    config = MptConfig(d_model=64, n_heads=4, n_layers=1, max_seq_len=32, vocab_size=tiny_models.VOCABULARY)
    model = tiny_models.build("llama", case.directory / "model", layers=1)
    for file in ("model.safetensors", "config.json"):
        (model / file).unlink()
    MptForCausalLM(config).save_pretrained(model)
    case.fails(model, USAGE, "reads at most 32 tokens", "--length 40")


def test_text_is_not_text(case: Case) -> None:
    model = case.model()
    (case.directory / "bad.txt").write_bytes(b"\xff\xfe" * 400)
    case.fails(model, USAGE, "bad.txt", calibration=case.directory / "bad.txt")
    (case.directory / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    case.fails(model, USAGE, "bad.jsonl, line 2", calibration=case.directory / "bad.jsonl")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_no_tokenizer(family: str, case: Case) -> None:
    model = case.model(family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    case.fails(model, USAGE, "has no usable tokenizer")


def test_broken_tokenizer(case: Case) -> None:
    model = case.model()
    (model / "tokenizer.json").write_text("{}")
    case.fails(model, USAGE, "has no usable tokenizer")
    (model / "tokenizer.json").write_text("{")
    case.fails(model, USAGE, "has no usable tokenizer")


def test_tokenizer_of_another_model(case: Case) -> None:
    model = case.model(vocab_size=200)
    case.fails(model, USAGE, "the tokenizer gives token", "the model knows 200", "do not belong together")


# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_weight_is_not_finite(layer: str, value: float, case: Case) -> None:
    model = case.model(layers=2)
    edit_tensors(model, lambda tensors: tensors[f"{layer}.weight"].__setitem__((3, 5), value))
    finished = int(".layers.1." in layer)
    message = case.fails(model, CHECK, layer, "NaN or infin", finished=finished)
    assert "[3, 5]" in message
    given = {"format": "dense", "metric": "magnitude", "reconstruction": "none"}
    case.fails(model, CHECK, layer, "NaN or infin", finished=finished, **given)


def test_ignored_weight_is_not_finite(case: Case) -> None:
    model = case.model()
    edit_tensors(
        model, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].__setitem__((0, 0), float("nan"))
    )
    case.fails(model, CHECK, "model.layers.0.mlp.down_proj", "NaN or infin", ignore="*.down_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"),
        ("model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.gate_proj"),
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_activations_are_not_finite(tensor: str, where: str, value: float, case: Case) -> None:
    model = case.model(layers=2)
    edit_tensors(model, lambda tensors: tensors[tensor].fill_(value))
    finished = int(".layers.1." in where)
    case.fails(model, CHECK, where, "NaN or infin", finished=finished)
    case.fails(model, CHECK, where, "NaN or infin", finished=finished, metric="magnitude", reconstruction="none")


def test_output_overflows(case: Case) -> None:
    """Inputs and weights are finite, the block's output is not, in float16."""
    model = case.model(layers=2, dtype=torch.float16)
    edit_tensors(model, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].mul_(8000).clamp_(-6e4, 6e4))
    case.fails(model, CHECK, "model.layers.0", "NaN or infinity", "--dtype float32")


# The place to write to


def test_out_is_not_empty(halve: Halve, tmp_path: Path) -> None:
    model = tiny_models.build("llama", tmp_path / "model", layers=1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    called = halve(*flags(model, out))
    assert called.code == USAGE
    assert "is not empty" in called.message
    assert tree(out) == {"precious": b"mine"}
    called = halve(*flags(model, out / "precious"))
    assert called.code == USAGE
    called = halve(*flags(model, out / "precious" / "below"))
    assert called.code == USAGE
    assert "cannot write" in called.message
    called = halve(*flags(model, model))
    assert called.code == USAGE
    assert beside(out) == ["calibration.txt", "model", "out"]


def test_a_work_directory_of_somebody_else(case: Case) -> None:
    """It is cleared when a run begins, so it has to be one that a run left behind."""
    model = case.model()
    partial = case.directory / "out.partial"
    for name in ("notes.md", "finally", "block-1.safetensors", "photos"):
        partial.mkdir()
        place = partial / name / "a.txt" if name == "photos" else partial / name
        place.parent.mkdir(exist_ok=True)
        place.write_text("mine")
        calibration(case.directory)
        before = tree(case.directory)
        called = case.halve(*flags(case.directory / "x", case.directory / "out")[2:], model=model)  # type: ignore[call-arg]
        assert called.code == USAGE
        assert f"{partial} is where this run would work, and it holds {name}" in called.message
        assert tree(case.directory) == before
        shutil.rmtree(partial)


@pytest.mark.parametrize(
    "left", ["block-00003.safetensors", ".block-00003.safetensors.tmp", "hidden.activations", "source.tmp", "lock"]
)
def test_what_a_run_left_is_cleared(left: str, halve: Halve, tmp_path: Path) -> None:
    model = tiny_models.build("llama", tmp_path / "model", layers=1)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / left).write_text("half of it")
    assert halve(*flags(model, tmp_path / "out")).code == 0
    assert "out.partial" not in beside(model)


def test_out_that_cannot_be_replaced(halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the run, and not after it."""
    model = tiny_models.build("llama", tmp_path / "model", layers=1)
    calibration(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mount")
    before = tree(tmp_path)
    for name, kind in (("link", "a link"), ("mount", "a mount point")):
        called = halve(*flags(model, tmp_path / name))
        assert called.code == USAGE
        assert f"{tmp_path / name} is {kind}" in called.message
        assert "a new directory inside of it" in called.message
    assert tree(tmp_path) == before
    assert "link.partial" not in beside(model)
    assert halve(*flags(model, tmp_path / "mount" / "inside")).code == 0


def test_out_that_is_empty_is_taken(halve: Halve, tmp_path: Path) -> None:
    model = tiny_models.build("llama", tmp_path / "model", layers=1)
    (tmp_path / "out").mkdir()
    assert halve(*flags(model, tmp_path / "out")).code == 0
    assert (tmp_path / "out" / "report.json").is_file()
    assert halve(*flags(model, tmp_path / "new" / "deep" / "out")).code == 0


@pytest.mark.parametrize("name", [".", "..", "/", ""])
def test_out_without_a_name(name: str, halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama", tmp_path / "model", layers=1)
    (tmp_path / "empty" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "er")
    given = flags(model, Path("OUT"))
    given[given.index("OUT")] = name
    called = halve(*given)
    assert called.code == USAGE
    assert "--out" in called.message
    assert beside(tmp_path / "empty" / "er") == ["er"]
    assert beside(model) == ["calibration.txt", "empty", "model"]


def test_read_only_place(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.model()
    if os.geteuid() == 0:  # root may write everywhere
        mkdir = Path.mkdir

        def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
            if self.name == "out.partial":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
            mkdir(self, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        case.directory.chmod(0o500)
    try:
        case.fails(model, USAGE, "cannot write", "out.partial", "Permission denied")
    finally:
        case.directory.chmod(0o700)


def test_too_little_space(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.model()
    usage = shutil.disk_usage(case.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    case.fails(model, USAGE, "not enough disk space", "GB")


def test_space_runs_out(halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every write in turn; then there is space again, and --resume finishes the run."""
    model = tiny_models.build("llama", tmp_path / "model", layers=2)
    expected = tree(compress(model, tmp_path / "expected").directory)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sync, copy = os.fsync, shutil.copyfile
    for number in range(1, 100):
        writes = iter(range(1, 1000))

        def failing(function: Any, number: int = number, writes: Any = writes) -> Any:
            def call(*args: Any) -> Any:
                if next(writes) == number:
                    raise full
                return function(*args)

            return call

        monkeypatch.setattr(files.os, "fsync", failing(sync))
        monkeypatch.setattr(shutil, "copyfile", failing(copy))
        place = tmp_path / f"{number}"
        place.mkdir()
        given = [*flags(model, place / "out", calibration=tmp_path / "calibration.txt"), "--checkpoint-seconds", "0"]
        called = halve(*given)
        monkeypatch.setattr(files.os, "fsync", sync)
        monkeypatch.setattr(shutil, "copyfile", copy)
        if called.code == 0:
            break
        assert called.code == USAGE
        assert "no disk space left while writing" in called.message
        assert not (place / "out").exists()
        if (place / "out.partial").exists():
            assert "--resume" in called.message
            given.append("--resume")
        called = halve(*given)
        assert called.code == 0, called
        assert tree(place) == {f"out/{name}": content for name, content in expected.items()}
    assert number > 15


def test_error_in_a_process_of_its_own(tmp_path: Path) -> None:
    called = call("compress", tmp_path / "none", "--out", tmp_path / "out")
    assert called.code == USAGE
    assert called.stdout == ""
    assert "there is no model directory" in called.message
    assert list(tmp_path.iterdir()) == []


def test_unexpected_failure_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no fault of the user is not dressed up as one."""
    model = tiny_models.build("llama", tmp_path / "model", layers=1)

    def broken(*args: Any) -> Any:
        raise AssertionError("a bug")

    monkeypatch.setattr(pruner, "prune_layer", broken)
    with pytest.raises(AssertionError, match="a bug"):
        compress(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert stored(model)
