"""On which share of the weights two pruned checkpoints of one model disagree, block by block.

    python -m benchmarks.mask_agreement A B [--name NAME]

For two dense-with-zeros checkpoints of different makers or dtypes. A method that is implemented alike gives equal
masks; rounding that differs (bfloat16 against float32 forwards) flips the closest decisions, and through the
activations ever more of them in later blocks. ``--name`` writes benchmarks/results/NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from compress.files import TensorFiles
from compress.layout import Layout
from compress.packed import DENSE_SUFFIX
from serve.measure.environment import environment

RESULTS = Path(__file__).parent / "results"


def disagreement(a: Path, b: Path) -> list[dict[str, Any]]:
    """For each linear of the blocks: its name, its size, and how many weights are zero in only one of the two."""
    layout, first, second = Layout.of(a), TensorFiles(a), TensorFiles(b)
    rows = []
    for linear in layout.block_linears:
        name = linear.name + DENSE_SUFFIX
        masks = []
        for files in (first, second):
            key = layout.key(name, files)
            assert key is not None, f"{name} is not in both"
            masks.append(files.read(key) != 0)
        differ = int((masks[0] != masks[1]).sum())
        rows.append({"name": linear.name, "weights": linear.n * linear.k, "differ": differ})
    return rows


def by_block(rows: list[dict[str, Any]]) -> dict[int, float]:
    """The share that differs in each block."""
    blocks: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        index = next(int(part) for part in row["name"].split(".") if part.isdigit())
        blocks.setdefault(index, []).append(row)
    return {
        index: sum(row["differ"] for row in group) / sum(row["weights"] for row in group)
        for index, group in blocks.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--name")
    arguments = parser.parse_args()
    rows = disagreement(arguments.a, arguments.b)
    shares = by_block(rows)
    lines = [
        f"# Where {arguments.a.name} and {arguments.b.name} disagree",
        "",
        "| block | share of weights kept by only one |",
        "|---:|---:|",
        *(f"| {index} | {share:.6f} |" for index, share in shares.items()),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    document = {"a": arguments.a.name, "b": arguments.b.name, "shares": shares, "environment": environment()}
    if arguments.name:
        (RESULTS / f"{arguments.name}.md").write_text(text)
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps({**document, "layers": rows}, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
