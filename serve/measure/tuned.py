"""What was measured decides: a layer shape that 2:4 makes slower on this device is served dense.

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
from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

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


def slow_shapes(device: torch.device) -> dict[tuple[Shape, str], str]:
    """For each shape and dtype that the table of the device knows to be better served dense, why."""
    if os.environ.get("HALVE_BACKEND", "auto") != "auto":
        return {}
    entries, _ = table_cache.load(table_cache.Identity.of(device))
    by_shape: dict[tuple[Shape, str], list[Entry]] = {}
    for entry in entries:
        by_shape.setdefault((entry.shape, entry.dtype), []).append(entry)
    return {key: reason for key, found in by_shape.items() if (reason := loses(found)) is not None}


def savings(rows: int, dtype: torch.dtype, device: torch.device) -> dict[tuple[int, int, bool], float]:
    """Microseconds that 2:4 saves in one product with ``rows`` rows of x, by the weight's N and K and whether it is a Conv1D's, as the
    table of a device has them; for `compress.compress_model`. Negative where 2:4 is slower."""
    entries, _ = table_cache.load(table_cache.Identity.of(device))
    return {
        (entry.n, entry.k, entry.conv1d): 1e6 * (entry.dense_seconds - entry.sparse_seconds)
        for entry in entries
        if entry.rows == rows and entry.dtype == dtype_name(dtype)
    }


_slow_shapes_once = functools.cache(slow_shapes)


def why_dense(device: torch.device, dtype: torch.dtype, n: int, k: int) -> str | None:
    """Why a packed weight [n, k] is better expanded on that device, or None; the table is read once a process."""
    return _slow_shapes_once(device).get((Shape(n, k), dtype_name(dtype)))


def serve_dense_where_faster(model: nn.Module) -> dict[str, str]:
    """Replaces the packed layers of a model that are better served dense by dense ones.

    Returns:
        For each layer that was replaced, why.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Sparse24Linear)]
    slow: dict[torch.device, dict[tuple[Shape, str], str]] = {}
    replaced = {}
    for name, module in found:
        device = module.device
        if device not in slow:
            slow[device] = slow_shapes(device)
        shape = Shape(module.out_features, module.in_features, isinstance(module, Sparse24Conv1D))
        if (reason := slow[device].get((shape, dtype_name(module.dtype)))) is not None:
            parent, _, own = name.rpartition(".")
            dense = _expanded(module)
            setattr(dense, WHY_DENSE, reason)
            setattr(model.get_submodule(parent), own, dense)
            replaced[name] = reason
    if replaced:
        name, reason = next(iter(replaced.items()))
        log.warning(
            "%d of %d packed layers are served dense, as `halve tune` measured; the first is %s: %s",
            *(len(replaced), len(found), name, reason),
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
