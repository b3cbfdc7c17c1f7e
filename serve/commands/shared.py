"""What several commands have in common."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from compress.errors import UsageError
from serve.terminate import unwinding

Against = Annotated[
    str | None,
    typer.Option(
        help="the dense model to compare with: a directory, a hub id, or a .gguf file",
        metavar="MODEL",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")]

ALWAYS = ()
"""What an option is for that no call ignores."""


@contextmanager
def dense_model(against: str | None) -> Iterator[Path | None]:
    """The directory of the model that ``--against`` names, downloaded or converted where it has to be.

    Raises:
        SourceError: it is neither a directory, nor a .gguf file, nor on the hub.
    """
    if against is None:
        yield None
        return
    from compress.sources import resolve

    with unwinding(), tempfile.TemporaryDirectory(prefix="halve-against-") as scratch:
        yield resolve(against, Path(scratch) / Path(against).stem)


def refuse_misplaced(context: typer.Context, belongs: Mapping[str, Sequence[str]], given: Collection[str]) -> None:
    """Raises UsageError for an option on the command line that the call would ignore.

    Args:
        belongs: for each parameter of the command what it is for; any of these will do.
        given: what the call is of that.
    """
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        # What comes from the environment was not meant for this call alone.
        if source is None or source.name != "COMMANDLINE":
            continue
        wanted = belongs[name]
        if wanted and not set(wanted) & set(given):
            raise UsageError(
                f"{parameter.opts[0]} is for {' or '.join(wanted)}, and would do nothing here; leave it out"
            )


def refuse_extra(context: typer.Context) -> None:
    """Raises UsageError where there are arguments behind the directory, which only vLLM takes."""
    if context.args:
        raise UsageError(f"{context.args[0]!r} is not known; arguments after the directory are for --engine vllm")
