"""The disk space that a run needs, known before it begins."""

from __future__ import annotations

from collections.abc import Mapping

from compress import packed
from compress.blocks import BlockModel
from compress.recipe import Recipe
from compress.split import Split
from compress.targets import TENSORS_OF_TARGETS


def bytes_needed(
    model: BlockModel, recipe: Recipe, decisions: Mapping[str, str | None], split: Split, samples: int, tokens: int
) -> int:
    """Of a run at its fullest, about.

    Args:
        decisions: for every linear None if it is pruned.
        samples: that go through the blocks.
        tokens: of a sample.
    """
    return _weights(model, recipe, decisions) + _activations(model, recipe, split, samples, tokens)


def _weights(model: BlockModel, recipe: Recipe, decisions: Mapping[str, str | None]) -> int:
    """The artefact, and the blocks that lie beside it until it is whole."""
    source, width = model.source.tensors, model.dtype.itemsize
    pruned = {model.key_of(f"{name}.weight") for name, reason in decisions.items() if reason is None}
    weights = sum(source.info[key].numel for key in pruned)
    cast = None if recipe.dtype == "auto" else model.dtype
    others = sum(source.entry(key, cast).nbytes for key in source.info.keys() - pruned)
    blocks = weights * width
    if recipe.format == "packed":
        blocks -= int(weights * (width / 2 - packed.MASK_BYTES_OF_A_WEIGHT) * (1 - recipe.allocate))
    # Those before a distillation beside those after.
    return others + blocks * (3 if recipe.distill else 2)


def _activations(model: BlockModel, recipe: Recipe, split: Split, samples: int, tokens: int) -> int:
    """Saved for a resume, and a second time where they are too large for the memory."""
    held = 2 * (2 if recipe.wants_dense else 1) * samples
    if recipe.chosen_targets is not None:
        held += TENSORS_OF_TARGETS * split.observed
    hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0))
    return held * tokens * hidden * model.dtype.itemsize
