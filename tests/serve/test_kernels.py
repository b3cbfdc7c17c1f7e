"""The plain backend gives the bits of the dense layer with zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress.packed import PackedWeight, pack, unpack
from compress.patterns import NMPattern
from serve.kernels import choose, plain, sparse24_linear
from serve.linear import Sparse24Conv1D, replacement

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def two_of_four(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A 2:4 weight in which some groups keep fewer than two values."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    weight *= NMPattern(2, 4).mask(weight.abs())
    weight[weight.abs() < 0.3] = 0
    return weight.to(dtype)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (5, 24), (64, 136)])
def test_expand_is_unpack(dtype: torch.dtype, n: int, k: int) -> None:
    weight = two_of_four(n, k, dtype)
    expanded = plain.expand(pack(weight))
    assert expanded.dtype == dtype
    assert torch.equal(expanded, weight)
    assert torch.equal(expanded, unpack(pack(weight)))
    assert not torch.signbit(expanded[expanded == 0]).any()


def test_expand_every_pair_of_columns() -> None:
    """All 36 valid mask bytes, with values that tell the places apart."""
    pairs = [byte for byte in range(16) if bin(byte).count("1") == 2]
    mask = torch.tensor([[low | high << 4] for low in pairs for high in pairs], dtype=torch.uint8)
    packed = PackedWeight(torch.arange(1.0, 1 + 4 * len(mask)).view(-1, 4), mask)
    assert len(mask) == 36
    assert torch.equal(plain.expand(packed), unpack(packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (0,), (2, 5), (2, 0, 3), (1, 1, 7)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (13, 40), (48, 136)])
def test_linear_has_the_bits_of_the_dense_layer(
    dtype: torch.dtype, with_bias: bool, batch: tuple[int, ...], n: int, k: int
) -> None:
    weight, x = two_of_four(n, k, dtype), drawn(*batch, k, dtype=dtype)
    bias = drawn(n, dtype=dtype) if with_bias else None
    result = sparse24_linear(x, pack(weight), bias)
    assert result.shape == (*batch, n)
    assert result.dtype == dtype
    assert torch.equal(result, functional.linear(x, weight, bias))


def conv1d(n: int, k: int, dtype: torch.dtype) -> tuple[Conv1D, Sparse24Conv1D]:
    dense = Conv1D(n, k).to(dtype).requires_grad_(False)
    weight = two_of_four(n, k, dtype)
    dense.weight.copy_(weight.T)
    dense.bias.copy_(drawn(n, dtype=dtype))
    sparse = replacement(dense, dtype)
    packed = pack(weight)
    sparse.load_state_dict({"weight_packed": packed.values, "weight_mask": packed.mask, "bias": dense.bias})
    assert isinstance(sparse, Sparse24Conv1D)
    return dense, sparse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(1,), (3,), (0,), (2, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (24, 40), (48, 136)])
def test_conv1d_has_the_bits_of_the_dense_layer(dtype: torch.dtype, batch: tuple[int, ...], n: int, k: int) -> None:
    dense, sparse = conv1d(n, k, dtype)
    x = drawn(*batch, k, dtype=dtype)
    assert torch.equal(sparse(x), dense(x))
    assert torch.equal(sparse.weight, dense.weight)


@pytest.mark.parametrize("width", [8, 15, 17, 32])
def test_wrong_width(width: int) -> None:
    with pytest.raises(ValueError, match=f"x has {width} features, the packed weight takes 16"):
        sparse24_linear(torch.zeros(2, width), pack(two_of_four(4, 16, torch.float32)))


@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_inputs_that_are_views(layout: str) -> None:
    weight = two_of_four(12, 16, torch.float32)
    x = drawn(6, 32, dtype=torch.float32)[:, ::2] if layout == "strided" else drawn(16, 6, dtype=torch.float32).T
    assert torch.equal(sparse24_linear(x, pack(weight)), functional.linear(x, weight))


def test_the_choice_has_a_reason() -> None:
    choice = choose(torch.device("cpu"), torch.bfloat16, 1, 64, 64)
    assert choice.backend.name == "plain"
    assert "cpu" in choice.reason
