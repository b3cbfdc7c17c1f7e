"""The plain backend gives the bits of the dense layer with zeros, and the choice of a backend says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress import wide
from compress.errors import CorruptCheckpointError, UsageError
from compress.packed import PackedWeight, pack, unpack
from compress.patterns import NMPattern
from serve.kernels import able, choose, plain, sparse24_linear
from serve.kernels.cpu import backend as cpu
from serve.kernels.cpu import library
from serve.linear import Sparse24Conv1D, Sparse24Linear, StreamedLinear, prepare_for_serving, replacement

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


@pytest.mark.usefixtures("plain_backend")
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


@pytest.mark.usefixtures("plain_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(1,), (3,), (0,), (2, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (24, 40), (48, 136)])
def test_conv1d_has_the_bits_of_the_dense_layer(dtype: torch.dtype, batch: tuple[int, ...], n: int, k: int) -> None:
    dense, sparse = conv1d(n, k, dtype)
    x = drawn(*batch, k, dtype=dtype)
    assert torch.equal(sparse(x), dense(x))
    assert torch.equal(sparse.weight, dense.weight)


@pytest.mark.parametrize("asked", [None, "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_torch_emulates_are_wide(
    dtype: torch.dtype, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of dense layers are, too, so that 2:4 is not slower for want of a library; unless torch's bits are asked for."""
    monkeypatch.delenv("HALVE_BACKEND", raising=False)
    if asked:
        monkeypatch.setenv("HALVE_BACKEND", asked)
    monkeypatch.setattr(wide, "EMULATED", {dtype: True})
    weight, x, bias = two_of_four(24, 40, dtype), drawn(3, 40, dtype=dtype), drawn(24, dtype=dtype)
    widened = functional.linear(x.float(), weight.float(), bias.float()).to(dtype)
    expected = functional.linear(x, weight, bias) if asked else widened
    assert torch.equal(plain.linear(x, pack(weight), bias), expected)
    if not asked:
        assert torch.equal(plain.linear_conv1d(x, pack(weight), bias), widened)


@pytest.mark.parametrize("width", [8, 15, 17, 32])
def test_wrong_width(width: int) -> None:
    with pytest.raises(ValueError, match=f"x has {width} features, the packed weight takes 16"):
        sparse24_linear(torch.zeros(2, width), pack(two_of_four(4, 16, torch.float32)))


@pytest.mark.usefixtures("plain_backend")
@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_inputs_that_are_views(layout: str) -> None:
    weight = two_of_four(12, 16, torch.float32)
    x = drawn(6, 32, dtype=torch.float32)[:, ::2] if layout == "strided" else drawn(16, 6, dtype=torch.float32).T
    assert torch.equal(sparse24_linear(x, pack(weight)), functional.linear(x, weight))


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_library = pytest.mark.skipif(library.load() is None, reason=library.status())


@needs_library
def test_the_choice_has_a_reason() -> None:
    few, many = (choose(CPU, torch.bfloat16, rows, 64, 64) for rows in (1, 512))
    assert few.backend.name == many.backend.name == "cpu"
    assert "read once past 1 rows of x" in few.reason
    assert few.reason != many.reason
    elsewhere = choose(CUDA, torch.bfloat16, 1, 64, 64)
    assert elsewhere.backend.name == "plain"
    assert "not cpu: the weight is on cuda" in elsewhere.reason


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "path", lambda: None)
    monkeypatch.setattr(library, "status", lambda: "was never built; install a compiler")
    choice = choose(CPU, torch.bfloat16, 1, 64, 64)
    assert choice.backend.name == "plain"
    assert "not cpu: was never built; install a compiler" in choice.reason
    weight, x = two_of_four(12, 16, torch.float32), drawn(3, 16, dtype=torch.float32)
    assert torch.equal(sparse24_linear(x, pack(weight)), functional.linear(x, weight))


def test_a_backend_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALVE_BACKEND", "plain")
    choice = choose(CPU, torch.bfloat16, 1, 64, 64)
    assert choice.backend.name == "plain"
    assert "HALVE_BACKEND asks for it" in choice.reason
    monkeypatch.setenv("HALVE_BACKEND", "plane")
    with pytest.raises(UsageError, match=r"HALVE_BACKEND='plane' is not known.*plain"):
        choose(CPU, torch.bfloat16, 1, 64, 64)
    monkeypatch.setenv("HALVE_BACKEND", "cpu")
    with pytest.raises(UsageError, match="cannot be used: the weight is on cuda"):
        choose(CUDA, torch.bfloat16, 1, 64, 64)


def module(kind: type[torch.nn.Linear] | type[Conv1D], n: int, k: int) -> Sparse24Linear:
    dense = Conv1D(n, k) if kind is Conv1D else torch.nn.Linear(k, n)
    result = replacement(dense.requires_grad_(False), torch.bfloat16)
    packed = pack(two_of_four(n, k, torch.bfloat16))
    result.load_state_dict(
        {"weight_packed": packed.values, "weight_mask": packed.mask, "bias": drawn(n, dtype=torch.bfloat16)}
    )
    return result


