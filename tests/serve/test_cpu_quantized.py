"""x that is rounded to values like those of the weight on the way to a product, on every code path that this processor has. Products of all
shapes are in test_cpu_scaled.py; what x is rounded to is `compress.packed.quantize_rows`, which is tested against a search through all values.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.packed import LARGEST, PackedWeight, quantize_rows, unpack
from serve.kernels import ops, plain
from serve.kernels.cpu import backend, library
from tests.serve.cpu_reference import (
    dot_flushes,
    expected_quantized,
    normal,
)
from tests.serve.test_cpu_kernels import KERNELS, MANY, path, poisoned
from tests.serve.test_cpu_scaled import OF_VALUES, OF_X, check, scaled

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.status())
__all__ = ["path", "poisoned"]  # fixtures


@OF_X
@OF_VALUES
@KERNELS
class TestProducts:
    def test_rows_of_all_sizes(self, path: str, dtype: torch.dtype, values: torch.dtype, few_rows: int) -> None:
        """Each has a scale of its own; among them zeros and outliers as activations of language models have them."""
        least = 2.0**-20 if dtype == torch.float16 else 2.0**-110
        factors = torch.tensor([0.0, -0.0, least, 2.0**-14, 1.0, 3.0, 2.0**10])
        x = normal(7, 136, dtype=torch.float32) * factors[:, None]
        x[4, 5] = 1e4
        check(path, x.to(dtype), scaled(33, 136, values, True), normal(33, dtype=dtype), few_rows)

    def test_what_is_not_finite(self, path: str, dtype: torch.dtype, values: torch.dtype, few_rows: int) -> None:
        """It makes its whole row of outputs NaN, and no other one."""
        packed = scaled(35, 136, values, True)
        stream = backend.prepare(packed)
        for special in (torch.inf, -torch.inf, torch.nan):
            for column in (0, 31, 64, 135):
                x = normal(18, 136, dtype=dtype)
                x[3, column] = special
                y = backend.linear(x, stream, normal(35, dtype=dtype), 35, few_rows)
                assert y[3].isnan().all()
                assert y[:3].isfinite().all()
                assert y[4:].isfinite().all()


@OF_VALUES
@KERNELS
def test_every_value_of_x_is_rounded_as_it_should_be(path: str, values: torch.dtype, few_rows: int) -> None:
    """To the bit, halves between two values included: one input times one, with float32 to show it, and every kernel."""
    largest = LARGEST[values]
    steps = torch.linspace(-largest, largest, 8 * 1016 + 1)[:-1].view(8, 1016)
    x = torch.cat([steps, torch.full((8, 8), largest)], dim=1) * 1.25  # the last eight fix the scale
    mask = torch.full((1024, 1024 // 8), 0x33, dtype=torch.uint8)
    kept = torch.zeros(1024, 512)
    rows = torch.arange(1024)
    for row in rows.tolist():  # the two lowest columns of its group, or the two highest
        if row % 4 > 1:
            byte = mask[row, row // 8]
            mask[row, row // 8] = (byte & 0x0F) | 0xC0 if row % 8 >= 4 else (byte & 0xF0) | 0x0C
    kept[rows, rows // 4 * 2 + rows % 2] = 1
    packed = PackedWeight(kept.to(values), mask, torch.ones(1024, 1), quantizes_x=True)
    assert torch.equal(unpack(packed, torch.float32), torch.eye(1024))
    rounded, scale = quantize_rows(x, values)
    y = backend.linear(x, backend.prepare(packed), None, 1024, few_rows)
    assert torch.equal(y, rounded.float() * scale)


@pytest.mark.parametrize("k", [1 << 17, (1 << 17) + 8])
def test_sums_do_not_overflow(path: str, k: int) -> None:
    """The longest rows that are summed in 32 bits, and the first that are not, at the ends of the range."""
    weight = torch.full((16, k // 2), 127, dtype=torch.int8)
    weight[1::2] = -127
    mask = torch.full((16, k // 8), 0x33, dtype=torch.uint8)
    packed = PackedWeight(weight, mask, torch.full((16, 1), 1 / 127), quantizes_x=True)
    for sign in (1.0, -1.0):
        for m in (2, 20):
            check(path, torch.full((m, k), sign), packed, None, -1)


@OF_VALUES
@pytest.mark.parametrize("fault", ["x as it is", "another scale of x", "neighbours"])
def test_the_bound_finds(path: str, values: torch.dtype, fault: str) -> None:
    x, packed = normal(40, 512, dtype=torch.float32), scaled(64, 512, values, True)
    bound = expected_quantized(x, packed, None, flushes=False)
    stream = backend.prepare(packed)
    for few_rows in (MANY, 0):
        assert not bound.wrong(backend.linear(x, stream, None, 64, few_rows)).any()
        if fault == "x as it is":
            y = backend.linear(x, backend.prepare(replace(packed, quantizes_x=False)), None, 64, few_rows)
        elif fault == "another scale of x":
            y = backend.linear(x, stream, None, 64, few_rows) * (1 + 2.0**-10)
        else:
            y = backend.linear(x.roll(1, 0), stream, None, 64, few_rows)
        assert bound.wrong(y).float().mean() > 0.75


@OF_VALUES
def test_prepared_and_restored(path: str, values: torch.dtype) -> None:
    packed = scaled(50, 136, values, True)
    stream = backend.prepare(packed)
    assert backend.describe(stream) == (values, 50, 136, True)
    assert stream.numel() == backend.prepare(replace(packed, quantizes_x=False)).numel()
    back = backend.restore(stream)
    assert back.quantizes_x
    assert torch.equal(back.values.view(torch.uint8), packed.values.view(torch.uint8))
    assert torch.equal(back.mask, packed.mask)
    out = torch.empty(50, 136)
    backend.expand(stream, 0, 50, out)
    assert torch.equal(out, plain.expand(packed, torch.float32))
    damaged = stream.clone()
    header = damaged[:64].view(torch.int64)
    header[5] = 2
    with pytest.raises(ValueError, match="no prepared weight"):
        backend.describe(damaged)
    floats = backend.prepare(PackedWeight(normal(16, 16, dtype=torch.bfloat16), packed.mask[:16, :4].contiguous()))
    floats[:64].view(torch.int64)[5] = 1
    with pytest.raises(ValueError, match="no prepared weight"):
        backend.describe(floats)


@OF_VALUES
@OF_X
def test_the_plain_backend_says_the_same(path: str, values: torch.dtype, dtype: torch.dtype) -> None:
    x, packed, bias = normal(9, 136, dtype=dtype), scaled(40, 136, values, True), normal(40, dtype=dtype)
    bound = expected_quantized(x, packed, bias, flushes=dot_flushes(path, dtype))
    assert not bound.wrong(plain.linear(x, packed, bias)).any()
    assert not bound.wrong(plain.linear_conv1d(x, packed, bias)).any()
    assert not bound.wrong(ops.sparse24_linear(x, backend.prepare(packed), bias, 40, True)).any()


@OF_VALUES
@pytest.mark.parametrize("with_bias", [False, True])
def test_many_rows_through_the_expanded_weight(
    values: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What processors with AMX do: torch multiplies rounded x by parts of the weight; sums, and values times scales, are rounded to bfloat16."""
    monkeypatch.setattr(backend, "expands", lambda dtype: True)
    monkeypatch.setattr(backend, "_EXPANDED_BYTES", 64 * 136 * 2)
    packed, x = scaled(200, 136, values, True), normal(5, 13, 136, dtype=torch.bfloat16)
    x[2, 4, 7] = torch.nan
    bias = normal(200, dtype=torch.bfloat16) if with_bias else None
    y = backend.linear(x, backend.prepare(packed), bias, 200)
    rounded, scale = quantize_rows(x, values)
    dense = unpack(packed, torch.float32).double()

    def allowed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        exact, size = inputs @ dense.T, inputs.abs() @ dense.abs().T
        exact = exact if bias is None else exact + bias.double()
        return exact, 2**-8 * (size + 2 * exact.abs())

    exact, most = allowed(rounded.double() * scale.double())
    finite = torch.ones(5, 13, dtype=torch.bool)
    finite[2, 4] = False
    assert y[2, 4].isnan().all()
    assert ((y.double() - exact).abs() <= most)[finite].all()
    as_it_is, _ = allowed(x.double())
    assert (y.double() - exact)[finite].norm() < (y.double() - as_it_is)[finite].norm() / 2
