"""The packed format, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress import packed as module
from compress.errors import CorruptCheckpointError, NumericalError
from compress.packed import (
    PackedWeight,
    canonical,
    is_two_of_four,
    pack,
    pack_bits,
    unpack,
    unpack_bits,
    validate,
    why_not,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def two_of_four(n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, zeros: float = 0.2) -> Tensor:
    """A 2:4 weight of random finite bit patterns: every exponent, subnormal numbers, −0.0; some groups with fewer than two."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    values = (
        torch.randint(info.min, info.max + 1, (n, k), generator=generator, dtype=torch.int64).to(integer).view(dtype)
    )
    values[~torch.isfinite(values)] = 1
    kept = torch.rand(n, k // 4, 4, generator=generator).argsort(dim=-1) < 2
    kept &= torch.rand(n, k // 4, 4, generator=generator) >= zeros
    weight = values.where(kept.view(n, k), torch.zeros((), dtype=dtype))
    weight[torch.rand(n, k, generator=generator) < 0.05 * (weight == 0)] = -0.0
    return weight


weights = st.builds(
    two_of_four,
    n=st.integers(1, 5),
    k=st.integers(1, 7).map(lambda groups: 8 * groups),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    zeros=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
)


@given(weights)
def test_unpack_gives_back_what_was_packed(weight: Tensor) -> None:
    before = weight.clone()
    restored = unpack(pack(weight))
    assert same_bits(weight, before)
    negative_zero = (weight == 0) & torch.signbit(weight)
    assert same_bits(restored, weight.masked_fill(negative_zero, 0.0))
    assert not torch.signbit(restored[restored == 0]).any()


@given(weights)
def test_packing_again_gives_the_same_bytes(weight: Tensor) -> None:
    packed = pack(weight)
    again = pack(unpack(packed))
    assert same_bits(again.values, packed.values)
    assert torch.equal(again.mask, packed.mask)


@given(weights)
def test_layout_against_a_loop(weight: Tensor) -> None:
    """Kept columns of each group: the non-zero ones, filled up with the lowest zeros. Bit k % 8 of byte k // 8."""
    n, k = weight.shape
    values, masks = [], []
    for row in canonical(weight):
        mask = [0] * (k // 8)
        for start in range(0, k, 4):
            group = list(range(start, start + 4))
            nonzero = [c for c in group if float(row[c]) != 0]
            fill = [c for c in group if c not in nonzero][: 2 - len(nonzero)]
            for column in sorted(nonzero + fill):
                values.append(row[column])
                mask[column // 8] |= 1 << (column % 8)
        masks.append(mask)
    packed = pack(weight)
    assert same_bits(packed.values, torch.stack(values).view(n, k // 2))
    assert packed.mask.tolist() == masks
    assert packed.shape == (n, k)
    validate(packed, "w")


@pytest.mark.parametrize("at_once", [1, 48, 100])
def test_rows_are_packed_a_few_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, and the place of what is not 2:4 counts from the first row."""
    weight = two_of_four(11, 24)
    whole = pack(weight)
    monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", at_once)
    parts = pack(weight)
    assert same_bits(parts.values, whole.values)
    assert torch.equal(parts.mask, whole.mask)
    weight[9, 20:24] = weight[10, 0:4] = 1
    with pytest.raises(CorruptCheckpointError, match=r"2 groups .*first in row 9, columns 20 to 23\)"):
        pack(weight, "lm.up")


CLEAR_PEAK = Path("/proc/self/clear_refs")
MEMORY_ON_THE_WAY = """
import os
from pathlib import Path
import torch
from compress.packed import pack
weight = torch.ones(2048, 4096, dtype=torch.bfloat16)
weight.view(-1, 4)[:, 2:] = 0
pack(weight[:8])
Path("/proc/self/clear_refs").write_text("5")
before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
packed = pack(weight)
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print((peak - before - packed.nbytes) / weight.numel())
"""


@pytest.mark.skipif(not os.access(CLEAR_PEAK, os.W_OK), reason="the peak of the memory is Linux' to tell")
def test_packing_needs_little_memory_on_the_way() -> None:
    """Layers are packed as they are loaded, when memory is full of the others. In a process of its own: one that ran other
    tests has freed memory at hand, which hides what is needed, and threads of theirs that need more."""
    done = subprocess.run([sys.executable, "-c", MEMORY_ON_THE_WAY], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 4


def test_layout_of_one_row_by_hand() -> None:
    row = torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 3.0, 0.0]])
    packed = pack(row)
    assert packed.values.tolist() == [[5.0, 7.0, 0.0, 3.0]]
    assert packed.mask.tolist() == [[0b0101_1010]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_size(dtype: torch.dtype) -> None:
    weight = two_of_four(24, 136, dtype)
    packed = pack(weight)
    assert packed.nbytes == weight.nbytes // 2 + weight.numel() // 8
    if dtype.itemsize == 2:
        assert packed.nbytes * 16 == weight.nbytes * 9


def test_views_are_packed_as_what_they_show() -> None:
    """A Conv1D's weight arrives as a transposed view."""
    weight = two_of_four(16, 24)
    view = weight.T.contiguous().T
    assert not view.is_contiguous()
    assert same_bits(pack(view).values, pack(weight).values)
    assert torch.equal(pack(view).mask, pack(weight).mask)
    assert pack(view).values.is_contiguous()
    assert pack(view).mask.is_contiguous()


@given(a=weights, seed=st.integers(0, 1000), rows=st.integers(1, 4))
def test_rows_concatenate(a: Tensor, seed: int, rows: int) -> None:
    """Fused q/k/v and gate/up are made by concatenation of the packed tensors."""
    b = two_of_four(rows, a.shape[1], a.dtype, seed)
    whole, parts = pack(torch.cat([a, b])), (pack(a), pack(b))
    assert same_bits(whole.values, torch.cat([part.values for part in parts]))
    assert torch.equal(whole.mask, torch.cat([part.mask for part in parts]))


@given(weight=weights, data=st.data())
def test_columns_slice_at_multiples_of_eight(weight: Tensor, data: st.DataObject) -> None:
    """Tensor parallelism cuts the packed tensors where it cuts the dense ones."""
    last = weight.shape[1] // 8
    start = data.draw(st.integers(0, last - 1))
    stop = data.draw(st.integers(start + 1, last))
    whole, part = pack(weight), pack(weight[:, 8 * start : 8 * stop])
    assert same_bits(part.values, whole.values[:, 4 * start : 4 * stop].contiguous())
    assert torch.equal(part.mask, whole.mask[:, start:stop])


@given(st.integers(0, 2**31))
def test_bits_round_trip(seed: int) -> None:
    kept = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(kept)), kept)


def test_not_two_of_four_names_row_and_columns() -> None:
    weight = two_of_four(6, 32)
    weight[4, 12:15] = 1
    weight[4, 20:24] = 1
    with pytest.raises(
        CorruptCheckpointError, match=r"lm\.up is not 2:4: 2 groups .*first in row 4, columns 12 to 15\)"
    ):
        pack(weight, "lm.up")
    assert not is_two_of_four(weight)


def test_two_of_four() -> None:
    assert is_two_of_four(two_of_four(4, 16))
    assert is_two_of_four(torch.zeros(2, 8))
    assert not is_two_of_four(torch.zeros(2, 6))
    across = torch.zeros(1, 8)
    across[0, 2:6] = 1  # four in a row, but two in each aligned group
    assert is_two_of_four(across)


@pytest.mark.parametrize("columns", [1, 4, 12, 20])
def test_narrow_weights_are_refused(columns: int) -> None:
    assert why_not(columns) is not None
    with pytest.raises(CorruptCheckpointError, match=f"lm.up: {columns} input features are not a multiple of 8"):
        pack(torch.zeros(2, columns), "lm.up")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_are_refused(bad: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 16, dtype=dtype)
    weight[1, 9] = bad
    with pytest.raises(NumericalError, match=r"lm\.up: 1 values are NaN or infinite \(the first at \[1, 9\]\)"):
        pack(weight, "lm.up")
    packed = pack(two_of_four(3, 16, dtype))
    packed.values[2, 3] = bad
    with pytest.raises(CorruptCheckpointError, match=r"lm\.up: 1 packed values .*\[2, 3\]"):
        validate(packed, "lm.up")


def test_every_flipped_mask_bit_is_noticed() -> None:
    packed = pack(two_of_four(3, 24))
    validate(packed, "lm.up")
    for row in range(3):
        for byte in range(3):
            for bit in range(8):
                mask = packed.mask.clone()
                mask[row, byte] ^= 1 << bit
                columns = f"row {row}, columns {8 * byte} to {8 * byte + 7}"
                with pytest.raises(CorruptCheckpointError, match=rf"lm\.up: .*\(1 bytes are wrong, .*{columns}\)"):
                    validate(PackedWeight(packed.values, mask), "lm.up")


def test_every_mask_byte_is_judged_by_its_bits() -> None:
    valid = 0
    for byte in range(256):
        packed = PackedWeight(torch.zeros(1, 4), torch.tensor([[byte]], dtype=torch.uint8))
        try:
            validate(packed, "w")
            valid += 1
            assert bin(byte & 15).count("1") == bin(byte >> 4).count("1") == 2
        except CorruptCheckpointError:
            assert not bin(byte & 15).count("1") == bin(byte >> 4).count("1") == 2
    assert valid == 36


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        ((2, 8), (2, 3)),
        ((2, 8), (3, 2)),
        ((2, 8), (2, 1)),
        ((2, 6), (2, 1)),
        ((2, 8), (4,)),
        ((16,), (2, 2)),
        ((1, 2, 8), (2, 2)),
        ((2, 8), (1, 2, 2)),
        ((), ()),
    ],
)
def test_shapes_that_do_not_belong_together(values: tuple[int, ...], mask: tuple[int, ...]) -> None:
    packed = PackedWeight(torch.zeros(values), torch.full(mask, 0x33, dtype=torch.uint8))
    with pytest.raises(CorruptCheckpointError, match=r"lm\.up: values .* do not belong together"):
        validate(packed, "lm.up")


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        (torch.float64, torch.uint8),
        (torch.int32, torch.uint8),
        (torch.uint8, torch.uint8),
        (torch.bfloat16, torch.int8),
        (torch.bfloat16, torch.bool),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_that_the_format_does_not_have(values: torch.dtype, mask: torch.dtype) -> None:
    packed = PackedWeight(torch.zeros(2, 8, dtype=values), torch.full((2, 2), 0x33).to(mask))
    with pytest.raises(CorruptCheckpointError, match=r"lm\.up: values are .* and the mask is"):
        validate(packed, "lm.up")
