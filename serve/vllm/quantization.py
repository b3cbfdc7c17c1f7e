"""The quantization method ``halve`` of vLLM: which layers are 2:4, which are left to vLLM, and a line that says so.

It is chosen by ``quant_method`` in ``config.json``, by the override hook for stranded checkpoints of compressed-tensors,
or by ``--quantization halve`` for a dense checkpoint with zeros.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from compress import stranded
from compress.errors import SourceError
from compress.files import TensorFiles
from serve import support
from serve.vllm import compile_cache, stored
from serve.vllm.linear import Outcome, SparseLinearMethod
from serve.vllm.names import Names
from serve.vllm.shards import FUSED, modules_of
from serve.vllm.sound import CHECKED_VARIABLE, require_sound
from serve.vllm.stored import DENSE, Stored

_logger = init_logger("vllm.halve")
compile_cache.install()


@register_quantization_config("halve")
class HalveQuantization(QuantizationConfig):
    """How the layers of a checkpoint are stored; vLLM asks it for the method of each layer as it builds the model."""

    def __init__(self, stored: Stored = DENSE) -> None:
        super().__init__()
        self.stored = stored
        self._names = Names()
        self._model_types: set[str] = set()
        self._cached: tuple[str, str | None] | None = None
        self._left: list[str] = []
        self._waiting: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}

    def __repr__(self) -> str:
        return f"HalveQuantization({self.stored.kind})"

    def get_name(self) -> Any:
        return "halve"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [getattr(torch, dtype) for dtype in support.ENGINES["vllm"].dtypes]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # where a device has no kernel, weights are expanded

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # without quantization_config in config.json, the checkpoint is taken for a dense one with zeros

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HalveQuantization:
        if config.get("quant_method") == "halve":
            return cls(stored.of_halve(config))
        return cls(stored.of_compressed_tensors(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Claims 2:4 checkpoints of compressed-tensors."""
        if user_quant not in (None, "halve", "compressed-tensors"):
            return None
        return "halve" if support.reads("vllm", "bitmask") and stranded.is_stranded(hf_quant_cfg) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks the files of a local checkpoint; those of a hub are not there yet, and checked when they were read."""
        for config in (hf_config, getattr(hf_config, "text_config", None)):
            self._model_types.add(str(getattr(config, "model_type", "")))
        directory = Path(model_name)
        if directory.is_dir():
            self.stored = self.stored.with_what_is_there(TensorFiles(directory))
        if os.environ.get(CHECKED_VARIABLE) == str(directory.resolve()):
            return
        if directory.is_dir():
            self._require_sound(directory)
        else:
            self._cached = (model_name, revision)

    def _require_sound(self, directory: Path) -> None:
        if problem := require_sound(directory, self.stored):
            _logger.warning("the tensors of %s were not compared with the model: %s", directory, problem)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """The checkpoint is told of as it is, so names are compared through the mapper, and `stored` keeps its own."""
        self._names.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """None for what is no linear layer: embeddings, ``lm_head``, attention, experts."""
        if not isinstance(layer, LinearBase):
            if hasattr(layer, "weight_loader") or "expert" in prefix.rpartition(".")[2]:
                self._left.append(prefix.rpartition(".")[2] or type(layer).__name__)
            return None
        modules = self._modules_of(prefix)
        packed = [self.stored.is_packed(module, self._names) for module in modules]
        found = [module for module, is_packed in zip(modules, packed, strict=True) if is_packed]
        stored.require_order(self.stored, self._model_types, found)
        if self.stored.kind != "dense" and not any(packed):
            self._left.append(prefix.rpartition(".")[2])
            return UnquantizedLinearMethod()
        self._waiting.add(prefix)
        return SparseLinearMethod(self.stored, prefix, modules, packed, self._processed)

    def _modules_of(self, prefix: str) -> list[str]:
        """The modules of the checkpoint behind a layer of vLLM."""
        modules = modules_of(prefix, self.packed_modules_mapping)
        if self.stored.kind != "dense" and modules == [prefix]:
            # Some of vLLM's models fuse layers and do not say so. It makes a difference where not all of the parts are packed.
            parts = modules_of(prefix, FUSED)
            if not all(self.stored.is_packed(part, self._names) for part in parts):
                return parts
        return modules

    def _processed(self, prefix: str, outcome: Outcome) -> None:
        """Notes what became of a layer, and says what became of all after the last one."""
        if prefix not in self._waiting:
            return  # read anew
        self._waiting.discard(prefix)
        self._outcomes[prefix] = outcome
        if self._waiting:
            return
        if self._cached is not None:
            self._check_downloaded(*self._cached)
        outcomes = list(self._outcomes.values())
        for line in summary(outcomes, self._left):
            _logger.info(line)
        for warning in dict.fromkeys(outcome.warning for outcome in outcomes if outcome.warning):
            _logger.warning(warning)

    def graph_digest(self) -> str:
        """Of what compiled graphs depend on: which layers are 2:4, of which values, how long their weights are, and whether x is quantized; "" before any was
        read."""
        if not self._outcomes:
            return ""
        forms = sorted(
            (prefix, outcome.sparse, str(outcome.value_dtype), outcome.bytes, outcome.quantizes_x)
            for prefix, outcome in self._outcomes.items()
        )
        return hashlib.sha256(repr(forms).encode()).hexdigest()

    def _check_downloaded(self, model: str, revision: str | None) -> None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(model, revision=revision, local_files_only=True))
            self._require_sound(directory)
        except (LocalEntryNotFoundError, SourceError) as error:
            _logger.warning("the files of %s were not compared with their digests: %s", model, error)


def summary(outcomes: list[Outcome], left: list[str]) -> list[str]:
    """What became of the layers, a line each: what runs 2:4 and on what, what is dense and why."""
    sparse = Counter(outcome.how for outcome in outcomes if outcome.sparse)
    dense = Counter(outcome.how for outcome in outcomes if not outcome.sparse)
    held = sum(outcome.bytes for outcome in outcomes if outcome.sparse)
    whole = sum(outcome.dense_bytes for outcome in outcomes if outcome.sparse)
    lines = [f"halve: {count} linear layers run 2:4 on {how}" for how, count in sparse.items()]
    if whole:
        lines.append(f"halve: their weights take {held / 2**20:.1f} MiB, {held / whole:.4f} of the dense ones")
    lines += [f"halve: {count} linear layers are dense: {how}" for how, count in dense.items()]
    if left:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(left).items())
        lines.append(f"halve: other layers are left to vLLM as they are: {counts}")
    return lines
