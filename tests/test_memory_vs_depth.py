"""Peak memory does not grow with the number of layers."""

from __future__ import annotations

from pathlib import Path

from benchmarks import memory_vs_depth
from compress.architecture import find_blocks, is_linear
from tests import tiny_models

ATTEMPTS = 3


def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """A smaller variant of the benchmark: 12 more blocks of 8 MB are 98 MB more weights.

    The heap's fragmentation adds to a measurement, from 0.2 to over 12 MB in runs of the same code on a busy machine, and
    never takes anything away: what is kept from block to block is in every measurement, so the smallest of three counts.
    """
    results = []
    for attempt in range(ATTEMPTS):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        results.append(memory_vs_depth.measure(directory, depths=(2, 14), hidden=584, samples=8, length=128))
        if results[-1]["passed"]:
            break
    result = min(results, key=lambda result: result["kept_bytes"])
    more = result["rows"][1]["weight_bytes"] - result["rows"][0]["weight_bytes"]
    assert more > 12 * result["block_bytes"] > 96e6
    # Nothing is kept from one block to the next: half a block's worth of small objects at most over all of them.
    assert result["kept_bytes"] < result["block_bytes"] / 2, results
    # The peak inside of a block varies with the heap's fragmentation, but does not follow the weights.
    assert min(result["growth_bytes"] for result in results) < more / 2, results


def test_block_bytes_is_right() -> None:
    model = tiny_models.llama(1, hidden_size=64, intermediate_size=192)
    linears = [module for module in find_blocks(model)[1].modules() if is_linear(module)]
    assert sum(module.weight.numel() * 2 for module in linears) == memory_vs_depth.block_bytes(64)
