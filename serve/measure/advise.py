"""`halve advise`: what pruning to 2:4 would bring, before anything is pruned.

On a device that is here, times are predicted from two models of a few blocks (`shallow`), and layers are judged by the measured
kernel table; for a GPU that is not, both come from a roofline (`gpus`), marked as an estimate. Nothing is said about accuracy,
which costs what `halve eval` finds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from compress.device import choose_device
from compress.errors import OutputError, UsageError
from compress.presets import PRESETS
from compress.recipe import Recipe
from serve.kernels import choose
from serve.measure import effort, estimate, gpus, kernel_table, shallow, shapes, table_cache, tuned
from serve.measure.environment import environment, processor
from serve.measure.kernel_table import ROWS, WINS, Entry, Shape
from serve.measure.shallow import Load
from serve.measure.shapes import Layers, ModelShape
from serve.measure.speed import ratio

USABLE = 0.9
"""Of a device's memory: the rest is for activations, workspaces and the runtime."""

_OF_BUDGET = 0.4  # for the kernel table; the rest is for the blocks
_FORMS = ("dense", "sparse")

Progress = Callable[[int, int, str], None]


class Timed(NamedTuple):
    """A layer: how many times as fast it is packed, and its seconds."""

    ratio: float
    dense: float
    sparse: float


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
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """What 2:4 would change for a model on a device.

    Args:
        model: a directory, a ``config.json`` or a hub id; no weights are needed.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` for what is here, or the name of a GPU (`gpus.GPUS`).
        measure: False: an estimate that measures nothing; None: measured where the device is here.
        budget: seconds for measuring; three rounds are made however long they take.
        recipes: by name, those whose time and memory are estimated; left out: the presets.

    Returns:
        A document with times, speed-ups and memory, dense and sparse, the layers, and a verdict with its reasons.

    Raises:
        SourceError: the model cannot be used; UsageError: the device is not known, or the call contradicts itself.
    """
    place = Place.of(device)
    if measure and place.here is None:
        raise UsageError(f"--measure: {place.name} is not here; leave it out for an estimate")
    measured = place.here is not None and measure is not False
    shape = shapes.read(model)
    load = Load(prompt, output, batch)
    _require_room(shape, load)
    notes = list(shape.notes)
    refusal = _refusal(shape, place)
    speeds: dict[str, dict[str, Any]] | None = None
    timed: Table = {}
    entries: list[Entry] = []
    if refusal is None:
        if place.gpu is not None:
            roofline = gpus.Roofline(place.gpu)
            timed = _from_roofline(roofline, shape, load)
            speeds = _estimated(shape, load, roofline)
            notes += [*roofline.ASSUMPTIONS, "how long pruning takes was never checked on a GPU: expect more"]
        else:
            assert place.here is not None
            seconds = budget * _OF_BUDGET if measured else 0.0
            entries, said = kernels(shape, load=load, device=place.here, budget=seconds, fresh=False, progress=progress)
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
    layers = [_layer(layers, load, timed.get(layers.shape, {})) for layers in shape.layers]
    document = {
        "kind": "advice",
        "basis": "measured" if measured else "estimate",
        "model": {
            "name": model,
            "dtype": kernel_table.dtype_name(shape.dtype),
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
        "kernels": kernel_table.document_of(entries),
        "notes": notes,
    }
    return {**document, "verdict": _verdict(document, refusal)}


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


def kernels(
    model: ModelShape,
    *,
    device: torch.device,
    budget: float,
    load: Load | None = None,
    fresh: bool = True,
    fused: bool = False,
    progress: Progress = lambda done, total, text: None,
) -> tuple[list[Entry], list[str]]:
    """The kernel table of a model's shapes: from this machine's own, and what is missing there measured and added to it.

    Args:
        load: the rows of x that matter most are its; without one all of `ROWS` do.
        fresh: measures everything anew.
        fused: also the layers that vLLM makes of several.

    Returns:
        The entries, and what there is to say about them.
    """
    identity = table_cache.Identity.of(device)
    dtype = kernel_table.dtype_name(model.dtype)
    known, why = table_cache.load(identity)
    said = [why] if why else []
    wanted = [(shape, rows) for shape in _shapes(model, fused) for rows in (_rows(load) if load else ROWS)]
    found = {} if fresh else {key: e for key in wanted if (e := table_cache.find(known, *key, dtype))}
    missing = [key for key in wanted if key not in found]
    if missing and budget > 0:
        new, skipped = kernel_table.measure(missing, dtype=model.dtype, device=device, budget=budget, progress=progress)
        found.update({(entry.shape, entry.rows): entry for entry in new})
        if new and (problem := table_cache.save(identity, new)):
            said.append(problem)
        if skipped:
            said.append(
                f"{len(skipped)} of {len(wanted)} shapes and row counts were not measured: the budget of {budget:.0f} s is spent"
            )
    if dates := sorted({entry.date for key, entry in found.items() if key not in missing}):
        said.append(
            f"kernel times of {' to '.join(dict.fromkeys((dates[0], dates[-1])))} are from {table_cache.path_of(identity)}"
        )
    return [found[key] for key in wanted if key in found], said


def _shapes(model: ModelShape, fused: bool = False) -> list[Shape]:
    """Of what can be pruned, the largest first: they decide most."""
    return sorted(
        {layers.shape for layers in (*model.prunable, *(model.fused if fused else ()))}, key=lambda s: (-s.n * s.k, s)
    )


def _rows(load: Load) -> list[int]:
    """Those of the load first."""
    return list(dict.fromkeys((load.batch, load.batch * load.prompt, *ROWS)))


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
    if place.here is not None:
        choice = choose(place.here, model.dtype, 1, *_first(model))
        if choice.backend.prepare is None:
            return f"there is no sparse kernel for this device and dtype: {choice.reason}"
    return None


def _require_entries(model: ModelShape, load: Load, timed: Table) -> None:
    for shape in _shapes(model):
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
    for shape in _shapes(model):
        for rows in _rows(load):
            dense, sparse = (
                roofline.layer(shape, rows, model.dtype.itemsize, packed=packed) for packed in (False, True)
            )
            timed.setdefault(shape, {})[rows] = Timed(dense / sparse, dense, sparse)
    return timed


def _layer(layers: Layers, load: Load, timed: Mapping[int, Timed]) -> dict[str, Any]:
    """One place in the blocks: how much faster at each number of rows, where that begins and ends, and whether it is worth
    it, that is, whether it is faster over a whole request."""
    decode, prefill = timed.get(load.batch), timed.get(load.batch * load.prompt)
    found: dict[str, Any] = {
        "name": layers.name,
        "n": layers.shape.n,
        "k": layers.shape.k,
        "count": layers.count,
        "ratios": {str(rows): timed[rows].ratio for rows in sorted(timed)},
        "wins_at_rows": [rows for rows in sorted(timed) if timed[rows].ratio >= WINS],
        "loses_at_rows": [rows for rows in sorted(timed) if timed[rows].ratio < WINS],
    }
    if layers.why_dense is not None:
        return {**found, "worth": False, "reason": layers.why_dense}
    if decode is None:
        return {**found, "worth": None, "reason": f"not measured at {load.batch} rows"}
    parts = [(decode, load.output - 1), (prefill, 1)] if prefill else [(decode, 1)]
    gain = sum(part.dense * times for part, times in parts) / sum(part.sparse * times for part, times in parts)
    over = "a request" if prefill else "decoding (the prompt was not measured)"
    return {**found, "worth": gain >= WINS, "reason": f"{gain:.2f} times as fast over {over}"}


def _verdict(document: Mapping[str, Any], refusal: str | None) -> dict[str, Any]:
    """Whether to prune, in a headline, and the reasons."""
    memory, speedup = document["memory"], document["speedup"]
    fits, name = memory["fits"], document["device"]["name"]
    reasons: list[str] = []
    if refusal is not None:
        if fits["sparse"] and not fits["dense"] and memory["freed_bytes"]:
            reasons.append(
                "packed it would fit, and dense it does not; but each layer is expanded whenever it multiplies"
            )
        return {"prune": False, "headline": f"don't prune: {refusal}", "reasons": reasons}
    if not fits["sparse"]:
        return {
            "prune": False,
            "headline": f"don't prune for this device: {name} holds neither the dense model nor 2:4",
            "reasons": reasons,
        }
    assert speedup is not None
    request = speedup["request"]["median"]
    changes = [
        f"{label} {_change(speedup[key]['median'])}"
        for label, key in (("time per output token", "tpot"), ("time to first token", "ttft"))
    ]
    reasons.append(", ".join(changes))
    if not fits["dense"]:
        return {"prune": True, "headline": f"prune: does not fit dense, fits 2:4 (on {name})", "reasons": reasons}
    if request < WINS:
        saved = memory["freed_bytes"] / 1e9
        reasons.append(f"2:4 would still free {saved:.2f} GB; the accuracy that it costs has to be worth that")
        headline = (
            f"don't prune for speed: a request would be {request:.2f} times as fast, and less than {WINS} is noise"
        )
        return {"prune": False, "headline": headline, "reasons": reasons}
    not_worth = sorted({layer["name"] for layer in document["layers"] if layer["worth"] is False})
    if not_worth:
        reasons.append(f"leave dense, they gain nothing: {', '.join(not_worth)}")
    return {"prune": True, "headline": f"prune: a request would be {request:.2f} times as fast", "reasons": reasons}


def _change(faster: float) -> str:
    return f"{faster:.2f} times as fast"


def kernels_document(
    directory: Any, *, device: str, budget: float, progress: Progress, fresh: bool = True, fused: bool = False
) -> dict[str, Any]:
    """`halve bench --kernels` and `halve tune`: every shape of a model at each of `ROWS`, measured and kept for `halve
    advise` and for serving; ``fresh``: measured now, even what the table knows; ``fused``: see `kernels`."""
    place, _ = choose_device(device)
    model = shapes.read(str(directory))
    entries, notes = kernels(model, device=place, budget=budget, fresh=fresh, fused=fused, progress=progress)
    by_shape = {shape: [entry for entry in entries if entry.shape == shape] for shape in _shapes(model, fused)}
    return {
        "kind": "kernels",
        "model": str(directory),
        "dtype": kernel_table.dtype_name(model.dtype),
        "environment": environment(place),
        "table": str(table_cache.path_of(table_cache.Identity.of(place))),
        "layers": [
            {
                "name": layers.name,
                "n": layers.shape.n,
                "k": layers.shape.k,
                "count": layers.count,
                "why_dense": layers.why_dense,
            }
            for layers in (*model.layers, *(model.fused if fused else ()))
        ],
        "kernels": kernel_table.document_of(entries),
        "wins": {str(shape): kernel_table.wins_at(found) for shape, found in by_shape.items()},
        "served_dense": {str(shape): why for shape, found in by_shape.items() if (why := tuned.loses(found))},
        "notes": notes,
    }


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
