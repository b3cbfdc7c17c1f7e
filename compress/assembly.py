"""The artefact of a finished run: its weights from the blocks' files and the source, its configuration, recipe and report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from compress import artefact, packed
from compress.architecture import linears_of
from compress.bias import NO_BIAS
from compress.blocks import BlockModel
from compress.calibration import CalibrationSet
from compress.files import Entry, TensorFiles
from compress.journal import Journal
from compress.recipe import Recipe
from compress.sources import is_hub_id, said_dtype
from compress.version import versions


def assemble(
    directory: Path, name: str, model: BlockModel, recipe: Recipe, samples: CalibrationSet, journal: Journal
) -> None:
    """Writes everything that the artefact of a run consists of; shards that are there already stay.

    Args:
        directory: where to.
        name: how the user called the model.
        journal: of the run, with all blocks finished.
    """
    directory.mkdir(exist_ok=True)
    for left_over in directory.rglob(".*.tmp"):  # of a run that was killed while it wrote
        left_over.unlink()
    blocks = [journal.record(index) for index in range(len(model.blocks))]
    records = [_stored_bytes(record, recipe) for block in blocks for record in block["layers"]]
    repairs = [block["repair"] for block in blocks if "repair" in block]
    pruned = [record for record in records if record["status"] == "pruned"]
    distillation = journal.distillation or {}
    artefact.write_weights(directory, _entries(model, recipe, journal))
    artefact.copy_companions(model.source.directory, directory)
    artefact.write_config(directory, _config(model, recipe, {record["name"] for record in pruned}))
    saved_recipe = {
        "recipe": recipe.model_dump(mode="json"),
        "model": name,
        "from_hub": is_hub_id(name),
        "versions": versions(),
        "device": model.device.type,
        "calibration": _calibration_record(samples),
    }
    metric = recipe.chosen_metric
    called = Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100  (a link has a name of its own)
    report = {
        "report_version": 1,
        "name": called.name.removesuffix(".gguf"),
        "model": name,
        "recipe_sha256": recipe.digest,
        "summary": {
            "pattern": recipe.pattern,
            "metric": metric.name if metric else f"{recipe.reconstruction}'s own",
            "reconstruction": recipe.reconstruction,
            "targets": recipe.targets,
            "layers": len(records),
            "layers_pruned": len(pruned),
            "layers_permuted": sum("permutation" in record for record in records),
            "layers_rotated": sum("rotation" in record for record in records),
            "mean_relative_output_error": sum(r["relative_output_error"] for r in pruned) / max(len(pruned), 1),
            "pruned_bytes_before": sum(r["bytes_before"] for r in pruned),
            "pruned_bytes_after": sum(r["bytes_after"] for r in pruned),
        },
        "warnings": [
            *_warnings(pruned, "layers"),
            *_missing_biases(recipe, pruned),
            *_warnings(repairs, "blocks"),
            *([distillation["warning"]] if "warning" in distillation else []),
        ],
        "layers": records,
        **({"allocation": journal.allocation} if journal.allocation else {}),
        **({"repairs": repairs} if repairs else {}),
        **({"distillation": distillation} if distillation else {}),
    }
    report["summary"] |= _summary_of_repairs(recipe, repairs) | _summary_of_distillation(distillation)
    artefact.write_records(directory, saved_recipe, report)


def _config(model: BlockModel, recipe: Recipe, pruned: set[str]) -> dict[str, Any]:
    """``config.json``: the source's, with what this run changed."""
    config = dict(model.source.config)
    if recipe.dtype != "auto":
        config["dtype"] = recipe.dtype
        config.pop("torch_dtype", None)
    elif said_dtype(config) is None:  # as it was found by the tensors; nobody has to look for it again
        config["dtype"] = str(model.dtype).removeprefix("torch.")
    if recipe.format == "packed":
        ignore = [name for name in linears_of(model.model, "") if name not in pruned]
        config["quantization_config"] = artefact.quantization_config(
            packed.SCALED_DTYPES.get(recipe.value_dtype, model.dtype),
            ignore,
            None if recipe.activation_dtype == "none" else recipe.activation_dtype,
        )
    return {**config, **dict.fromkeys(model.bias_switches, True)}


def _calibration_record(samples: CalibrationSet) -> dict[str, Any]:
    is_text = samples.argument == "input_ids"
    counted = {"tokens": samples.samples.numel()} if is_text else {"images": len(samples)}
    return {**counted, "sha256": samples.digest}


