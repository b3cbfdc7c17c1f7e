"""Whether a Gram matrix has seen enough tokens, and how much it is damped before it is factored: the option of all methods
that do it, and its default."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from compress.layer_statistics import LayerStatistics

DAMPING = 0.01
"""Of the papers (SparseGPT, APT), for a Gram matrix that has seen enough tokens."""
FEW_TOKENS_DAMPING = 0.1
FEW_TOKENS = 4
"""Tokens per input channel below which a Gram matrix fits its tokens rather than the layer's inputs, and is damped more."""

Damping: Any = Field(
    None,
    gt=0,
    le=1,
    description="ridge on the Gram matrix, as a share of its mean diagonal; left out: 0.01, or 0.1 for fewer than 4 tokens "
    "per input channel",
)
"""The option of every method that factors a Gram matrix."""


def gram_notes(statistics: LayerStatistics, so: str = "") -> dict[str, Any]:
    """What the report says of a layer's Gram matrix: of how many tokens it is, with a warning where they are few.

    Args:
        so: what was done about it, for the warning.
    """
    per_channel = statistics.count / statistics.inputs.features
    notes: dict[str, Any] = {"tokens_per_input": round(per_channel, 3)}
    if per_channel < FEW_TOKENS:
        notes["warning"] = (
            f"{per_channel:.2g} calibration tokens per input channel are few for a Gram matrix (at least {FEW_TOKENS}, "
            f"better {2 * FEW_TOKENS} or more); {so}raise --samples or --length"
        )
    return notes


def chosen_damping(given: float | None, statistics: LayerStatistics) -> tuple[float, dict[str, Any]]:
    """The damping for a layer's Gram matrix, and what the report says of it.

    The given one; or where none was given, that of the papers, or a larger one for too few tokens.
    """
    few = statistics.count < FEW_TOKENS * statistics.inputs.features
    damping = given if given is not None else FEW_TOKENS_DAMPING if few else DAMPING
    return damping, gram_notes(statistics, f"damping {damping:g}; ")
