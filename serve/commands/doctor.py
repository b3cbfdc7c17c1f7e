"""The command ``halve doctor``."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from compress.console import Json, emit, out


def doctor(as_json: Json = False) -> None:
    """What works on this machine, what does not, why, and what to do about it."""
    from serve.doctor import SECTIONS, examine

    document = examine()

    def human() -> None:
        out.print(f"halve {document['halve']}, Python {document['python']}", highlight=False)
        for section in SECTIONS:
            lines = Table.grid(padding=(0, 2))
            for check in document[section]:
                failed = "red" if check["required"] else "yellow"
                mark = Text("works", "green") if check["works"] else Text("no", failed)
                lines.add_row("", mark, check["name"], Text(check["detail"]))
                if check["remedy"]:
                    lines.add_row("", "", "", Text(f"to do: {check['remedy']}", "bold"))
            out.print(f"\n[bold]{section}[/]")
            out.print(lines)
        out.print("\n[bold]what runs where[/]")
        lines = Table.grid(padding=(0, 2))
        for wraps in (False, False, False, False, True, False, False, True):
            lines.add_column(no_wrap=not wraps)
        for row in document["matrix"]:
            mark = Text("here", "green") if row["here"] else Text("no", "yellow")
            dtypes = " ".join(row["dtypes"]).replace("float", "f").replace("8_e4m3fn", "8")
            by = f"by {row['kernel']}" if row["kernel"] else ""
            reason = row["why_not"] or row["status"].replace("works", "")
            lines.add_row("", mark, row["engine"], row["device"], ", ".join(row["formats"]), dtypes, by, reason)
        out.print(lines)

    emit(document, as_json, human)
    if not document["ok"]:
        raise typer.Exit(1)
