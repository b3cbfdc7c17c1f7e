"""2:4 checkpoints that llm-compressor and compressed-tensors wrote while they could, and that nothing of theirs reads any more.

What ``config.json`` says of them, and their linear layers as packed weights. A layer is stored as ``weight`` [N, K] with its zeros, or
(sparse-24-bitmask) as ``compressed`` [N, K/2] and ``bitmask`` [N, K/8], the least significant bit first; either way values may be of 8 bits, with
``weight_scale`` of each row, or of all. Only data is read: no name in it is ever imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from compress import packed
from compress.errors import CorruptCheckpointError, SourceError
from compress.files import TensorFiles
from compress.packed import DENSE_SUFFIX, LARGEST, SCALE_SUFFIX, PackedWeight

if TYPE_CHECKING:
    from compress.layout import Layout, LinearInfo

BITMASK = "sparse-24-bitmask"
Activations = Literal["none", "dynamic", "static"]
"""How the inputs of layers are rounded: not, with a scale for each token, or with one that calibration found."""

_VALUES, _MASK, _SHAPE = ".compressed", ".bitmask", ".shape"
_ZERO_POINT = ".weight_zero_point"
_BESIDE = (SCALE_SUFFIX, _ZERO_POINT, _SHAPE, ".input_scale", ".input_zero_point")
_READ = "halve reads values of 8 bits, symmetric, with a scale for each row (`channel`) or for all (`tensor`)"


def of_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the ``config.json`` of a checkpoint says about its quantization, wherever vLLM looks for it."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, Mapping) else None
    )
    found = found or config.get("compression_config")
    return found if isinstance(found, Mapping) else None


def is_theirs(quantization: Mapping[str, Any]) -> bool:
    """Whether it is a ``quantization_config`` of compressed-tensors. Older ones do not name the method, but no other has a
    ``sparsity_config``."""
    method = quantization.get("quant_method") or ("compressed-tensors" if "sparsity_config" in quantization else "")
    return str(method).lower().replace("_", "-") == "compressed-tensors"


def is_stranded(quantization: Mapping[str, Any]) -> bool:
    """Whether it is one with 2:4 sparsity, which vLLM refuses since 0.19 and transformers does not read."""
    sparsity = quantization.get("sparsity_config")
    return (
        is_theirs(quantization)
        and isinstance(sparsity, Mapping)
        and str(sparsity.get("sparsity_structure")).lower() == "2:4"
        and bool(sparsity.get("targets", ["Linear"]))
    )


def require_none(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises SourceError for a checkpoint that `pack_checkpoint` reads and transformers does not, by its ``config.json``."""
    found = of_config(config)
    if found is None or not is_theirs(found):
        return
    if is_stranded(found):
        raise SourceError(
            f"{directory} is 2:4 in the format of compressed-tensors, which transformers does not read; `halve pack {directory} --out PACKED` "
            "makes of it what halve reads everywhere"
        )
    if not found.get("config_groups"):
        raise SourceError(
            f"{directory} is a checkpoint of compressed-tensors with sparsity alone, which transformers does not read; if its weights are 2:4, "
            f"`halve pack {directory} --out PACKED` finds it, and where sparsity_config.format is 'dense', config.json without "
            "quantization_config is a dense checkpoint"
        )


def activations_of(quantization: Mapping[str, Any]) -> Activations:
    """How inputs are rounded, after a look at everything that changes what the tensors mean.

    Raises:
        SourceError: they mean what halve's packed format cannot say; names the field.
    """
    for field in ("kv_cache_scheme", "transform_config"):
        if quantization.get(field):
            raise SourceError(
                f"config.json: quantization_config.{field} is {quantization[field]!r}, and halve has nothing like it"
            )
    sparsity = quantization.get("sparsity_config")
    kind = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if kind not in (None, "dense", BITMASK):
        raise SourceError(
            f"config.json: sparsity_config.format is {kind!r}, and halve reads 2:4 checkpoints of compressed-tensors in the formats "
            f"'dense' and {BITMASK!r}"
        )
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CorruptCheckpointError(
            f"config.json: quantization_config.config_groups is {groups!r}, which is no mapping"
        )
    found: set[Activations] = {_activations_of_group(f"config_groups.{name}", group) for name, group in groups.items()}
    if len(found) > 1:
        raise SourceError(
            f"config.json: config_groups round the inputs of their layers differently ({', '.join(sorted(found))}), and halve rounds those "
            "of all packed layers alike"
        )
    return found.pop() if found else "none"


