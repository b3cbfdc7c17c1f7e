"""What a checkpoint's directory says of itself: its layers and why some are dense, its bytes, how it was made.

All of it is in ``report.json`` and ``recipe.yaml`` where halve made it. Elsewhere the headers of its files still tell which
layers are packed and how large everything is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, Field, ValidationError

from compress.artefact import RECIPE_NAME, REPORT_NAME, read_report
from compress.errors import CorruptCheckpointError
from compress.files import TensorFiles, seal
from compress.packed import FLOAT_DTYPES, LARGEST, MASK_SUFFIX, VALUES_SUFFIX, bytes_of
from compress.sources import read_config, said_dtype


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        block: index of its decoder block; None where the name holds none.
        kind: its place in the block, the same for every block: ``self_attn.q_proj``.
        shape: [N, K], or None.
        error: relative error of its output on the calibration text; None where it is not known.
        why_dense: None for a pruned layer.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    error: float | None = None
    why_dense: str | None = None

    @property
    def pruned(self) -> bool:
        return self.why_dense is None


@dataclass(frozen=True)
class Checkpoint:
    """A directory, by what lies in it.

    Attributes:
        layers: those of the decoder blocks, where they are known.
        dense_bytes: of all tensors that are not packed.
        summary, recipe: of ``report.json`` and ``recipe.yaml``; empty where halve did not make it.
        sealed: see `compress.files.seal`.
        complete: whether ``report.json`` is there, which accounts for every layer.
        allocation: which layers were kept dense by a budget, where there was one.
    """

    directory: Path
    name: str
    architecture: str
    layers: list[Layer]
    tensor_bytes: int
    summary: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    sealed: str | None = None
    complete: bool = False
    allocation: Allocation | None = None

    @property
    def pruned(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.pruned]

    @property
    def pruned_bytes(self) -> tuple[int, int]:
        """Of the pruned layers: before, and as they are stored."""
        return sum(layer.bytes_before for layer in self.pruned), sum(layer.bytes_after for layer in self.pruned)

    @property
    def method(self) -> str:
        """``"sparsegpt"``, ``"wanda + none"``: what a short label says of how it was made."""
        if not self.summary:
            return "unknown"
        metric, repair = self.summary.get("metric", "?"), self.summary.get("reconstruction", "?")
        return str(repair) if metric == f"{repair}'s own" else f"{metric} + {repair}"

    @property
    def source(self) -> str:
        """The dense model that it was made of, as its maker called it; a placeholder where nobody knows."""
        return str(self.recipe.get("model") or "DENSE")


class _Layer(BaseModel):
    name: str
    shape: list[int] = []
    status: Literal["pruned", "dense"]
    reason: str | None = None
    bytes_before: Annotated[int, Field(ge=0)]
    bytes_after: Annotated[int, Field(ge=0)]
    relative_output_error: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = None


NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0)]


class Candidate(BaseModel):
    """Layers that stay dense or are pruned together; see `compress.allocate.Candidate`."""

    names: Annotated[list[str], Field(min_length=1)]
    error: NotNegative
    saves: Annotated[float, Field(allow_inf_nan=False)]
    kept_dense: bool


class Allocation(BaseModel):
    """Which layers were kept dense by a budget, and what all of them cost; see `compress.allocate.Allocation`."""

    by: Literal["bytes", "latency"]
    unit: Literal["bytes", "us"]
    budget: NotNegative
    saves_all: NotNegative
    given_back: NotNegative
    error_all: NotNegative
    error_left: Annotated[float, Field(allow_inf_nan=False)]
    candidates: list[Candidate]


class _Report(BaseModel):
    name: str
    summary: dict[str, str | int | float | None]
    warnings: list[str] = []
    layers: list[_Layer]
    allocation: Allocation | None = None


def read(directory: Path) -> Checkpoint:
    """The checkpoint in a directory; reads no weight.

    Raises:
        SourceError: it is none; CorruptCheckpointError: a file is damaged.
    """
    config = read_config(directory)
    files = TensorFiles(directory)
    names = config.get("architectures")
    shared: dict[str, Any] = {
        "directory": directory,
        "architecture": str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", "")),
        "tensor_bytes": sum(info.nbytes for info in files.info.values()),
        "recipe": _recipe(directory),
        "sealed": seal(directory),
    }
    report = read_report(directory)
    if report is None:
        return Checkpoint(name=directory.resolve().name, layers=_packed_layers(files, config), **shared)
    try:
        found = _Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorruptCheckpointError(f"{directory / REPORT_NAME} is damaged: {place}: {first['msg']}") from None
    layers = [
        Layer(
            layer.name,
            *_place(layer.name),
            tuple(layer.shape),
            layer.bytes_before,
            layer.bytes_after,
            layer.relative_output_error,
            None if layer.status == "pruned" else layer.reason or "the report does not say",
        )
        for layer in found.layers
    ]
    return Checkpoint(
        name=found.name,
        layers=layers,
        summary=dict(found.summary),
        warnings=tuple(found.warnings),
        complete=True,
        allocation=found.allocation,
        **shared,
    )


def _recipe(directory: Path) -> dict[str, Any]:
    path = directory / RECIPE_NAME
    if not path.is_file():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        recipe = None
    if not isinstance(recipe, dict) or not all(
        isinstance(recipe.get(part, {}), dict) for part in ("recipe", "versions", "calibration")
    ):
        raise CorruptCheckpointError(f"{path} is not a recipe of halve")
    return recipe


def _packed_layers(files: TensorFiles, config: dict[str, Any]) -> list[Layer]:
    """The packed layers of a checkpoint without a report, from the shapes of their tensors."""
    computed = FLOAT_DTYPES.get(said_dtype(config) or "", torch.bfloat16)
    layers = []
    for key, values in files.info.items():
        mask = files.info.get(key.removesuffix(VALUES_SUFFIX) + MASK_SUFFIX)
        if key.endswith(VALUES_SUFFIX) and mask is not None and len(values.shape) == 2:
            name = key.removesuffix(VALUES_SUFFIX)
            n, k = values.shape[0], 2 * values.shape[1]
            width = (computed if values.dtype in LARGEST else values.dtype).itemsize
            layers.append(Layer(name, *_place(name), (n, k), n * k * width, bytes_of(n, k, values.dtype)))
    return layers


def _place(name: str) -> tuple[int | None, str]:
    """``model.layers.3.mlp.experts.7.w1`` is (3, ``mlp.experts.*.w1``)."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    if found is None:
        return None, name
    return int(found[1]), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name[found.end() :])
