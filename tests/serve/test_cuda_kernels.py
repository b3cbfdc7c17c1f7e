"""The GPU kernels' own source, run lane by lane on a processor, against float64.

What a GPU does is what `cuda_emulator.h` takes from the PTX ISA; the rest (indices, edges, the pipeline and its barriers,
sums over warps and blocks) is the real thing. `TestMistakes` shows that faults in either the bytes or the source are seen.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.packed import PackedWeight, unpack
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

pytestmark = needs_compiler

HOPPER, AMPERE, ADA = (9, 0), (8, 0), (8, 9)
OF_BOTH_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
COPIES = pytest.mark.parametrize("copies", [AT_ONCE, AT_THE_WAIT, ANY_TIME], ids=["at once", "at the wait", "any time"])


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return compile_emulator(tmp_path_factory.mktemp("hopper"), HOPPER, forms=some(HOPPER))


def some(capability: tuple[int, int]) -> list[Form]:
    """A form for each number of tiles, divided among blocks in one way after the other."""
    forms = plan.forms(capability)
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
            ("if (row < call.n) *", "*", 1),
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
