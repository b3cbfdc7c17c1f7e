"""Texts to token windows: what calibration and evaluation read.

Calibration packs the documents (joined by two newlines), cuts them into windows that do not overlap, at a
random phase, and draws among them with a fixed seed. Few documents of C4 are as long as a window, so drawing
windows inside of single documents, as the papers' codes do, would use only the longest ones.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.extras import how_to_install

BUILTIN = {"c4": "c4.jsonl.gz", "wikitext2": "wikitext2-test.txt.gz"}
TEST_TEXT = "wikitext2"
"""Of the built-in ones the one that is for measuring alone."""
_CHARACTERS_PER_TOKEN = 40
"""How many characters are read at most per token asked for: ten times what English takes."""


@dataclass(frozen=True)
class CalibrationSet:
    """What the model is shown: windows of text [samples, length] int64, or images [samples, 3, height, width]."""

    argument: str
    """The name under which the model's forward takes the samples."""
    samples: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the forward gets."""
    classes: Tensor | None = None
    """The class of each image, [samples] int64, or None where it is not known."""

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """Arguments of the forward for ``size`` samples at a time."""
        for part in self.samples.split(size):
            yield {self.argument: part, **self.settings}

    def first(self, count: int) -> CalibrationSet:
        """Only the first samples."""
        return replace(
            self,
            samples=self.samples[:count],
            classes=None if self.classes is None else self.classes[:count],
        )

    @property
    def digest(self) -> str:
        """SHA-256; equal digests mean the same calibration."""
        return digest(self.samples if self.classes is None else torch.cat([self.samples.flatten(), self.classes]))


def text_set(windows: Tensor) -> CalibrationSet:
    """A calibration set of token windows [samples, length]."""
    return CalibrationSet("input_ids", windows, {"use_cache": False})


def load_windows(
    source: str, tokenizer: Any, *, samples: int, length: int, seed: int, at_least: int | None = None
) -> Tensor:
    """Token windows [samples, length] int64 for calibration.

    Args:
        source: ``c4``, a ``.txt`` or ``.jsonl`` file (``.gz`` too), or a Hugging Face data set (needs ``datasets``).
        tokenizer: of transformers.
        at_least: how many will do where the text holds no more; left out, all of ``samples``.

    Raises:
        CalibrationError: the text cannot be read, holds fewer windows than asked for, or is kept for measuring.
    """
    if source == TEST_TEXT:
        raise CalibrationError(
            f"{source!r} is the test text that `halve eval` measures with: what was calibrated on it looks better there than it is; "
            "calibrate on c4, or on a text of your own"
        )
    text = "\n\n".join(_until(read_documents(source), samples * length * _CHARACTERS_PER_TOKEN))
    tokens = tokenize(text, tokenizer)
    available = len(tokens) // length
    if at_least is not None and at_least <= available < samples:
        samples = available
    if available < samples:
        samples = samples if at_least is None else at_least
        raise CalibrationError(
            f"calibration text {source!r} has {len(tokens)} tokens, which is {available} windows of {length}, and {samples} "
            f"were asked for; give a longer text, or "
            + (f"--samples {available}" if available else f"a --length below {length}")
        )
    generator = torch.Generator().manual_seed(seed)
    slack = len(tokens) - available * length
    phase = int(torch.randint(slack + 1, (), generator=generator))
    windows = tokens[phase : phase + available * length].view(available, length)
    chosen = torch.randperm(available, generator=generator)[:samples]
    return windows[chosen].clone()


def evaluation_windows(source: str, tokenizer: Any, *, length: int, windows: int | None = None) -> Tensor:
    """Token windows [n, length] int64 for perplexity: from the start, no overlap, the remainder dropped.

    For ``wikitext2`` this is the protocol of the papers: the rows of the Hugging Face data set (the lines of the
    raw test file with their newlines, where a line that is a single space is an empty row), joined by two
    newlines and tokenized once.

    Raises:
        CalibrationError: the text holds no window, or fewer than asked for.
    """
    tokens = tokenize("\n\n".join(read_documents(source)), tokenizer)
    available = len(tokens) // length
    wanted = available if windows is None else windows
    if available == 0 or available < wanted:
        raise CalibrationError(
            f"evaluation text {source!r} has {len(tokens)} tokens, which is {available} windows of {length}"
            + (f", and {windows} were asked for" if windows is not None else "")
        )
    return tokens[: wanted * length].view(wanted, length)


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """[tokens] int64; the tokenizer adds what it adds at the start of a text."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def digest(windows: Tensor) -> str:
    """SHA-256 of the samples' values (token ids); equal digests mean the same calibration."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def read_documents(source: str) -> Iterator[str]:
    """The documents of a text source, in order; see `load_windows`."""
    if source in BUILTIN:
        path = Path(str(importlib.resources.files("compress") / "data" / BUILTIN[source]))
    else:
        path = Path(source).expanduser()
    if not path.is_file():
        yield from _read_dataset(source, path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.name.removesuffix(".gz")
    try:
        with opener(path, "rt", encoding="utf-8") as handle:
            if kind.endswith((".jsonl", ".json")):
                for number, line in enumerate(handle, 1):
                    if line.strip():
                        yield _text_of(line, path, number)
            elif source == "wikitext2":
                for line in handle:  # a row of the data set keeps the newline of its line, unless it is empty
                    yield "" if line == " \n" else line
            else:
                yield handle.read()
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise CalibrationError(f"cannot read the text {path}: {error}") from None


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise CalibrationError(f"{path}, line {number}: each line must be a JSON object with a string 'text'")
    return text


def _read_dataset(source: str, path: Path) -> Iterator[str]:
    looks_like_file = path.suffix in {".txt", ".json", ".jsonl", ".gz"} or source.startswith((".", "/", "~"))
    if looks_like_file and not path.is_dir():
        raise CalibrationError(f"there is no text file {path}")
    if not path.is_dir() and source.count("/") != 1:
        raise CalibrationError(
            f"unknown text {source!r}: it is neither built in (c4, and {TEST_TEXT} to measure with), nor a file, "
            "nor a Hugging Face data set such as 'allenai/c4'"
        )
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise CalibrationError(
            f"reading the data set {source!r} needs the package 'datasets': {how_to_install('hub')}"
        ) from None
    try:
        # (a directory by its path, in which ~ is resolved)
        for row in load_dataset(str(path) if path.is_dir() else source, split="train", streaming=True):
            if not isinstance(row.get("text"), str):
                raise CalibrationError(
                    f"the data set {source!r} has a row without a text in a column 'text' (its columns: {', '.join(row)})"
                )
            yield row["text"]
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"cannot read the data set {source!r}: {reason}") from None


def _until(documents: Iterable[str], characters: int) -> Iterator[str]:
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= characters:
            return
