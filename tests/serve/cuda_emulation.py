"""The GPU kernels on a processor: the very source that NVRTC gets, compiled with `cuda_emulator.h` in the place of
`primitives.cuh`, and run lane by lane.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serve.kernels.cpu import build
from serve.kernels.cuda import layout, plan
from serve.kernels.cuda.plan import Form

SOURCE = Path(plan.__file__).parent / "src" / "sparse24.cu"
HEADER = Path(__file__).parent / "cuda_emulator.h"
INTERFACE = HEADER.with_name("cuda_emulator_interface.inc")
DTYPES = (torch.bfloat16, torch.float16)
NAMES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
VALUES = {None: "Same", torch.int8: "Int8", torch.float8_e4m3fn: "Float8"}
"""What kept values are."""

AT_ONCE, AT_THE_WAIT, ANY_TIME = range(3)
"""When a background copy happens."""

_GUARD = 1024
_POISON = 0x7FA5
"""NaN in both dtypes, with bits of its own."""


def _has_compiler() -> bool:
    try:
        build.find_compiler()
    except build.NoCompilerError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="there is no C++ compiler here")


class EmulationError(Exception):
    """The kernel did what the PTX ISA does not define."""


@dataclass(frozen=True)
class Emulator:
    """The kernels for a compute capability and, if there are any, values of 8 bits. The library is also a driver, with the functions
    that halve calls."""

    capability: tuple[int, int]
    forms: tuple[Form, ...]
    path: Path
    library: ctypes.CDLL
    values: torch.dtype | None = None

    def multiply(
        self,
        x: Tensor,
        prepared: Tensor,
        bias: Tensor | None,
        n: int,
        *,
        form: Form | None = None,
        splits: int = 1,
        seed: int = 0,
        copies: int = ANY_TIME,
        shared_bytes: int | None = None,
        x_scales: Tensor | None = None,
    ) -> Tensor:
        """x [rows, k], times ``x_scales`` [rows] if there are some -> [rows, n]; by the first form that takes so many rows, if by no
        other.

        Raises:
            EmulationError: says what was undefined.
        """
        rows, k = x.shape
        form = form or plan.for_rows(self.forms, rows)[0]
        grid = form.row_blocks(n) * splits
        shared = form.shared_bytes if shared_bytes is None else shared_bytes
        return self._run(
            form.name, x, prepared, bias, (rows, n), k, grid, splits, form.threads, shared, seed, copies, x_scales
        )

    def expand(self, prepared: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
        """The dense weight [n, k]."""
        units = -(-n // 64) * -(-k // 64)
        grid, threads = -(-units // plan.EXPAND_WARPS), 32 * plan.EXPAND_WARPS
        return self._run(
            "expand_weight", torch.empty(0, k, dtype=dtype), prepared, None, (n, k), k, grid, 1, threads, 0, 0, 0
        )

    def expand_values(self, prepared: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
        """The values of 8 bits [n, k] with zeros among them, and the scales [n] float32 behind them."""
        assert self.values is not None
        units = -(-n // 64) * -(-k // 64)
        grid, threads = -(-units // plan.EXPAND_WARPS), 32 * plan.EXPAND_WARPS
        written = self._run(
            *("expand_values", torch.empty(0, k, dtype=DTYPES[0]), prepared, None, (n, k // 2 + 2), k, grid, 1, threads),
            *(0, 0, 0),
        ).view(torch.uint8).flatten()  # fmt: skip
        return written[: n * k].view(self.values).view(n, k), written[n * k :].view(torch.float32)

    def _run(self, kernel: str, x: Tensor, prepared: Tensor, bias: Tensor | None, shape: tuple[int, int], k: int, grid: int,
             splits: int, threads: int, shared_bytes: int, seed: int, copies: int, x_scales: Tensor | None = None) -> Tensor:  # fmt: skip
        size = shape[0] * shape[1]
        y = torch.full((size + 2 * _GUARD,), _POISON, dtype=torch.int16)
        message = ctypes.create_string_buffer(300)
        self.library.emulate(
            *(layout.CODES[x.dtype], layout.CODES[self.values or x.dtype], kernel.encode()),
            *(prepared.data_ptr(), prepared.numel(), x.data_ptr(), x.nbytes),
            *(None if bias is None else bias.data_ptr(), y.data_ptr() + 2 * _GUARD),
            *(None if x_scales is None else x_scales.data_ptr(), x.shape[0]),
            *(
                shape[0] if kernel.startswith("expand") else shape[1],
                k,
                splits,
                grid,
                threads,
                shared_bytes,
                seed,
                copies,
                message,
            ),
        )
        if message.value:
            raise EmulationError(message.value.decode())
        if not bool((y[:_GUARD] == _POISON).all() and (y[_GUARD + size :] == _POISON).all()):
            raise EmulationError("something was written beside the result")
        if bool((y[_GUARD : _GUARD + size] == _POISON).any()):
            raise EmulationError("a part of the result was not written")
        return y[_GUARD : _GUARD + size].view(x.dtype).view(shape)


def compile_emulator(
    directory: Path,
    capability: tuple[int, int],
    source: str | None = None,
    forms: Sequence[Form] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    values: torch.dtype | None = None,
) -> Emulator:
    """The kernels for that capability, out of another source than the real one if there is one.

    Args:
        forms, dtypes: some of them, to be done sooner; left out: all that a device of the capability has.
        values: of the weight, where they are of 8 bits.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if forms is None:
        forms = plan.forms(capability, layout.UNIT_BYTES if values is None else layout.unit_bytes(values))
    calls = []
    parts = ['#include "cuda_emulator.h"', source or SOURCE.read_text()]
    for dtype in dtypes:
        namespace = NAMES[dtype].lower()
        parts.append(f"namespace {namespace} {{\n{plan.instantiations(forms, NAMES[dtype], VALUES[values])}}}")
        for kernel in plan.functions(forms, values is not None):
            calls.append(
                f'if (dtype == {layout.CODES[dtype]} && name == std::string("{kernel}")) return {namespace}::{kernel};'
            )
    found = "\n  ".join(calls)
    parts.append(
        f"static void (*find(int dtype, const char* name))(const Arguments) {{\n  {found}\n  return nullptr;\n}}"
    )
    parts.append(INTERFACE.read_text())
    (directory / "emulated.cpp").write_text("\n".join(parts))
    library = directory / "emulated.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run(
        [*build.find_compiler(), *flags, f"-I{HEADER.parent}", str(directory / "emulated.cpp"), "-o", str(library)],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.emulate.argtypes = (
        *(number, number, ctypes.c_char_p, pointer, size, pointer, size, pointer, pointer, pointer),
        *(number,) * 9,
        ctypes.c_char_p,
    )
    loaded.emulate.restype = None
    return Emulator(capability, tuple(forms), library, loaded, values)
