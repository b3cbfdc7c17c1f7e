"""The measured figures in the model card: a section between two marks, which a later report replaces.

What stands outside of the marks is a person's, and is kept to the byte. ``report.json`` accounts for the card, so it is brought
up to date after it; a run that ends in between is mended by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.artefact import CARD_NAME, REPORT_NAME, account_anew, read_report
from compress.card import MEASURED_BEGIN, MEASURED_END
from compress.errors import OutputError
from compress.files import write_text
from serve.measure.report.quantities import bounds, gain, quantity
from serve.measure.report.rows import Row

BEGIN, END = MEASURED_BEGIN, MEASURED_END


@dataclass(frozen=True)
class Update:
    """A card as it is to be: its text before and after."""

    path: Path
    before: str
    after: str

    def write(self) -> None:
        """Raises OutputError where it cannot be written."""
        if self.after != self.before:
            write_text(self.path, self.after)
        directory = self.path.parent
        report = read_report(directory)
        if (
            report is not None
            and CARD_NAME in report.get("files", {})
            and (text := account_anew(directory, report, CARD_NAME))
        ):
            write_text(directory / REPORT_NAME, text)


def prepare(directory: Path, rows: Sequence[Row]) -> Update | None:
    """The card of a checkpoint with these figures; None where there are none, and then the card stays as it is.

    Raises:
        OutputError: the card cannot be read, or its marks are broken.
    """
    if not rows:
        return None
    path = directory / CARD_NAME
    try:
        before = path.read_bytes().decode() if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {path}: {error}; mend it, or leave it alone with --no-card") from None
    return Update(path, before, replaced(before, section(rows), path))


def replaced(text: str, new: str, path: Path) -> str:
    """The text with the section between the marks replaced, or with the section at its end.

    Raises:
        OutputError: one mark is missing, or there are several.
    """
    marked = f"{BEGIN}\n{new}\n{END}"
    counts = text.count(BEGIN), text.count(END)
    if counts == (0, 0):
        return f"{text.rstrip()}\n\n{marked}\n" if text.strip() else f"{marked}\n"
    start, stop = text.find(BEGIN), text.find(END)
    if counts != (1, 1) or stop < start:
        raise OutputError(
            f"{path} has to have {BEGIN!r} once and {END!r} once after it; it has them {counts[0]} and {counts[1]} times. "
            "Remove both, and the section is put at the end; or leave the card alone with --no-card"
        )
    return text[:start] + marked + text[stop + len(END) :]


def section(rows: Sequence[Row]) -> str:
    """The figures as a Markdown table."""
    lines = ["## Measured", "", "| | dense | this | against dense |", "|---|---:|---:|---:|"]
    for row in rows:
        told = gain(row)
        against = "" if told is None else f"{told[1]} {told[2]}"
        between = bounds(row)
        cells = [
            ", ".join(filter(None, (row.label, row.load, row.failures))),
            "" if row.dense is None else quantity(row.dense, row.unit),
            quantity(row.value, row.unit),
            f"{against} ({between})" if between and against else against,
        ]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join([*lines, "", "By `halve eval` and `halve bench`; `halve report` wrote this section."])


def _cell(text: str) -> str:
    """Text that is nothing else in Markdown, nor in the HTML that it may hold."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text
