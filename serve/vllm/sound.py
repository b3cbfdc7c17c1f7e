"""Is the checkpoint whole? Asked before vLLM starts, which checks nothing of quantized models itself."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from compress.checkpoint import check_files
from compress.errors import CorruptCheckpointError, SourceError
from compress.files import TensorFiles
from compress.layout import Layout, LinearInfo
from compress.packed import DENSE_SUFFIX, MASK_SUFFIX, SCALE_SUFFIX, VALUES_SUFFIX, PackedWeight, validate
from compress.sources import read_config
from serve.vllm.stored import Stored, model_types, require_order

CHECKED_VARIABLE = "HALVE_VLLM_CHECKED"
"""The directory that `halve serve` checked before it started vLLM, so that it is read once."""


@lru_cache(maxsize=8)
def require_sound(directory: Path, stored: Stored) -> str | None:
    """Checks that every tensor of the model is there in its shape and dtype, and that each file has its digest.

    Returns:
        Why tensors could not be compared with the model, or None where they were.

    Raises:
        CorruptCheckpointError: names the tensor or the file.
        SourceError: vLLM would read a packed layer wrongly.
    """
    files = TensorFiles(directory)
    values, mask = f".{stored.values}", f".{stored.mask}"
    if stored.kind != "dense":
        stems = (key.removesuffix(values) for key in files if key.endswith(values))
        require_order(stored, model_types(read_config(directory)), stems)
    problem = None
    try:
        layout = Layout.of(directory)
    except SourceError as error:  # vLLM knows models that transformers does not
        problem = f"transformers does not know the model ({error})"
    else:
        dtype = "" if stored.value_dtype is None else str(stored.value_dtype).removeprefix("torch.")
        layout.require_tensors(files.info, _packed(stored, layout, files), dtype, (values, mask))
    try:
        check_files(files.files)
    except CorruptCheckpointError:
        _find_damage(files)
        raise
    return problem


def _packed(stored: Stored, layout: Layout, files: TensorFiles) -> set[str]:
    """The linears that have to be there packed."""
    if stored.kind == "packed":
        return layout.packed(stored.ignore)

    # What is there decides: compressed-tensors' rules may mean the output head, too, which it left as it is, and their names may
    # be those of an older transformers. They tell what should be there where nothing is.
    def is_there(linear: LinearInfo, suffix: str) -> bool:
        return layout.key(linear.name + suffix, files) is not None

    return {
        linear.name
        for linear in layout.linears.values()
        if is_there(linear, f".{stored.values}")
        or (linear.in_block and not is_there(linear, DENSE_SUFFIX) and stored.is_packed(linear.name))
    }


def _find_damage(files: TensorFiles) -> None:
    """Raises CorruptCheckpointError, naming the layer, where the damage shows in the mask, the values or the scales of a packed one."""
    for key in files:
        stem = key.removesuffix(MASK_SUFFIX)
        if stem != key and stem + VALUES_SUFFIX in files:
            scale = files.read(stem + SCALE_SUFFIX) if stem + SCALE_SUFFIX in files else None
            validate(PackedWeight(files.read(stem + VALUES_SUFFIX), files.read(key), scale), stem)
