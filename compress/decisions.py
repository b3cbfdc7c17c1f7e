"""Which linears of a model are pruned, and why the others stay dense."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from compress import packed
from compress.architecture import shape_of
from compress.blocks import BlockModel
from compress.errors import RecipeError, SourceError, did_you_mean
from compress.recipe import Recipe


def decide(model: BlockModel, recipe: Recipe) -> dict[str, str | None]:
    """For every linear of every block by its full name: None if it is pruned, or the reason why it stays dense.

    Raises:
        RecipeError: the recipe leaves something dense that is not there. SourceError: nothing can be pruned.
    """
    decisions: dict[str, str | None] = {}
    used: set[str] = set()
    for index in range(len(model.blocks)):
        for name, module in model.linears(index).items():
            columns = shape_of(module)[1]
            matching = [pattern for pattern in recipe.ignore if fnmatchcase(name, pattern)]
            used.update(matching)
            reason = f"ignored by the recipe ({matching[0]})" if matching else recipe.parsed_pattern.why_not(columns)
            if reason is None and recipe.format == "packed":
                reason = packed.why_not(columns)
            decisions[name] = reason
    if unused := [pattern for pattern in recipe.ignore if pattern not in used]:
        raise RecipeError(f"ignore {unused[0]!r} matches no linear layer{did_you_mean(unused[0], _generic(decisions))}")
    for option, part in recipe.named_layers.items():
        if not any(part in name for name in decisions):
            raise RecipeError(
                f"option {option}={part}: no linear layer has that in its name; they are {', '.join(_generic(decisions))}"
            )
    if all(decisions.values()):
        name, reason = next(iter(decisions.items()))
        raise SourceError(f"no layer of {model.source.directory} can be pruned to {recipe.pattern}: {name}: {reason}")
    return decisions


def widest(model: BlockModel, decisions: dict[str, str | None]) -> int:
    """Input channels of the widest linear that is pruned."""
    linears = (pair for index in range(len(model.blocks)) for pair in model.linears(index).items())
    return max(shape_of(module)[1] for name, module in linears if decisions[name] is None)


def _generic(names: dict[str, Any]) -> list[str]:
    """Layer names with their block number as a star, each once."""
    return sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names})
