"""Which linears a checkpoint's model has, from its ``config.json`` alone, and under which keys they are stored."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.architecture import (
    find_blocks,
    linears_of,
    load_config,
    merged_of,
    renamed,
    renamings_of,
    shape_of,
    skeleton,
)
from compress.checkpoint import expected_tensors
from compress.errors import CorruptCheckpointError
from compress.files import TensorInfo
from compress.packed import FLOAT_DTYPES, MASK_SUFFIX, VALUES_SUFFIX
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


class Keys(Protocol):
    """The names of the tensors of a checkpoint."""

    def __contains__(self, name: str, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...


class Layout:
    """The linears of a model by module name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix = f"{model.base_model_prefix}."
        blocks, _ = find_blocks(model)
        self.blocks = len(cast(nn.ModuleList, model.get_submodule(blocks)))
        self.linears: dict[str, LinearInfo] = {}
        for name, module in linears_of(model, "").items():
            n, k = shape_of(module)
            self.linears[name] = LinearInfo(name, n, k, isinstance(module, Conv1D), name.startswith(f"{blocks}."))
        self.parameters = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self._renamings = renamings_of(model)
        self._older: tuple[Keys, dict[str, str]] = ({}, {})
        self._tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        ignored = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
        self._optional: list[str] = [*ignored, *merged_of(model)]

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

    def packed(self, ignore: Iterable[str]) -> set[str]:
        """The linears of a packed checkpoint that are packed: all but those that its ``config.json`` ignores.

        Raises:
            CorruptCheckpointError: ``ignore`` names what the model does not have.
        """
        ignored = set(ignore)
        if unknown := ignored - self.linears.keys():
            raise CorruptCheckpointError(
                f"config.json: ignore names {sorted(unknown)[0]!r}, and this model has no such linear layer; "
                "config.json and the model do not belong together"
            )
        return self.linears.keys() - ignored

    def require_tensors(
        self,
        stored: Mapping[str, TensorInfo],
        packed: Collection[str],
        value_dtype: str,
        suffixes: tuple[str, str] = (VALUES_SUFFIX, MASK_SUFFIX),
    ) -> None:
        """Checks that a checkpoint has every parameter of the model, in its shape: as packed tensors for the
        linears ``packed``, as itself for the others. ``value_dtype`` and ``suffixes`` are those of `expected_tensors`.

        transformers itself fills what is missing with random numbers and goes on.

        Raises:
            CorruptCheckpointError: names the first tensor that is missing or has a wrong shape or dtype.
        """
        floats = tuple(FLOAT_DTYPES.values())
        expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {}
        for name, shape in self.parameters.items():
            module, _, attribute = name.rpartition(".")
            if module in packed and attribute == "weight":
                linear = self.linears[module]
                expected.update(expected_tensors(module, linear.n, linear.k, value_dtype, suffixes))
            else:
                expected[name] = (floats, shape)
        for name, (dtypes, shape) in expected.items():
            key = self.key(name, stored)
            if key is None and name in self._tied:
                key = self.key(self._tied[name], stored)
            if key is None:
                if any(re.search(pattern, name) for pattern in self._optional):
                    continue
                raise CorruptCheckpointError(
                    f"the checkpoint has no tensor {name}; it is damaged, or config.json is not its own"
                )
            info = stored[key]
            if info.dtype not in dtypes or info.shape != shape:
                raise CorruptCheckpointError(
                    f"{key} is {info.dtype} {list(info.shape)}, and {' or '.join(map(str, dtypes))} {list(shape)} belongs "
                    f"there (in {info.file})"
                )

    def parameter_keys(self, stored: Keys) -> set[str]:
        """The checkpoint's keys of the parameters that it stores as they are. Others are buffers, or packed tensors."""
        return {key for name in self.parameters if (key := self.key(name, stored)) is not None}

    def key(self, name: str, stored: Keys) -> str | None:
        """The checkpoint's key of a tensor of the model, or None.

        The base model's prefix may be missing or added there, and the names may be those of an older transformers.
        """
        candidates = (name, name.removeprefix(self._prefix), self._prefix + name)
        key = next((candidate for candidate in candidates if candidate in stored), None)
        if key is None:
            older = self._older_names(stored)
            key = next((older[candidate] for candidate in candidates if candidate in older), None)
        return key

    def _older_names(self, stored: Keys) -> dict[str, str]:
        """Name in the model -> key, where they differ; made once for a checkpoint."""
        if self._older[0] is not stored:
            self._older = (stored, renamed(stored, self._renamings))
        return self._older[1]
