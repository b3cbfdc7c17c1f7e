"""What the C++ kernels refuse: damaged masks and prepared weights, and tensors that do not belong together."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.errors import CorruptCheckpointError, UsageError
from compress.packed import PackedWeight
from serve.kernels.cpu import backend, library
from tests.serve.cpu_reference import DTYPES, PATTERNS, kept_columns, normal, random_weight
from tests.serve.test_cpu_kernels import KERNELS, OF_EVERY_DTYPE, path

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.status())

__all__ = ["path"]  # a fixture

N, K = 37, 72
NOT_TWO = [group for group in range(16) if group not in PATTERNS]
HEADER = "<Iiqqqq"
HEADER_FIELDS = ("magic", "dtype", "n", "k", "bytes", "interleave")
"""Magic, dtype, N, K, bytes."""


def bad_mask(row: int, byte: int) -> str:
    return re.escape(
        f"model.layers.3.q_proj: the mask does not have two bits in every group of four (row {row}, columns {8 * byte} "
        f"to {8 * byte + 7}); the file is damaged, get it again"
    )


@OF_EVERY_DTYPE
@pytest.mark.parametrize("group", NOT_TWO, ids=lambda group: f"{group:04b}")
@pytest.mark.parametrize("half", [0, 4], ids=["low", "high"])
def test_a_group_without_two_bits(dtype: torch.dtype, group: int, half: int) -> None:
    for row, byte in ((0, 0), (0, 8), (15, 3), (16, 4), (20, 5), (N - 1, 0), (N - 1, K // 8 - 1)):
        packed = random_weight(N, K, dtype)
        packed.mask[row, byte] = packed.mask[row, byte] & (0xF0 >> half) | group << half
        with pytest.raises(CorruptCheckpointError, match=bad_mask(row, byte)):
            backend.prepare(packed, "model.layers.3.q_proj")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_of_several_the_first_is_named(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    packed = random_weight(200, K, torch.bfloat16)
    for row, byte in ((180, 0), (150, 8), (149, 1), (60, 6), (60, 5), (3, 2)):
        packed.mask[row, byte] ^= 1
        with pytest.raises(CorruptCheckpointError, match=bad_mask(row, byte)):
            backend.prepare(packed, "model.layers.3.q_proj")
    torch.set_num_threads(before)


def test_every_byte_of_a_mask() -> None:
    accepted = []
    for byte in range(256):
        packed = PackedWeight(torch.ones(1, 4), torch.tensor([[byte]], dtype=torch.uint8))
        try:
            backend.prepare(packed)
        except CorruptCheckpointError:
            continue
        accepted.append(byte)
    assert accepted == sorted(low | high << 4 for low in PATTERNS for high in PATTERNS)


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        (torch.zeros(4, 8), torch.zeros(4, 1, dtype=torch.uint8)),
        (torch.zeros(4, 8), torch.zeros(3, 2, dtype=torch.uint8)),
        (torch.zeros(4, 6), torch.zeros(4, 1, dtype=torch.uint8)),
        (torch.zeros(8), torch.zeros(2, dtype=torch.uint8)),
        (torch.zeros(4, 8), torch.zeros(4, 2, dtype=torch.int32)),
        (torch.zeros(4, 8, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.uint8)),
    ],
    ids=["short mask", "fewer rows", "K not a multiple of 8", "one axis", "int32 mask", "float64"],
)
def test_no_packed_weight(values: Tensor, mask: Tensor) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"^lm_head: values .* expected|^lm_head: values .* do not belong"):
        backend.prepare(PackedWeight(values, mask), "lm_head")


def test_a_packed_weight_elsewhere() -> None:
    packed = random_weight(4, 16, torch.float32)
    with pytest.raises(ValueError, match="lm_head: values are on meta and the mask is on cpu"):
        backend.prepare(PackedWeight(packed.values.to("meta"), packed.mask), "lm_head")


def aligned(data: bytes, offset: int = 0) -> Tensor:
    """The bytes at a multiple of 64, plus an offset."""
    stream = torch.empty(len(data) + offset, dtype=torch.uint8)[offset:]
    if data:
        stream.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return stream


def with_header(**changes: int) -> Callable[[bytes], Tensor]:
    def change(stream: bytes) -> Tensor:
        fields = dict(zip(HEADER_FIELDS, struct.unpack_from(HEADER, stream), strict=True))
        interleave = fields["interleave"]
        expected = {"magic": 0x34326868, "dtype": 0, "n": N, "k": K, "bytes": len(stream), "interleave": interleave}
        assert fields == expected
        assert interleave in (1, 2, 4)
        return aligned(struct.pack(HEADER, *{**fields, **changes}.values()) + stream[struct.calcsize(HEADER) :])

    return change


def only_a_header(n: int, k: int) -> Callable[[bytes], Tensor]:
    return lambda stream: with_header(n=n, k=k, bytes=64)(stream)[:64].clone()


DAMAGED = "the prepared weight is damaged, or no prepared weight at all"
DAMAGES: dict[str, tuple[Callable[[bytes], Tensor], str]] = {
    "nothing": (lambda stream: aligned(b""), DAMAGED),
    "half a header": (lambda stream: aligned(stream[:32]), DAMAGED),
    "cut short": (lambda stream: aligned(stream[:-64]), DAMAGED),
    "a byte too few": (lambda stream: aligned(stream[:-1]), DAMAGED),
    "too long": (lambda stream: aligned(stream + bytes(64)), DAMAGED),
    "another file": (lambda stream: aligned(bytes(range(256)) * 20), DAMAGED),
    "zeros": (lambda stream: aligned(bytes(len(stream))), DAMAGED),
    "magic": (with_header(magic=0x34326869), DAMAGED),
    "dtype 3": (with_header(dtype=3), DAMAGED),
    "dtype -1": (with_header(dtype=-1), DAMAGED),
    "float32": (with_header(dtype=2), DAMAGED),
    "more rows": (with_header(n=N + 16), DAMAGED),
    "fewer rows": (with_header(n=N - 16), DAMAGED),
    "negative rows": (with_header(n=-N), DAMAGED),
    "wider": (with_header(k=K + 32), DAMAGED),
    "a part of a mask byte": (with_header(k=K + 4), DAMAGED),
    "bytes": (with_header(bytes=64), DAMAGED),
    "panels of no blocks": (with_header(interleave=0), DAMAGED),
    "panels of three blocks": (with_header(interleave=3), DAMAGED),
    "panels of eight blocks": (with_header(interleave=8), DAMAGED),
    "sizes that overflow to nothing": (only_a_header(1 << 36, 1 << 37), DAMAGED),
    "the largest sizes": (only_a_header((1 << 63) - 1, (1 << 63) - 8), DAMAGED),
    "misaligned": (lambda stream: aligned(stream, 32), "the prepared weight does not start at a cache line"),
    "with holes": (lambda stream: aligned(stream).repeat_interleave(2)[::2], r"with strides \[2\] on cpu"),
    "elsewhere": (lambda stream: aligned(stream).to("meta"), "on meta"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stream(damage: str) -> None:
    prepared = backend.prepare(random_weight(N, K, torch.bfloat16))
    change, message = DAMAGES[damage]
    stream = change(prepared.numpy().tobytes())
    x, out = normal(2, K, dtype=torch.bfloat16), torch.empty(N, K, dtype=torch.bfloat16)
    for use in (
        lambda: backend.describe(stream),
        lambda: backend.restore(stream),
        lambda: backend.expand(stream, 0, N, out),
        lambda: backend.linear(x, stream, None, N),
        lambda: backend.linear(x[:0], stream, None, N),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_stream_of_another_type() -> None:
    stream = backend.prepare(random_weight(N, K, torch.bfloat16)).view(torch.float32)
    for use in (lambda: backend.describe(stream), lambda: backend.linear(torch.zeros(2, K), stream, None, N)):
        with pytest.raises(ValueError, match=r"bytes in a row on the CPU, this is torch.float32 \[\d+\] on cpu"):
            use()


@OF_EVERY_DTYPE
@KERNELS
def test_damaged_masks_within_a_stream_stay_within_their_rows(path: str, dtype: torch.dtype, few_rows: int) -> None:
    """They are not looked at when multiplying, and choose among the inputs of their group, whatever they say."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)  # so many that a panel is one block, and tiles follow each other
    stream = backend.prepare(random_weight(N, K, dtype))
    torch.set_num_threads(before)
    assert struct.unpack_from(HEADER, bytes(stream[:64].tolist()))[-1] == 1
    x = normal(70, K, dtype=dtype)
    whole = backend.linear(x, stream, None, N, few_rows)
    tile = 64 + 16 * 8 * 2 * dtype.itemsize
    for byte in (0x00, 0x77, 0x88, 0xFF):
        damaged = stream.clone()
        for start in range(64, len(stream), tile):  # row 5 of every tile
            damaged[start + 20 : start + 24] = byte
        y = backend.linear(x, damaged, None, N, few_rows)
        others = torch.arange(N) % 16 != 5
        assert torch.equal(y[:, others], whole[:, others])
        assert not torch.equal(y[:, ~others], whole[:, ~others])
        backend.restore(damaged)
        backend.expand(damaged, 0, N, torch.empty(N, K, dtype=dtype))


