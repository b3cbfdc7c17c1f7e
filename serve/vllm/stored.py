"""What a checkpoint says about which of its linear layers are stored packed, and as which tensors. Imports nothing of vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.checkpoint import parse_config
from compress.errors import CorruptCheckpointError, SourceError
from compress.packed import VALUE_DTYPES


@dataclass(frozen=True)
class Stored:
    """How the linear layers of a checkpoint are stored.

    Attributes:
        kind: ``packed`` by halve; ``bitmask``: compressed-tensors' sparse-24-bitmask, the same bytes by other names;
            ``dense``: with zeros, which are found when the weights are read.
        targets: compressed-tensors' names of modules, ``re:`` patterns or classes that are stored packed.
        ignore: the names, patterns or classes that are not.
        value_dtype: of the packed values; None where the checkpoint does not say.
    """

    kind: str
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    value_dtype: torch.dtype | None = None

    @property
    def values(self) -> str:
        """The name of the tensor of kept values [N, K/2]."""
        return "compressed" if self.kind == "bitmask" else "weight_packed"

    @property
    def mask(self) -> str:
        """The name of the tensor of bits [N, K/8]."""
        return "bitmask" if self.kind == "bitmask" else "weight_mask"

    def is_packed(self, module: str) -> bool:
        """Whether the linear module of that name in the checkpoint is stored as values and mask."""
        if self.kind == "dense":
            return False
        if self.kind == "packed":
            return module not in self.ignore
        return _matches(module, self.targets) and not _matches(module, self.ignore)

    def renamed(self, names: list[str]) -> Stored:
        """The same with the ignored modules under other names."""
        return replace(self, ignore=tuple(names))


DENSE = Stored("dense")


def of_halve(config: Mapping[str, Any]) -> Stored:
    """From the ``quantization_config`` of a packed checkpoint.

    Raises:
        CorruptCheckpointError: it is not one that this version reads.
    """
    parsed = parse_config(config)
    return Stored("packed", ignore=tuple(parsed.ignore), value_dtype=VALUE_DTYPES[parsed.value_dtype])


def is_stranded(config: Mapping[str, Any]) -> bool:
    """Whether it is a ``quantization_config`` of compressed-tensors with 2:4 sparsity, which vLLM refuses since 0.19."""
    sparsity = config.get("sparsity_config")
    return (
        config.get("quant_method") == "compressed-tensors"
        and isinstance(sparsity, Mapping)
        and str(sparsity.get("sparsity_structure")).lower() == "2:4"
        and bool(sparsity.get("targets", ["Linear"]))
    )


def of_compressed_tensors(config: Mapping[str, Any]) -> Stored:
    """From the ``quantization_config`` of a stranded checkpoint. Only data is read, no name in it is ever imported.

    Raises:
        SourceError: the weights are quantized as well, or in a format that halve does not read.
        CorruptCheckpointError: a field has a wrong type.
    """
    if config.get("config_groups") or config.get("quantization_status") in ("compressed", "frozen"):
        raise SourceError(
            "the checkpoint is 2:4 and quantized (compressed-tensors with config_groups), and halve reads 2:4 checkpoints "
            "of bfloat16, float16 and float32 values; prune the unquantized model with `halve compress`"
        )
    sparsity: Mapping[str, Any] = config["sparsity_config"]
    kind = sparsity.get("format")
    names = {key: sparsity.get(key) or [] for key in ("targets", "ignore")}
    for key, value in names.items():
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise CorruptCheckpointError(
                f"config.json: sparsity_config.{key} is {value!r}, and a list of names belongs there"
            )
    if kind == "dense":
        return DENSE
    if kind == "sparse-24-bitmask":
        return Stored("bitmask", tuple(names["targets"]) or ("Linear",), tuple(names["ignore"]))
    raise SourceError(
        f"config.json: sparsity_config.format is {kind!r}, and halve reads 2:4 checkpoints of compressed-tensors in the "
        "formats 'dense' and 'sparse-24-bitmask'"
    )


def _matches(module: str, patterns: tuple[str, ...]) -> bool:
    """compressed-tensors' rule: a name, the class ``Linear`` of all these modules, or ``re:`` and what a name begins with."""
    return any(
        re.match(pattern[3:], module) is not None if pattern.startswith("re:") else pattern in (module, "Linear")
        for pattern in patterns
    )
