"""Triton compiles the kernels for the GPUs that they are for, without any of them."""

from __future__ import annotations

import warnings

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from serve.kernels.triton import backend, kernels

TARGETS = [("cuda", 80, 32), ("cuda", 86, 32), ("cuda", 89, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("cuda", 120, 32),
           ("hip", "gfx942", 64)]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_every_kernel_compiles(target: tuple[str, int | str, int]) -> None:
    """For every architecture, with shared memory that it has, and on its tensor cores."""
    amd = target[0] == "hip"
    most, instruction = (64, "mfma") if amd else (99, "mma")
    cuts = {backend.tiles(rows, amd=amd) for rows in (16, 32, 64, 128)}
    assert len(cuts) == 4
    for cut in cuts:
        names = ["x", "values", "mask", "bias", "y", "rows", "n", "k"]
        kinds = ["*bf16", "*bf16", "*u8", "*bf16", "*bf16", "i32", "i32", "i32"]
        constants = {"ROWS": cut.rows, "OUTPUTS": cut.outputs, "DEPTH": cut.depth, "SPLITS": 1, "HAS_BIAS": True}
        signature = dict(zip(names, kinds, strict=True)) | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name != "rows"}
        source = ASTSource(kernels.multiply, signature, constants, aligned)
        options = {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = triton.compile(source, target=GPUTarget(*target), options=options)
        assert done.metadata.shared <= most << 10
        assert instruction in done.asm["amdgcn" if amd else "ptx"]
