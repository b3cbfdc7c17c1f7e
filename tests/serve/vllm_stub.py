"""As much of vLLM as the plugin's layers touch, so that what becomes of a layer is tested in milliseconds.

The fixture `plugin` (of `tests.serve.test_vllm_layers`) puts it in vLLM's place. That the real one is like this is for
`tests.serve.test_vllm_interface` and the tests with engines to say.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

OURS = ("linear", "quantization", "compile_cache")


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


class ModelWeightParameter(nn.Parameter):
    def __new__(cls, data: Tensor, **options: Any) -> ModelWeightParameter:
        return torch.Tensor._make_subclass(cls, data, False)  # type: ignore[return-value]

    def __init__(self, data: Tensor, weight_loader: Callable[..., None], **options: Any) -> None:
        self.weight_loader = weight_loader


class LinearBase(nn.Module):
    """A layer of one or several fused parts; ``sizes``: the rows of each."""

    def __init__(self, quantization: Any, prefix: str, sizes: Sequence[int], columns: int) -> None:
        super().__init__()
        self.sizes, self.columns = list(sizes), columns
        self.quant_method = quantization.get_quant_method(self, prefix)
        self.create()

    def create(self) -> None:
        """What vLLM does as it builds the model, and before weights are read anew."""
        self.quant_method.create_weights(
            self, self.columns, self.sizes, self.columns, sum(self.sizes), torch.bfloat16, weight_loader=self.take
        )

    def take(self, param: Tensor, loaded_weight: Tensor, part: int | None = None) -> None:
        start = sum(self.sizes[: part or 0])
        rows = slice(None) if part is None else slice(start, start + self.sizes[part])
        param.data[rows].copy_(loaded_weight)

    def read(self, tensors: Mapping[str, Sequence[Tensor] | Tensor]) -> None:
        """The tensors of the checkpoint by name; of a fused layer one for each part."""
        for name, parts in tensors.items():
            parameter = self.get_parameter(name)
            for number, tensor in enumerate([parts] if isinstance(parts, Tensor) else parts):
                shard = () if isinstance(parts, Tensor) else (number,)
                parameter.weight_loader(parameter, tensor, *shard)  # type: ignore[attr-defined]
        self.quant_method.process_weights_after_loading(self)

    def read_anew(self, tensors: Mapping[str, Sequence[Tensor] | Tensor]) -> None:
        """As `vllm.model_executor.model_loader.reload.layerwise` does: what is read is copied into the tensors that are there,
        because graphs hold them."""
        kept = dict(self._parameters)
        for name in kept:
            delattr(self, name)
        self.create()
        self.read(tensors)
        for name, parameter in kept.items():
            assert parameter is not None
            parameter.data.copy_(getattr(self, name))
        for name in list(self._parameters):
            delattr(self, name)
        for name, parameter in kept.items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x)


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


@dataclass
class VllmConfig:
    """Its hash knows nothing of the quantization."""

    quant_config: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def compute_hash(self) -> str:
        return f"{hash(repr(self.settings)) & 0xFFFFFFFFFF:010x}"


@dataclass
class WeightsMapper:
    """Renames by prefix and by a part of the name, as vLLM's does."""

    orig_to_new_substr: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_prefix: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_suffix: dict[str, str | None] = field(default_factory=dict)

    def apply_list(self, values: list[str]) -> list[str]:
        found = []
        for name in values:
            for old, new in self.orig_to_new_substr.items():
                name = name.replace(old, new or "", 1)
            for old, new in self.orig_to_new_prefix.items():
                name = (new or "") + name.removeprefix(old) if name.startswith(old) else name
            found.append(name)
        return found


_MODULES: dict[str, dict[str, Any]] = {
    "vllm": {"__version__": "0.32.0"},
    "vllm.config": {"VllmConfig": VllmConfig},
    "vllm.logger": {"init_logger": logging.getLogger},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.linear": {
        "LinearBase": LinearBase,
        "LinearMethodBase": LinearMethodBase,
        "UnquantizedLinearMethod": UnquantizedLinearMethod,
    },
    "vllm.model_executor.layers.quantization": {"register_quantization_config": lambda name: lambda config: config},
    "vllm.model_executor.layers.quantization.base_config": {
        "QuantizationConfig": QuantizationConfig,
        "QuantizeMethodBase": object,
    },
    "vllm.model_executor.parameter": {"ModelWeightParameter": ModelWeightParameter},
    "vllm.model_executor.utils": {"set_weight_attrs": lambda parameter, attributes: None},
}


@contextmanager
def in_place_of_vllm() -> Iterator[ModuleType]:
    """`serve.vllm.quantization`, imported with the stub for vLLM."""
    names = [name for name in sys.modules if name.partition(".")[0] == "vllm"] + [f"serve.vllm.{name}" for name in OURS]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    original = VllmConfig.compute_hash
    for name, content in _MODULES.items():
        module = types.ModuleType(name)
        module.__path__ = []
        module.__dict__.update(content)
        sys.modules[name] = module
    try:
        yield importlib.import_module("serve.vllm.quantization")
    finally:
        VllmConfig.compute_hash = original  # type: ignore[method-assign]
        for name in [*_MODULES, *(f"serve.vllm.{name}" for name in OURS)]:
            sys.modules.pop(name, None)
        sys.modules.update(before)
