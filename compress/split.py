"""How calibration samples are divided: into batches, and into those that something is fitted to and those held out."""

from __future__ import annotations

from dataclasses import dataclass

from compress.layer_statistics import REGIONAL_NEEDS
from compress.recipe import Recipe
from compress.repair import HELD_OUT, held_out_batches


@dataclass(frozen=True)
class Split:
    """Of so many samples, for a recipe. Everything is counted in samples, and begins with the first one.

    Attributes:
        size: in one forward pass.
        observed: that the statistics see; whole batches, and nothing that a stage that trains holds out.
        fitted: that something may be fitted to; the others are held out.
        held_out: batches of those.
    """

    size: int
    observed: int
    fitted: int
    held_out: int

    @staticmethod
    def of(samples: int, recipe: Recipe, tokens: int, batch_tokens: int) -> Split:
        """
        Args:
            samples: how many there are.
            tokens: in one of them.
            batch_tokens: in one forward pass, if nothing speaks for fewer.
        """
        trains = recipe.chosen_repair is not None or bool(recipe.distill)
        size = max(1, batch_tokens // tokens)
        if trains:  # whole batches are held out, so there have to be some
            size = max(1, min(size, int(HELD_OUT * samples)))
        if recipe.needs & REGIONAL_NEEDS:
            size = 1  # a gradient is taken of each sample's own loss
        batches = -(-samples // size)
        if not trains or batches == 1:
            return Split(size, samples, samples, 0)
        fitted = (batches - held_out_batches(batches, size * tokens)) * size
        return Split(size, min(-(-recipe.samples // size) * size, fitted), fitted, batches - fitted // size)
