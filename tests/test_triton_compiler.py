"""Triton compiles all kernels for the GPUs that they are for, without any of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress import fused
from compress.fused import kernels as pruning
from serve.kernels.triton import backend
from serve.kernels.triton import kernels as serving

TARGETS = [("cuda", 80, 32), ("cuda", 86, 32), ("cuda", 89, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("cuda", 120, 32),
           ("hip", "gfx942", 64)]  # fmt: skip
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))


def compiled(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], target: tuple[Any, ...], **options: Any
) -> Any:
    """A kernel for a GPU, with pointers and sizes of which 16 is a divisor except those that Triton is told not to look at.

    It is checked that shared memory is what every such GPU has: 99 KB, and 64 on AMD's.
    """
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(arguments)
        if name not in ("rows", "total", "groups", "start", "size")
    }
    source = ASTSource(kernel, arguments | dict.fromkeys(constants, "constexpr"), constants, aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = triton.compile(source, target=GPUTarget(*target), options={"enable_fp_fusion": True, **options})
    assert done.metadata.shared <= (64 if target[0] == "hip" else 99) << 10
    return done


@each_target
def test_products(target: tuple[Any, ...]) -> None:
    """On tensor cores."""
    amd = target[0] == "hip"
    cuts = {backend.tiles(rows, amd=amd) for rows in (16, 32, 64, 128)}
    assert len(cuts) == 4
    arguments = {"x": "*bf16", "values": "*bf16", "mask": "*u8", "bias": "*bf16", "y": "*bf16"}
    arguments |= dict.fromkeys(("rows", "n", "k"), "i32")
    for cut in cuts:
        constants = {"ROWS": cut.rows, "OUTPUTS": cut.outputs, "DEPTH": cut.depth, "SPLITS": 1, "HAS_BIAS": True}
        done = compiled(serving.multiply, arguments, constants, target, num_warps=cut.warps, num_stages=cut.stages)
        assert ("mfma" if amd else "mma") in done.asm["amdgcn" if amd else "ptx"]


@each_target
def test_sums(target: tuple[Any, ...]) -> None:
    arguments = {"sums": "*fp32", "bias": "*bf16", "y": "*bf16", "total": "i32", "n": "i32"}
    compiled(serving.add_splits, arguments, {"SPLITS": 4, "HAS_BIAS": True, "SIZE": backend._SIZE}, target)


@each_target
@pytest.mark.parametrize("given", [False, True])
def test_pruning(target: tuple[Any, ...], given: bool) -> None:
    """A block stays in registers: none of it goes to local memory."""
    arguments = {"columns": "*fp32", "upper": "*fp32", "inverse_diagonal": "*fp32", "mask": "*u8", "errors": "*fp32"}
    arguments |= dict.fromkeys(("start", "size", "n", "k"), "i32")
    m, keep_n = (8, 0) if given else (4, 2)
    constants = {"KEEP": keep_n, "GIVEN": given, "M": m, "BLOCK": fused.MOST_COLUMNS, "OUTPUTS": fused._OUTPUTS}
    done = compiled(pruning.prune_block, arguments, constants, target, num_warps=fused._WARPS)
    if target[0] == "cuda":
        assert ".local" not in done.asm["ptx"]


@each_target
def test_masks(target: tuple[Any, ...]) -> None:
    arguments = {"scores": "*fp32", "mask": "*u8", "groups": "i32"}
    compiled(
        pruning.keep_largest, arguments, {"KEEP": 2, "M": 4, "GROUPS": fused._GROUPS}, target, num_warps=fused._WARPS
    )
