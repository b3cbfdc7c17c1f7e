"""What is quoted from ``benchmarks/results`` has to mean something to a reader on another machine."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import accuracy, methods, zero_shot

RESULTS = sorted((Path(__file__).resolve().parents[1] / "benchmarks" / "results").iterdir())
_ABSOLUTE = re.compile(r"(?<![\w.:/<])/(?:[\w.~-]+/)+[\w.~-]+")
"""A path of at least two folders from the root: no link of a page, no fraction, no closing tag."""


def paths_in(text: str) -> list[str]:
    return _ABSOLUTE.findall(text)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_no_result_tells_where_files_lay(path: Path) -> None:
    assert not paths_in(path.read_text()), (
        "name what was measured by a relative path, or by a name, before it is written"
    )


def test_what_is_taken_for_a_path() -> None:
    assert paths_in('{"directory": "/home/someone/model", "of": "/var/model"}') == ["/home/someone/model", "/var/model"]
    assert not paths_in(
        "https://example.org/a/b, sparse / dense, runs/advise/dense, 1/2, ../results/x.md, </td></tr>, /metrics"
    )


@pytest.mark.parametrize(
    ("script", "call"),
    [
        (accuracy, "--model {} --only fast"),
        (methods, "--model {} --only nothing"),
        (zero_shot, "--dense {} --task-data tasks --limit 400"),
    ],
)
def test_the_table_of_one_model_is_not_continued_with_another(
    script: ModuleType, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = script.__name__.rpartition(".")[2]
    (kept,) = [path for path in RESULTS if path.name == f"{name}.json"]
    shutil.copy(kept, tmp_path)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *call.format(tmp_path / "another").split()])
    if script is methods:
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code
    assert "is of smollm2-135m, not of another; give another --name" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.glob("*.json")] == [kept.name]
    assert (tmp_path / kept.name).read_text() == kept.read_text()
