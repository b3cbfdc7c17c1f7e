"""The command ``halve``: what makes checkpoints (from `compress.cli`) and what serves and measures them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

import compress.cli
from compress.console import run_app
from compress.version import version
from serve.commands.advise import advise
from serve.commands.bench import bench
from serve.commands.compare import compare
from serve.commands.doctor import doctor
from serve.commands.evaluate import evaluate
from serve.commands.export import export
from serve.commands.report import report
from serve.commands.serve import serve
from serve.commands.tune import tune

app = typer.Typer(
    name="halve",
    help="Prune language models to 2:4, pack the pruned layers into 9/16 of their bytes, serve them, and measure what it gained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        print(version())
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def _attention() -> str:
    """What `halve compress` attends with here."""
    from serve import attention  # torch takes seconds to import

    return attention.name()


def _savings(
    rows: int, dtype: Any, device: Any, value_dtype: Any, quantizes_x: bool
) -> Mapping[tuple[int, int, bool], float]:
    """What 2:4 saves on this machine, for `halve compress --allocate`."""
    from serve.measure import tuned

    return tuned.savings(rows, dtype, device, value_dtype, quantizes_x)


compress.cli.register(app, _attention, _savings)


TAKES_MORE = {"allow_extra_args": True}
"""What follows -- goes to vLLM."""

app.command("eval")(evaluate)
app.command()(compare)
app.command(context_settings=TAKES_MORE)(bench)
app.command()(advise)
app.command(context_settings=TAKES_MORE)(serve)
app.command()(export)
app.command()(doctor)
app.command()(report)
app.command()(tune)


def main() -> None:
    """Entry point of the command."""
    run_app(app)
