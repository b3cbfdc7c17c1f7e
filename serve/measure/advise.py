"""`halve advise`: what pruning to 2:4 would bring, before anything is pruned.

On a device that is here, times are predicted from two models of a few blocks (`shallow`), and layers are judged by the measured
kernel table; for a GPU that is not, both come from a roofline (`gpus`), marked as an estimate. Nothing is said about accuracy,
which costs what `halve eval` finds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from compress.device import choose_device
from compress.errors import OutputError, UsageError
from compress.presets import PRESETS
from compress.recipe import Recipe
from serve import support
from serve.kernels import choose
from serve.measure import effort, estimate, gpus, kernel_entries, kernel_table, model_kernels, shallow, shapes, verdict
from serve.measure.environment import environment, processor
from serve.measure.kernel_entries import Entry, Shape
from serve.measure.model_kernels import Progress, rows_of, shapes_of
from serve.measure.shallow import Load
from serve.measure.shapes import ModelShape
from serve.measure.speed import ratio
from serve.measure.verdict import Timed

USABLE = 0.9
"""Of a device's memory: the rest is for activations, workspaces and the runtime."""

_OF_BUDGET = 0.4  # for the kernel table; the rest is for the blocks
_FORMS = ("dense", "sparse")


Table = dict[Shape, dict[int, Timed]]
"""By shape and rows of x."""


@dataclass(frozen=True)
class Place:
    """Where the model would run: a device that is here, or a GPU that is not."""

    name: str
    memory: float
    here: torch.device | None = None
    gpu: gpus.Gpu | None = None

    @classmethod
    def of(cls, wish: str) -> Place:
        """Raises UsageError: the device is neither here nor known."""
        if wish.split(":")[0] in ("auto", "cpu", "cuda"):
            device, _ = choose_device(wish)
            if device.type == "cuda":
                found = torch.cuda.get_device_properties(device)
                return cls(found.name, found.total_memory, here=device)
            return cls(processor(), psutil.virtual_memory().total, here=device)
        gpu = gpus.find(wish)
        return cls(gpu.name, gpu.memory, gpu=gpu)


