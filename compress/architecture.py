"""What a model is made of, without a weight in memory: its configuration, its skeleton, its repeated blocks, its linears.

No names of families here. The blocks are found as the repeated part of the model that holds most linear weights; a
block's linears are its modules that multiply.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from compress.errors import SourceError
from compress.own_code import NEVER, explain

LinearModule = nn.Linear | Conv1D


def is_linear(module: nn.Module) -> TypeGuard[LinearModule]:
    """Whether the module is a matrix that halve knows how to prune: nn.Linear or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def oriented(weight: Tensor, module: LinearModule) -> Tensor:
    """A module's weight as [N, K] (output, input features), or back: Conv1D stores it as [K, N]."""
    return weight.T if isinstance(module, Conv1D) else weight


def shape_of(module: LinearModule) -> tuple[int, int]:
    """(N, K) of a linear module."""
    n, k = oriented(module.weight, module).shape
    return n, k


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks: of all module lists the one with most linear weights.

    A list inside of a block (experts) has fewer than the list that holds it.

    Raises:
        SourceError: the model has no list of modules with linears in it.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(m.weight.numel() for m in module.modules() if is_linear(m))
            if size and (best is None or size > best[0]):
                best = (size, name, module)
    if best is None:
        raise SourceError(
            f"{type(model).__name__} has no repeated blocks with linear layers: there is nothing that halve can prune"
        )
    return best[1], best[2]


def renamings_of(model: PreTrainedModel) -> list[WeightRenaming]:
    """How transformers renames tensors of older checkpoints of this model when it reads them (and back when it writes)."""
    return [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]


def merged_of(model: PreTrainedModel) -> list[str]:
    """Patterns of the names of parameters that transformers puts together from several tensors of a checkpoint (experts)."""
    changes = [change for change in get_model_conversion_mapping(model) if not isinstance(change, WeightRenaming)]
    return [pattern for change in changes for pattern in change.target_patterns]


def renamed(stored: Iterable[str], renamings: list[WeightRenaming]) -> dict[str, str]:
    """Name in the model -> key in the checkpoint, for the keys that are not called as in the model."""
    names = {}
    for key in stored:
        name = key
        for renaming in renamings:  # one after the other, as transformers does
            name, _ = renaming.rename_source_key(name)
        names[name] = key
    return {name: key for name, key in names.items() if name != key}


def linears_of(module: nn.Module, prefix: str) -> dict[str, LinearModule]:
    """The linears below a module by their full names, in the order of the model."""
    return {join_names(prefix, name): child for name, child in module.named_modules() if is_linear(child)}


def make_of(block: nn.Module) -> object:
    """What two blocks share, as a key, if they are made alike and differ in their weights only: the modules with their
    classes and settings, and the shapes. (Numbers that count the layers are no settings: whole numbers are left out.)
    """
    modules = tuple(
        (
            name,
            type(module),
            tuple(sorted((key, value) for key, value in vars(module).items() if _is_setting(key, value))),
        )
        for name, module in block.named_modules()
    )
    return modules, tuple((name, parameter.shape) for name, parameter in block.named_parameters())


def _is_setting(key: str, value: object) -> bool:
    return key != "training" and isinstance(value, bool | str | float)


def load_config(directory: Path) -> Any:
    """The configuration of a model directory, or of a ``config.json`` alone, as transformers reads it.

    Raises:
        SourceError: transformers does not know the model, or a field has a wrong type.
    """
    try:
        return AutoConfig.from_pretrained(directory, **NEVER)
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, ArithmeticError, StrictDataclassError
    ) as error:  # fmt: skip
        file = directory if directory.is_file() else directory / "config.json"
        raise SourceError(f"transformers cannot read {file}: {explain(error)}") from None


def reads_images(config: Any) -> bool:
    """Whether a configuration (an object, or the content of ``config.json``) is that of an image classifier."""
    named = config.get("architectures") if isinstance(config, dict) else getattr(config, "architectures", None)
    return any(str(name).endswith("ForImageClassification") for name in named or ())


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that builds and loads models of a configuration."""
    return AutoModelForImageClassification if reads_images(config) else AutoModelForCausalLM


def skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration on the meta device: shapes and names, no memory."""
    kind = "an image classifier" if reads_images(config) else "a causal language model"
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=dtype, **NEVER)
    except (
        ValueError,
        KeyError,
        ImportError,
        TypeError,
        AttributeError,
        RuntimeError,
        IndexError,
        AssertionError,
        ArithmeticError,
    ) as error:
        raise SourceError(f"transformers cannot build {kind} of this config.json: {explain(error)}") from None
    return model.eval().requires_grad_(False)


def switch_biases_on(config: Any, model: PreTrainedModel) -> tuple[Any, list[str], list[str]]:
    """Gives the linears of the blocks a bias where the family's configuration has a switch for it.

    A switch is a field of the configuration that is False, has "bias" in its name, and that adds nothing to the model
    but biases of linears in the blocks when it is True (Llama's ``attention_bias`` and ``mlp_bias``).

    Returns:
        The changed configuration, the names of the switches, and the names of the parameters that are new.
    """
    before = dict(model.named_parameters(remove_duplicate=False))
    blocks, _ = find_blocks(model)
    switches, added = [], set()
    for field, value in config.to_dict().items():
        if value is not False or "bias" not in field:
            continue
        trial = copy.deepcopy(config)
        setattr(trial, field, True)
        other = skeleton(trial, model.dtype)
        after = dict(other.named_parameters(remove_duplicate=False))
        new = after.keys() - before.keys()
        linears = {f"{name}.bias" for name in linears_of(other, "") if name.startswith(f"{blocks}.")}
        if new and new <= linears and before.keys() <= after.keys():
            switches.append(field)
            added |= new
    changed = copy.deepcopy(config)
    for field in switches:
        setattr(changed, field, True)
    return changed, switches, sorted(added)


def join_names(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
