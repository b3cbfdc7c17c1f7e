"""Token windows out of texts. The tokenizers here are so simple that a window shows where it comes from."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compress
from compress.calibration import digest, evaluation_windows, load_windows, read_documents, tokenize
from compress.errors import CalibrationError

DATA = Path(compress.__file__).parent / "data"


class Words:
    """Word ``w17`` is token 17."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


class Characters:
    """Every character is its code point, after a token that begins a text."""

    BOS = 2**21

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [self.BOS, *map(ord, text)]}


def counted(tokens: int) -> str:
    return " ".join(f"w{i}" for i in range(tokens))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(counted(1003))
    return str(path)


@pytest.mark.parametrize(("samples", "length"), [(1, 1003), (10, 100), (7, 100), (1003, 1), (3, 10)])
@pytest.mark.parametrize("seed", [0, 1])
def test_windows_are_disjoint_pieces_of_the_text(text: str, samples: int, length: int, seed: int) -> None:
    windows = load_windows(text, Words(), samples=samples, length=length, seed=seed)
    assert windows.shape == (samples, length)
    assert windows.dtype == torch.int64
    assert windows.flatten().unique().numel() == samples * length, "no overlap"
    assert torch.equal(windows - windows[:, :1], torch.arange(length).expand(samples, length)), "unbroken"
    assert int(windows.max()) < 1003
    assert len((windows[:, 0] % length).unique()) == 1, "one phase"


def test_windows_hang_on_the_seed_alone(text: str) -> None:
    def draw(seed: int) -> torch.Tensor:
        return load_windows(text, Words(), samples=8, length=100, seed=seed)

    first = draw(0)
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(draw(0), first)
    starts = {tuple(draw(seed)[:, 0].tolist()) for seed in range(20)}
    assert len(starts) > 15
    assert len({start[0] % 100 for start in starts}) > 1, "the phase is drawn, too"


