"""Is the checkpoint whole? Asked before vLLM starts, which checks nothing of quantized models itself."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from compress.checkpoint import check_files
from compress.errors import CorruptCheckpointError, SourceError
from compress.files import TensorFiles
from compress.layout import Layout
from compress.packed import MASK_SUFFIX, VALUES_SUFFIX, PackedWeight, validate
from serve.vllm.stored import Stored

CHECKED_VARIABLE = "HALVE_VLLM_CHECKED"
"""The directory that `halve serve` checked before it started vLLM, so that it is read once."""


@lru_cache(maxsize=8)
def require_sound(directory: Path, stored: Stored) -> str | None:
    """Checks that every tensor of the model is there in its shape and dtype, and that each file has its digest.

    Returns:
        Why tensors could not be compared with the model, or None where they were.

    Raises:
        CorruptCheckpointError: names the tensor or the file.
    """
    files = TensorFiles(directory)
    problem = None
    if stored.kind == "bitmask":
        problem = "its tensors have names of compressed-tensors, so each layer is checked when it is read"
    else:
        try:
            layout = Layout.of(directory)
        except SourceError as error:  # vLLM knows models that transformers does not
            problem = f"transformers does not know the model ({error})"
        else:
            packed = layout.packed(stored.ignore) if stored.kind == "packed" else ()
            dtype = str(stored.value_dtype).removeprefix("torch.")
            layout.require_tensors(files.info, packed, dtype)
    try:
        check_files(files.files)
    except CorruptCheckpointError:
        _find_damage(files)
        raise
    return problem


def _find_damage(files: TensorFiles) -> None:
    """Raises CorruptCheckpointError, naming the layer, where the damage shows in the mask or the values of a packed one."""
    for key in files:
        stem = key.removesuffix(MASK_SUFFIX)
        if stem != key and stem + VALUES_SUFFIX in files:
            validate(PackedWeight(files.read(stem + VALUES_SUFFIX), files.read(key)), stem)
