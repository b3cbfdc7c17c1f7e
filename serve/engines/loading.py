"""From a checkpoint directory to a model that is ready to run, and the choices made on the way.

Each automatic choice returns the value and the reason, for the log.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from compress.architecture import load_config
from compress.device import choose_device
from compress.errors import HalveError, SourceError, UsageError, did_you_mean
from compress.files import TensorFiles
from compress.packed import SCALED_DTYPES
from compress.sources import dtype_of, read_config, said_dtype
from serve.engines.directory import require_checkpoint
from serve.loading import load_model, load_tokenizer, require_language_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Layers whose cache is keys and values, one column a token; others (recurrent, convolutional) keep a state
# that cannot be padded, so a batch of them cannot be formed this way.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def choose_dtype(
    wish: str, stored: torch.dtype | None, device: torch.device, *, is_packed: bool = False
) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why: of packed values no other than their own. Raises `UsageError` for an unknown name."""
    if wish != "auto":
        if wish not in DTYPES:
            raise UsageError(f"--dtype {wish!r} is not known{did_you_mean(wish, [*DTYPES, 'auto'])}.")
        return DTYPES[wish], "asked for"
    if stored is None or stored not in DTYPES.values():
        return torch.float32, "the checkpoint names no dtype to keep"
    if device.type == "cuda" and stored == torch.float32 and not is_packed:
        return torch.bfloat16, "the checkpoint is float32, and 16 bits halve what a GPU reads for each token"
    return stored, "the dtype of the checkpoint"


def _stored_dtype(path: Path) -> tuple[torch.dtype | None, bool]:
    """The dtype of a checkpoint, of a packed one that of its values; and whether it is packed."""
    config = read_config(path)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "halve":
        found, is_packed = quantization.get("value_dtype"), True
        if found in SCALED_DTYPES:  # goes with any
            found, is_packed = said_dtype(config), False
    else:
        found, is_packed = said_dtype(config) or dtype_of(config, TensorFiles(path)), False
    return DTYPES.get(found) if isinstance(found, str) else None, is_packed


def load_checkpoint(directory: str, device: str, dtype: str) -> tuple[PreTrainedModel, Tokenizer, list[str]]:
    """Reads a model and its tokenizer. Returns them with one line for each choice made.

    Raises `SourceError` where the directory is not a causal language model with a tokenizer.
    """
    path = require_checkpoint(directory)
    require_language_model(path, "serve")
    place, why_place = choose_device(device)
    config = load_config(path).get_text_config()
    check_layers(config, directory)
    stored, is_packed = _stored_dtype(path)
    kind, why_kind = choose_dtype(dtype, stored, place, is_packed=is_packed)
    tokenizer = read_tokenizer(path)
    model = load_model(path, device=place, dtype=kind)
    if getattr(model, "_is_stateful", False):  # of a family whose configuration does not list its layers
        raise SourceError(
            f"{directory!r} is a {type(model).__name__}, which keeps a state instead of keys and values; the transformers "
            "engine cannot batch that."
        )
    return model, tokenizer, [f"device {place}: {why_place}", f"dtype {str(kind)[6:]}: {why_kind}"]


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, which from now on is only read."""
    tokenizer = load_tokenizer(path)
    # Drops a truncation or padding that tokenizer.json may ask for. Done here because to change a
    # tokenizer while another thread decodes with it fails.
    tokenizer("", verbose=False)
    return tokenizer


def check_layers(config: object, directory: str) -> None:
    """Raises SourceError for layers whose state a batch cannot hold."""
    odd = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if odd:
        raise SourceError(
            f"{directory!r} has layers of the kind {', '.join(sorted(odd))}, which the transformers engine "
            f"cannot batch; it serves models of {' and '.join(sorted(ATTENTION_LAYERS))} layers."
        )


def choose_context(config: object, tokenizer: Tokenizer, wish: int | None) -> tuple[int, str]:
    """max_model_len and why. Raises `UsageError` for more than the model has positions for."""
    trained = getattr(config, "max_position_embeddings", None)
    if trained is None and 0 < tokenizer.model_max_length < 10**9:  # larger is transformers' "unknown"
        trained = tokenizer.model_max_length
    if wish is None:
        if trained is None:
            return 2048, "neither config.json nor the tokenizer says how long a sequence may be"
        return trained, "as many positions as the model was made for"
    if wish < 1:
        raise UsageError(f"--max-model-len {wish} is not a length; it has to be at least 1.")
    if trained is not None and wish > trained:
        raise UsageError(f"--max-model-len {wish} is more than the {trained} positions that the model was made for.")
    return wish, "asked for"


def cache_slots(bytes_per_token: int, device: torch.device) -> int:
    """How many tokens of keys and values may be held: as many as fit half of the memory that is free now."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    slots = free // 2 // max(1, bytes_per_token)
    if slots < 1:
        raise HalveError("There is no memory left for keys and values; free some or use a smaller model.")
    return slots
