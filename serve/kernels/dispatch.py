"""Which backend multiplies a packed weight, and why.

A weight is prepared once, when a model is loaded: the backend that is chosen for it puts its bytes into the order that
its kernels read. The packed form is not kept beside it; `restore` gives it back.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UsageError, did_you_mean
from compress.packed import LARGEST, PackedWeight
from serve import support
from serve.kernels import ops, plain
from serve.kernels.cpu import backend as cpu
from serve.kernels.cuda import backend as cuda
from serve.kernels.triton import backend as triton
from serve.kernels.ways import Choices


@dataclass(frozen=True)
class Backend:
    """A way to multiply.

    Attributes:
        why_not: (device, dtype of the values) -> why it cannot, or None.
        reason: (dtype, rows of x) -> what it does with so many rows.
        prepare: (packed weight, name of the layer) -> its own form, [bytes] uint8; None where it takes the packed one.
        restore: the inverse of ``prepare``.
        choices: the ways that it has for some products, of which the fastest is for a measurement to find.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype], str | None]
    reason: Callable[[torch.dtype, int], str]
    prepare: Callable[[PackedWeight, str], Tensor] | None = None
    restore: Callable[[Tensor], PackedWeight] | None = None
    choices: Choices | None = None


@dataclass(frozen=True)
class Choice:
    """A backend and the reason why it was chosen."""

    backend: Backend
    reason: str


PLAIN = Backend(
    "plain",
    why_not=lambda device, dtype: None,
    reason=lambda dtype, rows: "expands the weight, then multiplies densely",
)
CPU = Backend("cpu", cpu.why_not, cpu.reason, cpu.prepare, cpu.restore)
CUDA = Backend("cuda", cuda.why_not, cuda.reason, cuda.prepare, cuda.restore, cuda.CHOICES)
TRITON = Backend("triton", triton.why_not, triton.reason, triton.prepare, triton.restore, triton.CHOICES)
BACKENDS = tuple({backend.name: backend for backend in (CPU, CUDA, TRITON, PLAIN)}[name] for name in support.KERNELS)
"""In the order of the table of support: the best first; the last one runs everywhere."""


def able(device: torch.device, dtype: torch.dtype, x_dtype: torch.dtype | None = None) -> list[Backend]:
    """The backends that could multiply such weights, the one first that is chosen where nothing was measured. Of several, those with a form of
    their own: to expand at every call is never faster.

    Args:
        dtype: of the values; ``x_dtype``: see `choose`.

    Raises:
        UsageError: ``HALVE_BACKEND`` names none, or one that cannot run this.
    """
    chosen = choose(device, dtype, 1, 0, 0, x_dtype=x_dtype).backend
    if os.environ.get("HALVE_BACKEND", "auto") != "auto":
        return [chosen]
    own = [b for b in BACKENDS if b.prepare is not None and _refusal(b, device, dtype, x_dtype) is None]
    return own or [chosen]


def choose(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    n: int,
    k: int,
    preferred: str | None = None,
    x_dtype: torch.dtype | None = None,
    quantizes_x: bool = False,
) -> Choice:
    """The backend for ``rows`` rows of x against a weight [n, k] on that device with values in that dtype.

    ``HALVE_BACKEND`` names one to use instead of the best.

    Args:
        preferred: the one that was measured to be faster than the first that can run; taken if it still can.
        x_dtype: of x, where the values are scaled; left out: bfloat16, which every backend takes.
        quantizes_x: whether x is rounded to such values, too; only the reason says so.

    Raises:
        UsageError: ``HALVE_BACKEND`` names none, or one that cannot run this.
    """
    wish = os.environ.get("HALVE_BACKEND", "auto")
    if wish == "auto":
        said = []
        liked = next((b for b in BACKENDS if b.name == preferred and not _refusal(b, device, dtype, x_dtype)), None)
        for backend in BACKENDS:
            refusal = _refusal(backend, device, dtype, x_dtype)
            if refusal is None and liked in (None, backend):
                return Choice(backend, "; ".join([_reason(backend, dtype, rows, quantizes_x), *said]))
            said.append(f"not {backend.name}: {refusal or 'measured to be slower here'}")
    named = {backend.name: backend for backend in BACKENDS}
    if wish not in named:
        raise UsageError(f"HALVE_BACKEND={wish!r} is not known{did_you_mean(wish, [*named, 'auto'])}.")
    if refusal := _refusal(named[wish], device, dtype, x_dtype):
        raise UsageError(f"HALVE_BACKEND={wish!r} cannot be used: {refusal}")
    return Choice(named[wish], f"{_reason(named[wish], dtype, rows, quantizes_x)}; HALVE_BACKEND asks for it")


def _reason(backend: Backend, dtype: torch.dtype, rows: int, quantizes_x: bool) -> str:
    """What a backend does with so many rows of x."""
    said = backend.reason(dtype, rows)
    return (
        f"x is rounded to {str(dtype).removeprefix('torch.')}, each row by its own scale; {said}"
        if quantizes_x
        else said
    )


def _refusal(backend: Backend, device: torch.device, dtype: torch.dtype, x_dtype: torch.dtype | None) -> str | None:
    """Why a backend cannot multiply values of a dtype by x of another there, or None."""
    if dtype in LARGEST and x_dtype is not None:
        # Asked first, as the other answer may take a compiler.
        return support.x_refusal(backend.name, str(x_dtype).removeprefix("torch.")) or backend.why_not(device, dtype)
    return backend.why_not(device, dtype)


def sparse24_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transposed packed weight [N, K] plus bias [N] -> [..., N], in x's dtype.

    The weight is prepared at every call; a layer that is used again holds it prepared (`serve.linear`).

    Raises:
        ValueError: x has another width than the weight.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x has {x.shape[-1]} features, the packed weight takes {k}")
    backend = choose(x.device, weight.values.dtype, x.numel() // k, n, k, x_dtype=x.dtype).backend
    if backend.prepare is None:
        return plain.linear(x, weight, bias)
    return ops.sparse24_linear(x, backend.prepare(weight, "weight"), bias, n, weight.quantizes_x)
