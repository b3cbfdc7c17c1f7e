"""The times of a model as the sum of its parts, where it cannot be run: from a roofline, or from a kernel table alone.

Weights, keys and values are moved once for each pass; experts as many as tokens choose at random. Norms, activations between
layers and what Python does are left out, so an estimate is early rather than late, and its ratio a little too good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.measure.kernel_entries import Entry, Shape
from serve.measure.shallow import Load
from serve.measure.shapes import ModelShape


class Parts(Protocol):
    """How long one part takes, in seconds."""

    def layer(self, shape: Shape, rows: int, itemsize: int, *, packed: bool) -> float: ...
    def seconds(self, moved: float, operations: float) -> float: ...


@dataclass(frozen=True)
class FromTable:
    """Parts from measured entries, which hold all packed layers. What has no entry (dense layers, attention) moves and computes as fast as the largest dense
    layer that has one."""

    entries: Sequence[Entry]

    def layer(self, shape: Shape, rows: int, itemsize: int, *, packed: bool) -> float:
        entry = next((e for e in self.entries if e.shape == shape and e.rows == rows), None)
        if entry is not None:
            return entry.sparse_seconds if packed else entry.dense_seconds
        alike = [e for e in self.entries if e.rows == rows]
        if not alike:
            return self.seconds(shape.n * shape.k * itemsize, 2 * rows * shape.n * shape.k)
        largest = max(alike, key=lambda e: e.n * e.k)
        return largest.dense_seconds * shape.n * shape.k / (largest.n * largest.k)

    def seconds(self, moved: float, operations: float) -> float:
        itemsize = 4 if self.entries[0].dtype.endswith("float32") else 2
        bandwidth = max(e.n * e.k * itemsize / e.dense_seconds for e in self.entries)
        flops = max(2 * e.n * e.k * e.rows / e.dense_seconds for e in self.entries)
        return max(moved / bandwidth, operations / flops)


def pass_seconds(model: ModelShape, load: Load, parts: Parts, *, packed: bool, prefill: bool) -> float:
    """Of the pass over the prompts, or of one that decodes a token for each sequence in the middle of the answers."""
    tokens = load.batch * (load.prompt if prefill else 1)
    itemsize = model.dtype.itemsize
    total = sum(
        layers.count * parts.layer(layers.shape, tokens, itemsize, packed=packed and layers.why_dense is None)
        for layers in model.layers
    )
    if model.head is not None:  # only the last position of a prompt is asked for
        total += parts.layer(model.head, load.batch, itemsize, packed=False)
    for experts in model.experts:
        share = experts.chosen / experts.experts
        touched = 1 - (1 - share) ** tokens
        total += parts.seconds(experts.parameters * touched * itemsize, 2 * tokens * experts.parameters * share)
    kept = model.kv_bytes_per_token or 0
    if prefill:  # two products of half a square for each head: the future is masked
        total += parts.seconds(tokens * kept, 2 * load.batch * load.prompt**2 * model.attention_width)
    else:
        context = load.prompt + load.output // 2
        total += parts.seconds(load.batch * context * kept, 4 * load.batch * context * model.attention_width)
    return total
