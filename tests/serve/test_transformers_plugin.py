"""`from_pretrained` on a packed checkpoint: packed in memory, the same numbers, and its way back to disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import CorruptCheckpointError
from serve.linear import Sparse24Conv1D, Sparse24Linear
from serve.loading import linear_bytes, load_model, load_tokenizer, weight_bytes
from serve.transformers_plugin import HalveConfig
from tests import tiny_models
from tests.runs import (
    ROOT,
    block_linears,
    compress,
    environment,
    generated,
    identical,
    load,
    logits,
    prompt,
    stored,
)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The packed and the dense artefact of one recipe."""
    directory = tmp_path_factory.mktemp(request.param)
    source = tiny_models.build(request.param, directory / "source", layers=2)
    packed = compress(source, directory / "packed").directory
    return packed, compress(source, directory / "dense", format="dense").directory


@pytest.mark.usefixtures("plain_backend")
def test_weights_stay_packed(pair: tuple[Path, Path]) -> None:
    packed, dense = map(load, pair)
    modules = {name: module for name, module in packed.named_modules() if isinstance(module, Sparse24Linear)}
    assert modules.keys() == block_linears(dense).keys()
    conv1d = pair[0].parent.name.startswith("gpt2")
    assert all(isinstance(module, Sparse24Conv1D) is conv1d for module in modules.values())
    files = stored(pair[0])
    prefix = "transformer." if conv1d else ""
    for name, module in modules.items():
        assert {key for key, _ in module.named_parameters()} - {"bias"} == {"weight_packed", "weight_mask"}
        for part in ("weight_packed", "weight_mask"):
            key = f"{name}.{part}"
            assert identical(getattr(module, part), files.get(key, files.get(key.removeprefix(prefix), torch.empty(0))))
    names = set(modules)
    assert linear_bytes(packed, names) == 0.5625 * linear_bytes(dense, names)
    assert weight_bytes(dense) - weight_bytes(packed) == linear_bytes(dense, names) - linear_bytes(packed, names)


@pytest.mark.parametrize("dtype", [None, "auto", torch.bfloat16])
def test_dtypes_that_fit(dtype: object, pair: tuple[Path, Path]) -> None:
    settings = {} if dtype is None else {"dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(pair[0], **settings).eval()
    assert model.dtype == torch.bfloat16
    assert identical(logits(model), logits(load(pair[1])))
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "weight_" in name)


def test_dtype_that_does_not_fit(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"bfloat16 and torch\.float32 was asked for.*halve unpack"):
        AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)


def test_load_model_and_tokenizer(pair: tuple[Path, Path]) -> None:
    packed, dense = map(load_model, pair)
    assert identical(logits(packed), logits(dense))
    assert torch.equal(generated(packed), generated(dense))
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert not packed.training
    assert load_tokenizer(pair[0])("The miller").input_ids == tiny_models.tokenizer()("The miller").input_ids


def test_cache_and_padding(pair: tuple[Path, Path]) -> None:
    """One token at a time, and rows of unequal length, as an endpoint calls the model."""
    packed, dense = map(load, pair)
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        outputs = []
        for model in (packed, dense):
            first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
            step = model(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
            outputs.append((first.logits, step.logits))
    assert identical(outputs[0][0], outputs[1][0])
    assert identical(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_saved_again(max_shard_size: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = load(pair[0])
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(shards) > 2) is (max_shard_size == "60KB")
    before, after = (json.loads((path / "config.json").read_text()) for path in (pair[0], tmp_path / "saved"))
    assert after["quantization_config"] == before["quantization_config"]
    again = load(tmp_path / "saved")
    assert identical(logits(again), logits(model))
    for name, tensor in model.state_dict().items():
        assert identical(tensor, again.state_dict()[name])


@pytest.mark.usefixtures("plain_backend")
def test_state_dict_goes_in_and_out(pair: tuple[Path, Path]) -> None:
    model, other = load(pair[0]), load(pair[0])
    for module in other.modules():
        if isinstance(module, Sparse24Linear):
            module.weight_packed.data.zero_()
    assert not identical(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert identical(logits(other), logits(model))


def test_config_alone(pair: tuple[Path, Path]) -> None:
    config = AutoConfig.from_pretrained(pair[0])
    quantization = config.quantization_config
    parsed = quantization if isinstance(quantization, HalveConfig) else HalveConfig.from_dict(dict(quantization))
    assert parsed.to_dict() == json.loads((pair[0] / "config.json").read_text())["quantization_config"]
    with pytest.raises(CorruptCheckpointError, match="unknown key 'extra'"):
        HalveConfig.from_dict({**parsed.to_dict(), "extra": 1})


def test_a_dense_model_is_not_packed_while_it_is_loaded(pair: tuple[Path, Path]) -> None:
    settings = json.loads((pair[0] / "config.json").read_text())["quantization_config"]
    with pytest.raises((ValueError, CorruptCheckpointError)):
        AutoModelForCausalLM.from_pretrained(pair[1], quantization_config=HalveConfig.from_dict(settings))


def test_a_process_that_imports_nothing_but_the_plugin(tmp_path: Path) -> None:
    """The usage that the model card gives."""
    packed = compress(tiny_models.build("llama", tmp_path / "source", layers=1), tmp_path / "packed").directory
    card = (packed / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "PATH_OR_ID" in code
    check = "\nprint(type(model).__name__, any('Sparse24' in type(m).__name__ for m in model.modules()))"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("PATH_OR_ID", str(packed)) + check],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "True"
