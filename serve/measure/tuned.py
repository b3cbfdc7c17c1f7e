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

from serve import support
from serve.kernels import plain
from serve.linear import WHY_DENSE, Sparse24Conv1D, Sparse24Linear
from serve.measure import table_cache
from serve.measure.kernel_table import WINS, Entry, Shape, dtype_name

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


def fastest(entries: Sequence[Entry]) -> list[Entry]:
    """Of one shape in one dtype, the entries of the backend that is the fastest at the numbers of rows at which sequences are decoded.

    Backends are compared by the geometric mean over the numbers of rows that all of them were measured at. Another than the first one, which
    is taken where nothing was measured, has to be faster by more than noise.
    """
    by_backend: dict[str, dict[int, Entry]] = {}
    order = [*support.KERNELS, *(entry.backend for entry in entries)]
    for entry in sorted(entries, key=lambda entry: order.index(entry.backend)):
        by_backend.setdefault(entry.backend, {})[entry.rows] = entry
    if not by_backend:
        return []
    shared = set.intersection(*(set(found) for found in by_backend.values()))
    decoded = [rows for rows in shared if rows <= DECODED_ROWS]
    first, *others = by_backend

    def gain(backend: str) -> float:
        """How many times as fast as the first one."""
        ratios = [by_backend[first][rows].sparse_seconds / by_backend[backend][rows].sparse_seconds for rows in decoded]
        return statistics.geometric_mean(ratios) if ratios else 0.0

    best = max(others, key=gain, default=first)
    return list(by_backend[best if best != first and gain(best) >= WINS else first].values())


@dataclass(frozen=True)
class Decision:
    """How a layer shape is served.

    Attributes:
        backend: what its packed weight is prepared for.
        why_dense: why it is expanded instead; None: it is not.
    """

    backend: str
    why_dense: str | None


def decisions(device: torch.device) -> dict[tuple[Shape, str], Decision]:
    """For each shape and dtype that the table of the device knows."""
    if os.environ.get("HALVE_BACKEND", "auto") != "auto":
        return {}
    entries, _ = table_cache.load(table_cache.Identity.of(device))
    found: dict[tuple[Shape, str], Decision] = {}
    for key, of_shape in _by_shape(entries).items():
        best = fastest(of_shape)
        found[key] = Decision(best[0].backend, loses(best))
    return found


def savings(rows: int, dtype: torch.dtype, device: torch.device) -> dict[tuple[int, int, bool], float]:
    """Microseconds that 2:4 saves in one product with ``rows`` rows of x, by the weight's N and K and whether it is a Conv1D's, as the
    table of a device has them; for `compress.compress_model`. Negative where 2:4 is slower."""
    entries, _ = table_cache.load(table_cache.Identity.of(device))
    return {
        (entry.n, entry.k, entry.conv1d): 1e6 * (entry.dense_seconds - entry.sparse_seconds)
        for of_shape in _by_shape(entries).values()
        for entry in fastest(of_shape)
        if entry.rows == rows and entry.dtype == dtype_name(dtype)
    }


def _by_shape(entries: Iterable[Entry]) -> dict[tuple[Shape, str], list[Entry]]:
    found: dict[tuple[Shape, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.shape, entry.dtype), []).append(entry)
    return found


_decisions_once = functools.cache(decisions)


def decision(device: torch.device, dtype: torch.dtype, n: int, k: int) -> Decision | None:
    """For a packed weight [n, k] on that device; None where nothing was measured. The table is read once a process."""
    return _decisions_once(device).get((Shape(n, k), dtype_name(dtype)))


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
        found = known[device].get((shape, dtype_name(module.dtype)))
        if found is None:
            continue
        if found.why_dense is None:
            module.preferred = found.backend
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
    weight = plain.expand(module.packed)
    with torch.device("meta"):
        if isinstance(module, Sparse24Conv1D):
            dense, weight = Conv1D(n, k), weight.T.contiguous()
        else:
            dense = nn.Linear(k, n, bias=module.bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return dense
