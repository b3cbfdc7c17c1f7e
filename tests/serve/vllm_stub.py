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


class ChannelQuantScaleParameter(nn.Parameter):
    """Its first axis is that of the output; it has none of the input."""

    def __new__(cls, data: Tensor, **options: Any) -> ChannelQuantScaleParameter:
        return torch.Tensor._make_subclass(cls, data, False)  # type: ignore[return-value]

    def __init__(self, data: Tensor, output_dim: int, weight_loader: Callable[..., None]) -> None:
        self.output_dim, self.weight_loader = output_dim, weight_loader


class ModelWeightParameter(ChannelQuantScaleParameter):
    def __init__(self, data: Tensor, input_dim: int, output_dim: int, weight_loader: Callable[..., None]) -> None:
        super().__init__(data, output_dim, weight_loader)
        self.input_dim = input_dim


def set_weight_attrs(parameter: Tensor, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        assert not hasattr(parameter, name)
        setattr(parameter, name, value)


class LinearBase(nn.Module):
    """A layer of one or several fused parts, or this rank's share of it.

    Args:
        sizes: the rows of each part, on all ranks; ``columns``: likewise.
        split: what each of the ``ranks`` has a share of: ``output`` or ``input``.
    """

    def __init__(
        self,
        quantization: Any,
        prefix: str,
        sizes: Sequence[int],
        columns: int,
        *,
        split: str = "output",
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.sizes, self.columns, self.split, self.ranks, self.rank = list(sizes), columns, split, ranks, rank
        self.quant_method = quantization.get_quant_method(self, prefix)
        self.create()

    def create(self) -> None:
        """What vLLM does as it builds the model, and before weights are read anew."""
        over = {"output": 1, "input": 1, self.split: self.ranks}
        sizes = [size // over["output"] for size in self.sizes]
        arguments = (self.columns // over["input"], sizes, self.columns, sum(self.sizes), torch.bfloat16)
        self.quant_method.create_weights(self, *arguments, weight_loader=self.take)

    def take(self, param: Tensor, loaded_weight: Tensor, part: int | None = None) -> None:
        """What ``weight_loader`` of vLLM's layers does with their parameters' axes."""
        data = param.data
        if self.split == "input":
            axis = getattr(param, "input_dim", None)
            if axis is not None:
                loaded_weight = loaded_weight.narrow(axis, self.rank * data.shape[axis], data.shape[axis])
        elif part is None and len(self.sizes) > 1:
            for number, one in enumerate(loaded_weight.split(self.sizes)):
                self.take(param, one, number)
            return
        else:
            size = self.sizes[part or 0] // self.ranks
            data = data.narrow(param.output_dim, sum(self.sizes[: part or 0]) // self.ranks, size)  # type: ignore[attr-defined]
            loaded_weight = loaded_weight.narrow(param.output_dim, self.rank * size, size)  # type: ignore[attr-defined]
        assert data.shape == loaded_weight.shape
        data.copy_(loaded_weight)

    def read(self, tensors: Mapping[str, Sequence[Tensor | None] | Tensor]) -> None:
        """The tensors of the checkpoint by name; of a fused layer one for each part, None where it has none."""
        for name, parts in tensors.items():
            parameter = self.get_parameter(name)
            for number, tensor in enumerate([parts] if isinstance(parts, Tensor) else parts):
                shard = () if isinstance(parts, Tensor) else (number,)
                if tensor is not None:
                    parameter.weight_loader(parameter, tensor, *shard)  # type: ignore[attr-defined]
        self.quant_method.process_weights_after_loading(self)

    def make_up(self) -> None:
        """As `vllm.model_executor.model_loader.weight_utils.initialize_single_dummy_weight` does for ``--load-format dummy``."""
        for parameter in self.parameters():
            value = getattr(parameter, "dummy_weight_value", None)
            if value is not None:
                parameter.fill_(value)
            elif parameter.is_floating_point():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-1e-3, 1e-3))
        self.quant_method.process_weights_after_loading(self)

    def read_anew(self, tensors: Mapping[str, Sequence[Tensor | None] | Tensor]) -> None:
        """As `vllm.model_executor.model_loader.reload.layerwise` does: what is read is copied into the tensors that are there,
        because graphs hold them. It is read into memory that holds anything, here what passes for a weight of every dtype."""
        kept = dict(self._parameters)
        for name in kept:
            delattr(self, name)
        self.create()
        for parameter in self.parameters():
            parameter.view(torch.uint8).fill_(0x33)
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
    "vllm.model_executor.parameter": {
        "ChannelQuantScaleParameter": ChannelQuantScaleParameter,
        "ModelWeightParameter": ModelWeightParameter,
    },
    "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
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
