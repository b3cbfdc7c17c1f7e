"""Triton compiles all kernels for the GPUs that they are for, without any of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress import fused
from compress.columns import PANEL
from compress.fused import kernels as pruning
from serve.kernels import narrow
from serve.kernels.triton import backend, layout, rounding
from serve.kernels.triton import kernels as serving

TARGETS = [("cuda", 80, 32), ("cuda", 86, 32), ("cuda", 89, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("cuda", 120, 32),
           ("hip", "gfx942", 64)]  # fmt: skip
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KINDS = {
    "bfloat16": ("*bf16", {"MAGIC": layout.MAGIC, "CODE": layout.CODES[torch.bfloat16]}),
    "int8": ("*u8", {"MAGIC": layout.MAGIC, "CODE": layout.CODES[torch.int8]}),
    "float8": ("*u8", {"MAGIC": layout.MAGIC, "CODE": layout.CODES[torch.float8_e4m3fn]}),
}
"""Of kept values: what a pointer to them is, and what the kernels are told."""
each_kind = pytest.mark.parametrize("kind", KINDS)


def compiled(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], target: tuple[Any, ...], **options: Any
) -> Any:
    """A kernel for a GPU, with pointers that are multiples of 16.

    It is checked that shared memory is what every such GPU has, 99 KB, and 64 on AMD's; and that nothing is spilled.
    """
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind.startswith("*")}
    source = ASTSource(kernel, arguments | dict.fromkeys(constants, "constexpr"), constants, aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = triton.compile(source, target=GPUTarget(*target), options=options)
    amd = target[0] == "hip"
    assert done.metadata.shared <= (64 if amd else 99) << 10
    assert spilled(done, amd) == 0
    return done


def spilled(done: Any, amd: bool) -> int:
    """Bytes of local memory, of a thread; vector registers that AMD's compiler spilled."""
    if amd:
        found = re.findall(r"(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", done.asm["amdgcn"])
        assert found
        return sum(map(int, found))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    assert "STACK" in said
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", said)))


def may_be_fused(ptx: str) -> list[str]:
    """Products of float32 that go straight into a sum, of which the compiler may make one operation."""
    products = re.findall(r"\bmul(?:\.rn)?\.f32(?:x2)?\s+(%rd?\d+),", ptx)
    assert products
    sums = re.findall(r"\b(?:add|sub)(?:\.rn)?\.f32(?:x2)?\s+%rd?\d+, (%rd?\d+), (%rd?\d+|0f\w+);", ptx)
    assert sums
    return [one for one in products if any(one in operands for operands in sums)]


def keeps_subnormal_numbers(code: str, amd: bool) -> bool:
    """Whether no float32 is flushed to zero."""
    if amd:
        return ".amdhsa_float_denorm_mode_32 3" in code
    return re.search(r"\.ftz\b.*\.f32|\.f32.*\.ftz\b", code) is None


