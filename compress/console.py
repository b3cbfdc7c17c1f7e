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
from rich.text import Text

from compress.errors import HalveError, one_line

out = Console(emoji=False)
err = Console(stderr=True, emoji=False)

Json = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output, and nothing else")]


def emit(document: dict[str, Any], as_json: bool, human: Callable[[], None]) -> None:
    """Prints a result as JSON or for people."""
    if as_json:
        print(json.dumps(document), flush=True)
    else:
        human()


def say(text: str) -> None:
    """A line for people on standard output, as it is: names and paths in it may hold what rich takes for markup."""
    out.print(text, markup=False, highlight=False)


def table(title: str, *columns: str, rows: list[list[Any]]) -> Table:
    """A table with a title; the first column is text, the others are right-aligned. Texts are no markup;
    a cell with a style is a `rich.text.Text`."""
    result = Table(title=Text(title, "bold"), title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(Text(column), justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return result


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error with steps, what is happening, and the time left; gives ``update(done, total, text)``.

    Where standard error is no terminal, a line for each step instead.
    """
    if not err.is_terminal:

        def line(done: int, total: int, text: str) -> None:
            err.print(f"{label} {done}/{total} {text}", markup=False, highlight=False, soft_wrap=True)

        yield line
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[text]}", markup=False), console=err, transient=True) as progress:
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
        _tell(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # a path or a device that the system refuses, at a place that has no better words for it
        where = f": {error.filename}" if error.filename is not None else ""
        _tell(f"{error.strerror or one_line(error)}{where} (errno {error.errno})" if error.errno else one_line(error))
        sys.exit(2)
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


def _tell(message: str) -> None:
    err.print(Text.assemble(("error:", "bold red"), " ", message), highlight=False, soft_wrap=True)
