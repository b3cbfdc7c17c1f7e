"""What can go wrong through no fault of the program, as one tree.

    HalveError                      shown to the user as one message, never as a traceback
    ├── UsageError                  the call or the input is wrong: exit code 2
    │   ├── RecipeError             a recipe, a flag or a method name
    │   ├── SourceError             the model that was given
    │   ├── CalibrationError        the calibration or evaluation text, or images
    │   └── OutputError             the place to write to
    └── CheckError                  a check or a gate failed: exit code 1
        ├── CorruptCheckpointError  a file is truncated, tampered with or not what it says
        └── NumericalError          NaN, infinity, or a matrix that stays singular

Every message says what is wrong, where (file, layer, flag), and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HalveError(Exception):
    """Base of all errors that are explained to the user."""

    exit_code = 1


class UsageError(HalveError):
    """The call or the input is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, a flag or the name of a method is wrong."""


class SourceError(UsageError):
    """The model that was given cannot be used."""


class CalibrationError(UsageError):
    """The calibration or evaluation text, or the images, cannot be used."""


class OutputError(UsageError):
    """The output directory cannot be used."""


class CheckError(HalveError):
    """A check or a gate failed."""


class CorruptCheckpointError(CheckError):
    """A file of a checkpoint is truncated, tampered with, or not what it says it is."""


class NumericalError(CheckError):
    """A weight or an activation is not finite, or a matrix cannot be factored."""


def one_line(error: BaseException) -> str:
    """The text of another library's error for the end of a message: on one line, and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


LONGEST_NAME = 100
"""Characters of what somebody gave as a name that a message repeats."""


def shortened(name: str) -> str:
    """A name as a message repeats it."""
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'wanda'?"`` and the whole list, for the end of a message about an unknown name."""
    names = sorted(known)
    # (what is much longer is like none of them, and to find that out would take its time)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) if len(name) <= LONGEST_NAME else []
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"{hint} (known: {', '.join(names)})"
