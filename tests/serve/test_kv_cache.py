"""The cache of a changing batch, against lists that are simply appended to."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from serve.engines.kv_cache import BatchCache

HEADS, DIM = 2, 3
ACTIONS = st.one_of(
    st.tuples(st.just("insert"), st.integers(1, 150)),
    st.tuples(st.just("remove"), st.integers(0, 7)),
    st.tuples(st.just("steps"), st.integers(1, 90)),
)


def states(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, DIM)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=20), st.sampled_from([10**6, 3000, 800]))
def test_rows_come_go_and_grow(actions, slots):
    cache = BatchCache(max_rows=8, max_slots=slots)
    rows: list[list[torch.Tensor]] = []  # for each row and layer, [heads, length, dim]
    for action, size in actions:
        if action == "insert" and len(rows) < 8 and cache.can_insert(size):
            prefilled = DynamicCache()
            kept = [states(1, HEADS, size) for _ in range(2)]
            for layer, keys in enumerate(kept):
                prefilled.update(keys, -keys, layer)
            cache.insert(prefilled, size)
            rows.append([keys[0] for keys in kept])
        elif action == "remove" and size < len(rows):
            cache.remove(size)
            rows[size] = rows[-1]
            rows.pop()
        elif action == "steps" and rows:
            for _ in range(size):
                if cache.can_step():
                    step(cache, rows)
        assert cache.lengths == [row[0].shape[1] for row in rows]
        assert cache.row_capacity * cache.column_capacity <= min(slots, 8 * (cache.end + max(64, cache.end // 4)))
    if not rows:
        assert cache.row_capacity == 0


def step(cache: BatchCache, rows: list[list[torch.Tensor]]) -> None:
    cache.make_room()
    mask = cache.attention_mask()
    for layer in range(2):
        new = states(len(rows), HEADS, 1)
        assert cache.get_seq_length() == cache.longest
        keys, values = cache.update(new, -new, layer)
        assert keys.shape[2] == cache.longest + 1 == cache.get_mask_sizes(1, 0)[0]
        assert torch.equal(keys, -values)
        assert keys.isfinite().all()
        for row, layers in enumerate(rows):
            layers[layer] = torch.cat([layers[layer], new[row]], dim=1)
            length = layers[layer].shape[1]
            assert torch.equal(keys[row, :, -length:], layers[layer])
            assert mask is None or mask[row].tolist() == [0] * (keys.shape[2] - length) + [1] * length
    cache.step_done()
