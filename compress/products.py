"""Linears that a model multiplies by hand: it takes the weight and never calls the module, so no hook of it runs.

Mamba does so with its dt_proj. What is seen here are products of the weight itself: ``linear(x, W)``, ``x @ W.T`` and
``W @ x``, where tokens are the columns of x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)

Seen = Callable[[str, Tensor, Tensor], None]
"""Called with the name of a linear, its input [..., K] and the product [..., N]."""


class Products(TorchFunctionMode):
    """While it is active, reports every product of a weight that happens outside of its module's own call.

    Args:
        linears: by name; only nn.Linear, whose weight is [N, K].
        called: the names of the modules that were called in this pass; the others are watched.
        seen: called after each product.
    """

    def __init__(self, linears: Mapping[str, nn.Module], called: set[str], seen: Seen) -> None:
        super().__init__()
        self._names = {id(module.weight): name for name, module in linears.items() if isinstance(module, nn.Linear)}
        self._called = called
        self._seen = seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if (func is nn.functional.linear or func in _MATMULS) and len(args) > 1:
            self._report(func is nn.functional.linear, args[0], args[1], output)
        return output

    def _report(self, is_linear: bool, first: Tensor, second: Tensor, output: Tensor) -> None:
        if is_linear:
            name, x, y = self._name(second), first, output
        elif (name := self._name(first)) is not None:
            if second.ndim < 2:
                x, y = second, output
            else:
                x, y = second.transpose(-1, -2), output.transpose(-1, -2)
        else:
            name, x, y = self._name_of_transposed(second), first, output
        if name is not None and name not in self._called:
            self._seen(name, x, y)

    def _name(self, tensor: Tensor) -> str | None:
        return self._names.get(id(tensor))

    def _name_of_transposed(self, tensor: Tensor) -> str | None:
        base = tensor._base
        if base is None or tensor.shape != base.shape[::-1] or tensor.stride() != base.stride()[::-1]:
            return None
        return self._name(base) if tensor.data_ptr() == base.data_ptr() else None
