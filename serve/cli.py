"""The command ``halve``: what makes checkpoints (from `compress.cli`) and what serves and measures them."""

from __future__ import annotations

import typer

import compress.cli
from compress.console import run_app
from compress.version import version

app = typer.Typer(
    name="halve",
    help="Prune language models to 2:4, pack them into 9/16 of the bytes, serve them, and measure what it gained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        print(version())
        raise typer.Exit


@app.callback()
def _main(
    show_version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version"),
) -> None:
    pass


compress.cli.register(app)


def main() -> None:
    """Entry point of the command."""
    run_app(app)
