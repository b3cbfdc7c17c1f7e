"""The run: for each decoder block load, observe, prune, save, propagate.

At no time are more than the embeddings, one block (two copies of its linears while it is written) and the
calibration activations in memory, whatever the number of blocks. Everything is deterministic: the same
recipe on the same machine gives the same bytes, so an interrupted run can go on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import artefact, memory, packed, vision
from compress.allocate import AllocateOptions, Savings, allocate, reasons_of, what_pruning_saves
from compress.assembly import assemble
from compress.attention import TORCH
from compress.blocks import BlockModel
from compress.checkpoint import check_files
from compress.decisions import decide
from compress.device import choose_device
from compress.distill import DistillOptions, distill, require_room
from compress.errors import (
    HalveError,
    NumericalError,
    OutputError,
    RecipeError,
    SourceError,
    UsageError,
)
from compress.files import TensorFiles
from compress.gradients import GradientStore
from compress.journal import Journal
from compress.layer_statistics import GRADIENT_NEEDS
from compress.pruner import BlockPruner
from compress.quiet import quiet_transformers
from compress.recipe import Recipe
from compress.repair import repair_block
from compress.samples import choose_samples
from compress.sources import Source, fingerprint, resolve
from compress.space import bytes_needed
from compress.streams import Streams, advance, pass_on
from compress.version import versions

BATCH_TOKENS = 2048
"""Calibration tokens in one forward pass: enough to keep the matmuls busy, few enough for small memories."""

Progress = Callable[[int, int, str], None]
"""Called with the blocks done, the blocks in all, and what is happening."""


@dataclass(frozen=True)
class Compressed:
    """A finished run: where the artefact lies, and its report (the content of ``report.json``)."""

    directory: Path
    report: dict[str, Any]


def compress_model(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    device: str = "auto",
    attention: str = TORCH,
    savings: Savings | None = None,
    gradients: str | Path | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> Compressed:
    """Prunes a model and writes a verified artefact.

    Args:
        model: a Hugging Face directory, a hub id, or a GGUF file.
        out: the directory to make; it must not exist or be empty. It appears when everything is done; until
            then the work is in ``OUT.partial``.
        recipe: how to prune; or give its fields as keyword arguments (``metric="wanda"``).
        resume: go on with the interrupted run in ``OUT.partial``; the artefact is the same to the bit as that
            of a run that was never interrupted.
        checkpoint_seconds: how often the activations are saved, for a later resume.
        device: where blocks are run: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``.
        attention: what blocks attend with, by its name in transformers' registry; ``serve.attention`` puts a faster one
            there for processors. A resumed run keeps to what it began with.
        savings: microseconds that 2:4 saves by the shape of a weight, for an allocation by latency;
            ``serve.measure.tuned.savings`` gives those of this machine's kernel table.
        gradients: a directory that keeps the gradients of the dense model for other runs with the same model and
            calibration, for metrics that need them; they are gathered into it where it is not there. Left out: they
            go with the work directory.
        progress: called after each step.

    Raises:
        HalveError: with one message for the user; see `compress.errors`.
    """
    if recipe is not None and fields:
        raise RecipeError(f"give either a recipe or its fields, not both (got {', '.join(fields)})")
    recipe = recipe or Recipe.create(**fields)
    if gradients is not None and not recipe.needs & GRADIENT_NEEDS:
        raise RecipeError(
            f"gradients={str(gradients)!r} was given, and nothing in the recipe reads the gradients of the model's loss; leave "
            "it out (flag --gradients), or choose a metric that does (see `halve methods`)"
        )
    run = _Run(
        str(model),
        Path(out),
        recipe,
        resume,
        checkpoint_seconds,
        choose_device(device)[0],
        attention,
        savings,
        Path(gradients) if gradients is not None else None,
        progress or (lambda *_: None),
    )
    try:
        with torch.no_grad(), quiet_transformers():
            return run.run()
    finally:
        run.close()


class _Run:
    def __init__(
        self,
        model: str,
        out: Path,
        recipe: Recipe,
        resume: bool,
        interval: float,
        device: torch.device,
        attention: str,
        savings: Savings | None,
        gradients: Path | None,
        progress: Progress,
    ) -> None:
        self.model_name = model
        self.recipe = recipe
        self.device = device
        self.savings = savings
        self.gradients = gradients
        self.progress = progress
        if not resume and not Path(model).expanduser().exists() and model.startswith((".", "/", "~")):
            resolve(model, Path())  # raises before a work directory is made
        self.journal = Journal(out, resume=resume, interval=interval)
        self.attention = self.journal.begun_with("attention") or attention  # a resumed run gives the same bits
        self.final = self.journal.directory / "final"
        self.store: GradientStore | None = None

    def close(self) -> None:
        """Lets other runs at what this one holds."""
        self.journal.close()
        if self.store is not None:
            self.store.close()

    def run(self) -> Compressed:
        try:
            self.source = Source(resolve(self.model_name, self.journal.directory / "source"))
            check_files(self.source.tensors.files)  # those that carry a digest
            self.model = BlockModel(
                self.source, self._dtype(), self.device, add_bias=self.recipe.add_bias, attention=self.attention
            )
            self.decisions = decide(self.model, self.recipe)
            self.samples, self.recipe, self.split = choose_samples(
                self.model, self.recipe, self.decisions, BATCH_TOKENS
            )
            self.shared = self.samples.first(self.recipe.windows)  # a distillation may see more
            distillation = self.recipe.chosen_distillation if self.journal.distillation is None else None
            if distillation is not None:
                require_room(self.model, self.samples.samples, len(self.shared) - self.split.fitted, distillation)
            self.store = self._gradient_store()
            self.journal.open(self._identity())
        except HalveError:
            self.journal.abandon_if_new()
            raise
        if self.journal.completed:  # killed between the last rename and the end of the clean-up
            self.journal.finish(self.final)
            return self._result()
        count = len(self.model.blocks)
        if not self.journal.finished(count):
            self._require_space()
            try:
                saves = self._what_pruning_saves()  # (refuses, and gradients may take hours)
                if self.store is not None:
                    self._provide_gradients(self.store)
                if self.recipe.chosen_allocation is not None:
                    self.decisions |= self._allocate(self.recipe.chosen_allocation, saves)
            except HalveError:
                self.journal.abandon_if_new()
                raise
            self.pruner = self._pruner()
            with self._keeping_what_is_finished():
                self._prune_blocks()
        if distillation is not None:
            with self._keeping_what_is_finished():
                self._distill(distillation)
        self.progress(count, count, "writing the checkpoint")
        assemble(self.final, self.model_name, self.model, self.recipe, self.samples, self.journal)
        self.journal.finish(self.final)
        return self._result()

    @contextlib.contextmanager
    def _keeping_what_is_finished(self) -> Iterator[None]:
        """Tells the user about it where something fails inside."""
        try:
            yield
        except OutputError:
            raise  # says itself how to go on
        except (UsageError, NumericalError) as error:
            self.journal.abandon_if_new()
            if self.journal.directory.is_dir():
                error.args = (f"{error} (what was finished is kept in {self.journal.directory})",)
            raise

    def _result(self) -> Compressed:
        report = artefact.read_report(self.journal.out)
        assert report is not None, "the artefact was just written"
        return Compressed(self.journal.out, report)

    def _dtype(self) -> torch.dtype:
        name = self.recipe.dtype
        if name == "auto":
            name = self.source.dtype
        if not isinstance(name, str) or name not in packed.VALUE_DTYPES:
            raise SourceError(
                f"the checkpoint's dtype is {name!r}; choose one of {', '.join(packed.VALUE_DTYPES)} with --dtype"
            )
        return packed.VALUE_DTYPES[name]

    def _identity(self) -> dict[str, Any]:
        gguf = Path(self.model_name).expanduser()
        return {
            "model": self.model_name,
            "source": {**self.source.fingerprint, **fingerprint([gguf] if gguf.is_file() else [])},
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration": self.samples.digest,
            "device": self.device.type,
            "attention": self.attention,
            "versions": versions(),
        }

    def _require_space(self) -> None:
        needed = bytes_needed(
            self.model, self.recipe, self.decisions, self.split, len(self.shared), self._tokens_of_a_sample()
        )
        free = shutil.disk_usage(self.journal.directory).free
        if free < needed:
            self.journal.abandon_if_new()
            raise OutputError(
                f"not enough disk space at {self.journal.directory.parent}: the run needs about {needed / 1e9:.2f} GB, "
                f"and {free / 1e9:.2f} GB are free"
            )

    def _tokens_of_a_sample(self) -> int:
        """About, for an image."""
        return self.samples.samples.shape[1] if self.samples.argument == "input_ids" else vision.TOKENS_OF_AN_IMAGE

    def _prune_blocks(self) -> None:
        count = len(self.model.blocks)
        self.progress(self.journal.next_block, count, "reading the calibration samples")
        streams = Streams(self.model, self.recipe, self.journal)
        passing = self.shared.first(self.split.observed) if self.recipe.chosen_repair is None else self.shared
        streams.begin(passing, self.split.size)
        memory.give_back()
        for index in range(self.journal.next_block, count):
            streams.save(index)
            with streams.widening():
                self._finish_block(index, streams.hidden, streams.dense)

    def _gradient_store(self) -> GradientStore | None:
        """Where the gradients of the dense model's loss lie, or will lie, if the recipe needs them."""
        if not self.recipe.needs & GRADIENT_NEEDS:
            return None
        # What is pruned and how makes no difference to them, and the attention none but of rounding.
        others = ("model", "recipe", "attention")
        identity = {key: value for key, value in self._identity().items() if key not in others}
        identity["calibration"] = self.samples.first(self.split.observed).digest
        if (gguf := Path(self.model_name).expanduser()).is_file():
            identity["source"] = fingerprint([gguf])  # what was made of it is new in each run
        identity["dtype"] = str(self._gradient_dtype())
        return GradientStore(self.gradients or self.journal.directory / "gradients", identity)

    def _gradient_dtype(self) -> torch.dtype:
        """Small gradients vanish in float16."""
        return torch.float32 if self.model.dtype == torch.float16 else self.model.dtype

    def _provide_gradients(self, store: GradientStore) -> None:
        """One backward pass over the dense model, unless another run has made it."""
        every = [list(self.model.linears(index)) for index in range(len(self.model.blocks))]
        wanted = {name for name, reason in self.decisions.items() if reason is None}
        kept = self.gradients is not None  # another run may need other kinds and layers
        store.provide(
            GRADIENT_NEEDS if kept else self.recipe.needs & GRADIENT_NEEDS,
            lambda: BlockModel(self.source, self._gradient_dtype(), self.device, attention=self.attention),
            self.samples.first(self.split.observed),
            every if kept else [[name for name in block if name in wanted] for block in every],
            wanted,
            self.progress,
        )
        memory.give_back()

    def _finish_block(self, index: int, hidden: list[Tensor], dense: list[Tensor] | None) -> None:
        """One block from its inputs to its outputs.

        Args:
            hidden: its inputs from the pruned blocks before it; overwritten with the outputs of the pruned block.
            dense: its inputs from the dense blocks before it; overwritten with the outputs of the dense block. None
                where nobody needs them.
        """
        count = len(self.model.blocks)
        repair = self.recipe.chosen_repair
        block = self.model.load_block(index)
        observed = hidden[: -(-self.split.observed // self.split.size)]
        done = self.pruner.prune(
            index, block, observed, dense, lambda batch: advance(self.model, index, dense or [], batch)
        )
        errors = [record["relative_output_error"] for record in done.records if "relative_output_error" in record]
        said = f"{self.model.block_name(index)}, relative output error "
        said += f"{sum(errors) / len(errors):.4f}" if errors else "none pruned"
        record: dict[str, Any] = {"layers": done.records}
        if repair is not None:
            assert dense is not None, "they are kept for the repair"
            repaired = repair_block(
                self.model,
                index,
                done.masks,
                hidden,
                dense,
                repair,
                self.recipe.parsed_pattern,
                batches=list(self.shared.batches(self.split.size)),
                held_out=self.split.held_out,
                seed=self.recipe.seed,
                tell=lambda text: self.progress(index, count, text),
            )
            record["repair"] = repaired.record
            done.changed |= repaired.changed
            if "held_out_error" in record["repair"]:
                said += ", held out {held_out_error_before:.4f}, repaired {held_out_error:.4f}".format(
                    **record["repair"]
                )
        pass_on(self.model, index, hidden)
        tensors = self.pruner.save(index, done)
        self.model.drop_block(index)
        del block, done
        self.journal.save_block(index, tensors, record)
        del tensors
        memory.give_back()
        self.progress(index + 1, count, said)

    def _pruner(self) -> BlockPruner:
        return BlockPruner(self.model, self.recipe, self.decisions, self.store, self.journal.directory)

    def _what_pruning_saves(self) -> dict[str, float]:
        """By linear, where an allocation is still to be made."""
        if self.recipe.chosen_allocation is None or self.journal.allocation is not None:
            return {}
        return what_pruning_saves(self.model, self.recipe, self.decisions, self.savings)

    def _allocate(self, options: AllocateOptions, saves: Mapping[str, float]) -> dict[str, str]:
        """Why the linears stay dense that the allocation keeps, measured in the dense model unless that was done."""
        record = self.journal.allocation
        if record is None:
            windows, size = self.samples.first(min(options.windows, self.split.observed)), self.split.size
            record = allocate(
                self.model,
                self._pruner(),
                windows.batches(size),
                partial(pass_on, self.model),
                saves,
                tell=self.progress,
            ).record()
            memory.give_back()
            self.journal.save_allocation(record)
        return reasons_of(record)

    def _distill(self, options: DistillOptions) -> None:
        """All blocks are done: trains the model as a whole."""
        count = len(self.model.blocks)
        records = [record for index in range(count) for record in self.journal.record(index)["layers"]]
        blocks, record = distill(
            self.model,
            {index: TensorFiles(self.journal.directory, [self.journal.block_file(index)]) for index in range(count)},
            {record["name"] for record in records if record["status"] == "pruned"},
            self.samples.samples,
            options,
            tokens=self.recipe.distill,
            seen=self.split.fitted,
            held_out=len(self.shared) - self.split.fitted,
            format=self.recipe.format,
            seed=self.recipe.seed,
            tell=self.progress,
        )
        self.journal.save_distilled(blocks, record)
        memory.give_back()