def test_every_window_can_be_drawn(text: str) -> None:
    seen = {int(load_windows(text, Words(), samples=1, length=100, seed=seed)[0, 0]) // 100 for seed in range(100)}
    assert seen == set(range(10))


@pytest.mark.parametrize(
    ("samples", "length", "message"),
    [
        (
            11,
            100,
            "has 1003 tokens, which is 10 windows of 100, and 11 were asked for; give a longer text, or --samples 10$",
        ),
        (1, 1004, "is 0 windows of 1004, and 1 were asked for; .* or a --length below 1004"),
    ],
)
def test_a_text_that_is_too_short(text: str, samples: int, length: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_windows(text, Words(), samples=samples, length=length, seed=0)


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    documents = ["w0 w1", "w2 ä\nw3", "w4"]
    lines = "".join(json.dumps({"text": document, "url": "x"}) + "\n" for document in documents)
    lines = lines.replace("\n", "\n\n", 1)  # an empty line is no document
    for name, content, expected in [
        ("a.jsonl", lines, documents),
        ("a.json", lines, documents),
        ("a.txt", "w0\n\nw1\n", ["w0\n\nw1\n"]),
        ("no-suffix", "w0 \n \n", ["w0 \n \n"]),
    ]:
        (tmp_path / name).write_text(content, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        assert list(read_documents(str(tmp_path / name))) == expected
        assert list(read_documents(str(tmp_path / f"{name}.gz"))) == expected


def test_documents_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    windows = evaluation_windows(str(tmp_path / "a.jsonl"), Characters(), length=7)
    assert windows.tolist() == [[Characters.BOS, *map(ord, "ab\n\ncd")]]


@pytest.mark.parametrize("line", ['{"text": ', '{"txt": "x"}', '{"text": 5}', "[1]", "3", "null"])
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w0"}\n\n' + line + "\n")
    with pytest.raises(
        CalibrationError, match=r"a\.jsonl, line 3: each line must be a JSON object with a string 'text'"
    ):
        list(read_documents(str(path)))


def test_no_more_is_read_than_needed(tmp_path: Path) -> None:
    """A data set may be endless, so what comes long after the last window is not looked at."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + counted(900) + '"}\nbroken\n')
    assert load_windows(str(path), Words(), samples=2, length=10, seed=0).shape == (2, 10)
    with pytest.raises(CalibrationError, match="line 2"):
        load_windows(str(path), Words(), samples=90, length=10, seed=0)


@pytest.mark.parametrize("damage", ["truncated", "changed", "not gzip", "empty member"])
def test_a_damaged_archive_is_explained(damage: str, tmp_path: Path) -> None:
    raw = gzip.compress(("".join(f'{{"text": "w{i}"}}\n' for i in range(500))).encode())
    content = {
        "truncated": raw[:-20],
        "changed": raw[:100] + bytes(255 - byte for byte in raw[100:140]) + raw[140:],
        "not gzip": b'{"text": "w0"}\n',
        "empty member": raw[:10],
    }[damage]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"a\.jsonl\.gz"):
        list(read_documents(str(path)))


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match=r"cannot read the text .*a\.txt: .*utf-8"):
        list(read_documents(str(tmp_path / "a.txt")))


@pytest.mark.parametrize("source", ["none.txt", "./none", "some/none.jsonl", "none.jsonl.gz", "~/none-of-these"])
def test_a_text_file_that_is_not_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError, match=r"there is no text file .*none"):
        list(read_documents(source))


@pytest.mark.parametrize("source", ["c5", "a/b/c"])
def test_an_unknown_source(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CalibrationError, match=rf"unknown text '{source}': .*built in \(c4, and wikitext2 to measure with\)"
    ):
        list(read_documents(source))


def test_home_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("hello")
    assert list(read_documents("~/a.txt")) == ["hello"]


def test_wikitext2_protocol() -> None:
    """The rows are the file's lines with their newlines; a line of one space is an empty row; joined by two newlines."""
    raw = gzip.decompress((DATA / "wikitext2-test.txt.gz").read_bytes()).decode()
    assert raw.endswith("\n")
    lines = raw.splitlines(keepends=True)
    assert " \n" in lines
    expected = "\n\n".join("" if line == " \n" else line for line in lines)
    documents = list(read_documents("wikitext2"))
    assert len(documents) == len(lines)
    assert "\n\n".join(documents) == expected
    windows = evaluation_windows("wikitext2", Characters(), length=1000, windows=3)
    assert windows.flatten().tolist() == [Characters.BOS, *map(ord, expected[:2999])], "one beginning, not one a window"


def test_a_line_of_one_space_is_kept_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n \nb")
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["a\n \nb"]


def test_c4_is_the_text_that_travels_with_halve() -> None:
    documents = list(read_documents("c4"))
    with gzip.open(DATA / "c4.jsonl.gz", "rt", encoding="utf-8") as handle:
        assert documents == [json.loads(line)["text"] for line in handle]
    windows = load_windows("c4", Characters(), samples=4, length=64, seed=0)
    text = "\n\n".join(documents)
    for window in windows.tolist():
        assert "".join(map(chr, (c for c in window if c != Characters.BOS))) in text


@given(tokens=st.integers(1, 300), length=st.integers(1, 60))
def test_evaluation_windows_drop_the_remainder(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "evaluation.txt"
    path.write_text(counted(tokens))
    available = tokens // length
    if available == 0:
        with pytest.raises(CalibrationError, match=f"has {tokens} tokens, which is 0 windows of {length}$"):
            evaluation_windows(str(path), Words(), length=length)
        return
    windows = evaluation_windows(str(path), Words(), length=length)
    assert windows.tolist() == torch.arange(available * length).view(available, length).tolist()
    first = evaluation_windows(str(path), Words(), length=length, windows=1)
    assert torch.equal(first, windows[:1])
    with pytest.raises(CalibrationError, match=f"{available} windows of {length}, and {available + 1} were asked for"):
        evaluation_windows(str(path), Words(), length=length, windows=available + 1)


def test_tokenize_adds_what_the_tokenizer_adds() -> None:
    assert tokenize("ab", Characters()).tolist() == [Characters.BOS, 97, 98]


def test_digest() -> None:
    windows = torch.arange(12).view(3, 4)
    expected = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in range(12))).hexdigest()
    assert digest(windows) == expected
    assert digest(windows.T.contiguous().T) == expected
    assert digest(windows.flip(0)) != expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_data_set(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [f"w{i} w{i + 1}" for i in range(0, 20, 2)]
    directory = tmp_path / "set"
    directory.mkdir()
    data = datasets.Dataset.from_dict({"text": rows})
    data.to_json(directory / "train.jsonl") if kind == "jsonl" else data.to_parquet(directory / "train.parquet")
    assert list(read_documents(str(directory))) == rows
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(read_documents("~/set")) == rows
    monkeypatch.chdir(tmp_path)
    assert list(read_documents("set")) == rows
    assert evaluation_windows("set", Words(), length=20).tolist() == [list(range(20))]


def test_local_data_sets_without_what_is_needed(tmp_path: Path) -> None:
    import datasets  # noqa: F401  part of the dev environment, so its absence is a failure

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"body": "x", "url": "y"}\n')
    with pytest.raises(CalibrationError, match=r"other' has a row without a text .* \(its columns: body, url\)"):
        list(read_documents(str(tmp_path / "other")))
    (tmp_path / "null").mkdir()
    (tmp_path / "null" / "train.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    with pytest.raises(CalibrationError, match="null' has a row without a text"):
        list(read_documents(str(tmp_path / "null")))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CalibrationError, match=r"cannot read the data set .*nothing"):
        list(read_documents(str(tmp_path / "nothing")))


def test_datasets_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"needs the package 'datasets': pip install -e '\.\[hub\]'"):
        list(read_documents("allenai/c4"))


@pytest.mark.parametrize("error", [ConnectionError(), OSError("no route\nto the hub"), ValueError("Bad split: train")])
def test_a_data_set_that_cannot_be_read(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CalibrationError, match=r"cannot read the data set 'allenai/c4': \w+"):
        list(read_documents("allenai/c4"))
