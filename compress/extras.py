"""How the optional parts of halve are installed: it is in no package index, so from its checkout."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """The command, for the end of a message."""
    return f"pip install -e '.[{extra}]' in the checkout of halve"
