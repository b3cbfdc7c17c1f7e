"""What was asked of vLLM in arguments that go to it as they are, read as its parser reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def option(arguments: Sequence[str], *names: str) -> str | None:
    """The value of an option by any of its names, or None where it is not given.

    Underscores stand for dashes, the last one counts, and what is not there may be in the file of ``--config``.
    """
    value = given(arguments, names)
    if value is None and (file := given(arguments, ("--config",))):
        value = given(_of_file(Path(file)), names)
    return value


def given(arguments: Sequence[str], names: Sequence[str]) -> str | None:
    """The same, on the command line alone."""
    value = None
    for number, argument in enumerate(arguments):
        name, is_joined, joined = argument.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name in names:
            value = joined if is_joined else "".join(arguments[number + 1 : number + 2])
    return value


def _of_file(file: Path) -> list[str]:
    """The arguments in a YAML file; none where it cannot be read, of which vLLM will say why."""
    try:
        content: Any = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [f"--{key}={value}" for key, value in content.items()] if isinstance(content, dict) else []
