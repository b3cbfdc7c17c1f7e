"""Puts a finished artefact together: shards with an index, config, recipe, report and model card, accounted to the byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import Tensor

from compress import packed
from compress.architecture import LinearModule, oriented
from compress.card import model_card
from compress.errors import CorruptCheckpointError
from compress.files import (
    INDEX_NAME,
    SINGLE_NAME,
    Entry,
    explain_os_error,
    file_digest,
    inside,
    read_header,
    write_shard,
    write_text,
)
from compress.packed import MASK_SUFFIX, SCALE_SUFFIX, VALUES_SUFFIX, PackedWeight

FORMAT_VERSION = 1
REPORT_NAME = "report.json"
RECIPE_NAME = "recipe.yaml"
CARD_NAME = "README.md"
SHARD_BYTES = 5 * 10**9

_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "additional_chat_templates/*")
_OURS = {"config.json", INDEX_NAME, REPORT_NAME, RECIPE_NAME, CARD_NAME}


def quantization_config(
    value_dtype: torch.dtype, ignore: Iterable[str], activation_dtype: str | None = None
) -> dict[str, Any]:
    """What ``config.json`` says about a packed checkpoint: data only.

    Every linear module of the model is packed but those in ``ignore`` (full module names).

    Args:
        activation_dtype: that of the values, where activations are rounded to it, too; says nothing where they are not.
    """
    activations = {} if activation_dtype is None else {"activation_dtype": activation_dtype}
    return {
        "quant_method": "halve",
        "format_version": FORMAT_VERSION,
        "sparsity": "2:4",
        "value_dtype": str(value_dtype).removeprefix("torch."),
        **activations,
        "ignore": sorted(ignore),
    }


def write_weights(
    directory: Path, entries: list[Entry], written: Callable[[Iterable[str]], None] = lambda names: None
) -> None:
    """Writes all tensors into shards with an index; shards that are there already (of an interrupted run) stay.

    Args:
        written: called with the names of a shard's tensors when it is safe on disk.
    """
    shards = _split(entries, SHARD_BYTES)
    names = (
        [SINGLE_NAME]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        if not (directory / name).is_file():
            write_shard(directory / name, shard)
        written([entry.name for entry in shard])
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def companions(source: Path) -> list[Path]:
    """The files of a checkpoint that an artefact takes over unchanged."""
    found = (path for pattern in _COMPANIONS for path in sorted(source.glob(pattern)))
    return [path for path in found if path.is_file() and path.name not in _OURS]


def copy_companions(source: Path, directory: Path) -> None:
    """Copies tokenizer, generation config, chat templates and licences as they are."""
    for path in companions(source):
        target = directory / path.relative_to(source)
        try:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        except OSError as error:
            raise explain_os_error(error, target) from None


def write_config(directory: Path, config: dict[str, Any]) -> None:
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def write_recipe(directory: Path, recipe: dict[str, Any]) -> None:
    write_text(directory / RECIPE_NAME, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def write_records(directory: Path, recipe: dict[str, Any], report: dict[str, Any], card: str | None = None) -> None:
    """Writes ``recipe.yaml``, the model card, and last ``report.json``, which accounts for every file beside it.

    Args:
        card: the card's text, where it is another than `compress.card.model_card` makes.
    """
    write_recipe(directory, recipe)
    write_text(directory / CARD_NAME, model_card(recipe, report) if card is None else card)
    write_text(directory / REPORT_NAME, account(directory, report))


def account(directory: Path, report: dict[str, Any]) -> str:
    """The report as JSON, with the bytes of every file of the directory, itself included, and of every kind of tensor."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != REPORT_NAME
    }
    kinds = {VALUES_SUFFIX: "packed_values", MASK_SUFFIX: "packed_masks", SCALE_SUFFIX: "packed_scales"}
    tensors = dict.fromkeys([*kinds.values(), "dense"], 0)
    headers = 0
    for path in sorted(directory.glob("*.safetensors")):
        info, _, header = read_header(path)
        headers += header
        for name, tensor in info.items():
            kind = next((kind for suffix, kind in kinds.items() if name.endswith(suffix)), "dense")
            tensors[kind] += tensor.nbytes
    others = sum(entry["bytes"] for name, entry in files.items() if not name.endswith(".safetensors"))
    return _with_own_size(
        {**report, "bytes": {**tensors, "safetensors_headers": headers, "other_files": others}, "files": files}
    )


