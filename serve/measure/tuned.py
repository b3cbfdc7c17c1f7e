"""What was measured decides: a layer shape runs on the backend that is the fastest, or dense where 2:4 makes it slower on this device.

`halve tune` (and `halve bench --kernels`, and `halve advise`) leave a table of sparse against dense behind, for this very
device, versions and threads (`serve.measure.table_cache`). When a model is loaded for serving, a packed layer is expanded,
once, if the table says that dense is faster for its shape at every number of rows at which sequences are decoded. Both forms
of a weight are only kept where that is asked for (``HALVE_KEEP_BOTH``, on NVIDIA's GPUs), so a layer that gains at some numbers of rows
and loses at others stays packed: what it saves in memory is sure. Without a table, and where ``HALVE_BACKEND`` asks for a backend, nothing is decided here.
"""

from __future__ import annotations

import functools
import logging
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from serve.kernels import able, plain, ways
from serve.linear import WHY_DENSE, Sparse24Conv1D, Sparse24Linear
from serve.measure import table_cache
from serve.measure.kernel_entries import WINS, Entry, Shape, Way, dtypes_of, kind_name
from serve.measure.settling import index_of

DECODED_ROWS = 64
"""Most rows of x that count: sequences that are decoded at once. More come with prompts, once an answer."""

log = logging.getLogger("halve.serve")


def loses(entries: Iterable[Entry]) -> str | None:
    """Why a layer shape is better served dense, from its measurements in one dtype; None where it is not, or not known.

    Dense has to be faster by more than noise at every number of rows up to `DECODED_ROWS`, and a single row has to be
    among them.
    """
    decoded = [entry for entry in entries if entry.rows <= DECODED_ROWS]
    if not any(entry.rows == 1 for entry in decoded):
        return None
    if any(entry.ratio.median > 1 / WINS or entry.ratio.p75 >= 1 for entry in decoded):
        return None
    ratios = [entry.ratio.median for entry in decoded]
    rows = [entry.rows for entry in decoded]
    return f"dense is faster here at {min(rows)} to {max(rows)} rows of x: 2:4 is {min(ratios):.2f} to {max(ratios):.2f} times as fast"


def served(entries: Sequence[Entry], backends: Sequence[str]) -> tuple[list[Entry], str | None]:
    """Of one shape in one dtype the entries of the backend that serves it, and why it is better served dense, if it is.

    Dense are shapes that no backend makes faster (`loses`). Backends are compared by the geometric mean over the numbers of rows at
    which sequences are decoded and both were measured. Another than the first has to be faster by more than noise.

    Args:
        backends: those that can run it, the one first that is taken where nothing was measured. Entries of others do not count.
    """
    by_backend = {name: [entry for entry in entries if entry.backend == name] for name in backends}
    measured = [name for name, found in by_backend.items() if found]
    if not measured:
        return [], None
    gaining = [name for name in measured if loses(by_backend[name]) is None]
    best, *others = gaining or measured
    for other in others:
        if _gain(by_backend[other], by_backend[best]) >= WINS:
            best = other
    return by_backend[best], None if gaining else loses(by_backend[best])


def _gain(entries: Sequence[Entry], others: Sequence[Entry]) -> float:
    """How many times as fast one backend is as another; 0 where they have no number of rows in common."""
    seconds = {entry.rows: entry.sparse_seconds for entry in others}
    shared = [entry for entry in entries if entry.rows <= DECODED_ROWS and entry.rows in seconds]
    return statistics.geometric_mean([seconds[e.rows] / e.sparse_seconds for e in shared]) if shared else 0.0


@dataclass(frozen=True)
class Decision:
    """How a layer shape is served.

    Attributes:
        backend: what its packed weight is prepared for; None: the first that can run, as without a measurement.
        why_dense: why it is expanded instead; None: it is not.
    """

    backend: str | None
    why_dense: str | None


def decisions(device: torch.device) -> dict[tuple[Shape, str], Decision]:
    """For each shape and dtype that the table of the device knows, as far as the backend that is taken first was measured. The ways that it
    knows are taken."""
    take_ways(device)
    if overruled():
        return {}
    entries, why = table_cache.load(table_cache.Identity.of(device))
    if why:
        log.info("nothing is known of how fast layers are: %s", why)
    found = {
        (shape, dtype): decide(of_shape, backends_for(device, dtype))
        for (shape, dtype), of_shape in _by_shape(entries).items()
    }
    return {key: decision for key, decision in found.items() if decision is not None}


