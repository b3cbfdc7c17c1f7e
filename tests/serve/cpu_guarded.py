"""Runs every kernel on memory that ends, or starts, at a page which nobody may touch: ``python -m tests.serve.cpu_guarded``.

A read or a write beyond the weights, x, bias, y, the scratch or a dense weight ends the process with a segmentation
fault, also of masked vector instructions, which compilers do not instrument. Buffers that are written start as NaN;
results are compared to the bit with those of ordinary memory.

    --faults       calls that claim more than there is, each in a process of its own, which has to end
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import resource
import signal
from dataclasses import replace

import torch
from torch import Tensor

from compress.packed import LARGEST
from serve.kernels.cpu import attention, backend, library
from tests.serve.cpu_reference import DTYPES, normal, random_scaled, random_weight

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0
MANY = 1 << 40
FAULTS = (
    "none",
    "x",
    "bias",
    "y",
    "weight",
    "scratch",
    "dense x",
    "dense weight",
    "dense y",
    "before x",
    "packed values",
)


class Guarded:
    """A buffer between two pages that nobody may touch, at the end of the space between them, or at its start."""

    def __init__(self, size: int, *, at_end: bool) -> None:
        inner = -(-size // _PAGE) * _PAGE or _PAGE
        self._map = mmap.mmap(-1, inner + 2 * _PAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memset(self._start, 0xFF, inner + 2 * _PAGE)
        for page in (self._start, self._start + _PAGE + inner):
            if _LIBC.mprotect(page, _PAGE, _NO_ACCESS):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.size = size
        self.address = self._start + _PAGE + (inner - size if at_end else 0)

    def fill(self, tensor: Tensor) -> Guarded:
        data = tensor.contiguous().view(torch.uint8)
        assert data.numel() == self.size
        ctypes.memmove(self.address, data.data_ptr(), self.size)
        return self

    def bytes(self) -> bytes:
        return ctypes.string_at(self.address, self.size)


def guarded(tensor: Tensor, at_end: bool) -> Guarded:
    return Guarded(tensor.nbytes, at_end=at_end).fill(tensor)


def check(
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    few_rows: int,
    at_end: bool,
    fault: str | None = None,
    stored: torch.dtype | None = None,
    quantizes_x: bool = False,
) -> None:
    """Prepare, restore, expand and linear; ``stored``: the dtype of the values, where it is another one than that of x."""
    lib, which, io = backend.functions(), backend.path_number(), backend._CODES[dtype]
    code = backend._CODES[stored or dtype]
    packed = random_weight(n, k, dtype) if stored is None else random_scaled(n, k, stored)
    packed = replace(packed, quantizes_x=quantizes_x)
    x, bias = normal(m, k, dtype=dtype), normal(n, dtype=dtype)
    wanted_stream = backend.prepare(packed)
    wanted = backend.linear(x, wanted_stream, bias, n, few_rows)

    values, mask = guarded(packed.values, at_end), guarded(packed.mask, at_end)
    scale = None if packed.scale is None else guarded(packed.scale, at_end)
    if fault == "packed values":
        values = guarded(packed.values[:-1], at_end)
    stream = Guarded(wanted_stream.numel(), at_end=at_end)
    assert stream.address % 64 == 0
    scales = None if scale is None else scale.address
    kept = (values.address, mask.address, scales)
    assert lib.halve_sparse24_prepare(code, quantizes_x, *kept, n, k, stream.address, 1) == -1
    assert stream.bytes() == wanted_stream.numpy().tobytes()

    new_values, new_mask = Guarded(values.size, at_end=at_end), Guarded(mask.size, at_end=at_end)
    size = stream.size
    new_scale = None if scale is None else Guarded(scale.size, at_end=at_end)
    new_scales = None if new_scale is None else new_scale.address
    assert lib.halve_sparse24_restore(stream.address, size, new_values.address, new_mask.address, new_scales, 1) == 0
    assert (new_values.bytes(), new_mask.bytes()) == (values.bytes(), mask.bytes())
    if new_scale is not None and scale is not None:
        assert new_scale.bytes() == scale.bytes()
    dense = Guarded(n * k * dtype.itemsize, at_end=at_end)
    assert lib.halve_sparse24_expand(stream.address, size, io, 0, n, dense.address, 1) == 0

    y, inputs, added = Guarded(wanted.nbytes, at_end=at_end), guarded(x, at_end), guarded(bias, at_end)
    scratch = Guarded(lib.halve_sparse24_scratch_bytes(which, size, io, n, k, m, few_rows), at_end=at_end)
    if fault == "x":
        inputs = guarded(x.flatten()[:-1], at_end)
    if fault == "before x":
        inputs.address -= 2
    if fault == "bias":
        added = guarded(bias[:-1], at_end)
    if fault == "y":
        y = Guarded(wanted.nbytes - dtype.itemsize, at_end=at_end)
    if fault == "weight":  # the header is believed, and what is behind it is not there
        stream = guarded(wanted_stream[: size - 64], at_end)
    if fault == "scratch":
        scratch = Guarded(scratch.size - 64, at_end=at_end)
    assert scratch.address % 64 == 0
    for threads in (1, 2) if fault is None else (1,):
        refusal = lib.halve_sparse24_linear(
            *(which, stream.address, size, io, n, k, inputs.address, m, k),
            *(added.address, y.address, n, few_rows, scratch.address, threads),
        )
        assert refusal == 0
        assert y.bytes() == wanted.view(torch.uint8).numpy().tobytes(), (dtype, m, n, k, few_rows, at_end)


def check_dense(dtype: torch.dtype, m: int, n: int, k: int, at_end: bool, fault: str | None = None) -> None:
    lib, which, code = backend.functions(), backend.path_number(), backend._CODES[dtype]
    weight, x, bias = normal(n, k, dtype=dtype), normal(m, k, dtype=dtype, seed=1), normal(n, dtype=dtype)
    wanted = backend.dense_linear(x, weight, bias)
    matrix, inputs, added = guarded(weight, at_end), guarded(x, at_end), guarded(bias, at_end)
    y = Guarded(wanted.nbytes, at_end=at_end)
    if fault == "dense x":
        inputs = guarded(x.flatten()[:-1], at_end)
    if fault == "dense weight":
        matrix = guarded(weight.flatten()[:-1], at_end)
    if fault == "dense y":
        y = Guarded(wanted.nbytes - dtype.itemsize, at_end=at_end)
    refusal = lib.halve_dense_linear(
        *(which, code, matrix.address, n, k, k, inputs.address, m, k, added.address, y.address, n, 1)
    )
    assert refusal == 0
    assert y.bytes() == wanted.view(torch.uint8).numpy().tobytes(), (dtype, m, n, k, at_end)


def check_attention(queries: int, keys: int, depth: int, value_depth: int, causal: bool, at_end: bool) -> None:
    """The forward and the backward pass."""
    lib, which = attention.functions(), backend.path_number()
    sizes = ((2, queries, depth), (1, keys, depth), (1, keys, value_depth))
    q, k, v = (normal(1, *size, dtype=torch.bfloat16, seed=i).requires_grad_() for i, size in enumerate(sizes))
    wanted = attention.DifferentiableAttention.apply(q, k, v, 0.2, causal)
    slope = normal(*wanted.shape, dtype=torch.bfloat16, seed=3)
    wanted.backward(slope)
    shape = attention._shape(q, k, v)
    inputs = [guarded(tensor.detach(), at_end) for tensor in (q, k, v)]
    out, given = Guarded(wanted.nbytes, at_end=at_end), guarded(slope, at_end)
    exponents = Guarded(4 * 2 * queries, at_end=at_end)
    scratch = Guarded(lib.halve_attention_scratch_bytes(which, shape), at_end=at_end)
    strides = attention._strides(q, k, v, wanted.transpose(1, 2))
    refusal = lib.halve_attention(
        *(which, shape, *(tensor.address for tensor in inputs), out.address, strides),
        *(None, 0.2, int(causal), exponents.address, scratch.address, 1),
    )
    assert refusal == 0
    assert out.bytes() == wanted.detach().view(torch.uint8).numpy().tobytes(), (queries, keys, depth, at_end)
    visible = torch.rand(1, 1, queries, keys, generator=torch.Generator().manual_seed(4)) < 0.5
    masked = attention.attention(q.detach(), k.detach(), v.detach(), visible, 0.2, causal)
    shown, other = guarded(visible, at_end), Guarded(masked.nbytes, at_end=at_end)
    strides = attention._strides(q, k, v, masked.transpose(1, 2), attention._by_query(visible))
    refusal = lib.halve_attention(
        *(which, shape, *(tensor.address for tensor in inputs), other.address, strides),
        *(shown.address, 0.2, int(causal), None, scratch.address, 1),
    )
    assert refusal == 0
    assert other.bytes() == masked.view(torch.uint8).numpy().tobytes(), (queries, keys, depth, at_end)
    # (gradients are laid out with heads side by side at each position)
    rights = [each.grad.transpose(1, 2).contiguous() for each in (q, k, v) if each.grad is not None]
    found = [Guarded(right.nbytes, at_end=at_end) for right in rights]
    buffers = [*inputs, out, given, *found]
    addresses = (ctypes.c_void_p * len(buffers))(*(buffer.address for buffer in buffers))
    by_position = [tensor.transpose(1, 2) for tensor in (wanted, slope, *rights)]
    scratch = Guarded(lib.halve_attention_backward_scratch_bytes(which, shape), at_end=at_end)
    refusal = lib.halve_attention_backward(
        *(which, shape, addresses, attention._strides(q, k, v, *by_position), 0.2, int(causal)),
        *(exponents.address, scratch.address, 1),
    )
    assert refusal == 0
    for buffer, right in zip(found, rights, strict=True):
        assert buffer.bytes() == right.view(torch.uint8).numpy().tobytes(), (queries, keys, depth, value_depth, at_end)


def check_fault(fault: str, few_rows: int) -> None:
    """A child process, forked before there are other threads, makes the call."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Sizes at which the last byte that is needed is the last one of a whole vector or tile; a scratch takes a rest.
        check(torch.bfloat16, 5, 32, 72 if fault == "scratch" else 64, few_rows, fault != "before x", fault)
        if fault.startswith("dense"):
            check_dense(torch.bfloat16, 5, 32, 64, True, fault)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if fault == "none" else -signal.SIGSEGV), f"{fault}: {status}"
    print(fault)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", action="store_true")
    torch.set_num_threads(1)
    if parser.parse_args().faults:
        for fault in FAULTS:
            for few_rows in (MANY, 0):
                check_fault(fault, few_rows)
        return
    for path in library.paths():
        with backend.using(path):
            for at_end in (True, False):
                for dtype in DTYPES:
                    for few_rows in (MANY, 0):
                        for m in (1, 2, 3, 5, 6, 17, 33, 65):
                            check(dtype, m, 1 + 5 * m % 37, 8 * (1 + 3 * m % 11), few_rows, at_end)
                        for n, k in ((1, 8), (16, 32), (17, 40), (33, 64), (50, 96), (64, 24), (530, 16)):
                            check(dtype, 1, n, k, few_rows, at_end)
                            check(dtype, 4, n, k, few_rows, at_end)
                        for stored in LARGEST:
                            for m, n, k in (
                                (1, 1, 8),
                                (1, 16, 32),
                                (2, 17, 40),
                                (3, 33, 64),
                                (5, 50, 96),
                                (17, 64, 24),
                                (65, 530, 16),
                            ):
                                for quantizes_x in (False, True):
                                    check(dtype, m, n, k, few_rows, at_end, stored=stored, quantizes_x=quantizes_x)
                    if path != "portable":
                        for k in (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 64, 65):
                            for m, n in ((1, 1), (1, 9), (3, 17), (5, 23)):
                                check_dense(dtype, m, n, k, at_end)
                if attention.available():
                    for queries, keys in (
                        *((1, 1), (1, 300), (7, 15), (7, 700), (24, 64), (25, 65)),
                        *((30, 257), (30, 100), (100, 30), (100, 100)),
                    ):
                        for depth, value_depth in ((16, 16), (80, 48), (64, 256)):
                            for causal in (False, True):
                                check_attention(queries, keys, depth, value_depth, causal, at_end)
            print(path)


if __name__ == "__main__":
    main()