OTHER = {torch.bfloat16: torch.float16, torch.float16: torch.float32, torch.float32: torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_arguments_of_linear(dtype: torch.dtype) -> None:
    stream, x, bias = backend.prepare(random_weight(N, K, dtype)), normal(3, K, dtype=dtype), normal(N, dtype=dtype)
    takes = re.escape(f"the prepared weight takes {dtype} [..., {K}] on cpu")
    for wrong in (
        x[:, :-8], x.repeat(1, 2), x[:0, :8], x.to(OTHER[dtype]), x.double(), x.long(), x.bool(), x.to("meta"),
        torch.zeros((), dtype=dtype), torch.zeros(3, 0, dtype=dtype), torch.zeros(0, dtype=dtype),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(f"x is {wrong.dtype} {list(wrong.shape)}") + ".*" + takes):
            backend.linear(wrong, stream, None, N)
    for n in (N - 1, N + 1, 0):
        with pytest.raises(ValueError, match=f"the prepared weight has {N} rows, not {n}"):
            backend.linear(x, stream, None, n)
    for wrong in wrong_biases(bias):
        with pytest.raises(
            ValueError, match=re.escape(f"a bias of {N} numbers in {dtype} on the CPU is needed, this is")
        ):
            backend.linear(x, stream, wrong, N)
    assert torch.equal(backend.linear(x, stream, bias, N)[:1], backend.linear(x[:1], stream, bias, N))


def wrong_biases(bias: Tensor) -> list[Tensor]:
    return [
        bias[:-1], bias[:1], bias[:0], bias.repeat(2), bias[None], bias[:, None], bias[0], bias.to(OTHER[bias.dtype]),
        bias.to("meta"),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_arguments_of_dense_linear(dtype: torch.dtype) -> None:
    if library.paths() == ("portable",):
        pytest.skip("this processor has no dense kernel")
    weight, x, bias = normal(N, K, dtype=dtype), normal(3, K, dtype=dtype), normal(N, dtype=dtype)
    for x_wrong, weight_wrong in (
        (x[:, :-1], weight), (x, weight[:, :-1]), (x.to(OTHER[dtype]), weight), (x, weight.to(OTHER[dtype])),
        (x.double(), weight.double()), (x.to("meta"), weight), (x, weight.to("meta")), (x, weight[0]), (x, weight[None]),
        (x, normal(K, N, dtype=dtype).T), (torch.zeros((), dtype=dtype), weight),
        (torch.zeros(3, 0, dtype=dtype), torch.zeros(N, 0, dtype=dtype)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(f"x is {x_wrong.dtype} {list(x_wrong.shape)}")):
            backend.dense_linear(x_wrong, weight_wrong, None)
    for wrong in wrong_biases(bias):
        with pytest.raises(ValueError, match=f"a bias of {N} numbers"):
            backend.dense_linear(x, weight, wrong)


def test_wrong_arguments_of_expand() -> None:
    stream, out = backend.prepare(random_weight(N, K, torch.float16)), torch.zeros(4, K, dtype=torch.float16)
    for first, rows in ((-1, 4), (N - 3, 4), (N + 1, 0), (0, -1), (1 << 62, 1 << 62), (4, (1 << 63) - 1)):
        with pytest.raises(ValueError, match=f"rows {first} to {first + rows} of a prepared weight with {N}"):
            backend.expand(stream, first, rows, out)
    for wrong in (
        out[:3],
        out[:, :-8],
        out.float(),
        out.bfloat16(),
        out.T.contiguous().T,
        out.to("meta"),
        out.flatten(),
    ):
        with pytest.raises(ValueError, match=re.escape(f"[4, {K}] in a row on the CPU is needed")):
            backend.expand(stream, 2, 4, wrong)
    assert out.eq(0).all()


def test_using_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    best = library.paths()[0]
    monkeypatch.delenv("HALVE_CPU_PATH", raising=False)
    with backend.using("portable"):
        assert (backend.path(), backend.few_rows(torch.bfloat16)) == ("portable", 1)
        with backend.using(best):
            assert backend.path() == best
        assert backend.path() == "portable"
    assert backend.path() == best
    with pytest.raises(UsageError, match="HALVE_CPU_PATH='avx3' is not known; did you mean"), backend.using("avx3"):
        pytest.fail("never run")
    assert backend.path() == best
    assert "HALVE_CPU_PATH" not in os.environ
    missing = [name for name in backend.PATHS if name not in library.paths()]
    for name in missing:
        with pytest.raises(UsageError, match=f"HALVE_CPU_PATH={name!r}: this processor can run"), backend.using(name):
            pytest.fail("never run")


def test_the_columns_of_the_reference() -> None:
    """The reference knows masks by the packed format's own reading of them."""
    mask = torch.tensor([[0x35, 0xCA], [0x66, 0x99]], dtype=torch.uint8)
    assert kept_columns(mask).tolist() == [[0, 2, 4, 5, 9, 11, 14, 15], [1, 2, 5, 6, 8, 11, 12, 15]]
