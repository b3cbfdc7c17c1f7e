"""The GPU kernels' own source, run lane by lane on a processor, against float64.

What a GPU does is what `cuda_emulator.h` takes from the PTX ISA; the rest (indices, edges, the pipeline and its barriers,
sums over warps and blocks) is the real thing. `TestMistakes` shows that faults in either the bytes or the source are seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.packed import PackedWeight, quantize_rows, unpack
from serve.kernels.cuda import layout, plan
from serve.kernels.cuda.plan import Form
from tests.serve.cpu_reference import expected, kept_columns, normal, random_weight
from tests.serve.cuda_emulation import (
    ANY_TIME,
    AT_ONCE,
    AT_THE_WAIT,
    DTYPES,
    SOURCE,
    EmulationError,
    Emulator,
    compile_emulator,
    needs_compiler,
)
from tests.serve.gpu_reference import SCALED, expected_rounded, expected_scaled, scaled_weight

pytestmark = needs_compiler

HOPPER, AMPERE, ADA = (9, 0), (8, 0), (8, 9)
OF_BOTH_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
COPIES = pytest.mark.parametrize("copies", [AT_ONCE, AT_THE_WAIT, ANY_TIME], ids=["at once", "at the wait", "any time"])


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return compile_emulator(tmp_path_factory.mktemp("hopper"), HOPPER, forms=some(HOPPER))


def some(capability: tuple[int, int], unit_bytes: int = layout.UNIT_BYTES) -> list[Form]:
    """A form for each number of tiles, divided among blocks in one way after the other."""
    forms = plan.forms(capability, unit_bytes)
    return [(found := plan.for_rows(forms, 8 * tiles))[at % len(found)] for at, tiles in enumerate((1, 2, 4, 8))]


@pytest.fixture(scope="module", params=[HOPPER, AMPERE, ADA], ids=["9.0", "8.0", "8.9"])
def emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if request.param == HOPPER:
        return request.getfixturevalue("hopper")
    return compile_emulator(tmp_path_factory.mktemp("emulator"), request.param, forms=some(request.param))


def wrong(emulator: Emulator, m: int, n: int, k: int, dtype: torch.dtype, *, bias: bool, splits: int = 1, seed: int = 0,
          copies: int = ANY_TIME) -> int:  # fmt: skip
    """How many outputs are out of their bounds."""
    weight, x = random_weight(n, k, dtype, seed=seed), normal(m, k, dtype=dtype, seed=1)
    added = normal(n, dtype=dtype, seed=2) if bias else None
    y = emulator.multiply(x, layout.prepare(weight), added, n, splits=splits, seed=seed, copies=copies)
    return int(expected(x, weight, added, flushes=False).wrong(y).sum())


@pytest.mark.parametrize("capability", [HOPPER, ADA], ids=["9.0", "8.9"])
def test_every_form(tmp_path_factory: pytest.TempPathFactory, capability: tuple[int, int]) -> None:
    """So deep that its pipeline is filled anew, with an edge, and in clusters where there are some."""
    emulator = compile_emulator(tmp_path_factory.mktemp("forms"), capability, dtypes=[torch.bfloat16])
    assert emulator.forms == plan.forms(capability)
    for form in emulator.forms:
        m, n, k = 8 * form.tiles - 1, 130, 64 * form.groups * (form.stages + 1) + 8
        weight, x = random_weight(n, k, torch.bfloat16), normal(m, k, dtype=torch.bfloat16)
        prepared, right = layout.prepare(weight), expected(x, weight, None, flushes=False)
        for splits in plan.possible_splits(capability)[:2]:
            y = emulator.multiply(x, prepared, None, n, form=form, splits=splits, seed=splits, copies=AT_THE_WAIT)
            assert not right.wrong(y).any(), (form, splits)


class TestShapes:
    def test_every_number_of_rows_of_x(self, emulator: Emulator) -> None:
        for m in range(1, plan.MOST_ROWS + 1):
            assert wrong(emulator, m, 70, 136, DTYPES[m % 2], bias=m % 3 == 0, seed=m) == 0, m

    @OF_BOTH_DTYPES
    def test_every_number_of_outputs(self, emulator: Emulator, dtype: torch.dtype) -> None:
        for n in [*range(1, 20), 63, 64, 65, 66, 127, 128, 129, 191, 192, 194, 260]:
            assert wrong(emulator, (1, 9, 20, 40)[n % 4], n, 72, dtype, bias=n % 3 > 0, seed=n) == 0, n

    @OF_BOTH_DTYPES
    def test_every_number_of_inputs(self, emulator: Emulator, dtype: torch.dtype) -> None:
        """With fewer steps than groups of warps, and as many as the pipeline is deep and more."""
        for k in [*range(8, 137, 8), 256, 320, 520, 1024, 1416]:
            assert wrong(emulator, (1, 16, 32, 64)[k // 8 % 4], 64, k, dtype, bias=True, seed=k) == 0, k

    @OF_BOTH_DTYPES
    @pytest.mark.parametrize("splits", [2, 3, 4, 8])
    def test_clusters(self, hopper: Emulator, dtype: torch.dtype, splits: int) -> None:
        for m, n, k in (
            (1, 100, 64 * splits),
            (8, 65, 1100 // 8 * 8),
            (13, 130, 8 * splits),
            (40, 200, 712),
            (64, 64, 328),
        ):
            assert wrong(hopper, m, n, k, dtype, bias=m > 1, splits=splits, seed=m) == 0, (m, n, k)

    def test_more_blocks_than_units(self, hopper: Emulator) -> None:
        assert wrong(hopper, 5, 70, 136, torch.bfloat16, bias=True, splits=8) == 0

    @OF_BOTH_DTYPES
    @pytest.mark.parametrize(("n", "k"), [(1, 8), (64, 64), (70, 136), (200, 328), (520, 72)])
    def test_expansion(self, emulator: Emulator, dtype: torch.dtype, n: int, k: int) -> None:
        weight = random_weight(n, k, dtype)
        assert torch.equal(emulator.expand(layout.prepare(weight), n, k, dtype), unpack(weight))


@COPIES
@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_events_changes_a_bit(emulator: Emulator, copies: int, seed: int) -> None:
    for m in (7, 12, 25, 60):
        splits = 2 if plan.has_clusters(emulator.capability) else 1
        weight, x = random_weight(130, 1000, torch.bfloat16), normal(m, 1000, dtype=torch.bfloat16)
        prepared = layout.prepare(weight)
        y = emulator.multiply(x, prepared, None, 130, splits=splits, seed=seed, copies=copies)
        assert torch.equal(y, emulator.multiply(x, prepared, None, 130, splits=splits, seed=9, copies=AT_ONCE))
        assert not expected(x, weight, None, flushes=False).wrong(y).any()


def test_numbers_at_the_ends_of_the_range(hopper: Emulator) -> None:
    """Tiny and huge values beside each other, infinity, and NaN in columns that are not kept."""
    for dtype in DTYPES:
        limits = torch.finfo(dtype)
        weight, x = random_weight(70, 200, dtype), normal(9, 200, dtype=dtype)
        weight.values[:, ::3] *= limits.tiny
        x[:, ::5] *= 100
        x[3, 17], x[4, 20] = float("inf"), float("nan")
        y = hopper.multiply(x, layout.prepare(weight), None, 70)
        kept = torch.zeros(70, 200, dtype=torch.bool).scatter_(1, kept_columns(weight.mask), True)
        assert torch.equal(y[4].isnan(), kept[:, 20])
        assert torch.equal(y[3].isinf() | y[3].isnan(), kept[:, 17])
        assert not expected(x, weight, None, flushes=False).wrong(y).any()


class TestOtherWeights:
    """What does not fit gives NaN everywhere, and never a number."""

    @staticmethod
    def all_nan(emulator: Emulator, prepared: Tensor, n: int, k: int, dtype: torch.dtype) -> bool:
        products = [emulator.multiply(normal(3, k, dtype=dtype), prepared, None, n, splits=splits) for splits in (1, 2)]
        return all(bool(y.isnan().all()) for y in [*products, emulator.expand(prepared, n, k, dtype)])

    def test_another_shape_of_the_same_size(self, hopper: Emulator) -> None:
        prepared = layout.prepare(random_weight(100, 200, torch.bfloat16))
        assert not self.all_nan(hopper, prepared, 100, 200, torch.bfloat16)
        assert self.all_nan(hopper, prepared, 101, 200, torch.bfloat16)
        assert self.all_nan(hopper, prepared, 100, 192 + 64, torch.bfloat16)

    def test_another_dtype(self, hopper: Emulator) -> None:
        prepared = layout.prepare(random_weight(100, 200, torch.bfloat16))
        assert self.all_nan(hopper, prepared, 100, 200, torch.float16)

    def test_something_else(self, hopper: Emulator) -> None:
        prepared = layout.prepare(random_weight(100, 200, torch.bfloat16))
        prepared[0] += 1
        assert self.all_nan(hopper, prepared, 100, 200, torch.bfloat16)


class TestMistakes:
    """That a mistake is seen."""

    M, N, K = 60, 132, 1000

    def seen(self, emulator: Emulator, prepared: Tensor, weight: PackedWeight, splits: int = 1) -> bool:
        """Whether some order of events gives a wrong number, or something that is undefined."""
        x = normal(self.M, self.K, dtype=weight.values.dtype, seed=1)
        right = expected(x, weight, None, flushes=False)
        for copies in (AT_ONCE, AT_THE_WAIT, ANY_TIME):
            for seed in range(4):
                try:
                    y = emulator.multiply(x, prepared, None, self.N, splits=splits, seed=seed, copies=copies)
                except EmulationError:
                    return True
                if right.wrong(y).any():
                    return True
        return False

    @pytest.mark.parametrize(
        "damage", ["a nibble", "two nibbles", "two values", "two lanes", "two units", "an undefined nibble"]
    )
    def test_in_the_bytes(self, hopper: Emulator, damage: str) -> None:
        weight = random_weight(self.N, self.K, torch.bfloat16)
        prepared = layout.prepare(weight)
        assert not self.seen(hopper, prepared, weight)
        body = prepared[layout.HEADER_BYTES :].view(-1, layout.UNIT_BYTES)
        metadata, values = body[3, 4096:], body[3, :4096]
        if damage == "a nibble":
            metadata[77] = {0x4: 0x8, 0x8: 0x4}.get(int(metadata[77]) & 15, 0x4) | int(metadata[77]) & 0xF0
        elif damage == "two nibbles":
            place = next(i for i in range(512) if metadata[i] & 15 != metadata[i] >> 4)
            metadata[place] = metadata[place] >> 4 | (metadata[place] & 15) << 4
        elif damage == "two values":
            values[800:804] = values[800:804].clone().roll(2)
        elif damage == "two lanes":
            values[512:544] = values[512:544].clone().roll(16)
        elif damage == "two units":
            body[3:5] = body[3:5].clone().flip(0)
        else:
            metadata[5] = 0x55
        assert self.seen(hopper, prepared, weight)

    @pytest.mark.parametrize(
        ("right", "mistaken", "splits"),
        [
            ("wait_for_copies<Stages - 2>();", "wait_for_copies<Stages - 1>();", 1),
            ("sync_warps<32 * Panels>(1 + group);", "", 1),
            ("sync_warps<32 * Panels>(1 + group);", "sync_warps<32>(1 + group);", 1),
            ("wait_for_copies<0>();\n  sync_block();", "wait_for_copies<0>();", 1),
            ("    sync_cluster();\n  }\n  for", "    sync_block();\n  }\n  for", 2),
            ("if (call.splits > 1) leave_cluster();", "", 2),
            ("  wait_for_kernel_before();\n", "", 1),
            ("store_shared(to, held[step][i])", "store_shared(to, held[0][i])", 1),
            ("row < call.rows && column < call.k", "row < call.rows", 1),
            ("row < call.rows && column < call.k", "column < call.k", 1),
            ("inputs + row * 128 + ((chunk ^ (row & 7)) << 4),", "inputs + row * 128 + (chunk << 4),", 1),
            ("(lane >> 3)", "(lane & 3)", 1),
            ("multiply_sparse<T, 1>", "multiply_sparse<T, 0>", 1),
            ("+ (i >> 1) * 8", "", 1),
            ("first + group + step * Groups", "first + group + step", 1),
            ("if (!right)", "if (right)", 1),
            ("if (own_row < call.n) *", "*", 1),
        ],
    )
    def test_in_the_source(
        self, tmp_path_factory: pytest.TempPathFactory, right: str, mistaken: str, splits: int
    ) -> None:
        source = SOURCE.read_text()
        assert right in source
        emulator = compile_emulator(
            tmp_path_factory.mktemp("mistaken"),
            HOPPER,
            source.replace(right, mistaken, 1),
            forms=plan.for_rows(plan.forms(HOPPER), self.M)[:1],
            dtypes=[torch.bfloat16],
        )
        weight = random_weight(self.N, self.K, torch.bfloat16)
        assert self.seen(emulator, layout.prepare(weight), weight, splits=splits)

    def test_too_little_shared_memory(self, hopper: Emulator) -> None:
        weight, form = random_weight(64, 4096, torch.bfloat16), plan.for_rows(hopper.forms, 3)[0]
        with pytest.raises(EmulationError, match="beyond shared memory"):
            hopper.multiply(normal(3, 4096, dtype=torch.bfloat16), layout.prepare(weight), None, 64,
                            shared_bytes=form.shared_bytes - 16)  # fmt: skip


@pytest.fixture(scope="module", params=SCALED, ids=str)
def scaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """Of kernels for values of 8 bits."""
    return compile_emulator(
        tmp_path_factory.mktemp("scaled"),
        HOPPER,
        forms=some(HOPPER, layout.SCALED_UNIT_BYTES),
        values=request.param,
    )


@pytest.fixture(scope="module", params=SCALED, ids=str)
def without_clusters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return compile_emulator(
        tmp_path_factory.mktemp("ada"), ADA, forms=some(ADA, layout.SCALED_UNIT_BYTES), values=request.param
    )


class TestScaled:
    """Values of 8 bits with a scale for each row."""

    @staticmethod
    def wrong(emulator: Emulator, m: int, n: int, k: int, dtype: torch.dtype, *, bias: bool, splits: int = 1,
              seed: int = 0, **how: Form) -> int:  # fmt: skip
        """How many outputs are out of their bounds."""
        assert emulator.values is not None
        weight, x = scaled_weight(n, k, emulator.values, seed), normal(m, k, dtype=dtype, seed=1)
        added = normal(n, dtype=dtype, seed=2) if bias else None
        y = emulator.multiply(x, layout.prepare(weight), added, n, splits=splits, seed=seed, **how)
        return int(expected_scaled(x, weight, added).wrong(y).sum())

    @pytest.mark.parametrize("values", SCALED, ids=str)
    @pytest.mark.parametrize("capability", [HOPPER, ADA, (12, 0)], ids=["9.0", "8.9", "12.0"])
    def test_every_form(
        self, tmp_path_factory: pytest.TempPathFactory, capability: tuple[int, int], values: torch.dtype
    ) -> None:
        emulator = compile_emulator(
            tmp_path_factory.mktemp("forms"), capability, dtypes=[torch.bfloat16], values=values
        )
        assert {form.unit_bytes for form in emulator.forms} == {layout.SCALED_UNIT_BYTES}
        for form in emulator.forms:
            k = 64 * form.groups * (form.stages + 1) + 8
            for splits in plan.possible_splits(capability)[:2]:
                how = {"bias": True, "splits": splits, "seed": splits, "form": form}
                assert self.wrong(emulator, 8 * form.tiles - 1, 130, k, torch.bfloat16, **how) == 0, (form, splits)

    def test_every_number_of_rows_of_x(self, scaled: Emulator) -> None:
        for m in range(1, plan.MOST_ROWS + 1):
            assert self.wrong(scaled, m, 70, 136, DTYPES[m % 2], bias=m % 3 == 0, seed=m) == 0, m

    @OF_BOTH_DTYPES
    def test_every_number_of_outputs(self, scaled: Emulator, dtype: torch.dtype) -> None:
        for n in [*range(1, 12), 63, 64, 65, 66, 127, 128, 129, 191, 194, 260]:
            assert self.wrong(scaled, (1, 9, 20, 40)[n % 4], n, 72, dtype, bias=n % 3 > 0, seed=n) == 0, n

    @OF_BOTH_DTYPES
    def test_every_number_of_inputs(self, without_clusters: Emulator, dtype: torch.dtype) -> None:
        for k in [*range(8, 137, 16), 256, 320, 520, 1024, 1416]:
            assert self.wrong(without_clusters, (1, 16, 32, 64)[k // 8 % 4], 70, k, dtype, bias=True, seed=k) == 0, k

    @OF_BOTH_DTYPES
    @pytest.mark.parametrize("splits", [2, 3, 8])
    def test_clusters(self, scaled: Emulator, dtype: torch.dtype, splits: int) -> None:
        """The scale counts once, and the bias is not scaled."""
        for m, n, k in ((1, 100, 64 * splits), (8, 65, 1096), (13, 130, 8 * splits), (40, 200, 712), (64, 260, 328)):
            assert self.wrong(scaled, m, n, k, dtype, bias=m > 1, splits=splits, seed=m) == 0, (m, n, k)

    def test_no_order_of_events_changes_a_bit(self, scaled: Emulator) -> None:
        assert scaled.values is not None
        weight, x = scaled_weight(130, 1000, scaled.values), normal(25, 1000, dtype=torch.float16)
        prepared = layout.prepare(weight)
        first = scaled.multiply(x, prepared, None, 130, splits=2, seed=9, copies=AT_ONCE)
        for copies in (AT_ONCE, AT_THE_WAIT, ANY_TIME):
            for seed in range(4):
                y = scaled.multiply(x, prepared, None, 130, splits=2, seed=seed, copies=copies)
                assert torch.equal(y, first)

    @OF_BOTH_DTYPES
    def test_every_value_in_every_byte_of_a_lane(self, scaled: Emulator, dtype: torch.dtype) -> None:
        """Exactly, subnormal ones too: each is alone in its sum, and its scale is 1. (The emulator ends where a conversion rounds.)"""
        assert scaled.values is not None
        bits = torch.arange(2048 * 16).remainder(256).to(torch.uint8).view(1024, 32)
        bits = torch.cat([part.roll(i, 1) for i, part in enumerate(bits.split(64))])  # (panels)
        if scaled.values == torch.int8:
            bits[bits == 0x80] = 0
        else:
            bits[(bits & 0x7F == 0x7F) | (bits == 0x80)] = 0
        values = bits.view(scaled.values)
        weight = PackedWeight(values, torch.full((1024, 8), 0x33, dtype=torch.uint8), torch.ones(1024, 1))
        prepared = layout.prepare(weight)
        of_lanes = layout._body(prepared, 1024, 64, scaled.values)[..., :2048].reshape(-1, 16)
        assert [len(place.unique()) for place in of_lanes.T] == [255 if scaled.values == torch.int8 else 253] * 16
        kept = torch.arange(64)[torch.arange(64) % 4 < 2]
        x = torch.zeros(32, 64, dtype=dtype)
        x[torch.arange(32), kept] = 1
        y = scaled.multiply(x, prepared, None, 1024)
        assert torch.equal(y.T.double(), values.double())
        assert torch.equal(scaled.expand(prepared, 1024, 64, dtype).double()[:, kept], values.double())

    @OF_BOTH_DTYPES
    @pytest.mark.parametrize(("n", "k"), [(1, 8), (64, 64), (70, 136), (200, 328)])
    def test_expansion(self, scaled: Emulator, dtype: torch.dtype, n: int, k: int) -> None:
        """To the bit, with scales that make subnormal numbers of it."""
        assert scaled.values is not None
        weight = scaled_weight(n, k, scaled.values)
        assert weight.scale is not None
        weight.scale[::4] *= 2.0**-20 if dtype is torch.float16 else 2.0**-130
        dense = scaled.expand(layout.prepare(weight), n, k, dtype)
        exact = unpack(PackedWeight(weight.values.double() * weight.scale.double(), weight.mask))
        assert torch.equal(dense, unpack(weight, dtype))
        assert torch.equal(dense, exact.float().to(dtype))
        assert n == 1 or bool(((dense != 0) & (dense.abs() < torch.finfo(dtype).tiny)).any())

    @pytest.mark.parametrize(("n", "k"), [(1, 8), (64, 64), (70, 136), (200, 328)])
    def test_expansion_of_the_values_themselves(self, scaled: Emulator, n: int, k: int) -> None:
        """To the bit, and the scales behind them; by another header these are NaN."""
        assert scaled.values is not None
        weight = scaled_weight(n, k, scaled.values)
        assert weight.scale is not None
        prepared = layout.prepare(weight)
        values, scales = scaled.expand_values(prepared, n, k)
        wanted = unpack(PackedWeight(weight.values.view(torch.uint8), weight.mask))
        assert torch.equal(values.view(torch.uint8), wanted)
        assert torch.equal(scales, weight.scale.flatten())
        prepared[4] += 1
        assert bool(scaled.expand_values(prepared, n, k)[1].isnan().all())

    def test_other_weights_give_nan(self, scaled: Emulator) -> None:
        assert scaled.values is not None
        right = layout.prepare(scaled_weight(100, 200, scaled.values))
        all_nan = TestOtherWeights.all_nan
        assert not all_nan(scaled, right, 100, 200, torch.float16)
        assert all_nan(scaled, right, 101, 200, torch.float16)
        for code in set(layout.CODES.values()) - {layout.CODES[scaled.values]}:
            other = right.clone()
            other[4] = code
            assert all_nan(scaled, other, 100, 200, torch.float16)

    @pytest.mark.parametrize("damage", ["a scale", "two scales", "two values", "a sign", "two fragments"])
    def test_mistakes_in_the_bytes(self, scaled: Emulator, damage: str) -> None:
        assert scaled.values is not None
        n, k = 132, 1000
        weight, x = scaled_weight(n, k, scaled.values), normal(60, k, dtype=torch.bfloat16)
        prepared = layout.prepare(weight)
        right = expected_scaled(x, weight, None)
        assert not right.wrong(scaled.multiply(x, prepared, None, n)).any()
        scales = layout._scales(prepared, n, k, scaled.values)
        values = layout._body(prepared, n, k, scaled.values)[1, 3, :2048]
        large = int(values.view(scaled.values).float().abs().argmax())
        other = large ^ 1
        if damage == "a scale":
            scales[17] *= 1.05
        elif damage == "two scales":
            scales[5:7] = scales[5:7].clone().flip(0)
        elif damage == "two values":
            assert values[large] != values[other]
            values[large], values[other] = values[other].clone(), values[large].clone()
        elif damage == "a sign":
            number = -values.view(scaled.values)[large].float()
            values[large] = number.to(scaled.values).view(torch.uint8)
        else:
            values[:512] = values[:512].view(32, 2, 8).flip(1).flatten()
        wrong = right.wrong(scaled.multiply(x, prepared, None, n)).any(dim=0)
        rows = {"a scale": 1, "two scales": 2, "two values": 2, "a sign": 1, "two fragments": 32}[damage]
        assert int(wrong.sum()) == rows
        if damage in ("a scale", "two scales"):
            assert wrong[17 if damage == "a scale" else slice(5, 7)].all()

    @pytest.mark.parametrize(
        ("values", "dtype", "right", "mistaken"),
        [
            (torch.int8, torch.float16, "of_x * as_float(scales.word[i]);", "of_x;"),
            (torch.int8, torch.float16, "+ thread % kFours * 4;", "+ thread % kFours;"),
            (torch.int8, torch.float16, "load_global(scales_of<V>(call) + own_row * 4)", "load_global(scales_of<V>(call))"),
            (torch.int8, torch.float16, "units * Stored<V>::kUnitBytes;\n}", "units * kBlockBytes;\n}"),
            (torch.int8, torch.float16, "bytes ^ 0x80808080", "bytes"),
            (torch.int8, torch.float16, "0x4240), 0x3c003c00", "0x4140), 0x3c003c00"),
            (torch.int8, torch.bfloat16, "0x4341));", "0x4340));"),
            (torch.int8, torch.bfloat16, "pair & 0xff80ff80", "pair & 0xff00ff00"),
            (torch.int8, torch.bfloat16, "word[2 + half], both.lower", "word[half], both.lower"),
            (torch.float8_e4m3fn, torch.bfloat16, "upper = one(bytes << 8), lower = one(bytes)", "upper = one(bytes), lower = one(bytes << 8)"),
            (torch.float8_e4m3fn, torch.bfloat16, "0x07f007f0", "0x07e007e0"),
            (torch.float8_e4m3fn, torch.bfloat16, "0x7b807b80", "0x7b007b00"),
            (torch.float8_e4m3fn, torch.float16, "(high & 0x80008000), 0x5c005c00", "(high & 0x00008000), 0x5c005c00"),
            (torch.float8_e4m3fn, torch.float16, "load_shared(values + (half * 2 + rows / 2)", "load_shared(values + (half * 2)"),
            (torch.float8_e4m3fn, torch.float16, "block <= kValueBlocks; ++block) copy", "block < kValueBlocks; ++block) copy"),
        ],
    )  # fmt: skip
    def test_mistakes_in_the_source(
        self, tmp_path_factory: pytest.TempPathFactory, values: torch.dtype, dtype: torch.dtype, right: str, mistaken: str
    ) -> None:  # fmt: skip
        source = SOURCE.read_text()
        assert right in source
        seen = []
        for text in (source, source.replace(right, mistaken)):
            emulator = compile_emulator(
                tmp_path_factory.mktemp("mistaken"),
                HOPPER,
                text,
                forms=plan.for_rows(plan.forms(HOPPER, layout.SCALED_UNIT_BYTES), 9)[:1],
                dtypes=[dtype],
                values=values,
            )
            try:
                seen.append(self.wrong(emulator, 9, 132, 200, dtype, bias=True) > 0)
            except EmulationError:
                seen.append(True)
        assert seen == [False, True]


class TestRoundedInputs:
    """x is rounded to values of 8 bits, too, with a scale for each row."""

    @staticmethod
    def product(emulator: Emulator, x: Tensor, weight: PackedWeight, bias: Tensor | None, **how: Any) -> Tensor:
        assert emulator.values is not None
        rounded, scale = quantize_rows(x, emulator.values)
        how = {"x_scales": scale[:, 0].contiguous(), **how}
        return emulator.multiply(rounded.to(x.dtype), layout.prepare(weight), bias, len(weight.values), **how)

    @staticmethod
    def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """No two rows next to each other have scales that are alike."""
        return (normal(m, k, dtype=torch.float32, seed=seed) * torch.exp2(torch.arange(m) % 5 - 2.0)[:, None]).to(dtype)

    @OF_BOTH_DTYPES
    @pytest.mark.parametrize("splits", [1, 2, 8])
    def test_products(self, scaled: Emulator, dtype: torch.dtype, splits: int) -> None:
        """Every number of tiles, edges on all three axes; each scale counts once, and the bias has none."""
        assert scaled.values is not None
        for m, n, k in ((1, 100, 512), (8, 65, 1096), (13, 130, 72), (40, 200, 712), (64, 260, 328)):
            x, weight = self.inputs(m, k, dtype), scaled_weight(n, k, scaled.values, m)
            bias = normal(n, dtype=dtype, seed=2) if m > 1 else None
            y = self.product(scaled, x, weight, bias, splits=splits, seed=m)
            assert not expected_rounded(x, weight, bias).wrong(y).any(), (m, n, k)

    @OF_BOTH_DTYPES
    def test_products_without_clusters(self, without_clusters: Emulator, dtype: torch.dtype) -> None:
        assert without_clusters.values is not None
        for m in (1, 7, 16, 33, 64):
            x, weight = self.inputs(m, 264, dtype), scaled_weight(70, 264, without_clusters.values, m)
            y = self.product(without_clusters, x, weight, None, seed=m)
            assert not expected_rounded(x, weight, None).wrong(y).any(), m

    @OF_BOTH_DTYPES
    @pytest.mark.parametrize("splits", [1, 2])
    def test_scales_of_one_change_no_bit(self, scaled: Emulator, dtype: torch.dtype, splits: int) -> None:
        assert scaled.values is not None
        x, prepared = normal(9, 328, dtype=dtype), layout.prepare(scaled_weight(70, 328, scaled.values))
        bias = normal(70, dtype=dtype, seed=2)
        without = scaled.multiply(x, prepared, bias, 70, splits=splits)
        assert torch.equal(scaled.multiply(x, prepared, bias, 70, splits=splits, x_scales=torch.ones(9)), without)

    def test_sums_that_float16_does_not_hold(self, scaled: Emulator) -> None:
        """They are scaled in float32."""
        assert scaled.values is not None
        weight, x = scaled_weight(70, 1000, scaled.values), self.inputs(20, 1000, torch.float16) / 64
        scale = quantize_rows(x, scaled.values)[1]
        assert weight.scale is not None
        y = self.product(scaled, x, weight, None)
        assert y.isfinite().all()
        assert bool(
            (y.double() / scale.double() / weight.scale.double().T).abs().max() > torch.finfo(torch.float16).max
        )
        assert not expected_rounded(x, weight, None).wrong(y).any()

    def test_rows_that_are_not_finite(self, scaled: Emulator) -> None:
        assert scaled.values is not None
        weight, x = scaled_weight(70, 136, scaled.values), self.inputs(5, 136, torch.bfloat16)
        x[1, 3], x[3, 77] = torch.inf, torch.nan
        y = self.product(scaled, x, weight, None)
        assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, False, True, False]
        assert not expected_rounded(x, weight, None).wrong(y).any()

    @pytest.mark.parametrize("mistake", ["a scale", "two scales", "a value"])
    def test_mistakes_in_the_inputs(self, scaled: Emulator, mistake: str) -> None:
        assert scaled.values is not None
        x, weight = self.inputs(9, 1000, torch.bfloat16), scaled_weight(132, 1000, scaled.values)
        rounded, scale = quantize_rows(x, scaled.values)
        numbers, scales = rounded.to(x.dtype), scale[:, 0].clone()
        if mistake == "a scale":
            scales[4] *= 1.05
        elif mistake == "two scales":
            scales[4:6] = scales[4:6].clone().flip(0)
        else:
            numbers[4, int(numbers[4].abs().argmax())] *= -1
        y = scaled.multiply(numbers, layout.prepare(weight), None, 132, x_scales=scales)
        wrong = expected_rounded(x, weight, None).wrong(y).any(dim=1)
        assert wrong.nonzero().flatten().tolist() == ([4, 5] if mistake == "two scales" else [4])

    @pytest.mark.parametrize(
        ("right", "mistaken"),
        [
            ("total[i] * of_x * as_float(scales.word[i])", "total[i] * as_float(scales.word[i])"),
            ("call.x_scales + four / kFours", "call.x_scales + four % kFours"),
            ("call.x_scales + four / kFours", "call.x_scales"),
            ("  wait_for_kernel_before();\n", "  if (call.x_scales) load_number_now(call.x_scales);\n  wait_for_kernel_before();\n"),
        ],
    )  # fmt: skip
    def test_mistakes_in_the_source(self, tmp_path_factory: pytest.TempPathFactory, right: str, mistaken: str) -> None:
        source, seen = SOURCE.read_text(), []
        assert right in source
        x, weight = self.inputs(9, 200, torch.bfloat16), scaled_weight(132, 200, torch.int8)
        for text in (source, source.replace(right, mistaken)):
            emulator = compile_emulator(
                tmp_path_factory.mktemp("mistaken"),
                HOPPER,
                text,
                forms=plan.for_rows(plan.forms(HOPPER, layout.SCALED_UNIT_BYTES), 9)[:1],
                dtypes=[torch.bfloat16],
                values=torch.int8,
            )
            try:
                y = self.product(emulator, x, weight, None, splits=2)
                seen.append(bool(expected_rounded(x, weight, None).wrong(y).any()))
            except EmulationError:
                seen.append(True)
        assert seen == [False, True]
