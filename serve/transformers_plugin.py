"""Lets ``AutoModelForCausalLM.from_pretrained`` read a packed checkpoint. Importing this module registers it.

It uses the hooks that transformers has for quantized checkpoints. The packed weights stay packed in memory.
What is read is checked: every packed tensor is there in its shape, each file fits its digest, each mask has two
bits a group, each value is finite.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.architecture import LinearModule
from compress.checkpoint import PackedConfig, check_files, parse_config
from compress.errors import CorruptCheckpointError
from compress.files import TensorInfo, read_header
from compress.layout import Layout
from compress.packed import SCALED_DTYPES, VALUE_DTYPES
from serve.linear import Sparse24Linear, replacement


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that have another name in the checkpoint are read in its dtype, whatever was asked for, if it is quantized."""
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    for name, module in model.named_modules():
        if isinstance(module, Sparse24Linear):
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)
            continue
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}"
            if parameter.is_floating_point() and not any(pattern.search(full) for pattern in kept):
                parameter.data = parameter.data.to(dtype)


@register_quantization_config("halve")
class HalveConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint, as transformers wants to hold it."""

    def __init__(self, **fields: Any) -> None:
        self.parsed: PackedConfig = parse_config(fields)
        self.quant_method = cast(Any, self.parsed.quant_method)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return self.parsed.model_dump(exclude_none=True)  # as `compress.artefact.quantization_config` has it

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer("halve")
class HalveQuantizer(HfQuantizer):
    """Puts packed modules in the place of linears before the weights are read, and checks them after."""

    _asked: torch.dtype | None = None
    requires_calibration = True  # a dense model becomes packed by `halve compress`, not while it is loaded

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self._config
        layout = Layout(model)
        packed = layout.packed(config.ignore)
        files = [Path(file) for file in checkpoint_files or []]
        stored: dict[str, TensorInfo] = {}
        for file in files:
            stored.update(read_header(file)[0])
        layout.require_tensors(stored, packed, config.value_dtype)
        check_files(files)
        for name in packed:
            parent, _, attribute = name.rpartition(".")
            linear, values = cast(LinearModule, model.get_submodule(name)), VALUE_DTYPES[config.value_dtype]
            computes_in = model.dtype if config.value_dtype in SCALED_DTYPES else values
            module = replacement(linear, computes_in, values, config.quantizes_x)
            setattr(model.get_submodule(parent), attribute, module)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, Sparse24Linear):
                module.validate(name)
                module.requires_grad_(False)  # transformers makes new parameters that do
                module.prepare(name)
        if self._asked is not None:
            _cast(model, self._asked)
        return model

    def update_dtype(self, dtype: Any) -> Any:
        """Packed values without scales have one dtype, and activations must have the same; those of 8 bits go with any."""
        if self._config.value_dtype in SCALED_DTYPES:
            self._asked = dtype
            return dtype
        stored = VALUE_DTYPES[self._config.value_dtype]
        if dtype is not None and dtype != stored:
            raise CorruptCheckpointError(
                f"the packed values are {self._config.value_dtype} and {dtype} was asked for; leave dtype out, or convert: "
                "`halve unpack`, then `halve compress --dtype ...`"
            )
        return stored

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        return dtype if dtype is not None and dtype.is_floating_point else None

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def _config(self) -> PackedConfig:
        return cast(Any, self.quantization_config).parsed
