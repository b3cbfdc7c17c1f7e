"""What is quoted from ``benchmarks/results`` has to mean something to a reader on another machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