def account_anew(directory: Path, report: dict[str, Any], name: str) -> str | None:
    """The report as JSON after one of its other files was rewritten; None where it is right already."""
    path = directory / name
    before = report["files"][name]
    now = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    if now == before:
        return None
    counted = dict(report["bytes"])
    counted["other_files"] += now["bytes"] - before["bytes"]
    return _with_own_size({**report, "bytes": counted, "files": {**report["files"], name: now}})


def _with_own_size(report: dict[str, Any]) -> str:
    """The report as JSON, with its own size and the total of all bytes filled in."""
    counted = {kind: count for kind, count in report["bytes"].items() if kind not in ("this_report", "total")}
    size = 0
    while True:  # the report contains its own size, whose digits change it at most twice
        total = sum(counted.values()) + size
        accounted = {**report, "bytes": {**counted, "this_report": size, "total": total}}
        text = json.dumps(accounted, indent=2) + "\n"
        if len(text.encode()) == size:
            return text
        size = len(text.encode())


def packed_entries(key: str, weight: Tensor, name: str) -> dict[str, Tensor]:
    """The two tensors that stand for the checkpoint's tensor ``key`` ("….weight"), from the dense [N, K] weight."""
    both = packed.pack(weight, name)
    stem = key.removesuffix(packed.DENSE_SUFFIX)
    return {stem + VALUES_SUFFIX: both.values, stem + MASK_SUFFIX: both.mask}


def entries_of(stem: str, shape: tuple[int, int], dtype: torch.dtype, read: Callable[[], PackedWeight]) -> list[Entry]:
    """What is to be written of a packed weight.

    Args:
        stem: the name of its module.
        shape: (N, K).
        dtype: of its values.
        read: gives the weight, when the turn of one of its tensors comes.
    """
    n, k = shape
    entries = [
        Entry(stem + VALUES_SUFFIX, dtype, (n, k // 2), lambda: read().values),
        Entry(stem + MASK_SUFFIX, torch.uint8, (n, k // 8), lambda: read().mask),
    ]
    if dtype in packed.LARGEST:
        entries.append(Entry(stem + SCALE_SUFFIX, torch.float32, (n, 1), lambda: cast(Tensor, read().scale)))
    return entries


def weight_entries(key: str, weight: Tensor, module: LinearModule, name: str, format: str) -> dict[str, Tensor]:
    """What is saved of a pruned weight [N, K] of a module as the checkpoint's tensor ``key``: packed, or dense as the
    module holds it."""
    if format == "packed":
        return packed_entries(key, packed.canonical(weight).cpu(), name)
    return {key: oriented(weight, module).contiguous().cpu()}


def read_report(directory: Path) -> dict[str, Any] | None:
    """``report.json``, or None where there is none."""
    path = directory / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not JSON: {error}") from None
    try:
        named = all("name" in layer for layer in report.get("layers", []))
        counted = all({"bytes", "sha256"} <= entry.keys() for entry in report.get("files", {}).values())
    except (AttributeError, TypeError):
        named = counted = False
    if not (named and counted):
        raise CorruptCheckpointError(f"{path} is not a report of halve")
    return report


def read_recipe(directory: Path) -> dict[str, Any] | None:
    """``recipe.yaml`` as `compress.assembly` writes it; None where there is none, or another program's."""
    try:
        saved = yaml.safe_load((directory / RECIPE_NAME).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return saved if isinstance(saved, dict) and isinstance(saved.get("recipe"), dict) else None


def check_account(directory: Path, report: dict[str, Any]) -> list[str]:
    """Compares the files with what ``report.json`` says of them.

    Returns:
        The files that it does not list.

    Raises:
        CorruptCheckpointError: names the first file that is missing or was changed.
    """
    listed = report.get("files", {})
    for name, entry in listed.items():
        path = inside(directory, name, directory / REPORT_NAME)
        if not path.is_file():
            raise CorruptCheckpointError(f"{path} is missing; {REPORT_NAME} lists it")
        if path.stat().st_size != entry["bytes"]:
            raise CorruptCheckpointError(f"{path} has {path.stat().st_size} bytes; {REPORT_NAME} says {entry['bytes']}")
        if file_digest(path) != entry["sha256"]:
            raise CorruptCheckpointError(f"{path} was changed: its SHA-256 is not the one in {REPORT_NAME}")
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {REPORT_NAME}
    return sorted(present - listed.keys())


def _split(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Consecutive entries in shards of at most ``limit`` bytes (a larger tensor gets its own)."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards
