"""What runs where: the one table of kernels and engines by device, format and dtype.

It is data. The dispatch (`serve.kernels`), the gate of the vLLM plugin and `halve doctor` take their facts from here, so
what doctor shows is what the code does. Whether a row that works in general works on this machine is for doctor to find out.
Nothing is imported, so that it can be shown where torch itself is broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Version = tuple[int, int]
Status = Literal["works", "not built"]

HALF = ("bfloat16", "float16")
ALL = (*HALF, "float32")
SCALED = ("int8", "float8_e4m3fn")
"""Of kept values that have scales."""

FORMATS = {
    "packed": "2:4, packed by halve",
    "bitmask": "2:4, packed by compressed-tensors before 0.15 (sparse-24-bitmask)",
    "zeros": "a dense checkpoint whose linears are 2:4",
    "dense": "any other checkpoint",
    "graph": "an ONNX graph that `halve export` made",
}
"""How a checkpoint may hold its linears."""


@dataclass(frozen=True)
class Kernel:
    """A backend that multiplies packed weights.

    Attributes:
        device: torch's name of the kind of device, or None: on any.
        dtypes: of the kept values; those of 8 bits go with activations of any of the others.
        architectures: of the device, for people.
        first_capability: of a CUDA device, the first with the ``units`` that it needs.
    """

    device: str | None
    dtypes: tuple[str, ...]
    architectures: str
    first_capability: Version | None = None
    units: str = ""


@dataclass(frozen=True)
class Engine:
    """What serves a model.

    Attributes:
        status: whether this version of halve has an adapter for it.
        kernels: which of `KERNELS` it multiplies by, for each format that it reads; another name: by the dense product of that library.
        oldest, newest: versions that the adapter is written for; None: what halve's own dependencies say.
    """

    status: Status
    kernels: dict[str, tuple[str, ...]]
    dtypes: tuple[str, ...] = ALL
    oldest: Version | None = None
    newest: Version | None = None


KERNELS = {
    "cpu": Kernel("cpu", (*ALL, *SCALED), "AVX-512 BF16, AVX-512, AVX2, portable C++"),
    "cuda": Kernel(
        "cuda", (*HALF, *SCALED), "sparse tensor cores", first_capability=(8, 0), units="sparse tensor cores"
    ),
    "triton": Kernel(
        "cuda",
        (*HALF, *SCALED),
        "AMD; NVIDIA where the kernels above do not run, or `halve tune` finds these faster; Triton, on dense matrix units",
        first_capability=(8, 0),
        units="bfloat16 tensor cores",
    ),
    "plain": Kernel(None, (*ALL, *SCALED), "any; expands, slower than dense"),
}
"""The best first; the last one runs everywhere."""

FLOAT8_SINCE: Version = (8, 9)
"""The compute capability whose tensor cores multiply float8."""

SLOW_INT8 = 10
"""The first number of the compute capability, data-centre Blackwell's, where torch's products of int8 are slower than those of 16 bits (pytorch
issue 187094)."""

AMD_MATRIX_UNITS = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""How the names of AMD's architectures begin for which Triton multiplies on matrix units."""

_SPARSE = ("cpu", "cuda", "triton", "plain")
ENGINES = {
    "transformers": Engine("works", {"packed": _SPARSE, "zeros": ("torch",), "dense": ("torch",)}),
    "vllm": Engine(
        "works",
        {"packed": _SPARSE, "bitmask": _SPARSE, "zeros": _SPARSE, "dense": ("torch",)},
        oldest=(0, 24),
        newest=(0, 33),
    ),
    "onnx": Engine("works", {"graph": ("onnxruntime",)}, dtypes=("float32", "float16")),
    "tensorrt": Engine("not built", {}),
}


@dataclass(frozen=True)
class Row:
    """One line of the matrix: an engine, a kind of device, the formats and dtypes, and what multiplies them."""

    engine: str
    device: str
    architectures: str
    formats: tuple[str, ...]
    dtypes: tuple[str, ...]
    kernel: str | None
    status: str
    """``works``, ``not built``, or ``needs ...``, which is what the device or the library has to be."""


def matrix() -> Iterator[Row]:
    """Every engine by kind of device: one row for what is multiplied by one kernel."""
    for name, engine in ENGINES.items():
        if engine.status != "works":
            yield Row(name, "any", "any", (), (), None, engine.status)
            continue
        used = dict.fromkeys(kernel for kernels in engine.kernels.values() for kernel in kernels)
        for kernel in used:
            formats = tuple(form for form, kernels in engine.kernels.items() if kernel in kernels)
            if kernel not in KERNELS:
                yield Row(name, "any", "any", formats, engine.dtypes, kernel, _needs(engine, None))
                continue
            how = KERNELS[kernel]
            dtypes = tuple(dtype for dtype in how.dtypes if dtype in (*engine.dtypes, *SCALED))
            yield Row(name, how.device or "any", how.architectures, formats, dtypes, kernel, _needs(engine, how))


def kernel_refusal(kernel: str, device: str, dtype: str) -> str | None:
    """Why that kernel cannot multiply values of a dtype on a kind of device, or None."""
    how = KERNELS[kernel]
    if how.device is not None and device != how.device:
        return f"the weight is on {device}"
    return None if dtype in how.dtypes else f"values are {dtype}"


def x_refusal(kernel: str, dtype: str) -> str | None:
    """Why that kernel cannot multiply scaled values by x of a dtype, or None."""
    return None if dtype in KERNELS[kernel].dtypes else f"x is {dtype}"


def capability_refusal(kernel: str, capability: Version) -> str | None:
    """Why that kernel cannot run on a CUDA device of that compute capability, or None."""
    first, units = KERNELS[kernel].first_capability, KERNELS[kernel].units
    if first is None or capability >= first:
        return None
    return f"the GPU has compute capability {_dotted(capability)}, and {units} came with {_dotted(first)}"


def bytes_refusal(dtype: str, capability: Version) -> str | None:
    """Why a CUDA device of that compute capability does not multiply many rows as values of 8 bits, or None."""
    if dtype == "int8":
        return "torch's products of int8 are slow on such a GPU" if capability[0] == SLOW_INT8 else None
    if capability < FLOAT8_SINCE:
        return f"the GPU has compute capability {_dotted(capability)}, and products of float8 came with {_dotted(FLOAT8_SINCE)}"
    return None


def reads(engine: str, form: str) -> bool:
    """Whether an engine reads checkpoints of that format (of `FORMATS`)."""
    return form in ENGINES[engine].kernels


def versions(engine: str) -> str:
    """The versions that an engine's adapter is written for: ``"0.24 to 0.33"``."""
    found = ENGINES[engine]
    return " to ".join(_dotted(version) for version in (found.oldest, found.newest) if version)


def _needs(engine: Engine, kernel: Kernel | None) -> str:
    needs = []
    if kernel is not None and kernel.first_capability is not None:
        needs.append(f"compute capability {_dotted(kernel.first_capability)}")
    if engine.oldest is not None and engine.newest is not None:
        needs.append(f"version {_dotted(engine.oldest)} to {_dotted(engine.newest)}")
    return f"needs {', '.join(needs)}" if needs else "works"


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