def _activations_of_group(where: str, group: Mapping[str, Any]) -> Activations:
    weights = _arguments(f"{where}.weights", group)
    if weights is None:
        raise SourceError(f"config.json: {where}.weights is not there, and {_READ}")
    if group.get("output_activations"):
        raise SourceError(f"config.json: {where}.output_activations are rounded, and halve does not round outputs")
    inputs = _arguments(f"{where}.input_activations", group)
    if inputs is None:
        return "none"
    if inputs.get("type", "int") != weights.get("type", "int"):
        raise SourceError(
            f"config.json: {where} has weights of the type {weights.get('type', 'int')!r} and inputs of {inputs.get('type', 'int')!r}; halve "
            "multiplies values of 8 bits by such values of the same type"
        )
    return "dynamic" if inputs.get("dynamic") else "static"


def _arguments(where: str, group: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How weights or inputs are quantized, if they are."""
    found = group.get(where.rpartition(".")[2])
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise CorruptCheckpointError(f"config.json: {where} is {found!r}, which is no mapping")
    inputs = where.endswith("input_activations")
    strategies = (None, "tensor", "token") if inputs else (None, "tensor", "channel")
    # (what is left out means what compressed-tensors takes for it)
    read = {"num_bits": (None, 8), "symmetric": (None, True), "strategy": strategies, "actorder": (None, False)}
    for field, values in read.items():
        if found.get(field) not in values:
            raise SourceError(f"config.json: {where}.{field} is {found[field]!r}, and {_READ}")
    if found.get("type", "int") not in ("int", "float"):
        raise SourceError(f"config.json: {where}.type is {found['type']!r}, and {_READ}")
    return found


@dataclass(frozen=True)
class Look:
    """What is to be known of a weight before it is packed.

    Attributes:
        is_two_of_four: whether it is 2:4, and has a shape that can be packed.
        lowest: how many of its values are −128 of int8, which halve has not.
        lost: rows whose largest value is not there. compressed-tensors kept the two largest of four by their absolute values, and of −128
            in int8 that is −128, so where it wrote a bitmask it took a zero instead.
    """

    is_two_of_four: bool
    lowest: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Weight:
    """The weight of one linear layer, read when it is asked for.

    Attributes:
        stem: the key of its module.
        shape: (N, K).
        dtype: of the stored values.
        is_bitmask: stored as values and bits; else with its zeros.
    """

    files: TensorFiles
    stem: str
    shape: tuple[int, int]
    dtype: torch.dtype
    is_bitmask: bool

    def look(self) -> Look:
        """What is to be known before it is packed."""
        stored = self._stored()
        is_two_of_four = packed.why_not(self.shape[1]) is None and packed.is_two_of_four(self._numbers(stored))
        if self.dtype != torch.int8:
            return Look(is_two_of_four)
        largest = stored.int().abs().amax(dim=1)
        lost = (largest > 0) & (largest < 127) if self.is_bitmask and self._has_scale_of_rows() else largest < 0
        return Look(is_two_of_four, int((stored == -128).sum()), int(lost.sum()))

    def _has_scale_of_rows(self) -> bool:
        info = self.files.info.get(self.stem + SCALE_SUFFIX)
        return info is not None and info.numel == self.shape[0]

    def packed(self) -> PackedWeight:
        """As halve has it, to the bit but for −128, which becomes −127. It must be 2:4.

        Raises:
            CorruptCheckpointError: a tensor has a wrong shape, a value is NaN, or a scale is not above zero; NumericalError: a value of 16
                bits or more is not finite; SourceError: there is a scale for each group of columns.
        """
        numbers = self._numbers(self._stored())
        found = packed.pack(numbers, self.stem)
        if self.dtype in LARGEST:
            found = PackedWeight(found.values.view(self.dtype), found.mask, self._scale(numbers))
            packed.validate(found, self.stem)
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K] of floats: scaled values rounded to ``dtype``, others as they are. Raises as `packed` does."""
        stored = self._stored()
        if self.dtype in LARGEST:
            stored = (stored.float() * self._scale(self._numbers(stored))).to(dtype)
        packed.require_finite(stored, self.stem)
        return stored

    def _scale(self, numbers: Tensor) -> Tensor:
        """[N, 1] float32. A row of zeros may have no scale; its one is 1."""
        key = self.stem + SCALE_SUFFIX
        _require(key, self.files)
        scale, (n, _) = self.files.read(key).float(), self.shape
        if scale.numel() not in (1, n):
            raise SourceError(f"{key} is {list(scale.shape)} for a weight {list(self.shape)}, and {_READ}")
        scale = scale.reshape(-1, 1).expand(n, 1).clone()
        is_empty = (numbers == 0).all(dim=1, keepdim=True)
        return torch.where(is_empty & ~(scale > 0), 1.0, scale)

    def _numbers(self, stored: Tensor) -> Tensor:
        """[N, K]: floats, or the bits of values of 8 bits as int8, of which zero is 0."""
        if self.dtype == torch.float8_e4m3fn:
            bits = stored.view(torch.int8)
            return bits.masked_fill(bits == -128, 0)  # −0.0
        return stored.clamp(min=-127) if self.dtype == torch.int8 else stored

    def _stored(self) -> Tensor:
        """[N, K] of the stored dtype."""
        if not self.is_bitmask:
            weight = self.files.read(self.stem + DENSE_SUFFIX)
            _require_shape(self.stem + DENSE_SUFFIX, weight, self.shape)
            return weight
        n, k = self.shape
        values, mask = self.files.read(self.stem + _VALUES), self.files.read(self.stem + _MASK)
        if k % packed.COLUMN_MULTIPLE:
            raise SourceError(f"{self.stem}: {packed.why_not(k)}")
        _require_shape(self.stem + _VALUES, values, (n, k // 2))
        _require_shape(self.stem + _MASK, mask, (n, k // 8))
        packed.validate_mask(mask, self.stem)
        numbers = values.view(torch.int8) if self.dtype in LARGEST else values
        return packed.unpack(PackedWeight(numbers, mask)).view(self.dtype)


class Linears:
    """The linear layers of such a checkpoint, by name of module, and the keys of all that belongs to them.

    Layers outside of the decoder blocks are among them where they are stored in a way of compressed-tensors.

    Raises:
        SourceError: one is stored in another way, or something that is no linear layer is stored in one of theirs;
        CorruptCheckpointError: one is missing.
    """

    def __init__(self, files: TensorFiles, layout: Layout) -> None:
        self.weights: dict[str, Weight] = {}
        self.keys: set[str] = set()
        for linear in layout.linears.values():
            weight = self._find(files, layout, linear)
            if weight is None or not (linear.in_block or weight.is_bitmask or weight.dtype in LARGEST):
                continue
            self.weights[linear.name] = weight
            own = (_VALUES, _MASK) if weight.is_bitmask else (DENSE_SUFFIX,)
            self.keys |= {weight.stem + suffix for suffix in (*own, *_BESIDE) if weight.stem + suffix in files}
        self._require_all(files)

    def _find(self, files: TensorFiles, layout: Layout, linear: LinearInfo) -> Weight | None:
        for suffix in (_VALUES, DENSE_SUFFIX):
            key = layout.key(linear.name + suffix, files)
            if key is None:
                continue
            stem, dtype = key.removesuffix(suffix), files.info[key].dtype
            if linear.transposed or dtype not in packed.VALUE_DTYPES.values():
                raise SourceError(f"{key} is {dtype}{' of a Conv1D' if linear.transposed else ''}, and {_READ}")
            if suffix == _VALUES:
                _require(stem + _MASK, files)
            if stem + _ZERO_POINT in files and bool(files.read(stem + _ZERO_POINT).float().any()):
                raise SourceError(f"{stem}{_ZERO_POINT} is not zero, and {_READ}")
            return Weight(files, stem, (linear.n, linear.k), dtype, suffix == _VALUES)
        if layout.key(linear.name + ".weight_packed", files) is not None:
            raise SourceError(
                f"{linear.name}.weight_packed is in a format of fewer bits or of words of them, and {_READ}"
            )
        return None  # tied to another, or missing, which is found out by who asks for everything

    def _require_all(self, files: TensorFiles) -> None:
        for key, info in files.info.items():
            if key not in self.keys and (info.dtype in LARGEST or key.endswith((_VALUES, _MASK))):
                raise SourceError(
                    f"{key} is {info.dtype} and belongs to no linear layer that halve finds in the model, so it cannot be packed"
                )


def value_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Of the dtypes of 2:4 layers: the one that is packed; of 8 bits, where some are, and the others stay dense.

    Raises:
        SourceError: there is more than one such.
    """
    found = set(dtypes)
    found = {dtype for dtype in found if dtype in LARGEST} or found
    if len(found) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise SourceError(f"the 2:4 layers have several dtypes ({names}); the packed format has one")
    return found.pop()


def _require(key: str, files: TensorFiles) -> None:
    if key not in files:
        raise CorruptCheckpointError(f"the checkpoint has no tensor {key}; it is damaged, get it again")


def _require_shape(key: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tuple(tensor.shape) != shape:
        raise CorruptCheckpointError(
            f"{key} is {list(tensor.shape)}, and config.json says {list(shape)}; they do not belong together"
        )
