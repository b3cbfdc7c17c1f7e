"""The key/value cache of a batch that changes while it decodes.

One rectangle a layer, [rows, heads, columns, head_dim], in which all sequences end at the same column
(``end``): a decoding step writes one column for every row in place, and reads the columns from the beginning
of the longest sequence on. Shorter sequences are padded on the left, which is the convention that every
transformers model handles (positions, sliding windows and ALiBi alike); the caller passes `attention_mask`.

A sequence that leaves is replaced by the last row, so the rows in use are always the first ones. When the
columns run out, everything moves to the left edge of a new rectangle with a quarter to spare, so moving costs
a constant a token. Rows double as long as there is room for that, and shrink back whenever the rectangle is made anew; an
empty cache holds no memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from compress.errors import SourceError

SPARE_COLUMNS = 64


def _columns_allocated_for(longest: int) -> int:
    return longest + max(SPARE_COLUMNS, longest // 4)


def slots_for(rows: int, longest: int) -> int:
    """The fewest token slots that so many rows of at most ``longest`` tokens take."""
    return rows * _columns_allocated_for(longest)


def keys_and_values(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer, [rows, heads, length, head_dim]. Raises `SourceError` for layers of another kind."""
    states = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            raise SourceError(
                f"A layer of this model keeps its state in a {type(layer).__name__}, which the transformers "
                "engine cannot batch; it needs plain keys and values."
            )
        states.append((layer.keys, layer.values))
    return states


class BatchLayer(CacheLayerMixin):
    """The rectangle of one layer. Its owner decides where the rows and columns in use are."""

    is_sliding = False  # all columns are kept: the sliding-window mask of the model does the rest

    def __init__(self, owner: BatchCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates rectangles with the heads, head_dim, dtype and device of these states."""
        self.keys = self._blank(key_states)
        self.values = self._blank(value_states)
        self.is_initialized = True

    def _blank(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, because masked columns are still multiplied (by a weight of 0): they must be finite.
        rows, columns = self.owner.row_capacity, self.owner.column_capacity
        return like.new_zeros(rows, like.shape[1], columns, like.shape[3])

    def _tensors(self) -> Iterable[torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def in_use(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all columns before ``end``, [rows, heads, longest, head_dim]."""
        rows, columns = self.owner.rows, slice(self.owner.start, self.owner.end)
        keys, values = self._tensors()
        return keys[:rows, :, columns], values[:rows, :, columns]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the states [rows, heads, queries, head_dim] at ``end`` and returns all columns in use."""
        rows, start, end = self.owner.rows, self.owner.start, self.owner.end
        after = end + key_states.shape[-2]
        keys, values = self._tensors()
        keys[:rows, :, end:after] = key_states
        values[:rows, :, end:after] = value_states
        return keys[:rows, :, start:after], values[:rows, :, start:after]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.longest + query_length, 0

    def get_seq_length(self) -> int:
        return self.owner.longest

    def get_max_length(self) -> int:
        return -1

    def put(self, row: int, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Fills one row with a sequence [1, heads, length, head_dim] that ends at ``end``."""
        end = self.owner.end
        for own, new in zip(self._tensors(), states, strict=True):
            own[row, :, : end - new.shape[2]] = 0
            own[row, :, end - new.shape[2] : end] = new[0]

    def move(self, source: int, target: int) -> None:
        for own in self._tensors():
            own[target, :, : self.owner.end] = own[source, :, : self.owner.end]

    def relocate(self, rows: int, old: slice, new: slice) -> None:
        """Moves the columns ``old`` of the first ``rows`` rows to ``new`` in fresh rectangles."""
        assert self.keys is not None
        assert self.values is not None
        for name in ("keys", "values"):
            before: torch.Tensor = getattr(self, name)
            after = self._blank(before)
            after[:rows, :, new] = before[:rows, :, old]
            setattr(self, name, after)


class BatchCache(Cache):
    """The caches of all layers; rows come and go with `insert` and `remove`.

    It never takes more than ``max_slots`` token slots, rows times columns, if `can_insert` and `can_step` are asked before.
    """

    layers: list[BatchLayer]

    def __init__(self, max_rows: int, max_slots: int) -> None:
        super().__init__(layers=[])
        self.max_rows = max_rows
        self.max_slots = max_slots
        self.lengths: list[int] = []
        self.end = 0
        self.row_capacity = 0
        self.column_capacity = 0

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def start(self) -> int:
        return self.end - self.longest

    def fits(self, rows: int, longest: int) -> bool:
        """Whether there is room for this many rows of at most ``longest`` tokens."""
        return slots_for(rows, longest) <= self.max_slots

    def can_insert(self, length: int) -> bool:
        """Whether there is room for one more row, of ``length`` tokens."""
        return not self._is_full_for(length) or self.fits(self.rows + 1, max(self.longest, length))

    def can_step(self) -> bool:
        """Whether there is room for one more token in every row."""
        return self.end < self.column_capacity or self.fits(self.rows, self.longest)

    def _is_full_for(self, length: int) -> bool:
        return self.rows >= self.row_capacity or self.end < length or self.end >= self.column_capacity

    def _rows_allocated_for(self, rows: int, columns: int) -> int:
        """Twice as many as before, where that is within both limits."""
        return max(rows, min(self.max_rows, 1 << (rows - 1).bit_length(), self.max_slots // columns)) if rows else 0

    def attention_mask(self) -> torch.Tensor | None:
        """[rows, longest + 1] for a step of one token a row, 0 at padding; None if there is none."""
        if min(self.lengths) == self.longest:
            return None
        assert self.layers[0].keys is not None
        device = self.layers[0].keys.device
        padding = torch.tensor([self.longest - length for length in self.lengths], device=device)
        return (torch.arange(self.longest + 1, device=device) >= padding[:, None]).long()

    def insert(self, prefilled: DynamicCache, length: int) -> None:
        """Appends a row with the cache of one sequence of ``length`` tokens."""
        states = keys_and_values(prefilled)
        if self._is_full_for(length):
            self._resize(self.rows + 1, max(self.longest, length))
        if not self.layers:
            self.layers = [BatchLayer(self) for _ in states]
            for layer, (keys, values) in zip(self.layers, states, strict=True):
                layer.lazy_initialization(keys, values)
        for layer, pair in zip(self.layers, states, strict=True):
            layer.put(self.rows, pair)
        self.lengths.append(length)

    def remove(self, row: int) -> None:
        """Frees a row; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self.layers = []
            self.end = self.row_capacity = self.column_capacity = 0

    def make_room(self) -> None:
        """Call before a step: makes sure that there is a column to write."""
        if self.end >= self.column_capacity:
            self._resize(self.rows, self.longest)

    def step_done(self) -> None:
        """Call after a step of one token a row."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _resize(self, rows: int, longest: int) -> None:
        old = slice(self.start, self.end)
        new = slice(longest - self.longest, longest)
        self.column_capacity = _columns_allocated_for(longest)
        self.row_capacity = self._rows_allocated_for(rows, self.column_capacity)
        for layer in self.layers:
            layer.relocate(self.rows, old, new)
        self.end = longest
