"""What every command shares: one error line for a user's mistake, progress on stderr, the JSON contract on stdout.

With ``--json`` the last line of standard output is one JSON document, and nothing else is on it. Everything
for people goes to standard output without ``--json``; progress and errors always go to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from compress.errors import HalveError

out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output, and nothing else")]


def emit(document: dict[str, Any], as_json: bool, human: Callable[[], None]) -> None:
    """Prints a result as JSON or for people."""
    if as_json:
        print(json.dumps(document), flush=True)
    else:
        human()


def table(title: str, *columns: str, rows: list[list[Any]]) -> Table:
    """A table with a title; the first column is text, the others are right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error with steps, what is happening, and the time left; gives ``update(done, total, text)``.

    Where standard error is no terminal, a line for each step instead.
    """
    if not err.is_terminal:

        def line(done: int, total: int, text: str) -> None:
            err.print(f"{label} {done}/{total} {text}", highlight=False, soft_wrap=True)

        yield line
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=err, transient=True) as progress:
        task = progress.add_task(label, total=None, text="")

        def update(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, text=text)

        yield update


def run_app(app: Callable[[], object]) -> None:
    """Runs a command line; a user's mistake is one message, and never a traceback.

    Exit codes: 0 done, 1 a check or gate failed, 2 the call or the input is wrong, 130 interrupted.
    """
    try:
        app()
    except HalveError as error:
        err.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted", highlight=False)
        sys.exit(130)


def human_bytes(count: float) -> str:
    """``"119.4 MB"``: decimal units, four digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
