"""One decoder block from its inputs to its pruned self: observe, gradients, channels, every linear.

The pipeline loads the block, saves what comes out and passes the activations on; here is what happens in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compress import artefact, memory, packed
from compress.architecture import LinearModule, oriented
from compress.blocks import BlockModel
from compress.folding import fold_block
from compress.gradients import GradientStore, regional_gradients
from compress.layer_statistics import GRADIENT_NEEDS, REGIONAL_NEEDS, LayerStatistics
from compress.layers import importance, prune_layer
from compress.observe import InputObserver
from compress.patterns import NMPattern
from compress.recipe import Recipe
from compress.seeds import named_seed


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
        samples: how many calibration samples there are.
        gradients: of the dense model's loss, where the recipe needs them.
    """

    def __init__(
        self,
        model: BlockModel,
        recipe: Recipe,
        decisions: Mapping[str, str | None],
        samples: int,
        gradients: GradientStore | None,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.decisions = decisions
        self._samples = samples
        self._gradients = gradients

    def prune(self, index: int, block: nn.Module, hidden: list[Tensor]) -> PrunedBlock:
        """Prunes a loaded block in place.

        Args:
            hidden: the block's inputs, [batch, length, hidden] each.
        """
        linears = self.model.linears(index)
        observed = {name: module for name, module in linears.items() if self.decisions[name] is None}
        tokens = sum(states.shape[:-1].numel() for states in hidden)
        observer = InputObserver(observed, self.recipe.needs | {"sample"}, tokens, block, self._samples)
        if observed:
            observer.run(self.model, index, hidden)
            memory.give_back()
        gradients = self._gradients_of(index, observed, hidden)
        permuted = self._permute(index, hidden[0], observer, gradients)
        done = PrunedBlock([], {})
        # Biases that the source does not have; methods may change them.
        done.changed |= {f"{name}.bias" for name in linears if f"{name}.bias" in self.model.added}
        for name in {producer: None for record in permuted.values() for producer in record["folded_into"]}:
            done.changed |= {f"{name}.{parameter}" for parameter, _ in linears[name].named_parameters()}
        for name, module in linears.items():
            statistics = self._statistics(name, module, observer, gradients.get(name, {}))
            record = self._prune_linear(name, module, statistics, done)
            done.records.append({**record, "permutation": permuted[name]} if name in permuted else record)
        return done

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
        self, index: int, hidden: Tensor, observer: InputObserver, gradients: dict[str, dict[str, Tensor]]
    ) -> dict[str, dict[str, Any]]:
        """Reorders the channels of a loaded block where the recipe asks for it and it is free; what was done by consumer."""
        pattern = self.recipe.parsed_pattern
        if self.recipe.permutation == "none" or not isinstance(pattern, NMPattern):
            return {}

        def score(name: str, module: LinearModule) -> Tensor:
            statistics = self._statistics(name, module, observer, gradients.get(name, {}))
            assert statistics is not None, "only observed layers are scored"
            return importance(name, oriented(module.weight, module), statistics, self.recipe)

        return fold_block(self.model, index, hidden, observer, gradients, pattern, score)

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
            windows=self._samples,
            bias=module.bias,
            outputs=observer.outputs.get(name),
            gradients=gradients,
            place=observer.place.get(name, {}),
        )

    def _prune_linear(
        self, name: str, module: LinearModule, statistics: LayerStatistics | None, done: PrunedBlock
    ) -> dict[str, Any]:
        """Prunes one linear in place, notes what it changed in ``done``, and returns its record."""
        weight = oriented(module.weight, module)
        record: dict[str, Any] = {"name": name, "shape": list(weight.shape), "bytes_before": weight.nbytes}
        reason = self.decisions[name]
        if reason is None and statistics is None:
            reason = "it never got a token in the calibration"
        if reason is not None or statistics is None:
            packed.require_finite(weight, name)
            return {**record, "status": "dense", "reason": reason}
        result = prune_layer(name, weight, statistics, self.recipe)
        module.weight.data = oriented(result.weight, module).contiguous()
        done.masks[name] = oriented(result.mask, module)
        if result.bias is not None:
            if module.bias is None:
                raise AssertionError(f"{name}: {self.recipe.reconstruction} gave a bias to a layer that has none")
            module.bias.data = result.bias.to(module.bias.dtype)
            done.changed.add(f"{name}.bias")
        return {**record, "status": "pruned", **result.record}
