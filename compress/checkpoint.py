"""What a packed checkpoint says of itself, validated strictly before anything is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.artefact import FORMAT_VERSION
from compress.errors import CorruptCheckpointError, did_you_mean
from compress.files import check_digest
from compress.packed import FLOAT_DTYPES, MASK_SUFFIX, SCALE_SUFFIX, SCALED_DTYPES, VALUE_DTYPES, VALUES_SUFFIX


class PackedConfig(BaseModel):
    """``quantization_config`` of a packed checkpoint: data only, nothing in it is ever imported or run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    quant_method: Literal["halve"]
    format_version: int
    sparsity: Literal["2:4"]
    value_dtype: Literal["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"]
    activation_dtype: Literal["int8", "float8_e4m3fn"] | None = None
    ignore: list[str]

    @property
    def quantizes_x(self) -> bool:
        """See `compress.packed.PackedWeight`."""
        return self.activation_dtype is not None


def parse_config(config: Mapping[str, Any]) -> PackedConfig:
    """Reads ``quantization_config``.

    Raises:
        CorruptCheckpointError: an unknown version, an unknown key, or a wrong value; the message names it.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CorruptCheckpointError(
            f"config.json: the packed format has version {version!r}, and this halve reads version {FORMAT_VERSION}; "
            "a newer halve may read it"
        )
    known = PackedConfig.model_fields
    for key in config:
        if key not in known:
            raise CorruptCheckpointError(
                f"config.json: quantization_config has an unknown key {key!r}{did_you_mean(str(key), known)}"
            )
    try:
        parsed = PackedConfig.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptCheckpointError(f"config.json: quantization_config.{where}: {first['msg']}") from None
    if parsed.activation_dtype not in (None, parsed.value_dtype):
        raise CorruptCheckpointError(
            f"config.json: quantization_config.activation_dtype is {parsed.activation_dtype!r} and value_dtype {parsed.value_dtype!r}; "
            "activations of 8 bits go with kept values of the same dtype"
        )
    return parsed


def check_files(files: list[Path]) -> None:
    """Compares every file with the digest that it carries (files without one pass).

    Raises:
        CorruptCheckpointError: a file is truncated or was changed.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(check_digest, files))


def expected_tensors(
    module_name: str, n: int, k: int, value_dtype: str, suffixes: tuple[str, str] = (VALUES_SUFFIX, MASK_SUFFIX)
) -> dict[str, tuple[tuple[Any, ...], tuple[int, int]]]:
    """The tensors that stand for a packed linear [n, k], with the dtypes that each may have and its shape.

    Args:
        value_dtype: of the kept values; "": any that has no scale.
        suffixes: what values and mask are called.
    """
    import torch

    values, mask = suffixes
    scale = {module_name + SCALE_SUFFIX: ((torch.float32,), (n, 1))} if value_dtype in SCALED_DTYPES else {}
    return {
        module_name + values: (
            (VALUE_DTYPES[value_dtype],) if value_dtype else tuple(FLOAT_DTYPES.values()),
            (n, k // 2),
        ),
        module_name + mask: ((torch.uint8,), (n, k // 8)),
        **scale,
    }
