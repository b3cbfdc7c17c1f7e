"""The command ``halve report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import Directory
from compress.console import Json, emit, human_bytes, out


def report(
    directory: Directory,
    out_file: Annotated[Path, typer.Option("--out", help="the HTML file to make", show_default=False)],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="a file of `halve eval|bench --json`; may be repeated", show_default=False),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="another checkpoint to show beside this one; may be repeated", show_default=False),
    ] = None,
    card: Annotated[bool, typer.Option(help="put the measured figures into the checkpoint's README.md, too")] = True,
    as_json: Json = False,
) -> None:
    """What was pruned and what was measured, as one HTML file that needs no network, and in the model card."""
    from serve.measure.report import report as run

    document = run(directory, out_file, results=results or [], beside=beside or [], card=card)

    def human() -> None:
        out.print(f"{document['out']}: {human_bytes(document['bytes'])}", highlight=False, markup=False)
        if document["card"]:
            out.print(f"{document['card']}: {len(document['figures'])} figures", highlight=False, markup=False)
        for note in document["notes"]:
            out.print(f"note: {note}", highlight=False, markup=False)
        for what, command in document["not_measured"].items():
            out.print(f"not measured: {what}; run {command}", highlight=False, markup=False, soft_wrap=True)

    emit(document, as_json, human)
