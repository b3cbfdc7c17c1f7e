"""Is a checkpoint really 2:4, whole, finite and what its report says? Read from the files alone.

Nothing of the process that wrote a checkpoint is trusted: the shards' digests, every packed mask and value,
every parameter, every group of a dense checkpoint, and the bytes that ``report.json`` accounts for are looked at
again. What pattern the layers of a dense checkpoint should have is in its recipe; without one, it is 2:4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import packed, stranded
from compress.artefact import RECIPE_NAME, REPORT_NAME, check_account, read_recipe, read_report
from compress.checkpoint import parse_config
from compress.errors import CorruptCheckpointError, RecipeError, SourceError
from compress.files import TensorFiles, check_digest
from compress.layout import Layout, LinearInfo
from compress.packed import (
    DENSE_SUFFIX,
    FLOAT_DTYPES,
    PACKED_SUFFIXES,
    SCALE_SUFFIX,
    VALUES_SUFFIX,
    PackedWeight,
)
from compress.patterns import Pattern, has_pattern, parse_pattern
from compress.sources import read_config


@dataclass
class Verdict:
    """What `verify` found. ``layers`` has one record for each linear of the decoder blocks, and for packed ones elsewhere."""

    directory: Path
    kind: str
    pattern: str = "2:4"
    value_dtype: str | None = None  # of packed values
    activation_dtype: str | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    sealed_files: int = 0
    files: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def sparse(self) -> list[dict[str, Any]]:
        """The layers that have the pattern."""
        return [layer for layer in self.layers if layer["status"] != "dense"]

    @property
    def ok(self) -> bool:
        """Whether any layer is sparse: a model that nobody pruned may be whole, but it is not what is asked for."""
        return bool(self.sparse)


def verify(directory: Path, progress: Callable[[int, int, str], None] = lambda done, total, text: None) -> Verdict:
    """Reads every file of a checkpoint and checks it.

    Raises:
        SourceError: it is no model directory.
        CorruptCheckpointError: names the first file or layer that is damaged, missing, or not what the report says of it.
        NumericalError: names the first parameter that is not finite.
    """
    config = read_config(directory)
    stranded.require_none(directory, config)
    files = TensorFiles(directory)
    quantization = config.get("quantization_config")
    is_packed = quantization is not None and quantization.get("quant_method") == "halve"
    if quantization is not None and not is_packed:
        raise SourceError(
            f"{directory} is quantized ({quantization.get('quant_method')}); halve verifies packed and dense checkpoints"
        )
    parsed = parse_config(quantization) if quantization is not None else None
    verdict = Verdict(directory, "packed" if is_packed else "dense", files=len(files.files))
    if parsed is not None:
        verdict.value_dtype, verdict.activation_dtype = parsed.value_dtype, parsed.activation_dtype
    for file in files.files:
        verdict.sealed_files += check_digest(file)
    if verdict.sealed_files < verdict.files:
        verdict.notes.append(
            f"{verdict.files - verdict.sealed_files} of {verdict.files} files carry no digest: a change of a value would not be noticed"
        )
    report = read_report(directory)
    said = {layer["name"]: layer for layer in (report or {}).get("layers", [])}
    pattern = _pattern(directory) if parsed is None else packed.PATTERN
    verdict.pattern = str(pattern)

    layout = Layout.of(directory)
    packed_names = layout.packed(parsed.ignore) if parsed else set()
    layout.require_tensors(files.info, packed_names, parsed.value_dtype if parsed else "")
    linears = [linear for linear in layout.linears.values() if linear.in_block or linear.name in packed_names]
    for done, linear in enumerate(linears, 1):
        record = said.get(linear.name, {})
        if linear.name in packed_names:
            layer = _verify_packed(files, layout, linear)
        else:
            layer = _verify_dense(files, layout, linear, pattern, record.get("reason"))
        if record.get("status") == "pruned" and layer["status"] == "dense" and parsed is None:
            raise CorruptCheckpointError(f"{linear.name} is not {pattern}, and {REPORT_NAME} says that it was pruned")
        verdict.layers.append({"name": linear.name, "shape": [linear.n, linear.k], **layer})
        progress(done, len(linears), linear.name)
    _require_finite(files, layout, {layout.key(linear.name + DENSE_SUFFIX, files) for linear in linears}, verdict)

    if report is not None and (extra := check_account(directory, report)):
        verdict.notes.append(f"{len(extra)} files are not in {REPORT_NAME}: {', '.join(extra[:3])}")
    verdict.bytes = {
        "sparse_layers": sum(layer["bytes"] for layer in verdict.sparse),
        "dense_layers": sum(layer["bytes"] for layer in verdict.layers if layer["status"] == "dense"),
        "all_tensors": sum(info.nbytes for info in files.info.values()),
        "directory": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    }
    return verdict


def _verify_packed(files: TensorFiles, layout: Layout, linear: LinearInfo) -> dict[str, Any]:
    parts = []
    for suffix in PACKED_SUFFIXES:
        key = layout.key(linear.name + suffix, files)
        if key is None:
            if suffix == SCALE_SUFFIX:  # the values' dtype tells whether one belongs there, and `validate` asks
                continue
            raise CorruptCheckpointError(f"{linear.name}: the checkpoint has no tensor {linear.name}{suffix}")
        parts.append(files.read(key))
    weight = PackedWeight(*parts)
    packed.validate(weight, linear.name)
    if weight.shape != (linear.n, linear.k):
        raise CorruptCheckpointError(
            f"{linear.name}: the packed weight is {list(weight.shape)}, and config.json says {[linear.n, linear.k]}"
        )
    return {"status": "packed", "bytes": weight.nbytes}


def _verify_dense(
    files: TensorFiles, layout: Layout, linear: LinearInfo, pattern: Pattern, reason: str | None
) -> dict[str, Any]:
    key = layout.key(linear.name + DENSE_SUFFIX, files)
    if key is None:
        raise CorruptCheckpointError(f"{linear.name}: the checkpoint has no tensor {linear.name}{DENSE_SUFFIX}")
    weight = files.read(key)
    packed.require_finite(weight, linear.name)
    if has_pattern(weight.T if linear.transposed else weight, pattern):
        return {"status": str(pattern), "bytes": weight.nbytes}
    return {"status": "dense", "bytes": weight.nbytes, "reason": reason or f"it is not {pattern}"}


def _require_finite(files: TensorFiles, layout: Layout, seen: set[str | None], verdict: Verdict) -> None:
    """Looks at the tensors that were not read yet. What is no parameter may hold infinity on purpose, as masks do."""
    parameters = layout.parameter_keys(files)
    for key, info in files.info.items():
        if key in seen or info.dtype not in FLOAT_DTYPES.values():
            continue
        if key in parameters:
            packed.require_finite(files.read(key), key)
        elif not key.endswith((VALUES_SUFFIX, SCALE_SUFFIX)) and not packed.is_finite(files.read(key)):
            verdict.notes.append(f"{key}, which is no parameter of the model, has values that are NaN or infinite")


def _pattern(directory: Path) -> Pattern:
    """What the recipe beside a dense checkpoint asked for."""
    recipe = (read_recipe(directory) or {}).get("recipe", {})
    try:
        return parse_pattern(str(recipe.get("pattern", packed.PATTERN)), recipe.get("sparsity"))
    except (RecipeError, TypeError):
        raise CorruptCheckpointError(
            f"{directory / RECIPE_NAME} has a pattern that halve does not know: {recipe.get('pattern')!r}"
        ) from None