def ints(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


@each_target
@each_kind
@pytest.mark.parametrize("unit", [8, 128])
def test_products(target: tuple[Any, ...], unit: int, kind: str) -> None:
    """On matrix units; and for few rows, where K is a multiple of 128, all loads are in flight while others are multiplied. (For
    more rows the bytes of the mask are too few for each thread; what counts there are products.)"""
    amd = target[0] == "hip"
    cuts = {backend.tiles(rows, amd=amd, scaled=kind != "bfloat16") for rows in (16, 32, 64, 128)}
    assert len(cuts) == 4
    pointer, weight = KINDS[kind]
    arguments = {
        "x": "*bf16",
        "header": "*i32",
        "values": pointer,
        "mask": "*u8",
        "scales": "*fp32",
        "x_scales": "*fp32",
        "bias": "*bf16",
        "y": "*bf16",
    }
    arguments |= ints("rows", "n", "units", "splits", "has_scales", "has_x_scales", "has_bias")
    for cut in cuts if unit == 128 else list(cuts)[:1]:
        constants = {"UNIT": unit, "ROWS": cut.rows, "OUTPUTS": cut.outputs, "DEPTH": cut.depth, **weight}
        done = compiled(serving.multiply, arguments, constants, target, num_warps=cut.warps, num_stages=cut.stages)
        code = done.asm["amdgcn" if amd else "ptx"]
        assert ("mfma" if amd else "mma") in code
        assert keeps_subnormal_numbers(code, amd)  # of which float8 is made
        if not amd and unit == 128 and cut.rows < 128:
            [loop] = re.findall(r"scf\.for.*?\n(.*?)scf\.yield", done.asm["ttgir"], flags=re.DOTALL)
            assert "tt.load" not in loop
            assert "async_copy" in loop


@each_target
@each_kind
def test_sums_and_expansion(target: tuple[Any, ...], kind: str) -> None:
    pointer, weight = KINDS[kind]
    arguments = {"sums": "*fp32", "scales": "*fp32", "x_scales": "*fp32", "bias": "*bf16", "y": "*bf16"}
    arguments |= ints("total", "n", "splits", "has_x_scales", "has_bias")
    compiled(serving.add_splits, arguments, {"SIZE": backend._SIZE, "CODE": weight["CODE"]}, target)
    outputs, depth = backend._EXPANDED
    arguments = {"header": "*i32", "values": pointer, "mask": "*u8", "scales": "*fp32", "dense": "*bf16"}
    arguments |= ints("n", "units")
    done = compiled(serving.expand, arguments, {"UNIT": 128, "OUTPUTS": outputs, "DEPTH": depth, **weight}, target)
    amd = target[0] == "hip"
    assert keeps_subnormal_numbers(done.asm["amdgcn" if amd else "ptx"], amd)
    if kind != "bfloat16":
        arguments |= {"dense": "*u8", "copied": "*fp32"} | ints("n", "units")
        names = ("header", "values", "mask", "scales", "dense", "copied", "n", "units")
        arguments = {name: arguments[name] for name in names}
        compiled(serving.expand_values, arguments, {"UNIT": 128, "OUTPUTS": outputs, "DEPTH": depth, **weight}, target)


@each_target
@pytest.mark.parametrize("sums", ["*i32", "*fp32"])
def test_sums_are_scaled(target: tuple[Any, ...], sums: str) -> None:
    """They are read, and y is written, 16 bytes at a time."""
    arguments = {"sums": sums, "scales": "*fp32", "x_scales": "*fp32", "bias": "*bf16", "y": "*bf16"}
    arguments |= ints("rows", "units", "has_bias")
    of_x, outputs = narrow._BLOCK
    done = compiled(serving.scale_sums, arguments, {"UNIT": narrow.MULTIPLE, "ROWS": of_x, "OUTPUTS": outputs}, target)
    if target[0] == "hip":
        code = done.asm["amdgcn"]
        assert "global_load_dwordx4" in code
        assert "global_store_dwordx" in code
    else:
        code = done.asm["ptx"]
        assert "ld.global.v4.b32" in code
        assert "st.global.v4.b32" in code


@each_target
@pytest.mark.parametrize("values", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("form", list(rounding.Form), ids=lambda form: form.name)
def test_rounding(target: tuple[Any, ...], values: torch.dtype, form: rounding.Form) -> None:
    """Divisions are rounded to nearest, no product is one operation with a sum, and x is read 16 bytes at a time."""
    to = "*u8" if form is rounding.Form.BYTES else "*bf16"
    constants = {"CODE": layout.CODES[values], "PRODUCTS": form is rounding.Form.PRODUCTS, "BLOCK": rounding.BLOCK}
    arguments = {"x": "*bf16", "values": to, "scales": "*fp32", **ints("units")}
    done = compiled(serving.round_rows, arguments, constants, target, num_warps=rounding.WARPS)
    amd = target[0] == "hip"
    code = done.asm["amdgcn" if amd else "ptx"]
    assert keeps_subnormal_numbers(code, amd)  # of which float8 are made
    if amd:
        assert code.count("v_div_fixup_f32") == 2
        assert "global_load_dwordx2" in code  # (of twice as many threads)
    else:
        assert code.count("div.rn.f32") == 2
        assert "ld.global.v4.b32" in code
        assert "fma" not in code
        assert may_be_fused(code) == []


@each_target
@pytest.mark.parametrize(("given", "m"), [(False, 4), (False, 8), (True, PANEL)])
def test_pruning(target: tuple[Any, ...], given: bool, m: int) -> None:
    """A block stays in registers."""
    arguments = {"columns": "*fp32", "upper": "*fp32", "inverse_diagonal": "*fp32", "mask": "*u8", "errors": "*fp32"}
    arguments |= ints("start", "size", "n", "k", "keep_n")
    constants = {"GIVEN": given, "M": m, "BLOCK": fused.MOST_COLUMNS, "OUTPUTS": fused._OUTPUTS}
    compiled(pruning.prune_block, arguments, constants, target, num_warps=fused._WARPS)


@each_target
@pytest.mark.parametrize("m", fused.GROUP_SIZES)
def test_masks(target: tuple[Any, ...], m: int) -> None:
    arguments = {"scores": "*fp32", "mask": "*u8", **ints("groups", "keep_n")}
    compiled(pruning.keep_largest, arguments, {"M": m, "GROUPS": fused._GROUPS}, target, num_warps=fused._WARPS)
