"""Writes the measured tables of README.md from the files in ``benchmarks/results``.

    python -m benchmarks.readme [--check]

Between ``<!-- results: NAME -->`` and ``<!-- end -->`` stands the table of the Markdown file ``results/NAME.md``, so
no number in the README can differ from the measurement that it is quoted from; ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PLACE = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 if the README is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = fill(before)
    if arguments.check:
        if after != before:
            sys.exit("README.md is out of date with benchmarks/results: run python -m benchmarks.readme")
        return
    readme.write_text(after)


def fill(text: str) -> str:
    """The text with every marked place filled from its results file."""
    return _PLACE.sub(lambda match: f"{match[1]}\n{table(match['name'])}\n{match[3]}", text)


def table(name: str) -> str:
    """The first table of ``results/NAME.md``."""
    lines = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text().splitlines()
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append(line)
        elif rows:
            break
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
