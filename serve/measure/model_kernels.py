"""The kernel times of a model's layers: from this machine's table, and measured where it has none.

`halve advise` judges layers by them, `halve tune` and `halve bench --kernels` measure all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from compress.device import choose_device
from serve.measure import kernel_entries, kernel_table, shapes, table_cache, tuned
from serve.measure.environment import environment
from serve.measure.kernel_entries import Entry, Shape
from serve.measure.kernel_table import ROWS
from serve.measure.shallow import Load
from serve.measure.shapes import ModelShape

Progress = Callable[[int, int, str], None]


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
        The entries, one for each backend that can run a layer, and what there is to say about them.
    """
    identity = table_cache.Identity.of(device)
    dtype = model.kind
    known, why = table_cache.load(identity)
    said = [why] if why else []
    wanted = [(shape, rows) for shape in shapes_of(model, fused) for rows in (rows_of(load) if load else ROWS)]
    names = tuned.backends_for(device, dtype)
    found = {
        key: [entry for entry in table_cache.find(known, *key, dtype) if entry.backend in names and not fresh]
        for key in wanted
    }
    failures = [] if fresh else [f for f in table_cache.failures(identity) if f.dtype == dtype]
    failed = {(failure.shape, failure.backend) for failure in failures}
    missing = [
        (shape, rows)
        for shape, rows in wanted
        if {name for name in names if (shape, name) not in failed} > {entry.backend for entry in found[shape, rows]}
    ]
    known_ways = [] if fresh else [way for way in tuned.take_ways(device) if way.dtype == dtype]
    if missing and budget > 0:
        new = kernel_table.measure(
            missing,
            dtype=model.dtype,
            value_dtype=model.value_dtype,
            quantizes_x=model.quantizes_x,
            device=device,
            budget=budget,
            leave_out=failed,
            settled={(way.shape, way.backend, way.rows) for way in known_ways},
            progress=progress,
        )
        for key in {(entry.shape, entry.rows) for entry in new.entries}:
            found[key] = [entry for entry in new.entries if (entry.shape, entry.rows) == key]
        failures += new.failures
        for shape, backend in {(failure.shape, failure.backend) for failure in new.failures}:
            for key in wanted:
                found[key] = [entry for entry in found[key] if (entry.shape, entry.backend) != (shape, backend)]
        known_ways += new.ways
        if (new.entries or new.failures or new.ways) and (
            problem := table_cache.save(identity, new.entries, new.failures, new.ways)
        ):
            said.append(problem)
        if new.skipped:
            said.append(
                f"{len(new.skipped)} of {len(wanted)} shapes and row counts were not measured: the budget of {budget:.0f} s is spent"
            )
    shapes_wanted = {shape for shape, _ in wanted}
    said += [
        f"{f.backend} does not serve {f.shape}: {f.reason} ({f.date})" for f in failures if f.shape in shapes_wanted
    ]
    of_these = [way for way in known_ways if way.shape in shapes_wanted and way.backend in names]
    if better := [way.gain for way in of_these if way.gain > 1]:
        said.append(
            f"{len(better)} of {len(of_these)} products are cut another way than was guessed, which is up to {max(better):.2f} times as fast"
        )
    if dates := sorted({entry.date for key, entries in found.items() if key not in missing for entry in entries}):
        said.append(
            f"kernel times of {' to '.join(dict.fromkeys((dates[0], dates[-1])))} are from {table_cache.path_of(identity)}"
        )
    return [entry for key in wanted for entry in found[key]], said


def served(entries: Sequence[Entry], device: torch.device) -> tuple[list[Entry], dict[Shape, str]]:
    """Of each shape the entries of the backend that serves it, in order, and the shapes that are better served dense, with the reason:
    none where ``HALVE_BACKEND`` decides instead."""
    names = tuned.backends_for(device, entries[0].dtype) if entries else []
    chosen: dict[Shape, str] = {}
    dense: dict[Shape, str] = {}
    for shape in dict.fromkeys(entry.shape for entry in entries):
        of_shape = [entry for entry in entries if entry.shape == shape]
        chosen[shape] = tuned.served(of_shape, names)[0][0].backend
        decision = None if tuned.overruled() else tuned.decide(of_shape, names)
        if decision is not None and decision.why_dense is not None:
            dense[shape] = decision.why_dense
    return [entry for entry in entries if entry.backend == chosen[entry.shape]], dense


def document(
    directory: Any,
    *,
    device: str,
    budget: float,
    progress: Progress,
    value_dtype: str = "auto",
    activation_dtype: str = "auto",
    fresh: bool = True,
    fused: bool = False,
) -> dict[str, Any]:
    """`halve bench --kernels` and `halve tune`: every shape of a model at each of `ROWS`, measured and kept for `halve
    advise` and for serving; ``fresh``: measured now, even what the table knows; ``fused``: see `kernels`; ``value_dtype`` and ``activation_dtype``: see `shapes.read`."""
    place, _ = choose_device(device)
    model = shapes.read(str(directory), value_dtype, activation_dtype)
    found, notes = kernels(model, device=place, budget=budget, fresh=fresh, fused=fused, progress=progress)
    if tuned.overruled():
        notes.append("HALVE_BACKEND decides how layers are served, so these times do not")
    entries, dense = served(found, place)
    by_shape = {shape: [entry for entry in entries if entry.shape == shape] for shape in shapes_of(model, fused)}
    return {
        "kind": "kernels",
        "model": str(directory),
        "dtype": model.kind,
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
        "kernels": kernel_entries.document_of(entries),
        "other_backends": kernel_entries.document_of([entry for entry in found if entry not in entries]),
        "wins": {str(shape): kernel_entries.wins_at(found) for shape, found in by_shape.items()},
        "served_dense": {str(shape): why for shape, why in dense.items()},
        "notes": notes,
    }


def shapes_of(model: ModelShape, fused: bool = False) -> list[Shape]:
    """Of what can be pruned, the largest first: they decide most."""
    return sorted(
        {layers.shape for layers in (*model.prunable, *(model.fused if fused else ()))}, key=lambda s: (-s.n * s.k, s)
    )


def rows_of(load: Load) -> list[int]:
    """Those of the load first."""
    return list(dict.fromkeys((load.batch, load.batch * load.prompt, *ROWS)))
