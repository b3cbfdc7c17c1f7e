"""One backward pass: the gradients of linears' weights, summed over the calibration samples, and what they are gradients of.

Of the whole model's loss they are gathered block after block by `compress.gradients`; those of one block's output, which
never leave the block, are here.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.architecture import LinearModule, linears_of, oriented
from compress.blocks import BlockModel
from compress.calibration import CalibrationSet
from compress.errors import SourceError, one_line


def no_gradient(model: str, layers: Sequence[str]) -> SourceError:
    """What is said where the output does not depend on some layers."""
    return SourceError(
        f"the method needs gradients, and {model} gives none for {layers[0]} ({len(layers)} layers): its output does not "
        f"depend on them; add --ignore {layers[0]!r}, or choose a metric without gradients (see `halve methods`)"
    )


@torch.no_grad()
def regional_gradients(
    model: BlockModel, index: int, linears: Mapping[str, LinearModule], hidden: Sequence[Tensor]
) -> dict[str, Tensor]:
    """sqrt(mean_n g_n²) with g_n = ∂‖block(x_n)‖₂/∂W for each linear of a loaded block, [N, K] float32.

    The regional gradient of Wanda++ (Yang et al. 2025, arXiv 2503.04992): it stays within one block, so nothing but
    the block has to be in memory. ``hidden`` holds the inputs of the block, one sample a tensor. A float16 block is run in
    float32: small gradients would vanish, and those of massive tokens lose their digits.

    Raises:
        SourceError: the output of the block does not depend on a layer.
    """
    # A copy, as some blocks keep what they computed (a recurrent state), which would hold the graph in the block.
    block = copy.deepcopy(model.blocks[index])
    dtype = model.dtype
    if dtype == torch.float16:
        dtype = torch.float32
        block.to(dtype)
    copies = linears_of(block, model.block_name(index))
    total = Accumulator({name: copies[name] for name in linears}, ["gradient_l2"])
    for n, states in enumerate(hidden):
        with torch.enable_grad(), total.tracked():
            output = model.run_copy(index, n, states, block, dtype)
            assert output is not None, "no hook ends this pass"
            total.add(output.float().norm(), None, None)
    scale = max(len(hidden), 1) ** -0.5
    found = total.result(type(model.model).__name__)
    return {name: found[f"{name}.gradient_l2"] * scale for name in linears}


class Accumulator:
    """Σ|g| and Σg² of the weights of some linears over samples, float32, oriented as [N, K]."""

    def __init__(self, linears: Mapping[str, LinearModule], kinds: Iterable[str]) -> None:
        self._linears = dict(linears)
        self._sums = {
            (name, kind): torch.zeros(module.weight.shape, dtype=torch.float32, device=module.weight.device)
            for name, module in linears.items()
            for kind in kinds
        }
        self._reached: set[str] = set()

    def tracked(self) -> Any:
        """The weights are leaves of the graph inside."""
        return _Tracked([module.weight for module in self._linears.values()])

    def add(self, output: Tensor, gradient: Tensor | None, leaf: Tensor | None) -> Tensor:
        """Backward from ``output``, whose own gradient is ``gradient`` (None for a loss); adds one sample's gradients.

        Returns:
            The gradient of ``leaf``, or an empty tensor where there is none.
        """
        weights = [module.weight for module in self._linears.values()]
        targets = weights if leaf is None else [*weights, leaf]
        if not output.requires_grad:
            return torch.empty(0)
        gradients = torch.autograd.grad(
            output, targets, None if gradient is None else gradient.to(output.dtype), allow_unused=True
        )
        for name, found in zip(self._linears, gradients, strict=False):
            if found is None:
                continue  # an expert that this sample did not reach
            self._reached.add(name)
            if (name, "gradient_l1") in self._sums:
                self._sums[name, "gradient_l1"] += found.float().abs_()
            if (name, "gradient_l2") in self._sums:
                self._sums[name, "gradient_l2"] += found.float().square()
        if leaf is None:
            return torch.empty(0)
        return torch.zeros_like(leaf) if gradients[-1] is None else gradients[-1]

    def result(self, model: str, required: Collection[str] | None = None) -> dict[str, Tensor]:
        """``NAME.gradient_l1`` and ``NAME.gradient_l2``, the latter as a root, of every layer that was reached.

        Raises:
            SourceError: a required layer was not (left out: none may be missing).
        """
        needed = self._linears if required is None else required
        if missing := [name for name in self._linears if name not in self._reached and name in needed]:
            raise no_gradient(model, missing)
        return {
            f"{name}.{kind}": oriented(
                total.sqrt_() if kind == "gradient_l2" else total, self._linears[name]
            ).contiguous()
            for (name, kind), total in self._sums.items()
            if name in self._reached
        }


class _Tracked:
    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = weights

    def __enter__(self) -> None:
        for weight in self._weights:
            weight.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for weight in self._weights:
            weight.requires_grad_(False)


def loss_of(run: Any, hidden: Tensor, inputs: Mapping[str, Any], samples: CalibrationSet, n: int) -> Any:
    """The model's own loss of one sample: of the next token over all of a window, or of the class of an image.

    An image whose class is not known gets the class that the dense model sees in it.
    """
    try:
        if samples.argument == "input_ids":
            return run(hidden, {**inputs, "labels": inputs["input_ids"]}).loss
        if samples.classes is not None:
            label = samples.classes[n : n + 1]
        else:
            with torch.no_grad():
                label = run(hidden.detach(), inputs).logits.argmax(dim=-1)
        return run(hidden, {**inputs, "labels": label}).loss
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise SourceError(f"the method needs gradients, and the model gives no loss: {one_line(error)}") from None
