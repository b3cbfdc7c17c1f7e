"""One decoder block from its inputs to its pruned self: observe, gradients, channels, every linear.

The pipeline loads the block, saves what comes out and passes the activations on; here is what happens in between. All
linears are observed in one pass and pruned; or, where they are fitted to the dense model (`compress.targets`), stage after
stage, each observed with what was pruned before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress import artefact, memory, packed
from compress.activations import first_tokens
from compress.architecture import LinearModule, join_names, make_of, oriented
from compress.backward import regional_gradients
from compress.blocks import BlockModel
from compress.errors import NumericalError
from compress.folding import FoldsOfAlike, fold_block
from compress.gradients import GradientStore
from compress.layer_statistics import GRADIENT_NEEDS, PLACE_NEEDS, REGIONAL_NEEDS, LayerStatistics
from compress.layers import importance, prune_layer
from compress.norms import ends_with_norm
from compress.observe import InputObserver
from compress.patterns import NMPattern
from compress.recipe import Recipe
from compress.rotating import rotate_block
from compress.seeds import named_seed
from compress.stages import Stage, plan_stages
from compress.targets import TARGET_NEEDS, Aligned, DenseTensors, StageTargets, TargetOptions, aligned

PERMUTATION_TOKENS = 8192
"""Tokens on which channels are scored for their reordering, where it comes before the observation."""


@dataclass
class PrunedBlock:
    """What happened to a loaded block; its weights are in the block itself."""

    records: list[dict[str, Any]]
    """One for each linear."""
    masks: dict[str, Tensor]
    """For each pruned linear by its full name, True where a weight is kept, shaped as the module's weight."""
    changed: set[str] = field(default_factory=set)
    """Full names of the other parameters that are not as the source has them."""


