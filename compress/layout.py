"""Which linears a checkpoint's model has, from its ``config.json`` alone, and under which keys they are stored."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.blocks import find_blocks, linears_of, load_config, shape_of, skeleton
from compress.quiet import quiet_transformers


@dataclass(frozen=True)
class LinearInfo:
    """One linear module: its name, the shape [n, k] of its weight, how and where it is stored."""

    name: str
    n: int
    k: int
    transposed: bool
    """Stored as [K, N], as transformers' Conv1D is."""
    in_block: bool
    """Inside of the decoder blocks, where pruning happens."""


class Layout:
    """The linears of a model by module name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix = f"{model.base_model_prefix}."
        blocks, _ = find_blocks(model)
        self.linears: dict[str, LinearInfo] = {}
        for name, module in linears_of(model, "").items():
            n, k = shape_of(module)
            self.linears[name] = LinearInfo(name, n, k, isinstance(module, Conv1D), name.startswith(f"{blocks}."))

    @classmethod
    def of(cls, directory: Path) -> Layout:
        """The layout of a model directory, without reading a weight.

        Raises:
            SourceError: transformers cannot build the model.
        """
        with quiet_transformers():
            return cls(skeleton(load_config(directory), torch.bfloat16))

    @property
    def block_linears(self) -> list[LinearInfo]:
        return [linear for linear in self.linears.values() if linear.in_block]

    def key(self, name: str, stored: Container[str]) -> str | None:
        """The checkpoint's key of a tensor of the model, or None. The base model's prefix may be missing or added there."""
        candidates = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((candidate for candidate in candidates if candidate in stored), None)