def _entries(model: BlockModel, recipe: Recipe, journal: Journal) -> list[Entry]:
    """All tensors of the artefact in the order of the source: replaced ones from the blocks' files, others as they were."""
    source = model.source.tensors
    replaced: dict[str, tuple[TensorFiles, list[str]]] = {}
    for index in range(len(model.blocks)):
        part = TensorFiles(journal.directory, [journal.block_file(index)])
        for name in part:
            stem = name.removesuffix(packed.VALUES_SUFFIX).removesuffix(
                packed.MASK_SUFFIX
            )  # (blocks have no scales yet)
            original = name if stem == name else stem + packed.DENSE_SUFFIX
            replaced.setdefault(original, (part, []))[1].append(name)
    cast = None if recipe.dtype == "auto" else model.dtype
    scaled = packed.SCALED_DTYPES.get(recipe.value_dtype)
    entries = []
    for key in source:
        files, names = replaced.get(key, (source, [key]))
        stem = key.removesuffix(packed.DENSE_SUFFIX)
        if scaled is not None and stem + packed.VALUES_SUFFIX in names:
            entries += _scaled(files, stem, scaled)
            continue
        for name in sorted(names, reverse=True):  # the values before their mask
            entries.append(files.entry(name, cast if files is source else None))
    for key, (files, names) in replaced.items():
        if key not in source:  # a bias that the source does not have
            entries += [files.entry(name) for name in names]
    return entries


def _scaled(files: TensorFiles, stem: str, dtype: torch.dtype) -> list[Entry]:
    """The packed weight of a block's file with values of 8 bits. Only what is saved at the very end is rounded: no stage of the run
    works with rounded weights."""
    n, half = files.info[stem + packed.VALUES_SUFFIX].shape

    def read() -> packed.PackedWeight:
        values, mask = (files.read(stem + suffix) for suffix in (packed.VALUES_SUFFIX, packed.MASK_SUFFIX))
        return packed.quantize(packed.PackedWeight(values, mask), dtype)

    return artefact.entries_of(stem, (n, 2 * half), dtype, read)


def _stored_bytes(record: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The record of a layer with the bytes that it takes in the artefact, where values are stored in 8 bits."""
    scaled = packed.SCALED_DTYPES.get(recipe.value_dtype)
    if scaled is None or record["status"] != "pruned":
        return record
    n, k = record["shape"]
    return {**record, "bytes_after": packed.bytes_of(n, k, scaled)}


def _summary_of_repairs(recipe: Recipe, repairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the blocks of the error against the dense model's activations, before and after, held out; and where the last one
    learned predictions, their divergence from the dense model's."""
    done = [repair for repair in repairs if "held_out_error" in repair]
    if not done:
        return {"repair": recipe.repair}
    means = {
        f"mean_{key}": sum(repair[key] for repair in done) / len(done)
        for key in ("held_out_error_before", "held_out_error")
    }
    learned = done[-1].get("predictions", {})
    predictions = {
        f"predictions_{key}": learned[key]
        for key in ("tokens", "held_out_divergence_before", "held_out_divergence")
        if key in learned
    }
    return {"repair": recipe.repair, "blocks_repaired": len(done)} | means | predictions


def _summary_of_distillation(distillation: dict[str, Any]) -> dict[str, Any]:
    """Of the whole model's divergence from the dense one, before and after, held out."""
    wanted = ("tokens", "held_out_divergence_before", "held_out_divergence")
    return {f"distilled_{key}" if key == "tokens" else key: distillation[key] for key in wanted if key in distillation}


def _missing_biases(recipe: Recipe, pruned: list[dict[str, Any]]) -> list[str]:
    """Of a metric that supposes a bias, how many layers have none; of those that it scored so."""
    metric = recipe.chosen_metric
    if metric is None or not metric.corrects_bias:
        return []
    bare = [record["name"] for record in pruned if record.get("bias") == NO_BIAS and not record.get("after_norm")]
    if not bare:
        return []
    remedy = (
        "use wanda"
        if recipe.add_bias
        else "give them one by --add-bias, where the model has a switch for it, or use wanda"
    )
    return [
        f"{metric.name} supposes that a bias takes over the mean of what is pruned, and {len(bare)} of {len(pruned)} layers "
        f"have none, the first is {bare[0]}: they were pruned by the variance of their inputs alone, and nothing makes up for "
        f"the mean; {remedy}"
    ]


def _warnings(records: list[dict[str, Any]], what: str) -> list[str]:
    """What the methods warn of, one line for all layers, or blocks."""
    warned = [record for record in records if "warning" in record]
    if not warned:
        return []
    return [f"{len(warned)} of {len(records)} {what}, the first is {warned[0]['name']}: {warned[0]['warning']}"]
