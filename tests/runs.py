"""What the end-to-end tests share: a short calibration text, runs on tiny models, and ways to look at artefacts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import serve.transformers_plugin  # noqa: F401  registers the packed format
from compress import calibration as texts
from compress.architecture import auto_class, is_linear, load_config, oriented
from compress.attention import TORCH, set_attention
from compress.pipeline import Compressed, compress_model
from serve.cli import app
from serve.linear import Sparse24Conv1D, Sparse24Linear
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, LENGTH = 6, 40  # windows are longer than the sliding windows of the tiny models
assert LENGTH > 2 * tiny_models.SLIDING_WINDOW


def calibration(directory: Path) -> Path:
    """A text file beside the models of a test, enough for every test."""
    path = directory / "calibration.txt"
    if not path.exists():
        path.write_text(tiny_models.text(2))
    return path


def compress(model: Path, out: Path, **settings: Any) -> Compressed:
    """`compress_model` with a short calibration."""
    defaults = {"calibration": str(calibration(model.parent)), "samples": SAMPLES, "length": LENGTH}
    return compress_model(model, out, **{**defaults, **settings})


def build_with_text(
    family: str, directory: Path, *, layers: int = 2, dtype: torch.dtype = torch.float32, **more: Any
) -> Path:
    """A tiny model, beside a calibration text of some more windows than most tests need: some are held out."""
    (directory / "calibration.txt").write_text(tiny_models.text(4))
    return tiny_models.build(family, directory / "source", layers=layers, dtype=dtype, **more)


def report(directory: Path) -> dict[str, Any]:
    """What an artefact says of itself."""
    return json.loads((directory / "report.json").read_text())


def flags(model: Path, out: Path, **settings: Any) -> list[str]:
    """The same as arguments of the command."""
    defaults = {"calibration": str(calibration(model.parent)), "samples": SAMPLES, "length": LENGTH}
    given = {**defaults, **settings}
    pairs = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), str(value))]
    return ["compress", str(model), "--out", str(out), *pairs]


@dataclass(frozen=True)
class Called:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The JSON document, which must be all that is on standard output."""
        lines = self.stdout.splitlines()
        assert len(lines) == 1, self.stdout
        return json.loads(lines[0])

    @property
    def message(self) -> str:
        """The one error message, without the progress lines before it."""
        assert "Traceback" not in self.stderr, self.stderr
        before, found, after = self.stderr.partition("error: ")
        assert found, self.stderr
        assert "error: " not in before + after, self.stderr
        assert len(after.strip().splitlines()) == 1, self.stderr
        return after.strip()


def turn_last_windows(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """From now on that many calibration windows, the last ones, hold their tokens in reverse."""
    load_windows = texts.load_windows

    def windows(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = load_windows(*args, **kwargs)
        found[-count:] = found[-count:].flip(1)
        return found

    monkeypatch.setattr(texts, "load_windows", windows)


class Halve:
    """The command, called inside of this process (which spares two seconds of imports a call)."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str | Path) -> Called:
        from compress.console import run_app

        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["halve", *map(str, arguments)])
        code = 0
        try:
            run_app(app)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        captured = self._capsys.readouterr()
        return Called(code, captured.out, captured.err)


def chromium() -> str | None:
    """The program of a Chromium that is installed on this machine."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def environment() -> dict[str, str]:
    """For child processes: this checkout is what is imported, one thread, no network."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }


def command(*arguments: str | Path) -> list[str]:
    """`halve` with these arguments, for a child process."""
    return [sys.executable, "-c", "from serve.cli import main; main()", *map(str, arguments)]


def call(*arguments: str | Path) -> Called:
    """Runs the command in a process of its own."""
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    return Called(done.returncode, done.stdout, done.stderr)


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its content."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def beside(path: Path) -> list[str]:
    """What lies in the directory that holds `path`."""
    return sorted(p.name for p in path.parent.iterdir())


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118  it is no mapping
                assert name not in tensors
                tensors[name] = handle.get_tensor(name)
    return tensors


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


def load(directory: Path) -> Any:
    """The model as transformers loads it when nothing else is said, in the checkpoint's own dtype; but where torch's attention would
    ignore the cap of its logits (Gemma 2)."""
    model = auto_class(load_config(directory)).from_pretrained(directory).eval()
    set_attention(model, TORCH)
    return model


@cache
def prompt() -> torch.Tensor:
    """Token ids [2, 48]."""
    ids = tiny_models.tokenizer()(tiny_models.TEXT).input_ids
    return torch.tensor([ids[:48], ids[100:148]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(prompt()).logits


def generated(model: Any) -> torch.Tensor:
    """16 greedy tokens for each row of the prompt."""
    ids = prompt()
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=16, max_new_tokens=16, do_sample=False
    )


def block_linears(model: Any) -> dict[str, torch.Tensor]:
    """The weights [N, K] of all linears but the output layer, dense, whether they are held packed or not."""
    head = model.get_output_embeddings()
    weights: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, Sparse24Linear):
            weights[name] = module.weight.T if isinstance(module, Sparse24Conv1D) else module.weight
        elif is_linear(module):
            weights[name] = oriented(module.weight, module)
    return weights


def kept_in_groups(weight: torch.Tensor, m: int) -> torch.Tensor:
    """How many of every m consecutive columns are not zero, [N, K/m]."""
    return (weight != 0).unflatten(1, (-1, m)).sum(dim=-1)
