"""The command ``halve compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.console import Json, emit
from compress.errors import UsageError


def compare(
    a: Annotated[Path, typer.Argument(help="the candidate: a result of `halve eval|bench --json`, or a checkpoint")],
    b: Annotated[
        Path | None,
        typer.Argument(help="the baseline, of the same kind; left out: the dense model in A's own document"),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="'perplexity<=1.10x' (of the baseline), 'tpot.p50<=0.02' (absolute); may be repeated"),
    ] = None,
    confident: Annotated[bool, typer.Option(help="the whole 95 % interval has to clear a gate, not just the value")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Two results or checkpoints side by side: ratios, intervals, what is a difference; gates give the exit code."""
    from serve.measure.compare import compare as run

    if confident and not gate:
        raise UsageError("--confident is for --gate, and would do nothing here; leave it out")
    document = run(a, b, gates=gate or [], confident=confident)

    def human() -> None:
        from serve.measure.tables import print_comparison

        print_comparison(document)

    emit(document, as_json, human)
    if not document["ok"]:
        raise typer.Exit(1)
