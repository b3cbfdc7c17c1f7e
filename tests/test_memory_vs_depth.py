"""Peak memory does not grow with the number of layers."""

from __future__ import annotations

from pathlib import Path

from benchmarks import memory_vs_depth
from compress.blocks import find_blocks, is_linear
from tests import tiny_models


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """A smaller variant of the benchmark: 12 more blocks of 8 MB are 98 MB more weights."""
    result = memory_vs_depth.measure(tmp_path, depths=(2, 14), hidden=584, samples=8, length=128)
    more = result["rows"][1]["weight_bytes"] - result["rows"][0]["weight_bytes"]
    assert more > 12 * result["block_bytes"] > 96e6
    # Nothing is kept from one block to the next: half a block's worth of small objects at most over all of them.
    assert result["kept_bytes"] < result["block_bytes"] / 2
    # The peak inside of a block varies with the heap's fragmentation, but does not follow the weights.
    assert result["growth_bytes"] < more / 2
    assert result["passed"]


def test_block_bytes_is_right() -> None:
    model = tiny_models.llama(1, hidden_size=64, intermediate_size=192)
    linears = [module for module in find_blocks(model)[1].modules() if is_linear(module)]
    assert sum(module.weight.numel() * 2 for module in linears) == memory_vs_depth.block_bytes(64)
