"""Which tensors come straight from a normalization: told by what a module does, not by what it is called.

A normalization is a module whose output does not change when its input is scaled. Activations, projections,
convolutions and embeddings all change; LayerNorm, every RMSNorm, with or without weights, do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.blocks import is_linear

_SCALE = 4.0
_TOLERANCE = 0.02
"""Of the output's largest value: room for bfloat16, and for the small constant that norms add to the variance."""


class NormOutputs:
    """Remembers the outputs of a block's leaf modules for one forward pass, and says which of them are normalizations.

    Args:
        block: the decoder block; its leaf modules that are not linears are watched.
    """

    def __init__(self, block: nn.Module) -> None:
        self._candidates = [
            module for module in block.modules() if not any(module.children()) and not is_linear(module)
        ]
        self._made: dict[tuple[int, int, int], tuple[nn.Module, tuple[Any, ...], dict[str, Any], Tensor]] = {}
        self._watching = True

    def watch(self) -> list[RemovableHandle]:
        """Hooks; the caller removes them."""
        return [module.register_forward_hook(self._remember, with_kwargs=True) for module in self._candidates]

    def made(self, x: Tensor) -> bool:
        """Whether ``x`` is, as it is, the output of a normalization of this forward pass."""
        found = self._made.get(_key(x))
        return found is not None and _is_norm(*found)

    def forget(self) -> None:
        """The forward pass is over: nothing more is remembered."""
        self._made.clear()
        self._watching = False

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._watching and isinstance(output, Tensor) and output.is_floating_point():
            # The tensors are held until the pass is over, so an address belongs to no other.
            self._made[_key(output)] = (module, args, kwargs, output)


def _key(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.numel(), x._version


def _is_norm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
    if not args:
        name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        if name is None:
            return False
        x = kwargs[name]
        again = module.forward(**{**kwargs, name: x * _SCALE})
    elif isinstance(args[0], Tensor):
        x = args[0]
        again = module.forward(x * _SCALE, *args[1:], **kwargs)
    else:
        return False
    if x.shape != output.shape or not isinstance(again, Tensor):
        return False
    largest = float(output.abs().max()) if output.numel() else 0.0
    if largest == 0.0:
        return False  # of a dead input nothing can be told
    return float((again - output).abs().max()) <= _TOLERANCE * largest and not torch.equal(x, output)
