"""Checkpoints may bring Python code of their own (``auto_map`` in their JSON files). halve never runs it.

transformers asks on standard output whether to, unless it is told beforehand: every call that reads a model passes
`NEVER`, and every error of one goes through `explain`.
"""

from __future__ import annotations

from typing import Any

from compress.errors import one_line

NEVER: dict[str, Any] = {"trust_remote_code": False}


def explain(error: BaseException) -> str:
    """The text of an error of transformers for the end of a message, on one line."""
    text = one_line(error)
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own (auto_map), which halve never runs; halve takes models that transformers "
            "itself has. Remove auto_map from the JSON files if this is one of them"
        )
    return text
