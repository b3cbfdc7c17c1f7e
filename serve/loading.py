"""Loads a checkpoint of any kind for evaluation and serving: packed, dense with zeros, or dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress import sources, stranded
from compress.architecture import auto_class, load_config, reads_images
from compress.checkpoint import check_files
from compress.errors import CorruptCheckpointError, HalveError, SourceError
from compress.files import TensorFiles
from compress.own_code import NEVER, explain
from compress.quiet import quiet_transformers
from compress.sources import read_config
from serve.linear import prepare_for_serving
from serve.measure.tuned import serve_as_measured


def load_model(
    directory: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of a local directory, a causal language model or an image classifier, in evaluation mode, in its own
    dtype or another one, ready to serve.

    Raises:
        SourceError: it is no model directory, or `halve pack` has to be called first; CorruptCheckpointError: a file is damaged.
    """
    model = read_model(directory, dtype)
    torch.nn.Module.to(model, torch.device(device))
    serve_as_measured(model)
    prepare_for_serving(model)
    return model.eval().requires_grad_(False)


def read_model(directory: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The same as the files have it, on the processor. Raises as `load_model` does."""
    import serve.transformers_plugin  # noqa: F401  registers the packed format

    config = read_config(directory)
    stranded.require_none(directory, config)
    auto = auto_class(load_config(directory))  # notices fields of wrong types, and names them
    files = TensorFiles(directory)  # notices a truncated file, and names it
    if not _is_packed(config):
        check_files(files.files)  # the plugin does it for packed ones
    try:
        with quiet_transformers():
            loaded: Any = auto.from_pretrained(
                directory, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, **NEVER
            )
    except HalveError:
        raise
    except (ValueError, OSError, KeyError, RuntimeError, TypeError) as error:
        raise CorruptCheckpointError(f"cannot load {directory}: {explain(error)}") from None
    model, found = loaded
    # transformers itself draws at random what is missing or does not fit, and goes on.
    if missing := sorted(found["missing_keys"]):
        raise CorruptCheckpointError(f"{directory} has no tensor {missing[0]} ({len(missing)} are missing)")
    if unfit := sorted(found["mismatched_keys"]):
        name, stored, expected = unfit[0]
        raise CorruptCheckpointError(
            f"{directory}: {name} is {list(stored)}, and config.json says {list(expected)}; they do not belong together"
        )
    return model.eval().requires_grad_(False)


def require_language_model(directory: Path, does: str) -> None:
    """Raises SourceError for an image classifier; ``does`` is what the caller does with language models."""
    if reads_images(read_config(directory)):
        raise SourceError(
            f"{directory} is an image classifier, and `halve {does}` is for causal language models; load it with "
            "transformers' AutoModelForImageClassification (after `import serve.transformers_plugin`, if it is packed)"
        )


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a local directory.

    Raises:
        SourceError: there is none that transformers can read.
    """
    with quiet_transformers():
        return sources.load_tokenizer(directory)


def _is_packed(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "halve"


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers as they are held in memory; tied ones count once."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def linear_bytes(model: torch.nn.Module, names: set[str]) -> int:
    """Bytes held by the weights (not the biases) of the linear modules of those names, dense or packed."""
    total = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        module, _, attribute = name.rpartition(".")
        if module in names and attribute.startswith("weight"):
            total += tensor.nbytes
    return total