def advise(
    model: str,
    *,
    device: str = "auto",
    batch: int = 1,
    prompt: int = 512,
    output: int = 128,
    measure: bool | None = None,
    budget: float = 90.0,
    recipes: Mapping[str, Recipe] | None = None,
    value_dtype: str = "auto",
    activation_dtype: str = "auto",
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """What 2:4 would change for a model on a device.

    Args:
        model: a directory, a ``config.json`` or a hub id; no weights are needed.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` for what is here, or the name of a GPU (`gpus.GPUS`).
        measure: False: an estimate that measures nothing; None: measured where the device is here.
        budget: seconds for measuring; three rounds are made however long they take.
        recipes: by name, those whose time and memory are estimated; left out: the presets.
        value_dtype: what kept values are stored as: ``auto``: as they are, ``int8`` or ``float8_e4m3fn``; ``activation_dtype``: what x is
            rounded to: ``auto``: what it is, ``none``, or the same as the values.

    Returns:
        A document with times, speed-ups and memory, dense and sparse, the layers, and a verdict with its reasons.

    Raises:
        SourceError: the model cannot be used; UsageError: the device is not known, or the call contradicts itself.
    """
    place = Place.of(device)
    if measure and place.here is None:
        raise UsageError(f"--measure: {place.name} is not here; leave it out for an estimate")
    measured = place.here is not None and measure is not False
    shape = shapes.read(model, value_dtype, activation_dtype)
    load = Load(prompt, output, batch)
    _require_room(shape, load)
    notes = list(shape.notes)
    refusal = _refusal(shape, place)
    speeds: dict[str, dict[str, Any]] | None = None
    timed: Table = {}
    entries: list[Entry] = []
    if refusal is None:
        if place.gpu is not None:
            roofline = gpus.Roofline(place.gpu, values=shape.value_dtype, quantizes_x=shape.quantizes_x)
            timed = _from_roofline(roofline, shape, load)
            speeds = _estimated(shape, load, roofline)
            notes += [*roofline.ASSUMPTIONS, "how long pruning takes was never checked on a GPU: expect more"]
        else:
            assert place.here is not None
            seconds = budget * _OF_BUDGET if measured else 0.0
            entries, said = model_kernels.kernels(
                shape, load=load, device=place.here, budget=seconds, fresh=False, progress=progress
            )
            entries, _ = model_kernels.served(entries, place.here)
            notes += said
            for entry in entries:
                found = Timed(entry.ratio.median, entry.dense_seconds, entry.sparse_seconds)
                timed.setdefault(entry.shape, {})[entry.rows] = found
            if measured:
                speeds, said = _measured(shape, load, place.here, budget * (1 - _OF_BUDGET), progress)
                notes += said
            else:
                _require_entries(shape, load, timed)
                speeds = _estimated(shape, load, estimate.FromTable(entries))
                notes += [
                    "made of the kernel table alone: attention is guessed, and all between the layers is left out"
                ]
    memory = _memory(shape, load, place)
    pruning = {} if refusal is not None else _pruning(shape, place, measured, recipes)
    layers = [verdict.of_layer(layers, load, timed.get(layers.shape, {})) for layers in shape.layers]
    document = {
        "kind": "advice",
        "basis": "measured" if measured else "estimate",
        "model": {
            "name": model,
            "dtype": shape.kind,
            "blocks": len(shape.kinds),
            "parameters": shape.weights // shape.dtype.itemsize,
            "pruned_share": shape.dense_bytes / shape.weights,
        },
        "device": {"name": place.name, "memory_bytes": place.memory, "here": place.here is not None},
        "load": {"prompt": prompt, "output": output, "batch": batch},
        "environment": environment(place.here or "cpu"),
        "times": None if speeds is None else {form: _times(speeds[form], load) for form in _FORMS},
        "speedup": None if speeds is None else _speedup(speeds, load),
        "memory": memory,
        "pruning": pruning,
        "layers": layers,
        "kernels": kernel_entries.document_of(entries),
        "notes": notes,
    }
    return {**document, "verdict": verdict.of_model(document, refusal)}


def _pruning(
    shape: ModelShape, place: Place, measured: bool, recipes: Mapping[str, Recipe] | None
) -> dict[str, dict[str, Any]]:
    """What each recipe would take, by name; nothing where nothing is known of the device."""
    if place.gpu is not None:
        rates = effort.of_gpu(place.gpu)
    elif measured and place.here is not None:
        rates = effort.measured(shape.dtype, place.here)
    else:
        return {}
    if recipes is None:
        recipes = {name: Recipe.create(**preset.fields) for name, preset in PRESETS.items()}
    return {name: effort.estimate(shape, recipe, rates) for name, recipe in recipes.items()}


def _require_room(model: ModelShape, load: Load) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and load.prompt + load.output > limit:
        raise UsageError(
            f"{model.name} reads at most {limit} tokens, and --prompt and --output together have {load.prompt + load.output}"
        )


def _refusal(model: ModelShape, place: Place) -> str | None:
    """Why nothing can be gained at all."""
    if not model.prunable:
        reasons = list(dict.fromkeys(layers.why_dense for layers in model.layers if layers.why_dense))
        return "no layer can be pruned" + (f": {'; '.join(reasons)}" if reasons else "")
    if place.gpu is not None and not place.gpu.sparse:
        capability = ".".join(map(str, place.gpu.capability))
        return f"{place.name} has no sparse tensor cores (compute capability {capability}; they came with 8.0)"
    dtype = kernel_entries.dtype_name(model.dtype)
    if place.gpu is not None and dtype not in support.HALF:
        return f"there is no sparse kernel of GPUs for {dtype}; convert by `halve compress --dtype bfloat16`"
    if place.here is not None:
        choice = choose(place.here, model.value_dtype, 1, *_first(model), x_dtype=model.dtype)
        if choice.backend.prepare is None:
            return f"there is no sparse kernel for this device and dtype: {choice.reason}"
    return None


def _require_entries(model: ModelShape, load: Load, timed: Table) -> None:
    for shape in shapes_of(model):
        for rows in (load.batch, load.batch * load.prompt):
            if rows not in timed.get(shape, {}):
                raise UsageError(
                    f"the kernel table of this machine has no layer {shape} at {rows} rows, and --estimate measures nothing; "
                    "leave it out"
                )


def _first(model: ModelShape) -> tuple[int, int]:
    shape = model.prunable[0].shape
    return shape.n, shape.k


def _measured(
    model: ModelShape, load: Load, device: torch.device, budget: float, progress: Progress
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    depths = shallow.choose_depths(
        model.kinds,
        cached=shallow.blocks_that_a_cache_holds(model, kernel_table.last_cache_bytes(device)),
        most=shallow.blocks_that_fit(model, free / 2),
    )
    times = shallow.measure(model, depths, load, device=device, budget=budget, progress=progress)
    speeds = {form: {"ttft": times.ttft[form], "tpot": times.tpot[form]} for form in _FORMS}
    rounds = len(times.tpot["dense"])
    how = f"times of all {depths.whole} blocks are predicted from models of {depths.shallow} and {depths.deep} with random weights"
    if depths.deep == depths.whole:
        how = f"all {depths.whole} blocks were run with random weights"
    return speeds, [f"{how}, {rounds} rounds in turn"]


def _estimated(model: ModelShape, load: Load, parts: estimate.Parts) -> dict[str, dict[str, Any]]:
    return {
        form: {
            name: [estimate.pass_seconds(model, load, parts, packed=form == "sparse", prefill=name == "ttft")]
            for name in ("ttft", "tpot")
        }
        for form in _FORMS
    }


def _times(samples: Mapping[str, list[float]], load: Load) -> dict[str, Any]:
    request = _request(samples, load)
    return {
        "ttft_seconds": {"median": statistics.median(samples["ttft"]), "samples": samples["ttft"]},
        "tpot_seconds": {"median": statistics.median(samples["tpot"]), "samples": samples["tpot"]},
        "request_seconds": {"median": statistics.median(request), "samples": request},
        "output_tokens_per_second": load.batch * load.output / statistics.median(request),
    }


def _request(samples: Mapping[str, list[float]], load: Load) -> list[float]:
    """Seconds from a prompt to its whole answer; the first token comes with the prompt's pass."""
    return [first + (load.output - 1) * token for first, token in zip(samples["ttft"], samples["tpot"], strict=True)]


def _speedup(speeds: Mapping[str, Mapping[str, list[float]]], load: Load) -> dict[str, dict[str, float]]:
    dense, sparse = speeds["dense"], speeds["sparse"]
    found = {name: ratio(sparse[name], dense[name]) for name in ("ttft", "tpot")}
    return {**found, "request": ratio(_request(sparse, load), _request(dense, load))}


def _memory(model: ModelShape, load: Load, place: Place) -> dict[str, Any]:
    """Bytes, and how many tokens of keys and values fit beside the weights, in all sequences together."""
    weights = {"dense": model.weights, "sparse": model.sparse_weights}
    kept = model.kv_bytes_per_token
    tokens = load.batch * (load.prompt + load.output)
    usable = place.memory * USABLE
    room = {form: usable - size for form, size in weights.items()}
    return {
        "weights_bytes": weights,
        "pruned_layers_bytes": {"dense": model.dense_bytes, "sparse": model.packed_bytes},
        "freed_bytes": weights["dense"] - weights["sparse"],
        "kv_bytes_per_token": kept,
        "freed_tokens": (weights["dense"] - weights["sparse"]) // kept if kept else None,
        "usable_bytes": usable,
        "kv_tokens": {form: max(0, int(left // kept)) for form, left in room.items()} if kept else None,
        "fits": {form: left >= tokens * (kept or 0) for form, left in room.items()},
    }


def _from_roofline(roofline: gpus.Roofline, model: ModelShape, load: Load) -> Table:
    timed: Table = {}
    for shape in shapes_of(model):
        for rows in rows_of(load):
            dense, sparse = (
                roofline.layer(shape, rows, model.dtype.itemsize, packed=packed) for packed in (False, True)
            )
            timed.setdefault(shape, {})[rows] = Timed(dense / sparse, dense, sparse)
    return timed


def write(document: dict[str, Any], file: Path) -> None:
    """Writes an advice under another name, then renames it.

    Raises:
        OutputError: the place cannot be written to.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text(json.dumps(document) + "\n")
        partial.replace(file)
    except OSError as error:
        raise OutputError(f"--out {file}: cannot be written: {error.strerror}") from None
