"""16-bit layers on processors that cannot multiply 16-bit numbers: the same values, rounded once, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress import wide
from compress.architecture import find_blocks
from compress.blocks import BlockModel
from compress.sources import Source
from compress.wide import WideConv1D, WideLinear, is_emulated, linear, widen
from tests import tiny_models
from tests.runs import compress, tree

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """This processor as one that cannot, and as one that can."""
    monkeypatch.setattr(wide, "EMULATED", dict.fromkeys(HALVES, request.param))
    return request.param


def ulps(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error in units of the last place of the exact value, or of what is summed where it nearly cancels."""
    unit = torch.finfo(found.dtype).eps * exact.abs().clamp_min(1e-2)
    return float(((found.double() - exact).abs() / unit).max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", [1, 300, 1 << 24])
def test_a_product_is_that_of_float64_rounded_once(
    dtype: torch.dtype, bias: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "EMULATED", dict.fromkeys(HALVES, True))
    monkeypatch.setattr(wide, "PART", part)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 48, generator=generator).to(dtype)
    w = torch.randn(23, 48, generator=generator).to(dtype)
    b = torch.randn(23, generator=generator).to(dtype) if bias else None
    exact = x.double() @ w.double().T + (0 if b is None else b.double())
    found = linear(x, w, b)
    assert found.dtype == dtype
    assert found.shape == (2, 5, 23)
    assert ulps(found, exact) <= 0.51 + 1e-2  # half a unit for the rounding, and the sums of float32


@pytest.mark.parametrize("dtype", HALVES)
def test_layers_keep_their_weights_and_give_nearly_the_same(dtype: torch.dtype, emulated: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.GELU(), Conv1D(16, 24), nn.Linear(16, 8, bias=False)).to(dtype)
    with torch.no_grad():
        model[2].bias.normal_()
    before = copy.deepcopy(model)
    widen(model, dtype, CPU)
    assert [type(module) for module in model] == (
        [WideLinear, nn.GELU, WideConv1D, WideLinear] if emulated else [nn.Linear, nn.GELU, Conv1D, nn.Linear]
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    x = torch.randn(3, 7, 32).to(dtype)
    exact = copy.deepcopy(before).double()(x.double())
    torch.testing.assert_close(model(x).double(), exact, rtol=3e-2, atol=3e-2)
    # As float32, as a copy in training is, they are ordinary layers.
    assert torch.equal(copy.deepcopy(model).float()(x.float()), copy.deepcopy(before).float()(x.float()))
    # And where autocast says in what to multiply, they leave it to that.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.float()(x.float()), before.float()(x.float()))


def test_gradients_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "EMULATED", {torch.bfloat16: True})
    monkeypatch.setattr(wide, "PART", 64)
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 12).bfloat16(), torch.randn(9, 16).bfloat16().requires_grad_()
    reference, y = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    widen(layer, torch.bfloat16, CPU)
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        y_wide = layer(x)
    assert set(kept) == {torch.bfloat16}  # no wide copies wait for the backward pass
    y_wide.square().sum().backward()
    reference(y).square().sum().backward()
    for found, exact in zip((x, *layer.parameters()), (y, *reference.parameters()), strict=True):
        assert found.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=3e-2, atol=0.15)


def test_only_what_is_known_is_changed() -> None:
    assert not is_emulated(torch.float32, CPU)
    assert not is_emulated(torch.bfloat16, torch.device("cuda"))
    assert wide.EMULATED.keys() <= set(HALVES)


def test_the_blocks_of_a_run_are_wide_and_what_they_give_is_as_good(tmp_path: Path, emulated: bool) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2, dtype=torch.bfloat16)
    model = BlockModel(Source(source), torch.bfloat16, CPU)
    kinds = {type(module) for module in find_blocks(model.model)[1].modules() if isinstance(module, nn.Linear)}
    assert kinds == ({WideLinear} if emulated else {nn.Linear})
    hidden = model.record_calls([{"input_ids": torch.arange(3, 40)[None]}])
    exact = BlockModel(Source(source), torch.float32, CPU)
    wanted = exact.record_calls([{"input_ids": torch.arange(3, 40)[None]}])
    model.load_block(0)
    exact.load_block(0)
    with torch.no_grad():
        found, close = model.run_block(0, 0, hidden[0]), exact.run_block(0, 0, wanted[0])
    assert float((found.float() - close).norm() / close.norm()) < 2e-2
    one = compress(source, tmp_path / "one").directory
    two = compress(source, tmp_path / "two").directory
    assert tree(one) == tree(two)
