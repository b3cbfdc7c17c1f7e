"""Which tensors come straight from a normalization: told by what a module does, not by what it is called.

A normalization is a module whose output does not change when its input is scaled. Activations (a ReLU's output scales
with its input), projections, convolutions and embeddings all change; LayerNorm, every RMSNorm, with or without weights,
do not. A module that hands its input on as it is (dropout when nothing is trained, Identity) makes nothing.

One block is watched at a time. Where the block before it ends with a norm (OPT with ``do_layer_norm_before=False``), the
block's own input is a normalized tensor: `ends_with_norm` tells. What comes before the first block is not looked at: its
input counts as embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.architecture import is_linear
from compress.blocks import BlockModel

_SCALE = 4.0
_TOLERANCE = 0.02
"""Of the output's largest value: room for bfloat16."""


class NormOutputs:
    """Remembers the outputs of a block's leaf modules for one forward pass, and says which of them are normalizations.

    Args:
        block: the decoder block; its leaf modules that are not linears are watched.
        normalized: whether the block's input is a normalization's output, too.
    """

    def __init__(self, block: nn.Module, normalized: bool = False) -> None:
        self._block = block
        self._normalized = normalized
        self._given: set[tuple[int, int, int]] = set()
        self._candidates = [
            module for module in block.modules() if not any(module.children()) and not is_linear(module)
        ]
        self._made: dict[tuple[int, int, int], tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor]] = {}
        self._watching = True

    def watch(self) -> list[RemovableHandle]:
        """Hooks; the caller removes them."""
        handles = [module.register_forward_hook(self._remember, with_kwargs=True) for module in self._candidates]
        if self._normalized:
            handles.append(self._block.register_forward_pre_hook(self._enter, with_kwargs=True))
        return handles

    def made(self, x: Tensor) -> bool:
        """Whether ``x`` is, as it is, the output of a normalization of this forward pass, or of one right before it."""
        if _key(x) in self._given:
            return True
        found = self._made.get(_key(x))
        return found is not None and _is_norm(*found)

    def modules(self) -> set[nn.Module]:
        """The modules that normalized in this forward pass."""
        return {found[0] for found in self._made.values() if _is_norm(*found)}

    def forget(self) -> None:
        """The forward pass is over: nothing more is remembered."""
        self._made.clear()
        self._given.clear()
        self._watching = False

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, _ = _input(args, kwargs)
        if self._watching and x is not None:
            self._given.add(_key(x))  # (the caller holds it while the block runs)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._watching or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        x, _ = _input(args, kwargs)
        if x is not None and _key(x) != _key(output):
            # The tensors are held until the pass is over, so an address belongs to no other.
            self._made[_key(output)] = (module, args, kwargs, output)


@torch.no_grad()
def norms_of(block: nn.Module, run: Callable[[], object]) -> set[nn.Module]:
    """The modules of a block that normalize, seen in one forward pass of it, ``run``."""
    outputs = NormOutputs(block)
    handles = outputs.watch()
    try:
        run()
        return outputs.modules()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def ends_with_norm(model: BlockModel, index: int, hidden: Tensor) -> bool:
    """Whether a block's output comes straight from a normalization.

    The block is loaded for it and dropped again: this hangs on how it is made, not on what was pruned, nor on where a run
    was resumed.

    Args:
        hidden: any hidden states of the first batch, [batch, length, hidden].
    """
    block = model.load_block(index)
    outputs = NormOutputs(block)
    handles = outputs.watch()
    try:
        return outputs.made(model.run_block(index, 0, hidden.clone()))  # blocks may write into their input
    finally:
        for handle in handles:
            handle.remove()
        model.drop_block(index)


def _key(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.numel(), x._version


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, str | None]:
    """The tensor that a module was called with, and its name where it was given by one."""
    if args:
        return (args[0], None) if isinstance(args[0], Tensor) else (None, None)
    name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
    return (None, None) if name is None else (kwargs[name], name)


def _is_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
    x, name = _input(args, kwargs)
    if x is None or x.shape != output.shape or not x.is_floating_point() or not bool(x.any()):
        return False  # (of a dead input nothing can be told)

    def run(scaled: Tensor) -> Any:
        return module.forward(**{**kwargs, name: scaled}) if name else module.forward(scaled, *args[1:], **kwargs)

    # Tokens of size 1: the small constant that norms add to the variance is nothing beside it, however small the
    # embeddings of a model are, and no bounded activation is saturated.
    sizes = x.float().square().mean(dim=-1, keepdim=True).sqrt().clamp_min_(torch.finfo(torch.float32).tiny)
    unit = (x.float() / sizes).to(x.dtype)
    once, scaled = run(unit), run(unit * _SCALE)
    if not isinstance(once, Tensor) or not isinstance(scaled, Tensor):
        return False
    return float((scaled - once).abs().max()) <= _TOLERANCE * float(once.abs().max())
