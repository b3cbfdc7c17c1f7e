"""What several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.errors import UsageError

Against = Annotated[Path | None, typer.Option(help="the dense checkpoint to compare with", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")]


def refuse_extra(context: typer.Context) -> None:
    """Raises UsageError where there are arguments behind the directory, which only vLLM takes."""
    if context.args:
        raise UsageError(f"{context.args[0]!r} is not known; arguments after the directory are for --engine vllm")
