"""A block on its way back to the dense block's output: a float32 copy of it, what of it is trained, and its error.

`compress.repair` says what is done with it, and why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress import remask
from compress.architecture import LinearModule, linears_of, oriented, shape_of
from compress.blocks import BlockModel
from compress.norms import norms_of
from compress.training import Trainable, autocast, precision


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """‖output − target‖² / ‖target‖² of each token, [batch, length] float32."""
    target = target.float()
    energy = target.square().sum(dim=-1)
    return (output.float() - target).square().sum(dim=-1) / energy.clamp_min(torch.finfo(torch.float32).tiny)


class Course:
    """A float32 copy of a block, its trainable parameters, and its error."""

    def __init__(
        self,
        model: BlockModel,
        index: int,
        masks: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        held_out: int,
    ) -> None:
        self._model, self._index = model, index
        self._inputs, self._targets = inputs, targets
        self.fitted = range(len(inputs) - held_out)
        self._held_out = range(len(inputs) - held_out, len(inputs))
        self._original = model.blocks[index]
        self._block = copy.deepcopy(self._original).float()
        self._precision = precision(model.dtype, model.device)
        self._pruned = {n: m for n, m in linears_of(self._block, model.block_name(index)).items() if n in masks}
        self._norms = norms_of(self._block, lambda: self._output(0))
        self._set_masks(masks)
        for trainable in self.parameters.values():
            trainable.parameter.requires_grad_(True)
        self._errors: Callable[[Tensor, int], Tensor] = self._against_target
        self.tokens = sum(inputs[batch].shape[:-1].numel() for batch in self.fitted)
        self.widest = max(shape_of(module)[1] for module in self._pruned.values())

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        self.parameters = _trainable(self._block, self._pruned, self.masks, self._norms)

    def _output(self, batch: int) -> Tensor:
        return _run(self._model, self._index, batch, self._inputs[batch], self._block, self._precision)

    def _against_target(self, output: Tensor, batch: int) -> Tensor:
        return relative_error(output, self._targets[batch].to(self._model.device))

    @contextmanager
    def judged_by(self, errors: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
        """Inside, loss and errors are those that ``errors`` gives for an output and the number of its batch."""
        self._errors = errors
        try:
            yield
        finally:
            self._errors = self._against_target

    def loss(self, batch: int) -> Tensor:
        with torch.enable_grad():
            return self._errors(self._output(batch), batch).mean()

    def held_out_error(self) -> float:
        return self.error(self._held_out)

    @torch.no_grad()
    def error(self, batches: Iterable[int]) -> float:
        """The mean over the tokens of some batches."""
        return float(torch.cat([self._errors(self._output(batch), batch).flatten() for batch in batches]).mean())

    def state(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Masks, and copies of all values."""
        return self.masks, [trainable.parameter.detach().clone() for trainable in self.parameters.values()]

    def set_state(self, state: tuple[dict[str, Tensor], list[Tensor]]) -> None:
        """Back to what `state` gave."""
        masks, values = state
        self._set_masks(masks)
        with torch.no_grad():
            for trainable, value in zip(self.parameters.values(), values, strict=True):
                trainable.parameter.copy_(value)

    def exchange(self, m: int, share: float, generator: torch.Generator) -> tuple[int, int]:
        """Exchanges kept weights for pruned ones where that promises most; how many groups there are, and of how many the mask
        is another one now."""
        order = torch.randperm(len(self.fitted), generator=generator).tolist()
        half = -(-len(order) // 2)
        finding, judging = (
            remask.sensitivities(
                self._pruned,
                m,
                batches,
                self._output,
                lambda batch: self._targets[batch].to(self._model.device),
                relative_error,
                generator,
            )
            for batches in (order[:half], order[half:])
        )
        names = finding.keys() & judging.keys()
        renewed = dict(self.masks)
        with torch.no_grad():
            weights = {
                name: oriented(self._pruned[name].weight, self._pruned[name]) for name in self._pruned if name in names
            }
            masks = {name: oriented(self.masks[name], self._pruned[name]) for name in weights}
            found = {name: remask.exchanges(weights[name], masks[name], finding[name]) for name in weights}
            changes = {name: remask.predicted(weights[name], found[name], judging[name]) for name in weights}
            chosen = remask.chosen(changes, share) if changes else {}
            for name, groups in chosen.items():
                module = self._pruned[name]
                weight, mask = remask.exchanged(weights[name], masks[name], found[name], groups)
                module.weight.copy_(oriented(weight, module))
                renewed[name] = oriented(mask, module)
        self._set_masks(renewed)
        return sum(groups.numel() for groups in chosen.values()), sum(int(groups.sum()) for groups in chosen.values())

    def write_back(self) -> None:
        """The trained values go into the block itself, rounded once."""
        with torch.no_grad():
            for name, value in self._original.named_parameters():
                if name in self.parameters:
                    value.copy_(self.parameters[name].parameter)


def _trainable(
    block: nn.Module, pruned: Mapping[str, LinearModule], masks: Mapping[str, Tensor], norms: set[nn.Module]
) -> dict[str, Trainable]:
    """The parameters that are trained, by their names in the block; each once."""
    weights = {id(module.weight): masks[name] for name, module in pruned.items()}
    others = {id(p) for module in (*pruned.values(), *norms) for p in module.parameters(recurse=False)}
    return {
        name: Trainable(parameter, weights.get(id(parameter)))
        for name, parameter in block.named_parameters()
        if id(parameter) in others
    }


def _run(
    model: BlockModel, index: int, batch: int, states: Tensor, block: nn.Module, low: torch.dtype | None
) -> Tensor:
    """The output of a float32 copy of a block, its matrix products in ``low``."""
    with autocast(model.device, low):
        output = model.run_copy(index, batch, states, block, torch.float32)
    assert output is not None, "no hook ends this pass"
    return output
