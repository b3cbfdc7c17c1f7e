"""The order in which the GPU kernels read a weight, against the PTX ISA's formulas and against torch's metadata."""

from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from compress.errors import CorruptCheckpointError
from compress.packed import PackedWeight, pack, unpack
from compress.patterns import NMPattern
from serve.kernels.cuda import layout
from tests.serve.cpu_reference import kept_columns, random_weight
from tests.serve.gpu_reference import SCALED, same, scaled_weight

SHAPES = [(1, 8), (5, 24), (64, 64), (65, 72), (128, 128), (200, 136), (63, 320)]
OF_8_BITS = pytest.mark.parametrize("values", SCALED, ids=str)
OF_BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@OF_BOTH_DTYPES
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (0, 16)])
def test_what_is_prepared_is_restored(n: int, k: int, dtype: torch.dtype) -> None:
    weight = random_weight(n, k, dtype)
    prepared = layout.prepare(weight)
    assert len(prepared) == layout.prepared_bytes(n, k)
    assert layout.describe(prepared) == (dtype, n, k, None)
    restored = layout.restore(prepared)
    assert torch.equal(restored.values.view(torch.int16), weight.values.view(torch.int16))
    assert torch.equal(restored.mask, weight.mask)


@OF_8_BITS
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (0, 16)])
def test_values_of_8_bits_are_restored(n: int, k: int, values: torch.dtype) -> None:
    weight = scaled_weight(n, k, values)
    prepared = layout.prepare(weight)
    assert len(prepared) == layout.prepared_bytes(n, k, values)
    assert layout.scaled_dtype(len(prepared), n, k) == values
    assert layout.describe(prepared) == (values, n, k, None)
    assert same(layout.restore(prepared), weight)


def test_the_bytes_are_nine_sixteenths() -> None:
    assert layout.prepared_bytes(4096, 4096) - layout.HEADER_BYTES == 4096 * 4096 * 2 * 9 // 16


@OF_8_BITS
def test_the_bytes_are_five_sixteenths_and_the_scales(values: torch.dtype) -> None:
    more = layout.prepared_bytes(4096, 4096, values) - 4096 * 4096 * 2 * 5 // 16 - 4 * 4096
    assert 0 < more <= layout.HEADER_BYTES + 1024


