"""Code that a checkpoint brings is never run, nor is anybody asked whether to."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from compress.errors import SourceError
from compress.sources import load_tokenizer
from compress.verify import verify
from serve.engines.loading import load_checkpoint
from serve.loading import load_model
from tests import tiny_models
from tests.runs import ROOT, Halve

CODE = """
from pathlib import Path
Path({marker!r}).write_text("it ran")
from transformers import LlamaConfig as Own, PreTrainedTokenizerFast as OwnTokenizer, LlamaForCausalLM as OwnModel
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that names code for everything; running it leaves a file."""
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    (source / "own.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    change(source / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"})
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    return source


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_model_that_transformers_does_not_have(with_code: Path, halve: Halve, tmp_path: Path) -> None:
    change(with_code / "config.json", model_type="own", architectures=["OwnModel"])
    for read in (verify, load_model, lambda path: load_checkpoint(str(path), "cpu", "auto")):
        with pytest.raises(SourceError, match=r"config\.json: it brings Python code of its own"):
            read(with_code)
    called = halve("verify", with_code, "--json")
    assert (called.code, called.stdout) == (2, "")
    assert "never runs" in called.message
    assert not (tmp_path / "marker").exists()


def test_a_tokenizer_that_transformers_does_not_have(with_code: Path, tmp_path: Path) -> None:
    change(with_code / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    with pytest.raises(SourceError, match="no usable tokenizer"):
        load_tokenizer(with_code)
    assert not (tmp_path / "marker").exists()


def test_a_model_that_transformers_has_is_read_without_it(with_code: Path, tmp_path: Path) -> None:
    assert load_model(with_code).config.model_type == "llama"
    assert not (tmp_path / "marker").exists()


def test_every_call_that_reads_a_model_says_so() -> None:
    found = 0
    for folder in ("compress", "serve"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr in ("from_pretrained", "from_config"):
                    found += 1
                    assert any(word.arg is None for word in node.keywords), f"{file}:{node.lineno} has no **NEVER"
    assert found >= 8
