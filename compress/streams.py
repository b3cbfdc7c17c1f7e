"""Activations on their way through the blocks: those of the pruned model, and beside them those of the dense one.

One tensor a batch of calibration samples, [batch, length, hidden], overwritten from block to block; in memory, or in a file
where they are large.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from compress import packed
from compress.activations import Growing, spilled
from compress.blocks import BlockModel
from compress.calibration import CalibrationSet
from compress.errors import NumericalError
from compress.journal import Journal
from compress.recipe import Recipe


class Streams:
    """What goes into the next block.

    Args:
        recipe: says whether the dense model's activations are wanted, too.
        journal: of the run, whose interrupted predecessor may have saved them.
    """

    def __init__(self, model: BlockModel, recipe: Recipe, journal: Journal) -> None:
        self._model = model
        self._recipe = recipe
        self._journal = journal
        self._kinds: dict[str, list[Tensor]] = {}

    @property
    def hidden(self) -> list[Tensor]:
        """Of the pruned model."""
        return self._kinds["hidden"]

    @property
    def dense(self) -> list[Tensor] | None:
        """Of the dense model, where the recipe wants them."""
        return self._kinds.get("dense")

    def begin(self, samples: CalibrationSet, size: int) -> None:
        """Into the block that the run goes on with: from what comes before the blocks, or as they were saved.

        Args:
            size: samples in one batch.

        Raises:
            SourceError: the model's blocks hand more on to each other than the recipe's stages can follow.
        """
        batches = samples.batches(size)
        if (saved := self._journal.load_activations()) is not None:
            self._model.record_calls(batches, lambda states: None)
            self._kinds = {kind: self._kept(kind, states) for kind, states in saved.items()}
            return
        kinds = ("hidden", "dense") if self._recipe.wants_dense else ("hidden",)
        growing = {
            kind: Growing(-(-len(samples) // size), self._journal.directory / f"{kind}.activations") for kind in kinds
        }

        def keep(states: Tensor) -> None:
            for number, into in enumerate(growing.values()):
                into.append(states.clone() if number else states)  # each is overwritten on its own

        self._model.record_calls(batches, keep)
        self._refuse_what_is_carried()
        self._kinds = {kind: into.tensors for kind, into in growing.items()}

    def _refuse_what_is_carried(self) -> None:
        """Two streams would write over what the other's blocks hand on, and later blocks may read channels that were moved."""
        if self._recipe.wants_dense:
            self._model.refuse_carried("--repair block" if self._recipe.chosen_repair else "--targets dense")
        if self._recipe.permutation != "none":
            self._model.refuse_carried(f"--permutation {self._recipe.permutation}")
        if self._recipe.rotation != "none":
            self._model.refuse_carried(f"--rotation {self._recipe.rotation}")

    def save(self, index: int) -> None:
        """For a later run, as they go into block ``index``."""
        if not self._model.carried:  # else a resumed run begins with the first block: what is carried is not saved
            self._journal.save_activations(index, self._kinds)

    @contextmanager
    def widening(self) -> Iterator[None]:
        """Around what overwrites them: where a block's outputs are of a wider dtype than its inputs, they are other tensors."""
        before = {kind: batches[0].dtype for kind, batches in self._kinds.items()}
        yield
        for kind, batches in self._kinds.items():
            if batches[0].dtype != before[kind]:
                self._kinds[kind] = self._kept(kind, batches)

    def _kept(self, kind: str, batches: list[Tensor]) -> list[Tensor]:
        return spilled(batches, self._journal.directory / f"{kind}.activations")


def pass_on(model: BlockModel, index: int, activations: list[Tensor]) -> None:
    """Overwrites the inputs of a loaded block with its outputs.

    Raises:
        NumericalError: an output is not finite.
        SourceError: the block gives something else than what the next one takes.
    """
    for batch in range(len(activations)):
        advance(model, index, activations, batch)


def advance(model: BlockModel, index: int, activations: list[Tensor], batch: int) -> None:
    """The same for one batch."""
    states = activations[batch]
    output = model.run_block(index, batch, states)
    model.require_same_shape(index, states, output)
    if not packed.is_finite(output):
        raise NumericalError(
            f"{model.block_name(index)}: its output contains NaN or infinity (in {model.dtype}); "
            "check the model in this dtype, or try --dtype float32"
        )
    if output.dtype == states.dtype:
        states.copy_(output)
    else:  # the residuals of some families are wider than their embeddings
        activations[batch] = output.to(states.device)
