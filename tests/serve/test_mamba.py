"""A model with a state instead of keys and values is evaluated and measured, and refused where it cannot be batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from compress.errors import SourceError
from serve.engines import loading
from serve.measure.speed import _generate
from tests import tiny_models
from tests.runs import Halve, call, compress, load, prompt


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The dense model and the packed one."""
    directory = tmp_path_factory.mktemp("mamba")
    source = tiny_models.build("mamba", directory / "source", layers=2)
    return source, compress(source, directory / "packed").directory


def test_eval_and_bench(artefacts: tuple[Path, Path]) -> None:
    """In processes of their own, where transformers has not yet said once what it says once."""
    source, packed = artefacts
    text = source.parent / "calibration.txt"
    called = call(
        "eval", packed, "--against", source, "--text", text, "--length", "24", "--windows", "3", "--json"
    )  # fmt: skip
    assert called.code == 0, called.stderr
    document = called.document
    model, ids = load(packed), tiny_models.tokenizer()(text.read_text()).input_ids[: 3 * 24]
    with torch.no_grad():
        windows = torch.tensor(ids).view(3, 24)
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    assert document["models"][1]["losses"] == pytest.approx(losses, rel=1e-3)
    assert document["ratio"] == document["models"][1]["perplexity"] / document["models"][0]["perplexity"]
    assert "transformers" not in called.stderr
    called = call(
        "bench", packed, "--in-process", "--against", source, "--prompt", "8", "--output", "3", "--rounds", "1", "--json"
    )  # fmt: skip
    assert called.code == 0, called.stderr
    # 9/16, and what padding to whole tiles and a header cost layers as small as these.
    assert 0.5625 <= called.document["bytes_ratio"]["pruned_layers"] < 0.7
    assert sum(backend["layers"] for backend in called.document["backends"]) == 2 * 2 * 4
    assert "transformers" not in called.stderr


@pytest.mark.parametrize("family", ["mamba", "llama", "gemma3"])
def test_bench_decodes_with_the_state(family: str, tmp_path: Path) -> None:
    """What is timed is a decoding that knows its context: it gives the tokens that generate() gives."""
    model = load(tiny_models.build(family, tmp_path / "model", layers=2, dtype=torch.float32))
    expected = model.generate(prompt()[:1], min_new_tokens=6, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    fed: list[Any] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].flatten().tolist()), with_kwargs=True
    )
    prefill, decode = _generate(model, prompt()[:1], 6)
    assert prefill > 0
    assert decode > 0
    assert fed[0] == prompt()[0].tolist()
    assert [token for tokens in fed[1:] for token in tokens] == expected


def test_bench_of_a_model_that_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_models.build("llama", tmp_path / "model", layers=1))
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, **inputs: forward(self, **{**inputs, "use_cache": False}))
    with pytest.raises(SourceError, match="keeps nothing from one token to the next"):
        _generate(model, prompt()[:1], 2)


def test_serve_refuses(artefacts: tuple[Path, Path], halve: Halve, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in artefacts:
        called = halve("serve", directory)
        assert called.code == 2
        assert "layers of the kind linear_attention" in called.message
    # Families whose configuration does not list its layers are known by what they are.
    monkeypatch.setattr(loading, "check_layers", lambda *_: None)
    called = halve("serve", artefacts[1])
    assert called.code == 2
    assert "is a MambaForCausalLM, which keeps a state" in called.message


def test_advice_of_transformers_is_not_shown(artefacts: tuple[Path, Path], tmp_path: Path) -> None:
    """That the reference implementation is slow is said once, by a logger; a run shows its own lines only."""
    verbosity = logging.get_verbosity()
    called = call("compress", artefacts[0], "--out", tmp_path / "out", "--calibration",
                  artefacts[0].parent / "calibration.txt", "--samples", "2", "--length", "16")  # fmt: skip
    assert called.code == 0
    assert all(line.startswith("pruning ") for line in called.stderr.splitlines() if line)
    assert logging.get_verbosity() == verbosity