@needs_library
@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_a_prepared_layer_behaves_like_a_packed_one(kind: type[Any]) -> None:
    packed, prepared = (module(kind, 40, 72) for _ in range(2))
    prepared.prepare("layer")
    assert prepared.weight_prepared is not None
    assert prepared.weight_packed.numel() == prepared.weight_mask.numel() == 0  # no second copy
    x = drawn(3, 2, 72, dtype=torch.bfloat16)
    torch.testing.assert_close(prepared(x), packed(x), rtol=2**-7, atol=2**-7)
    state, expected = prepared.state_dict(), packed.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert torch.equal(prepared.weight, packed.weight)
    prepared.validate("layer")
    assert prepared.dtype == torch.bfloat16

    copied = copy.deepcopy(prepared)
    assert torch.equal(copied(x), prepared(x))
    prepared.load_state_dict({**state, "weight_packed": -state["weight_packed"], "bias": 0 * state["bias"]})
    copied.load_state_dict({**state, "bias": 0 * state["bias"]})
    assert torch.equal(prepared(x), -copied(x))

    wide = copy.deepcopy(copied).to(torch.float32)
    assert wide.dtype == torch.float32
    assert wide.weight_prepared is not None
    torch.testing.assert_close(wide(x.float()), copied(x).float(), rtol=2**-7, atol=2**-7)
    assert module(kind, 8, 8).to("meta").prepare("layer") is None


@needs_library
def test_a_corrupt_mask_is_refused_with_the_layer() -> None:
    layer = module(torch.nn.Linear, 40, 72)
    layer.weight_mask.data[7, 3] = 0x31
    with pytest.raises(CorruptCheckpointError, match=r"model\.layer: .*row 7, columns 24 to 31"):
        layer.prepare("model.layer")


@needs_library
def test_dense_layers_take_the_faster_path() -> None:
    torch.manual_seed(0)
    for dtype, expected in ((torch.bfloat16, StreamedLinear), (torch.float32, torch.nn.Linear)):
        model = torch.nn.Sequential(torch.nn.Linear(72, 40, dtype=dtype)).requires_grad_(False)
        dense = copy.deepcopy(model)
        prepare_for_serving(model)
        assert type(model[0]) is expected
        for rows in (0, 1, 16, 17):
            x = drawn(rows, 72, dtype=dtype)
            torch.testing.assert_close(model(x), dense(x), rtol=2**-7, atol=2**-7)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_many_rows_through_the_expanded_weight(
    dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What processors with AMX do: parts of the weight are expanded, and torch multiplies."""
    monkeypatch.setattr(cpu, "expands", lambda dtype: True)
    monkeypatch.setattr(cpu, "_EXPANDED_BYTES", 64 * 136 * dtype.itemsize)
    n, k = 200, 136  # three parts of 64 rows, and one of 8
    weight, bias = two_of_four(n, k, dtype), drawn(n, dtype=dtype) if with_bias else None
    x = drawn(5, 13, k, dtype=dtype)
    assert "expanded in parts for oneDNN" in choose(CPU, dtype, 65, n, k).reason
    result = sparse24_linear(x, pack(weight), bias)
    expected = [functional.linear(x, part, None if bias is None else b)
                for part, b in zip(weight.split(64), (bias if bias is not None else torch.zeros(n)).split(64), strict=True)]  # fmt: skip
    assert torch.equal(result, torch.cat(expected, dim=-1))


@needs_library
def test_huge_pages_leave_contents_and_address_alone() -> None:
    tensor = torch.arange(3_000_000, dtype=torch.int32)
    address = tensor.data_ptr()
    cpu.gather_into_huge_pages(tensor)
    assert tensor.data_ptr() == address
    assert torch.equal(tensor, torch.arange(3_000_000, dtype=torch.int32))
    cpu.gather_into_huge_pages(torch.empty(0))


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("asked", ["plain", "auto"])
def test_dense_layers_are_torchs_own_where_plain_is_asked_for(
    asked: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALVE_BACKEND", asked)
    monkeypatch.setattr(wide, "EMULATED", {torch.bfloat16: emulated})
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), Conv1D(16, 32)).bfloat16()
    before, x = copy.deepcopy(model), drawn(40, 64, dtype=torch.bfloat16)
    prepare_for_serving(model)
    kinds = [type(module) for module in model]
    if asked == "plain":
        assert kinds == [torch.nn.Linear, Conv1D]
        assert torch.equal(model(x), before(x))
    else:
        assert issubclass(kinds[0], wide.WideLinear) or not emulated
        assert kinds[1] is (wide.WideConv1D if emulated else Conv1D)


@pytest.mark.parametrize("values", [torch.int8, torch.float8_e4m3fn])
def test_scaled_values_need_a_kernel_for_the_dtype_of_x(values: torch.dtype) -> None:
    """GPUs have none for float32."""
    gpu = torch.device("cuda")
    choice = choose(gpu, values, 1, 64, 64, x_dtype=torch.float32)
    assert choice.backend.name == "plain"
    assert "not cuda: x is float32; not triton: x is float32" in choice.reason
    assert "x is" not in choose(gpu, values, 1, 64, 64, x_dtype=torch.bfloat16).reason
    assert able(gpu, values, torch.float32) == [choice.backend]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert "x is" not in choose(torch.device("cpu"), values, 1, 64, 64, x_dtype=dtype).reason


@pytest.mark.parametrize("wish", ["auto", "plain"])
def test_the_reason_says_that_x_is_rounded(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("HALVE_BACKEND", wish)
    without, rounded = (
        choose(CPU, torch.int8, 1, 64, 64, quantizes_x=is_rounded).reason for is_rounded in (False, True)
    )
    assert rounded == f"x is rounded to int8, each row by its own scale; {without}"