class BlockPruner:
    """Prunes loaded blocks of a model by a recipe.

    Args:
        decisions: for every linear the reason why it stays dense, or None.
        gradients: of the dense model's loss, where the recipe needs them.
        directory: for tensors of the dense model that are too large for the memory.
    """

    def __init__(
        self,
        model: BlockModel,
        recipe: Recipe,
        decisions: Mapping[str, str | None],
        gradients: GradientStore | None,
        directory: Path | None = None,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.decisions = decisions
        self._gradients = gradients
        self._directory = directory or Path()
        self._plans: dict[object, list[Stage]] = {}
        self._folds = FoldsOfAlike()
        self._rotations = FoldsOfAlike(rotations=True)
        self._ends_with_norm: dict[object, bool] = {}

    def prune(
        self,
        index: int,
        block: nn.Module,
        hidden: list[Tensor],
        dense: list[Tensor] | None = None,
        advance: Callable[[int], None] = lambda batch: None,
    ) -> PrunedBlock:
        """Prunes a loaded block in place.

        Args:
            hidden: the block's inputs, [batch, length, hidden] each, that it is observed on.
            dense: the inputs of the dense block in the same batches, and maybe more; needed for dense targets.
            advance: turns one batch of ``dense`` from the block's inputs to its outputs. Called for each of them before
                anything is pruned.
        """
        linears = self.model.linears(index)
        wanted = {name: module for name, module in linears.items() if self.decisions[name] is None}
        done = PrunedBlock([], {})
        # Biases that the source does not have; methods may change them.
        done.changed |= {f"{name}.bias" for name in linears if f"{name}.bias" in self.model.added}
        rotated = self._rotate(index, block, wanted, hidden, done)
        gradients = self._gradients_of(index, wanted, hidden)
        options = self.recipe.chosen_targets
        if options is None:
            observer = self._observe(index, block, wanted, hidden, self.recipe.needs | {"sample"})
            memory.give_back()  # (once for all; between stages, fetching the pages again would cost more than it saves)
            permuted = self._permute(index, hidden[0], observer, gradients, done)
            for batch in range(len(dense or ())):
                advance(batch)
            for name in linears:
                self._prune_linear(name, linears[name], observer, gradients.get(name, {}), permuted, done)
            _note(done, "rotation", rotated)
            return done
        assert dense is not None, "the pipeline passes them on for the targets"
        permuted = self._permute_early(index, block, wanted, hidden, gradients, done)
        stages = self._stages(index, block, wanted, hidden[0])
        tensors = DenseTensors(block, stages, len(hidden), self._directory)
        tensors.gather(dense, advance)
        for number, stage in enumerate(stages):
            self._prune_stage(index, block, hidden, stage, tensors, options, gradients, permuted, done)
            later = {tap for other in stages[number + 1 :] for tap in other.shows.values()}
            tensors.forget(set(stage.shows.values()) - later)
        for name in linears:
            if name not in wanted:
                self._prune_linear(name, linears[name], None, {}, permuted, done)
        order = {name: number for number, name in enumerate(linears)}
        done.records.sort(key=lambda record: order[record["name"]])
        _note(done, "rotation", rotated)
        return done

    def trials(self, index: int, block: nn.Module, hidden: list[Tensor]) -> Iterator[tuple[str, ...]]:
        """Prunes the linears of a loaded block that read one tensor, those of one tensor after the other, each time in a
        block that is dense otherwise.

        Channels are not reordered, and targets are the layers' own.

        Args:
            hidden: the block's inputs, [batch, length, hidden] each, that it is observed on.

        Yields:
            The names of those that are pruned now; they are dense again when the next are asked for.
        """
        linears = self.model.linears(index)
        wanted = {name: module for name, module in linears.items() if self.decisions[name] is None}
        gradients = self._gradients_of(index, wanted, hidden)
        observer = self._observe(index, block, wanted, hidden, self.recipe.needs | {"sample"})
        units = {tuple(observer.sharing(name)): None for name in wanted if observer.statistics(name) is not None}
        for names in units:
            parameters = [parameter for name in names for parameter in linears[name].parameters(recurse=False)]
            dense = [parameter.data for parameter in parameters]
            try:
                for name in names:
                    self._prune_linear(name, linears[name], observer, gradients[name], {}, PrunedBlock([], {}))
                yield names
            finally:
                for parameter, values in zip(parameters, dense, strict=True):
                    parameter.data = values

    def _prune_stage(
        self,
        index: int,
        block: nn.Module,
        hidden: list[Tensor],
        stage: Stage,
        tensors: DenseTensors,
        options: TargetOptions,
        gradients: dict[str, dict[str, Tensor]],
        permuted: dict[str, dict[str, Any]],
        done: PrunedBlock,
    ) -> None:
        """The layers of one stage, observed behind everything that was pruned before them."""
        linears = self.model.linears(index)
        names = {layer: join_names(self.model.block_name(index), layer) for layer in stage.layers}
        targets = StageTargets(stage, tensors)
        needs = self.recipe.needs | TARGET_NEEDS | {"sample"}
        some = {name: linears[name] for name in names.values()}
        observer = self._observe(index, block, some, hidden, needs, targets)
        for layer, name in names.items():
            aim = _Aim(targets, layer, options)
            self._prune_linear(name, linears[name], observer, gradients.get(name, {}), permuted, done, aim)

    def _observe(
        self,
        index: int,
        block: nn.Module,
        linears: dict[str, LinearModule],
        hidden: list[Tensor],
        needs: frozenset[str],
        targets: StageTargets | None = None,
    ) -> InputObserver:
        """The statistics of some linears of a loaded block, and with targets what these are missing."""
        tokens = sum(states.shape[:-1].numel() for states in hidden)
        windows = sum(len(states) for states in hidden)
        normalized = bool(needs & PLACE_NEEDS) and self._reads_norm(index, hidden[0])
        observer = InputObserver(linears, needs, tokens, block, windows, normalized)
        if not linears:
            return observer
        if targets is None:
            observer.run(self.model, index, hidden)
        else:
            observer.run(self.model, index, hidden, targets.taps, targets.update)
        return observer

    def _reads_norm(self, index: int, hidden: Tensor) -> bool:
        """Whether the input of a block comes straight from a normalization; looked at once for all blocks that are made alike,
        with the block before it in memory beside it."""
        if index == 0:
            return False
        key = make_of(self.model.blocks[index - 1])
        if key not in self._ends_with_norm:
            self._ends_with_norm[key] = ends_with_norm(self.model, index - 1, hidden)
        return self._ends_with_norm[key]

    def _rotate(
        self, index: int, block: nn.Module, linears: dict[str, LinearModule], hidden: list[Tensor], done: PrunedBlock
    ) -> dict[str, dict[str, Any]]:
        """Mixes the channels of heads where the recipe asks for it and it is free; what was done by consumer."""
        options, pattern = self.recipe.chosen_rotation, self.recipe.parsed_pattern
        if options is None or not isinstance(pattern, NMPattern) or not linears:
            return {}
        observe = partial(self._observe, index, block)
        rotated = rotate_block(self.model, index, hidden, linears, observe, pattern, options, self._rotations)
        self._note_changed(index, rotated, "with", done)
        return rotated

    def _note_changed(self, index: int, records: dict[str, dict[str, Any]], key: str, done: PrunedBlock) -> None:
        """Everything of the linears that the records name is saved, whether they are pruned or not."""
        linears = self.model.linears(index)
        for name in {producer: None for record in records.values() for producer in record[key]}:
            done.changed |= {f"{name}.{parameter}" for parameter, _ in linears[name].named_parameters()}

    def _permute_early(
        self,
        index: int,
        block: nn.Module,
        linears: dict[str, LinearModule],
        hidden: list[Tensor],
        gradients: dict[str, dict[str, Tensor]],
        done: PrunedBlock,
    ) -> dict[str, dict[str, Any]]:
        """Reorders the channels before the stages begin, as all of them have to see the same order; by scores on a part of the
        calibration, which tells as much."""
        if self.recipe.permutation == "none" or not linears:
            return {}
        some = first_tokens(hidden, PERMUTATION_TOKENS)
        observer = self._observe(index, block, linears, some, self.recipe.scoring_needs)
        return self._permute(index, hidden[0], observer, gradients, done)

    def _stages(self, index: int, block: nn.Module, linears: dict[str, LinearModule], hidden: Tensor) -> list[Stage]:
        """Once for all blocks that are made alike."""
        prefix = f"{self.model.block_name(index)}."
        names = tuple(name.removeprefix(prefix) for name in linears)
        key = (make_of(block), names)
        if key not in self._plans:
            self._plans[key] = plan_stages(self.model, index, hidden, names)
        return self._plans[key]

    def save(self, index: int, done: PrunedBlock) -> dict[str, Tensor]:
        """What has to be saved of a block, under the checkpoint's names; the records get the bytes that it takes."""
        saved: dict[str, Tensor] = {}
        linears = self.model.linears(index)
        for record in done.records:
            name = record["name"]
            weight = oriented(linears[name].weight, linears[name])
            if record["status"] == "dense":
                record["bytes_after"] = weight.nbytes
                continue
            key = self.model.key_of(f"{name}.weight")
            entries = artefact.weight_entries(key, weight.detach(), linears[name], name, self.recipe.format)
            record["bytes_after"] = sum(tensor.nbytes for tensor in entries.values())
            saved.update(entries)
        pruned = {f"{name}.weight" for name in done.masks}
        parameters = dict(self.model.parameters(index))
        for name in sorted(done.changed - pruned):
            saved[self.model.key_of(name)] = parameters[name].data.cpu()
        return saved

    def _gradients_of(
        self, index: int, linears: dict[str, LinearModule], hidden: list[Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """The gradients that the recipe needs of a loaded block's linears, by layer and by statistic."""
        found: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
        if kinds := self.recipe.needs & GRADIENT_NEEDS:
            assert self._gradients is not None, "the pipeline gathers what the recipe needs"
            for name, gradient in self._gradients.read(index, linears, kinds, self.model.device).items():
                found[name].update(gradient)
        if self.recipe.needs & REGIONAL_NEEDS and linears:
            for name, gradient in regional_gradients(self.model, index, linears, hidden).items():
                found[name]["regional_gradient"] = gradient
        return found

    def _permute(
        self,
        index: int,
        hidden: Tensor,
        observer: InputObserver,
        gradients: dict[str, dict[str, Tensor]],
        done: PrunedBlock,
    ) -> dict[str, dict[str, Any]]:
        """Reorders the channels of a loaded block where the recipe asks for it and it is free; what was done by consumer."""
        pattern = self.recipe.parsed_pattern
        if self.recipe.permutation == "none" or not isinstance(pattern, NMPattern):
            return {}

        def score(name: str, module: LinearModule) -> Tensor:
            statistics = self._statistics(name, module, observer, gradients.get(name, {}))
            assert statistics is not None, "only observed layers are scored"
            return importance(name, oriented(module.weight, module), statistics, self.recipe)

        permuted = fold_block(self.model, index, hidden, observer, gradients, pattern, score, self._folds)
        self._note_changed(index, permuted, "folded_into", done)
        return permuted

    def _statistics(
        self, name: str, module: LinearModule, observer: InputObserver, gradients: dict[str, Tensor]
    ) -> LayerStatistics | None:
        """What is known of a layer, or None where it was never called."""
        inputs = observer.statistics(name)
        if inputs is None:
            return None
        return LayerStatistics(
            inputs,
            seed=named_seed(self.recipe.seed, name),
            windows=observer.windows,
            bias=module.bias,
            outputs=observer.outputs.get(name),
            gradients=gradients,
            place=observer.place.get(name, {}),
            name=name,
        )

    def _prune_linear(
        self,
        name: str,
        module: LinearModule,
        observer: InputObserver | None,
        gradients: dict[str, Tensor],
        permuted: dict[str, dict[str, Any]],
        done: PrunedBlock,
        aim: _Aim | None = None,
    ) -> None:
        """Prunes one linear in place, and notes its record and what it changed in ``done``."""
        statistics = None if observer is None else self._statistics(name, module, observer, gradients)
        weight = oriented(module.weight, module)
        record: dict[str, Any] = {"name": name, "shape": list(weight.shape), "bytes_before": weight.nbytes}
        if name in permuted:
            record["permutation"] = permuted[name]
        reason = self.decisions[name]
        if reason is None and statistics is None:
            reason = "it never got a token in the calibration"
        if reason is not None or statistics is None:
            packed.require_finite(weight, name)
            done.records.append({**record, "status": "dense", "reason": reason})
            return
        target, notes = None, dict[str, Any]()
        if aim is not None and (found := aim.take(name, weight, statistics)) is not None:
            target, notes = found.weight, found.notes
            if found.bias is not None:
                self._set_bias(name, module, found.bias, done)
                statistics.bias = module.bias
        result = prune_layer(name, weight, statistics, self.recipe, target)
        module.weight.data = oriented(result.weight, module).contiguous()
        done.masks[name] = oriented(result.mask, module)
        if result.bias is not None:
            if module.bias is None:
                raise AssertionError(f"{name}: {self.recipe.reconstruction} gave a bias to a layer that has none")
            self._set_bias(name, module, result.bias, done)
        done.records.append({**record, "status": "pruned", **result.record, **notes})

    def _set_bias(self, name: str, module: LinearModule, bias: Tensor, done: PrunedBlock) -> None:
        assert module.bias is not None
        module.bias.data = bias.to(module.bias.dtype)
        done.changed.add(f"{name}.bias")


def _note(done: PrunedBlock, key: str, notes: Mapping[str, Any]) -> None:
    """Adds to the records of the linears that ``notes`` name."""
    for record in done.records:
        if record["name"] in notes:
            record[key] = notes[record["name"]]


@dataclass(frozen=True)
class _Aim:
    """What one layer of a stage is fitted to."""

    targets: StageTargets
    layer: str
    options: TargetOptions

    def take(self, name: str, weight: Tensor, statistics: LayerStatistics) -> Aligned | None:
        """The weights [N, K] to prune instead of ``weight``, or None where nothing is known of the dense model."""
        packed.require_finite(weight, name)
        statistics.require_finite(name)
        missing = self.targets.of(self.layer, weight)
        if missing is None:
            return None
        try:
            return aligned(weight, *missing, statistics, self.options)
        except NumericalError as error:
            raise NumericalError(f"{name}: {error}") from None
