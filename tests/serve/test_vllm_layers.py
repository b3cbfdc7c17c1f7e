"""What becomes of a layer in vLLM: its form, whether it stays so, what compiled graphs know of it. With a stub for vLLM."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import CorruptCheckpointError, SourceError
from compress.packed import PATTERN, pack
from serve.kernels.cpu import library
from serve.measure import tuned
from serve.measure.tuned import Decision
from serve.vllm import stored
from serve.vllm.stored import DENSE, Stored
from tests.serve import vllm_checkpoints as checkpoints
from tests.serve.vllm_stub import LinearBase, VllmConfig, WeightsMapper, in_place_of_vllm

needs_kernels = pytest.mark.skipif(library.load() is None, reason=library.status())
SIZE = 64
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.fixture
def plugin() -> Iterator[ModuleType]:
    with in_place_of_vllm() as quantization:
        yield quantization


def drawn(seed: int, *, is_sparse: bool, rows: int = SIZE) -> Tensor:
    weight = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return weight * PATTERN.mask(weight.abs()) if is_sparse else weight


def layer_of(plugin: ModuleType, how: Stored = DENSE, prefix: str = "model.layers.0.self_attn.o_proj") -> LinearBase:
    return LinearBase(plugin.HalveQuantization(how), prefix, [SIZE], SIZE)


def qkv(plugin: ModuleType, how: Stored) -> LinearBase:
    quantization = plugin.HalveQuantization(how)
    quantization.packed_modules_mapping = FUSED
    return LinearBase(quantization, "model.layers.0.self_attn.qkv_proj", [SIZE, SIZE // 2, SIZE // 2], SIZE)


def is_product(layer: LinearBase, weight: Tensor) -> bool:
    x = drawn(9, is_sparse=False, rows=3)
    return torch.allclose(layer(x).double(), x.double() @ weight.double().T, rtol=0.02, atol=0.1)


# Which layers are packed


@pytest.mark.parametrize("mapping", [FUSED, {}])
def test_a_part_that_is_not_packed_counts_where_a_model_does_not_say_what_it_fuses(
    plugin: ModuleType, mapping: dict[str, list[str]]
) -> None:
    """As of vLLM's StableLM, GPT-J and Orion; models whose checkpoints hold the layer fused (Phi-3) name it so."""
    attention = "model.layers.0.self_attn"

    def found(*ignore: str) -> tuple[list[str], list[bool]]:
        quantization = plugin.HalveQuantization(Stored("packed", ignore=ignore, value_dtype=torch.bfloat16))
        quantization.packed_modules_mapping = mapping
        method = LinearBase(quantization, f"{attention}.qkv_proj", [SIZE, SIZE // 2, SIZE // 2], SIZE).quant_method
        return list(method.modules), list(method.is_packed)

    parts = [f"{attention}.{name}_proj" for name in "qkv"]
    assert found(f"{attention}.v_proj") == (parts, [True, True, False])
    whole = (parts, [True] * 3) if mapping else ([f"{attention}.qkv_proj"], [True])
    assert found("model.layers.1.self_attn.v_proj") == whole
    if not mapping:
        quantization = plugin.HalveQuantization(Stored("packed", ignore=(f"{attention}.qkv_proj",)))
        quantization.get_quant_method(LinearBase.__new__(LinearBase), f"{attention}.qkv_proj")
        assert quantization._left == ["qkv_proj"]


def test_what_is_stored_whole_is_not_packed(plugin: ModuleType, tmp_path: Path) -> None:
    """vLLM makes a linear of a router that is none in transformers, so that config.json does not name it."""
    packed = pack(drawn(0, is_sparse=True))
    tensors = {
        "model.layers.0.mlp.gate.weight": drawn(1, is_sparse=False),
        "model.layers.0.norm.weight": torch.ones(SIZE),
        "model.layers.0.self_attn.o_proj.weight_packed": packed.values,
        "model.layers.0.self_attn.o_proj.weight_mask": packed.mask,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = plugin.HalveQuantization(Stored("packed", value_dtype=torch.bfloat16))
    quantization._require_sound = lambda directory: None
    quantization.maybe_update_config(str(tmp_path))
    for name in ("mlp.gate", "self_attn.o_proj"):
        quantization.get_quant_method(LinearBase.__new__(LinearBase), f"model.layers.0.{name}")
    assert quantization._left == ["gate"]


# Weights that are read anew


@needs_kernels
def test_other_weights_of_the_same_form(plugin: ModuleType) -> None:
    layer = layer_of(plugin)
    layer.read({"weight": drawn(0, is_sparse=True)})
    assert list(layer._parameters) == ["weight_packed"]
    held = layer.weight_packed
    for seed in (1, 2):
        again = drawn(seed, is_sparse=True)
        layer.read_anew({"weight": again})
        assert layer.weight_packed is held
        assert is_product(layer, again)


@needs_kernels
def test_a_sparse_layer_refuses_weights_that_are_not(plugin: ModuleType) -> None:
    layer = layer_of(plugin)
    layer.read({"weight": drawn(0, is_sparse=True)})
    with pytest.raises(CorruptCheckpointError, match=r"layers\.0\.self_attn\.o_proj was 2:4 .* are not \(not 2:4\)"):
        layer.read_anew({"weight": drawn(1, is_sparse=False)})


def test_a_dense_layer_takes_sparse_weights_and_stays_dense(plugin: ModuleType) -> None:
    layer = layer_of(plugin)
    layer.read({"weight": drawn(0, is_sparse=False)})
    for is_sparse in (True, False):
        again = drawn(1, is_sparse=is_sparse)
        layer.read_anew({"weight": again})
        assert list(layer._parameters) == ["weight"]
        assert is_product(layer, again)


def test_what_decided_may_change_in_between(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`halve tune` beside a server that runs: the form that the layer has stays."""
    monkeypatch.setattr(tuned, "decision", lambda *shape: Decision("cpu", "dense is faster here"))
    layer = layer_of(plugin)
    layer.read({"weight": drawn(0, is_sparse=True)})
    assert list(layer._parameters) == ["weight"]
    monkeypatch.setattr(tuned, "decision", lambda *shape: None)
    again = drawn(1, is_sparse=True)
    layer.read_anew({"weight": again})
    assert list(layer._parameters) == ["weight"]
    assert is_product(layer, again)


# Layers that vLLM fuses


def parts(*sparse: bool) -> list[Tensor]:
    return [
        drawn(number, is_sparse=is_sparse, rows=rows)
        for number, (is_sparse, rows) in enumerate(zip(sparse, (SIZE, SIZE // 2, SIZE // 2), strict=True))
    ]


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.mark.parametrize("is_packed", [True, False])
def test_one_dense_part_costs_the_whole_layer_its_gain_which_is_said(
    plugin: ModuleType, caplog: pytest.LogCaptureFixture, is_packed: bool
) -> None:
    dense = "model.layers.0.self_attn.v_proj"
    layer = qkv(plugin, Stored("packed", ignore=(dense,)) if is_packed else DENSE)
    weights = parts(True, True, False)
    with caplog.at_level(logging.INFO):
        if is_packed:
            packed = [pack(weight) for weight in weights[:2]]
            for part, weight in enumerate(packed):
                layer.weight_packed.weight_loader(layer.weight_packed, weight.values, part)
                layer.weight_mask.weight_loader(layer.weight_mask, weight.mask, part)
            layer.weight.weight_loader(layer.weight, weights[2], 2)
            layer.quant_method.process_weights_after_loading(layer)
        else:
            layer.read({"weight": weights})
    assert is_product(layer, torch.cat(weights))
    assert "halve: 1 linear layers are dense: vLLM fuses them with v_proj, which is not 2:4" in said(
        caplog, logging.INFO
    )
    [warning] = said(caplog, logging.WARNING)
    assert "prune q, k and v of a block alike" in warning


def test_a_fused_layer_that_is_dense_is_no_loss(plugin: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    layer = qkv(plugin, DENSE)
    with caplog.at_level(logging.INFO):
        layer.read({"weight": parts(False, False, False)})
    assert "halve: 1 linear layers are dense: not 2:4" in said(caplog, logging.INFO)
    assert not said(caplog, logging.WARNING)


# Graphs that are kept


class Model(nn.Module):
    def __init__(self, layer: LinearBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def start(plugin: ModuleType, weight: Tensor, x: Tensor, kept: Path) -> tuple[Tensor, bool]:
    """A start of vLLM: weights are read; a graph that was kept under the configuration's hash is loaded with guards off, or one is
    compiled and kept. The model's answer, and whether the graph was one that was kept."""
    quantization = plugin.HalveQuantization(DENSE)
    layer = LinearBase(quantization, "model.layers.0.self_attn.o_proj", [SIZE], SIZE)
    layer.read({"weight": weight})
    model, file = Model(layer), kept / VllmConfig(quantization).compute_hash()
    was_kept = file.exists()
    torch._dynamo.reset()
    if not was_kept:
        options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        with torch._dynamo.config.patch(enable_aot_compile=True):
            compiled = torch.compile(model.forward, fullgraph=True, backend="inductor", options=options)
            compiled.aot_compile(((x,), {})).save_compiled_function(str(file))
    with file.open("rb") as opened:
        loaded = torch.compiler.load_compiled_function(opened, f_globals=Model.forward.__globals__)
    loaded.disable_guard_check()
    return loaded(model, x), was_kept


@needs_kernels
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_kept_graph_is_not_taken_for_layers_of_another_form(
    plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`halve tune` between two starts, and weights in the same place that are no longer 2:4."""
    x, weight = drawn(9, is_sparse=False, rows=3), drawn(0, is_sparse=True)
    decided: list[str | None] = [None]
    monkeypatch.setattr(tuned, "decision", lambda *shape: Decision("cpu", decided[0]))
    for reason, values, is_kept in (
        (None, weight, False),
        ("dense is faster here", weight, False),
        (None, weight, True),
        (None, drawn(1, is_sparse=False), True),  # as the second one
    ):
        decided[0] = reason
        found, was_kept = start(plugin, values, x, tmp_path)
        assert torch.allclose(found.double(), x.double() @ values.double().T, rtol=0.02, atol=0.1)
        assert was_kept is is_kept


def test_the_hash_counts_what_became_of_every_layer(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_of(first: bool, second: bool) -> str:
        quantization = plugin.HalveQuantization(DENSE)
        config = VllmConfig(quantization)
        assert config.compute_hash() == VllmConfig().compute_hash(), "nothing was read yet"
        layers = [LinearBase(quantization, f"layers.{number}.o_proj", [SIZE], SIZE) for number in range(2)]
        for layer, is_sparse in zip(layers, (first, second), strict=True):
            layer.read({"weight": drawn(0, is_sparse=is_sparse)})
        assert len(config.compute_hash()) == len(VllmConfig().compute_hash())
        assert config.compute_hash() != VllmConfig(quantization, {"max_model_len": 7}).compute_hash()
        return config.compute_hash()

    if library.load() is not None:
        assert len({hash_of(a, b) for a in (True, False) for b in (True, False)}) == 4
    assert hash_of(True, False) == hash_of(True, False)
    monkeypatch.setenv("HALVE_BACKEND", "plain")
    assert hash_of(True, True) == hash_of(False, False), "all of them are dense, and of the same size"


# Names


def test_a_downloaded_checkpoint_is_checked_by_its_own_names(
    plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After vLLM renamed what it was told."""
    packed, _ = checkpoints.pair(tmp_path / "model", layers=1, ignore=("*.k_proj",))
    checked: list[Path] = []

    def download(model: str, **options: Any) -> str:
        checked.append(packed)
        return str(packed)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    how = stored.of_halve(json.loads((packed / "config.json").read_text())["quantization_config"])
    quantization = plugin.HalveQuantization(how)
    quantization.maybe_update_config("someone/model")
    quantization.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    prefix = "language_model.model.layers.0.self_attn"
    assert plugin.SparseLinearMethod is type(
        LinearBase(quantization, f"{prefix}.o_proj", [checkpoints.WIDTH], checkpoints.WIDTH).quant_method
    )
    unquantized = quantization.get_quant_method(LinearBase.__new__(LinearBase), f"{prefix}.k_proj")
    assert isinstance(unquantized, plugin.UnquantizedLinearMethod)
    quantization._processed(f"{prefix}.o_proj", plugin.Outcome(False, "why", 1, 1))
    assert checked == [packed]


# Llama 4, of which vLLM reorders the rows of q and k


class Config:
    def __init__(self, model_type: str, text_config: Config | None = None) -> None:
        self.model_type, self.text_config = model_type, text_config


@pytest.mark.parametrize("config", [Config("llama4_text"), Config("llama4", Config("llama4_text"))])
@pytest.mark.parametrize(("kind", "advice"), [("packed", "halve unpack"), ("bitmask", "compressed-tensors before")])
def test_rows_that_vllm_reorders_are_refused(plugin: ModuleType, config: Config, kind: str, advice: str) -> None:
    def build(how: Stored, config: Config) -> None:
        quantization = plugin.HalveQuantization(how)
        quantization.packed_modules_mapping = FUSED
        quantization.maybe_update_config("someone/model", hf_config=config)
        for name in ("o_proj", "qkv_proj"):
            LinearBase(quantization, f"model.layers.0.self_attn.{name}", [SIZE, SIZE // 2, SIZE // 2], SIZE)

    with pytest.raises(SourceError, match=rf"self_attn\.q_proj is packed, and vLLM reorders .*{advice}"):
        build(Stored(kind), config)
    build(DENSE, config)
    build(Stored(kind), Config("llama"))
    build(Stored(kind, ignore=("re:.*self_attn.[qk]_proj",)), config)