def take_ways(device: torch.device) -> list[Way]:
    """Has backends multiply as the table of the device says (`serve.kernels.ways`), and gives what it says; nothing without one."""
    found = table_cache.ways(table_cache.Identity.of(device))
    index = index_of(device)
    for way in found:
        ways.of(way.backend, index, *dtypes_of(way.dtype)).take(way.rows, way.n, way.k, way.way)
    return found


def overruled() -> bool:
    """Whether ``HALVE_BACKEND`` asks for a backend, so that no measurement decides."""
    return os.environ.get("HALVE_BACKEND", "auto") != "auto"


def decide(entries: Sequence[Entry], backends: Sequence[str]) -> Decision | None:
    """For one shape in one dtype; None before the backend that is taken first was measured. ``backends``: see `served`."""
    if not any(entry.backend == backends[0] for entry in entries):
        return None
    best, why_dense = served(entries, backends)
    return Decision(best[0].backend if best[0].backend != backends[0] else None, why_dense)


def backends_for(device: torch.device, dtype: str) -> list[str]:
    """The names of those that can multiply weights of that dtype (see `kind_name`) there, as `served` takes them."""
    return [backend.name for backend in able(device, *dtypes_of(dtype))]


def savings(
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    value_dtype: torch.dtype | None = None,
    quantizes_x: bool = False,
) -> dict[tuple[int, int, bool], float]:
    """Microseconds that 2:4 saves in one product with ``rows`` rows of x, by the weight's N and K and whether it is a Conv1D's, as the
    table of a device has them; for `compress.compress_model`. Negative where 2:4 is slower."""
    entries, _ = table_cache.load(table_cache.Identity.of(device))
    kind = kind_name(dtype, value_dtype, quantizes_x)
    names = backends_for(device, kind)
    return {
        (entry.n, entry.k, entry.conv1d): 1e6 * (entry.dense_seconds - entry.sparse_seconds)
        for (_, stored), of_shape in _by_shape(entries).items()
        for entry in served(of_shape, names)[0]
        if entry.rows == rows and stored == kind
    }


def _by_shape(entries: Iterable[Entry]) -> dict[tuple[Shape, str], list[Entry]]:
    found: dict[tuple[Shape, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.shape, entry.dtype), []).append(entry)
    return found


_decisions_once = functools.cache(decisions)


def decision(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    k: int,
    value_dtype: torch.dtype | None = None,
    quantizes_x: bool = False,
) -> Decision | None:
    """For a packed weight [n, k] on that device; None where nothing was measured. The table is read once a process.

    Args:
        dtype: that the layer computes in; ``value_dtype``: of the weight's values, left out: the same; ``quantizes_x``: see `PackedWeight`.
    """
    return _decisions_once(device).get((Shape(n, k), kind_name(dtype, value_dtype, quantizes_x)))


def serve_as_measured(model: nn.Module) -> dict[str, str]:
    """Replaces the packed layers of a model that are better served dense by dense ones, and tells the others for which backend to prepare
    their weight.

    Returns:
        For each layer that was replaced, why.
    """
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, Sparse24Linear)]
    known: dict[torch.device, dict[tuple[Shape, str], Decision]] = {}
    replaced = {}
    for name, module in packed:
        device = module.device
        if device not in known:
            known[device] = decisions(device)
        shape = Shape(module.out_features, module.in_features, isinstance(module, Sparse24Conv1D))
        found = known[device].get((shape, kind_name(module.dtype, module.value_dtype, module.quantizes_x)))
        if found is None:
            continue
        if found.why_dense is None:
            module.prefer(found.backend)
            continue
        parent, _, own = name.rpartition(".")
        dense = _expanded(module)
        setattr(dense, WHY_DENSE, found.why_dense)
        setattr(model.get_submodule(parent), own, dense)
        replaced[name] = found.why_dense
    if replaced:
        name, reason = next(iter(replaced.items()))
        log.warning(
            "%d of %d packed layers are served dense, as `halve tune` measured; the first is %s: %s",
            *(len(replaced), len(packed), name, reason),
        )
    return replaced


def _expanded(module: Sparse24Linear) -> nn.Module:
    """The dense layer with the same weights."""
    n, k = module.out_features, module.in_features
    weight = plain.expand(module.packed, module.dtype)
    with torch.device("meta"):
        if isinstance(module, Sparse24Conv1D):
            dense, weight = Conv1D(n, k), weight.T.contiguous()
        else:
            dense = nn.Linear(k, n, bias=module.bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return dense
