"""Is a checkpoint really 2:4, whole, finite and what its report says? Read from the files alone.

Nothing of the process that wrote a checkpoint is trusted: the shards' digests, every packed mask and value,
every group of a dense checkpoint, and the bytes that ``report.json`` accounts for are looked at again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import packed
from compress.artefact import REPORT_NAME, read_report
from compress.checkpoint import parse_config
from compress.errors import CorruptCheckpointError, SourceError
from compress.files import TensorFiles, check_digest, file_digest
from compress.layout import Layout, LinearInfo
from compress.packed import DENSE_SUFFIX, MASK_SUFFIX, VALUES_SUFFIX, PackedWeight
from compress.sources import read_config


@dataclass
class Verdict:
    """What `verify` found. ``layers`` has one record for each linear of the decoder blocks."""

    directory: Path
    kind: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    sealed_files: int = 0
    files: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def sparse(self) -> list[dict[str, Any]]:
        return [layer for layer in self.layers if layer["status"] != "dense"]


def verify(directory: Path, progress: Callable[[int, int, str], None] = lambda done, total, text: None) -> Verdict:
    """Reads every file of a checkpoint and checks it.

    Raises:
        SourceError: it is no model directory.
        CorruptCheckpointError: names the first file or layer that is damaged, missing or not 2:4.
    """
    config = read_config(directory)
    files = TensorFiles(directory)
    quantization = config.get("quantization_config")
    is_packed = quantization is not None and quantization.get("quant_method") == "halve"
    if quantization is not None and not is_packed:
        raise SourceError(
            f"{directory} is quantized ({quantization.get('quant_method')}); halve verifies packed and dense checkpoints"
        )
    parsed = parse_config(quantization) if quantization is not None else None
    verdict = Verdict(directory, "packed" if is_packed else "dense", files=len(files.files))
    for file in files.files:
        verdict.sealed_files += check_digest(file)
    if verdict.sealed_files < verdict.files:
        verdict.notes.append(
            f"{verdict.files - verdict.sealed_files} of {verdict.files} files carry no digest: a change of a value would not be noticed"
        )
    report = read_report(directory)
    reasons = {layer["name"]: layer.get("reason") for layer in (report or {}).get("layers", [])}

    layout = Layout.of(directory)
    packed_names = layout.packed(parsed.ignore) if parsed else set()
    layout.require_tensors(files.info, packed_names, parsed.value_dtype if parsed else "")
    linears = layout.block_linears
    for done, linear in enumerate(linears, 1):
        if linear.name in packed_names:
            layer = _verify_packed(files, layout, linear)
        else:
            layer = _verify_dense(files, layout, linear, reasons.get(linear.name))
        verdict.layers.append({"name": linear.name, "shape": [linear.n, linear.k], **layer})
        progress(done, len(linears), linear.name)

    if report is not None:
        _check_account(directory, report, verdict)
    verdict.bytes = {
        "sparse_layers": sum(layer["bytes"] for layer in verdict.sparse),
        "dense_layers": sum(layer["bytes"] for layer in verdict.layers if layer["status"] == "dense"),
        "all_tensors": sum(info.nbytes for info in files.info.values()),
        "directory": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
    }
    return verdict


def _verify_packed(files: TensorFiles, layout: Layout, linear: LinearInfo) -> dict[str, Any]:
    parts = []
    for suffix in (VALUES_SUFFIX, MASK_SUFFIX):
        key = layout.key(linear.name + suffix, files)
        if key is None:
            raise CorruptCheckpointError(f"{linear.name}: the checkpoint has no tensor {linear.name}{suffix}")
        parts.append(files.read(key))
    weight = PackedWeight(*parts)
    packed.validate(weight, linear.name)
    if weight.shape != (linear.n, linear.k):
        raise CorruptCheckpointError(
            f"{linear.name}: the packed weight is {list(weight.shape)}, and config.json says {[linear.n, linear.k]}"
        )
    return {"status": "packed", "bytes": weight.nbytes}


def _verify_dense(files: TensorFiles, layout: Layout, linear: LinearInfo, reason: str | None) -> dict[str, Any]:
    key = layout.key(linear.name + DENSE_SUFFIX, files)
    if key is None:
        raise CorruptCheckpointError(f"{linear.name}: the checkpoint has no tensor {linear.name}{DENSE_SUFFIX}")
    weight = files.read(key)
    packed.require_finite(weight, linear.name)
    if packed.is_two_of_four(weight.T if linear.transposed else weight):
        return {"status": "2:4", "bytes": weight.nbytes}
    return {"status": "dense", "bytes": weight.nbytes, "reason": reason or "it is not 2:4"}


def _check_account(directory: Path, report: dict[str, Any], verdict: Verdict) -> None:
    """Compares the files with what ``report.json`` says of them."""
    listed = report.get("files", {})
    for name, entry in listed.items():
        path = directory / name
        if not path.is_file():
            raise CorruptCheckpointError(f"{path} is missing; {REPORT_NAME} lists it")
        if path.stat().st_size != entry["bytes"]:
            raise CorruptCheckpointError(f"{path} has {path.stat().st_size} bytes; {REPORT_NAME} says {entry['bytes']}")
        if file_digest(path) != entry["sha256"]:
            raise CorruptCheckpointError(f"{path} was changed: its SHA-256 is not the one in {REPORT_NAME}")
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {REPORT_NAME}
    if extra := sorted(present - listed.keys()):
        verdict.notes.append(f"{len(extra)} files are not in {REPORT_NAME}: {', '.join(extra[:3])}")
