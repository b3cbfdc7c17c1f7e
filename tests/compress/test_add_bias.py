"""Biases where a family's configuration has a switch for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.architecture import find_blocks, linears_of, load_config, skeleton, switch_biases_on
from compress.errors import SourceError
from compress.layer_statistics import LayerStatistics
from compress.methods import Metric
from compress.metrics import METRICS
from compress.reconstruction import RECONSTRUCTIONS, SPARSEGPT
from compress.verify import verify
from tests import tiny_models
from tests.runs import block_linears, compress, generated, identical, load, logits, stored

ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
SWITCHES: dict[str, tuple[list[str], set[str]]] = {
    "llama": (["attention_bias", "mlp_bias"], ATTENTION | MLP),
    "qwen3": (["attention_bias"], ATTENTION),
    "gemma2": (["attention_bias"], ATTENTION),
    "mamba": (["use_bias"], {"mixer.in_proj", "mixer.out_proj"}),
    "mistral": ([], set()),
    "qwen2": ([], set()),  # has some, and no switch
    "opt": ([], set()),
    "gpt2": ([], set()),
    "gpt_neox": ([], set()),
    "phi3": ([], set()),
}


@pytest.mark.parametrize("family", SWITCHES)
def test_switches(family: str, tmp_path: Path) -> None:
    switches, linears = SWITCHES[family]
    config = load_config(tiny_models.build(family, tmp_path / "source"))
    model = skeleton(config, torch.float32)
    before = config.to_dict()
    changed, found, added = switch_biases_on(config, model)
    assert sorted(found) == switches
    name, _ = find_blocks(model)
    assert added == sorted(f"{name}.{index}.{linear}.bias" for index in range(3) for linear in linears)
    assert config.to_dict() == before
    assert changed.to_dict() == {**before, **dict.fromkeys(switches, True)}


def test_switches_that_are_on_already(tmp_path: Path) -> None:
    config = load_config(tiny_models.build("llama", tmp_path / "source", attention_bias=True))
    _, found, added = switch_biases_on(config, skeleton(config, torch.float32))
    assert found == ["mlp_bias"]
    assert {name.split(".", 3)[3].removesuffix(".bias") for name in added} == MLP


@pytest.fixture(autouse=True)
def leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reconstruction that may correct biases and does not, so that they stay what they were made as."""
    method = dataclasses.replace(SPARSEGPT, name="test_leaving", corrects_bias=True)
    monkeypatch.setitem(RECONSTRUCTIONS, method.name, method)


def artefacts(family: str, directory: Path, **settings: Any) -> tuple[Path, Path, Path]:
    source = tiny_models.build(family, directory / "source")
    settings = {"reconstruction": "test_leaving", **settings}
    packed = compress(source, directory / "packed", add_bias=True, **settings).directory
    dense = compress(source, directory / "dense", add_bias=True, format="dense", **settings).directory
    return source, packed, dense


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mamba"])
def test_zeros_are_stored(family: str, tmp_path: Path) -> None:
    """A method that corrects no bias leaves them at zero: the artefact computes what one without them does."""
    source, packed, dense = artefacts(family, tmp_path)
    switches, linears = SWITCHES[family]
    block, _ = find_blocks(load(source))
    added = {f"{block}.{index}.{linear}.bias" for index in range(3) for linear in linears}
    assert stored(dense).keys() == stored(source).keys() | added
    for directory in (packed, dense):
        config = json.loads((directory / "config.json").read_text())
        assert all(config[switch] is True for switch in switches)
        tensors = stored(directory)
        for name in added:
            weight = load(source).get_submodule(name.removesuffix(".bias")).weight
            assert identical(tensors[name], torch.zeros(weight.shape[0], dtype=torch.bfloat16))
        assert not verify(directory).notes
    _, loading = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    model = load(dense)
    assert type(model.get_submodule(next(iter(added)).removesuffix(".bias"))) is torch.nn.Linear
    assert identical(logits(load(packed)), logits(model))
    assert torch.equal(generated(load(packed)), generated(load(dense)))

    plain = compress(source, tmp_path / "plain", format="dense").directory
    for name, weight in block_linears(load(plain)).items():
        assert identical(weight, block_linears(model)[name]), name
    torch.testing.assert_close(logits(model).float(), logits(load(plain)).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_families_without_switches_are_unchanged(family: str, tmp_path: Path) -> None:
    source, packed, dense = artefacts(family, tmp_path)
    plain = compress(source, tmp_path / "plain").directory
    config, expected = (json.loads((d / "config.json").read_text()) for d in (packed, plain))
    assert config == expected
    ours, theirs = stored(packed), stored(plain)
    assert ours.keys() == theirs.keys()
    assert all(identical(tensor, theirs[name]) for name, tensor in ours.items())
    assert stored(dense).keys() == stored(source).keys()


def test_no_switch_for_what_has_no_bias(tmp_path: Path) -> None:
    source = tiny_models.build("phi3", tmp_path / "source")
    with pytest.raises(SourceError, match=r"Phi3ForCausalLM has no switch .* \(12 have none, the first is .*\); leave"):
        compress(source, tmp_path / "out", add_bias=True, reconstruction="bias", metric="wanda")
    assert not (tmp_path / "out.partial").exists()


def test_a_metric_that_corrects_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new biases are not zero, are those of both artefacts, and lessen the error of the mean."""

    def score(weight: torch.Tensor, statistics: LayerStatistics, options: Any) -> torch.Tensor:
        assert statistics.bias is not None
        return weight.abs()

    metric = Metric("test_bias", score, paper="none", cost="none", needs=frozenset({"moments"}), corrects_bias=True)
    monkeypatch.setitem(METRICS, metric.name, metric)
    source, packed, dense = artefacts("llama", tmp_path, metric="test_bias", reconstruction="none")
    biases = {name: t for name, t in stored(packed).items() if name.endswith("_proj.bias")}
    assert len(biases) == 3 * 7
    assert all(bool(bias.any()) for bias in biases.values())
    assert all(identical(bias, stored(dense)[name]) for name, bias in biases.items())
    assert identical(logits(load(packed)), logits(load(dense)))
    names = {name.removesuffix(".bias") for name in biases}
    assert names == {name for name in linears_of(load(source), "") if name != "lm_head"}
    report = json.loads((packed / "report.json").read_text())
    assert all(layer["bias"] == "corrected" for layer in report["layers"])
    without = compress(source, tmp_path / "without", metric="magnitude", reconstruction="none")
    first, other = report["layers"][0], without.report["layers"][0]
    assert first["relative_output_error"] < other["relative_output_error"]
