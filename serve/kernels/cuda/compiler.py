"""Compiles the kernels for an architecture, by NVRTC through ``cuda.bindings``. Needs no GPU, driver or CUDA toolkit.

Both come with CUDA builds of torch; where they are missing, `CompilerError` says which, and what to do.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import one_line
from serve.kernels.cuda import plan
from serve.kernels.cuda.plan import Form

SOURCES = Path(__file__).resolve().parent / "src"
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills")


class CompilerError(Exception):
    """There is no compiler, or it refused; one line that says why."""


@dataclass(frozen=True)
class Usage:
    """What the assembler says of one kernel: registers a thread, and bytes that did not fit into them."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def source(forms: Sequence[Form], dtype: str, values: str = "Same") -> str:
    """The whole text that is compiled. ``dtype``, of x: BFloat16 or Float16; ``values``: Same, Int8 or Float8."""
    kernels = (SOURCES / "sparse24.cu").read_text()
    include = '#include "primitives.cuh"'
    assert kernels.count(include) == 1
    kernels = kernels.replace(include, (SOURCES / "primitives.cuh").read_text())
    options = f"// {' '.join(_OPTIONS)}"  # compiled code is kept under a digest of this text
    return f"{kernels}\n{plan.instantiations(forms, dtype, values)}{options}\n"


def version() -> tuple[int, int]:
    """NVRTC's.

    Raises:
        CompilerError: there is none.
    """
    _, major, minor = _nvrtc().nvrtcVersion()
    return major, minor


def architecture(capability: tuple[int, int], supported: Sequence[int] | None = None) -> int:
    """What to compile for, for a device of that capability: its own, or the newest before it that runs on it.

    Code runs on later minor versions of its major one, never on another major one (CUDA Programming Guide, "Binary
    Compatibility").

    Raises:
        CompilerError: NVRTC knows none.
    """
    if supported is None:
        _, supported = _nvrtc().nvrtcGetSupportedArchs()
    assert supported is not None
    major, minor = capability
    fitting = [arch for arch in supported if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise CompilerError(
            f"NVRTC {'.'.join(map(str, version()))} does not know compute capability {major}.{minor}; "
            "install a torch that is built with a newer CUDA"
        )
    return max(fitting)


def compile_cubin(text: str, arch: int) -> tuple[bytes, str]:
    """The machine code of a source, and what the compiler reported.

    Raises:
        CompilerError: it refused; the first error is in the message.
    """
    nvrtc = _nvrtc()
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), b"sparse24.cu", 0, [], []), "create a program")
    try:
        options = [option.encode() for option in (f"--gpu-architecture=sm_{arch}", *_OPTIONS)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program), "ask for its log"))
        _checked(nvrtc.nvrtcGetProgramLog(program, log), "read its log")
        said = bytes(log).rstrip(b"\0").decode(errors="replace")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            errors = [line for line in said.splitlines() if "error" in line.lower()] or [said.strip()]
            raise CompilerError(f"NVRTC did not compile the kernels for sm_{arch} ({result.name}): {errors[0]}")
        cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program), "ask for the code's size"))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin), "read the code")
        return bytes(cubin), said
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def usage(report: str) -> dict[str, Usage]:
    """The assembler's figures for each kernel, from the compiler's report."""
    found = {}
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    for name, stack, stores, loads, registers in pattern.findall(report):
        found[name] = Usage(int(registers), int(stack), int(stores), int(loads))
    return found


def _checked(returned: tuple[Any, ...], doing: str) -> Any:
    """What a call of NVRTC gave beside its status."""
    status, *values = returned
    if int(status) != 0:
        raise CompilerError(f"NVRTC could not {doing}: {status.name}")
    return values[0] if values else None


@cache
def _nvrtc() -> Any:
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")  # by name: builds of torch for processors come without
    except ImportError as error:
        raise CompilerError(
            f"cuda.bindings, which CUDA builds of torch bring, is not there ({one_line(error)}); pip install cuda-bindings"
        ) from error
    try:
        status, *_ = nvrtc.nvrtcVersion()
    except Exception as error:  # it looks for the library at the first call, and raises errors of its own kinds
        raise CompilerError(
            f"the NVRTC library cannot be loaded ({one_line(error)}); pip install nvidia-cuda-nvrtc"
        ) from error
    if int(status) != 0:
        raise CompilerError(f"NVRTC does not say its version: {status.name}")
    return nvrtc
