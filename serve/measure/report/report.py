"""`halve report`: reads a checkpoint and its results, writes the page and the card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import OutputError, UsageError
from compress.files import write_text
from serve.measure.report import card as model_card
from serve.measure.report import charts, checkpoint
from serve.measure.report.page import Page
from serve.measure.report.results import assign, load


def report(
    directory: Path,
    out: Path,
    *,
    results: Sequence[Path] = (),
    beside: Sequence[Path] = (),
    card: bool = True,
) -> dict[str, Any]:
    """Writes one self-contained HTML file about a checkpoint, and its measured figures into its model card.

    Args:
        results: documents of `halve eval --json` and `halve bench --json`; each goes to the checkpoint that it is of.
        beside: other checkpoints, to be shown beside it.
        card: whether to write into the model card; it stays as it is where nothing was measured.

    Returns:
        A document with the file, its size, the figures on it, what was not measured (and the command that does), and
        notes, as on results that are of another checkpoint.

    Raises:
        OutputError: the file is there already, or cannot be written.
        SourceError, CorruptCheckpointError: a directory is no checkpoint, or damaged.
        DocumentError: a result cannot be read.
        UsageError: matplotlib is not installed, or two directories are the same.
    """
    charts.require_matplotlib()
    if out.exists():
        raise OutputError(f"{out} is there already; choose another --out, or remove it")
    if not out.parent.is_dir():
        raise OutputError(f"there is no directory {out.parent} to write {out.name} into")
    resolved = [path.resolve() for path in (directory, *beside)]
    if len(set(resolved)) < len(resolved):
        raise UsageError("--beside names a checkpoint twice, or the one that the report is about")
    main, *others = (checkpoint.read(path) for path in (directory, *beside))
    by_directory, left_out = assign([load(path) for path in dict.fromkeys(results)], [main, *others])
    own = by_directory[main.directory]
    page = Page(main, own, [(other, by_directory[other.directory]) for other in others], left_out)
    text = page.render()
    new_card = model_card.prepare(directory, page.headline) if card else None
    # The card comes last: a checkpoint is not changed by a report that could not be written.
    write_text(out, text)
    if new_card is not None:
        try:
            new_card.write()
        except BaseException:
            out.unlink()  # so that the same command can be tried again
            raise
    return {
        "kind": "report",
        "out": str(out),
        "bytes": len(text.encode()),
        "checkpoint": str(directory),
        "figures": [
            {"figure": row.label, "value": row.value, "dense": row.dense, "ratio": row.ratio, "interval": row.interval,
             "verdict": row.verdict, "load": row.load, "source": row.source}
            for row in page.headline
        ],
        "not_measured": page.missing,
        "notes": page.notes,
        "card": None if new_card is None else str(new_card.path),
    }  # fmt: skip
