"""What a checkpoint says about which of its linear layers are stored packed, and as which tensors. Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.checkpoint import parse_config
from compress.errors import CorruptCheckpointError, SourceError
from compress.files import TensorFiles
from compress.packed import DENSE_SUFFIX, LARGEST, VALUE_DTYPES
from serve.vllm.names import Names

_AS_STORED = Names()
_REORDERED_TYPES = ("llama4", "llama4_text")
_REORDERED_MODULES = ("q_proj", "k_proj")
"""Of these models vLLM reorders the rows of these modules as it reads them, if a tensor is called ``weight``, ``weight_packed`` or
``weight_scale``: masks stay as they are, and compressed-tensors' values do, too."""


@dataclass(frozen=True)
class Stored:
    """How the linear layers of a checkpoint are stored.

    Attributes:
        kind: ``packed`` by halve; ``bitmask``: compressed-tensors' sparse-24-bitmask, the same bytes by other names;
            ``dense``: with zeros, which are found when the weights are read.
        targets: compressed-tensors' names of modules, ``re:`` patterns or classes that are stored packed.
        ignore: the names, patterns or classes that are not.
        value_dtype: of the packed values; None where the checkpoint does not say.
        quantizes_x: whether x is rounded to these, too.
        whole: names of modules whose weights are there unpacked, whatever the checkpoint says; empty where nobody looked.
    """

    kind: str
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    value_dtype: torch.dtype | None = None
    quantizes_x: bool = False
    whole: tuple[str, ...] = ()

    @property
    def values(self) -> str:
        """The name of the tensor of kept values [N, K/2]."""
        return "compressed" if self.kind == "bitmask" else "weight_packed"

    @property
    def mask(self) -> str:
        """The name of the tensor of bits [N, K/8]."""
        return "bitmask" if self.kind == "bitmask" else "weight_mask"

    @property
    def scale(self) -> str | None:
        """The name of the tensor of scales [N, 1]; None where values have none."""
        return "weight_scale" if self.value_dtype in LARGEST else None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all of them, in the order in which `PackedWeight` takes them."""
        return (self.values, self.mask) if self.scale is None else (self.values, self.mask, self.scale)

    def with_what_is_there(self, files: TensorFiles) -> Stored:
        """The same with the names of what is stored whole: `ignore` has linears alone, and of vLLM's there may be more (routers of
        experts)."""
        if self.kind == "dense":
            return self
        stems = (name.removesuffix(DENSE_SUFFIX) for name, info in files.info.items() if len(info.shape) == 2)
        return replace(self, whole=tuple(stem for stem in stems if f"{stem}{DENSE_SUFFIX}" in files))

    def is_packed(self, module: str, names: Names = _AS_STORED) -> bool:
        """Whether a linear module is stored packed. ``names``: how its name comes from that in the checkpoint."""
        if self.kind == "dense":
            return False
        is_ignored = any(_is_meant(module, pattern, names) for pattern in (*self.ignore, *self.whole))
        return not is_ignored and any(_is_meant(module, pattern, names) for pattern in self.targets)


DENSE = Stored("dense")


def of_halve(config: Mapping[str, Any]) -> Stored:
    """From the ``quantization_config`` of a packed checkpoint.

    Raises:
        CorruptCheckpointError: it is not one that this version reads.
    """
    parsed = parse_config(config)
    return Stored(
        "packed",
        ignore=tuple(parsed.ignore),
        value_dtype=VALUE_DTYPES[parsed.value_dtype],
        quantizes_x=parsed.quantizes_x,
    )


def of_compressed_tensors(config: Mapping[str, Any]) -> Stored:
    """From the ``quantization_config`` of a stranded checkpoint. Only data is read, no name in it is ever imported.

    Raises:
        SourceError: the weights are quantized as well, or in a format that halve does not read.
        CorruptCheckpointError: a field has a wrong type.
    """
    if config.get("config_groups"):  # (``quantization_status`` is set where nothing is quantized, too)
        raise SourceError(
            "the checkpoint is 2:4 and quantized (compressed-tensors with config_groups), and the plugin reads such ones after "
            "`halve pack DIR --out PACKED` alone"
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


def require_order(stored: Stored, model_types: Collection[str], modules: Iterable[str]) -> None:
    """Refuses packed modules of which vLLM would reorder the rows of one tensor and not of the other.

    Args:
        model_types: of the model and of its language model.
        modules: names of packed modules.

    Raises:
        SourceError: names the first.
    """
    if not any(model_type in _REORDERED_TYPES for model_type in model_types):
        return
    for module in modules:
        if module.rpartition(".")[2] in _REORDERED_MODULES:
            unpack = (
                "decompress it with a compressed-tensors before 0.15"
                if stored.kind == "bitmask"
                else "write it with zeros (`halve unpack DIR --out DENSE`)"
            )
            raise SourceError(
                f"{module} is packed, and vLLM reorders the rows of q and k of Llama 4 as it reads them, but not the rows of their "
                f"masks: {unpack} and serve that, of which vLLM packs the weights afterwards (--quantization halve)"
            )


def model_types(config: Mapping[str, Any]) -> set[str]:
    """The types of the model and of its language model, by its ``config.json``."""
    text = config.get("text_config")
    found = {config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None}
    return {one for one in found if isinstance(one, str)}


def _is_meant(module: str, pattern: str, names: Names) -> bool:
    """compressed-tensors' rule: the class ``Linear`` of all these modules, a name, or ``re:`` and what a name begins with."""
    return pattern == "Linear" or names.is_called(module, pattern)