@OF_8_BITS
@pytest.mark.parametrize(("n", "k"), [(128, 128), (70, 200)])
def test_every_lane_has_its_bytes_of_the_fragments(n: int, k: int, values: torch.dtype) -> None:
    """Four at a time, of the two registers with the same columns: register r and r + 1 of the fragment have rows l / 4 and 8 more, and
    of each the first value comes before the second ones."""
    weight = scaled_weight(n, k, values)
    given = weight.values.view(torch.uint8).tolist()
    panels, units = -(-n // 64), -(-k // 64)
    prepared = layout.prepare(weight)
    body = prepared[layout.HEADER_BYTES :][: panels * units * 2560].view(panels, units, 2560)
    found = body[..., :2048].contiguous().view(panels, units, 2, 2, 32, 16).tolist()
    of_16_bits = layout.prepare(PackedWeight(weight.values.view(torch.uint8).half(), weight.mask))
    metadata = of_16_bits[layout.HEADER_BYTES :].view(panels, units, 4608)[..., 4096:]
    assert torch.equal(body[..., 2048:], metadata)
    seen = 0
    for panel in range(panels):
        for unit in range(units):
            for half in range(2):
                for below in range(2):
                    for lane in range(32):
                        for byte in range(16):
                            fragment, register, value, lower = byte // 8, byte // 4 % 2, byte // 2 % 2, byte % 2
                            row = panel * 64 + below * 32 + fragment * 16 + lower * 8 + lane // 4
                            kept = (unit * 64 + half * 32 + register * 16 + lane % 4 * 4) // 2 + value
                            wanted = given[row][kept] if row < n and kept < k // 2 else 0
                            assert found[panel][unit][half][below][lane][byte] == wanted
                            seen += row < n and kept < k // 2
    assert seen == n * k // 2
    scales = prepared[layout.HEADER_BYTES + panels * units * 2560 :][: panels * 256].view(torch.float32)
    assert weight.scale is not None
    assert torch.equal(scales[:n], weight.scale[:, 0])
    assert not scales[n:].any()


@OF_8_BITS
def test_values_of_8_bits_have_one_form(values: torch.dtype) -> None:
    prepared = layout.prepare(scaled_weight(10, 40, values))
    with pytest.raises(ValueError, match="only a weight with values of 16 bits has a second form"):
        layout.append(prepared, layout.Second.DENSE, prepared[:64])
    second = prepared.clone()
    second[16] = 1
    for damaged in (prepared[:-1], torch.cat([prepared, prepared[:512]]), second):
        with pytest.raises(ValueError, match="damaged, or no prepared weight"):
            layout.restore(damaged)


@pytest.mark.parametrize(("n", "k"), [(128, 128), (70, 200)])
def test_every_lane_has_the_fragment_of_the_ptx_isa(n: int, k: int) -> None:
    """Element i of lane l of the A fragment of mma.m16n8k32 (section "Matrix Fragments for sparse mma.m16n8k32"):

    row l / 4, or 8 more for i in 2, 3, 6, 7; columns 4 (l % 4) to 3 more, or 16 more for i from 4 on, of which it is the
    first or the second value that is kept.
    """
    weight = random_weight(n, k, torch.bfloat16)
    values, columns = weight.values.view(torch.int16).tolist(), kept_columns(weight.mask).tolist()
    body = layout.prepare(weight)[layout.HEADER_BYTES :].view(-(-n // 64), -(-k // 64), layout.UNIT_BYTES)
    fragments = body[..., :4096].contiguous().view(torch.int16).view(*body.shape[:2], 2, 4, 32, 8).tolist()
    for panel, units in enumerate(fragments):
        for unit, halves in enumerate(units):
            for half, rows in enumerate(halves):
                for sixteen, lanes in enumerate(rows):
                    for lane, elements in enumerate(lanes):
                        for i, found in enumerate(elements):
                            row = panel * 64 + sixteen * 16 + lane // 4 + (8 if i in (2, 3, 6, 7) else 0)
                            column = unit * 64 + half * 32 + lane % 4 * 4 + (16 if i >= 4 else 0)
                            wanted = 0
                            if row < n and column < k:
                                kept = column // 2 + i % 2
                                assert column <= columns[row][kept] < column + 4
                                wanted = values[row][kept]
                            assert found == wanted


@OF_BOTH_DTYPES
@pytest.mark.parametrize(("n", "k"), [(64, 64), (128, 192), (192, 512)])
def test_metadata_are_those_of_torch(n: int, k: int, dtype: torch.dtype) -> None:
    """torch arranges them for CUTLASS: 32-bit words [k / 32, n / 32, lane], of 32 rows and 32 columns each."""
    dense = torch.rand(n, k, generator=torch.Generator().manual_seed(0)) + 0.5  # no zero among what is kept
    dense = (dense * NMPattern(2, 4).mask(dense)).to(dtype)
    values, metadata = sparse_semi_structured_from_dense_cutlass(dense)
    packed = pack(dense)
    assert torch.equal(packed.values, values)
    theirs = metadata.flatten().view(torch.int32).view(k // 64, 2, n // 64, 2, 32)  # unit, half, panel, 32 rows, lane
    body = layout.prepare(packed)[layout.HEADER_BYTES :].view(n // 64, k // 64, layout.UNIT_BYTES)
    ours = body[..., 4096:].contiguous().view(torch.int32).view(n // 64, k // 64, 32, 2, 2)  # lane, half, 32 rows
    assert torch.equal(ours, theirs.permute(2, 0, 4, 1, 3))
    assert len(ours.unique()) > 100


def test_edges_are_zeros_with_metadata_that_are_defined() -> None:
    weight = PackedWeight(torch.ones(1, 4, dtype=torch.float16), torch.full((1, 1), 0x33, dtype=torch.uint8))
    prepared = layout.prepare(weight)
    padded = prepared.clone()
    padded[:16] = torch.frombuffer(bytearray(b"hh2G\x02\0\0\0\x40\0\0\0\x40\0\0\0"), dtype=torch.uint8)
    whole = unpack(layout.restore(padded))
    assert whole.shape == (64, 64)
    assert whole.sum() == 4
    assert (layout.restore(padded).mask == 0x33).all()


def test_a_mask_that_is_wrong() -> None:
    weight = random_weight(70, 200, torch.bfloat16)
    weight.mask[68, 21] = 0x37
    with pytest.raises(CorruptCheckpointError, match=r"layer\.3: .*row 68, columns 168 to 171"):
        layout.prepare(weight, "layer.3")
    with pytest.raises(CorruptCheckpointError, match="do not belong together"):
        layout.prepare(PackedWeight(weight.values, weight.mask[:, :-1]))
    with pytest.raises(
        ValueError, match=r"layer: values are torch.float32; the kernels take bfloat16, float16, int8, float8_e4m3fn"
    ):
        layout.prepare(random_weight(4, 8, torch.float32), "layer")


def test_what_is_no_prepared_weight() -> None:
    prepared = layout.prepare(random_weight(10, 40, torch.bfloat16))
    for place, byte in ((0, 1), (4, 3), (8, 200), (14, 7)):  # magic, dtype, N, K
        damaged = prepared.clone()
        damaged[place] = byte
        with pytest.raises(ValueError, match="damaged, or no prepared weight"):
            layout.restore(damaged)
    for short in (prepared[:-1], prepared[:100], prepared[:0]):
        with pytest.raises(ValueError, match="damaged, or no prepared weight"):
            layout.describe(short)
    for other in (prepared.float(), prepared[None], prepared[::2]):
        with pytest.raises(ValueError, match="a prepared weight is bytes in a row"):
            layout.describe(other)
    damaged = prepared.clone()
    damaged[layout.HEADER_BYTES + 4096] = 0x55
    with pytest.raises(ValueError, match="metadata is not two columns in every group"):
        layout.restore(damaged)
