"""Layers in vLLM whose kept values are of 8 bits, with a scale for each row. With a stub for vLLM.

Weights are compared with value times scale in float64. Where a kernel takes such values, layers are prepared for it, and expanded
elsewhere; `prepared` stands for one, whatever runs here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import CorruptCheckpointError, SourceError
from compress.packed import SCALED_DTYPES, PackedWeight, pack, quantize, quantize_rows, unpack, unpack_bits
from serve.kernels import Backend, Choice, choose
from serve.measure import tuned
from serve.measure.tuned import Decision
from serve.vllm.stored import Stored
from tests.serve.test_vllm_layers import FUSED, SIZE, drawn, said
from tests.serve.vllm_stub import LinearBase, VllmConfig, in_place_of_vllm

ATTENTION = "model.layers.0.self_attn"
PARTS = [SIZE, SIZE // 2, SIZE // 2]
TENSORS = ("weight_packed", "weight_mask", "weight_scale")
dtypes = pytest.mark.parametrize("dtype", SCALED_DTYPES.values(), ids=SCALED_DTYPES)


@pytest.fixture
def plugin() -> Iterator[ModuleType]:
    with in_place_of_vllm() as quantization:
        yield quantization


@pytest.fixture
def prepared(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[PackedWeight]:
    """What layers gave to a backend, which took everything; its own form is as long for every dtype."""
    given: list[PackedWeight] = []

    def prepare(weight: PackedWeight, name: str) -> Tensor:
        given.append(weight)
        return torch.full([weight.shape[0]], len(given), dtype=torch.uint8)

    backend = Backend("any", lambda device, dtype: None, lambda dtype, rows: "takes everything", prepare)
    monkeypatch.setattr(sys.modules["serve.vllm.linear"], "choose", lambda *arguments: Choice(backend, "why"))
    return given


def weight_of(seed: int, dtype: torch.dtype, rows: int = SIZE) -> PackedWeight:
    """Rows of very different sizes, so that a scale that goes with another row is seen."""
    sizes = 2.0 ** (torch.arange(rows)[:, None] % 7 - 3)
    return quantize(pack(drawn(seed, is_sparse=True, rows=rows) * sizes), dtype)


def exact(weight: PackedWeight) -> Tensor:
    """The dense weight [N, K] in float64, by its definition."""
    kept = unpack_bits(weight.mask)
    assert weight.scale is not None
    products = weight.values.double() * weight.scale.double()
    return torch.zeros(kept.shape, dtype=torch.float64).masked_scatter_(kept, products)


def is_product(y: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Of bfloat16 operands, summed more exactly, as far as a rounding of each and one of the sum go."""
    terms = x.double().abs() @ weight.abs().T
    return bool(((y.double() - x.double() @ weight.T).abs() <= 2**-7 * terms).all()) and bool((y != 0).any())


def tensors_of(*weights: PackedWeight | None) -> dict[str, list[Tensor | None]]:
    """The tensors of a checkpoint for the parts of a layer; None: no part of that kind."""
    columns = [(None,) * 3 if one is None else (one.values, one.mask, one.scale) for one in weights]
    return {name: list(column) for name, column in zip(TENSORS, zip(*columns, strict=True), strict=True)}


def single(plugin: ModuleType, dtype: torch.dtype, **share: Any) -> LinearBase:
    how = Stored("packed", value_dtype=dtype)
    return LinearBase(plugin.HalveQuantization(how), f"{ATTENTION}.o_proj", [SIZE], SIZE, **share)


def qkv(plugin: ModuleType, dtype: torch.dtype, *ignore: str, **share: Any) -> LinearBase:
    quantization = plugin.HalveQuantization(Stored("packed", ignore=ignore, value_dtype=dtype))
    quantization.packed_modules_mapping = FUSED
    return LinearBase(quantization, f"{ATTENTION}.qkv_proj", PARTS, SIZE, **share)


def parts_of(dtype: torch.dtype) -> list[PackedWeight]:
    return [weight_of(number, dtype, rows) for number, rows in enumerate(PARTS)]


def same(one: PackedWeight, other: PackedWeight) -> bool:
    assert one.scale is not None
    assert other.scale is not None
    values = one.values.dtype == other.values.dtype and torch.equal(
        one.values.view(torch.uint8), other.values.view(torch.uint8)
    )
    return values and torch.equal(one.mask, other.mask) and torch.equal(one.scale, other.scale)


def joined(parts: list[PackedWeight]) -> PackedWeight:
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(parts[0].values.dtype)
    scales = [part.scale for part in parts if part.scale is not None]
    return PackedWeight(values, torch.cat([part.mask for part in parts]), torch.cat(scales))


# Parts and shares


@dtypes
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_a_layer_multiplies_by_value_times_scale(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: str
) -> None:
    monkeypatch.setenv("HALVE_BACKEND", backend)
    x, weight = drawn(9, is_sparse=False, rows=3), weight_of(0, dtype)
    layer = single(plugin, dtype)
    layer.read(tensors_of(weight))
    assert is_product(layer(x), x, exact(weight))
    fused, parts = qkv(plugin, dtype), parts_of(dtype)
    fused.read(tensors_of(*parts))
    assert is_product(fused(x), x, torch.cat([exact(part) for part in parts]))
    for one in (layer, fused):
        assert list(one._parameters) in (["weight"], ["weight_packed"]), "values and scales are let go of"
    if backend == "plain":
        assert torch.equal(layer.weight, unpack(weight, torch.bfloat16)), "as `halve unpack` writes it"


@dtypes
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_a_layer_whose_x_is_rounded_to_8_bits(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: str
) -> None:
    """Where a kernel multiplies it; a layer that is expanded multiplies x as it is."""
    monkeypatch.setenv("HALVE_BACKEND", backend)
    weight, x = weight_of(0, dtype), drawn(9, is_sparse=False, rows=3)
    x[1] *= 100
    layer = LinearBase(
        plugin.HalveQuantization(Stored("packed", value_dtype=dtype, quantizes_x=True)),
        f"{ATTENTION}.o_proj",
        [SIZE],
        SIZE,
    )
    layer.read(tensors_of(weight))
    values, scale = quantize_rows(x, dtype)
    rounded = values.double() * scale.double()
    runs_sparse = list(layer._parameters) == ["weight_packed"]
    assert runs_sparse or backend == "plain" or choose(torch.device("cpu"), dtype, 1, 1, 1).backend.prepare is None
    assert is_product(layer(x), rounded if runs_sparse else x, exact(weight))
    if runs_sparse:
        off = (layer(x).double() - rounded @ exact(weight).T).norm()
        assert off < (layer(x).double() - x.double() @ exact(weight).T).norm() / 2, "x is rounded to 8 bits"


@dtypes
def test_what_rounds_x_is_told_so(plugin: ModuleType, prepared: list[PackedWeight], dtype: torch.dtype) -> None:
    for quantizes_x in (False, True):
        quantization = plugin.HalveQuantization(Stored("packed", value_dtype=dtype, quantizes_x=quantizes_x))
        quantization.packed_modules_mapping = FUSED
        layer = LinearBase(quantization, f"{ATTENTION}.qkv_proj", PARTS, SIZE)
        layer.read(tensors_of(*parts_of(dtype)))
        assert prepared[-1].quantizes_x is quantizes_x


@dtypes
def test_a_layer_that_is_stored_fused(plugin: ModuleType, prepared: list[PackedWeight], dtype: torch.dtype) -> None:
    """As Phi-3's is."""
    whole = joined(parts_of(dtype))
    layer = qkv(plugin, dtype)
    layer.read({name: tensor for name, (tensor,) in tensors_of(whole).items() if tensor is not None})
    assert same(prepared[0], whole)


@dtypes
def test_each_rank_has_the_scales_of_its_rows(
    plugin: ModuleType, prepared: list[PackedWeight], dtype: torch.dtype
) -> None:
    parts = parts_of(dtype)
    for rank in range(2):
        qkv(plugin, dtype, ranks=2, rank=rank).read(tensors_of(*parts))
        half = [part.rows(slice(rank * part.shape[0] // 2, (rank + 1) * part.shape[0] // 2)) for part in parts]
        assert same(prepared[-1], joined(half))


@dtypes
def test_each_rank_has_all_scales_of_its_columns(
    plugin: ModuleType, prepared: list[PackedWeight], dtype: torch.dtype
) -> None:
    weight = weight_of(0, dtype)
    for rank in range(2):
        single(plugin, dtype, split="input", ranks=2, rank=rank).read(tensors_of(weight))
        values, mask = (
            tensor[:, rank * tensor.shape[1] // 2 : (rank + 1) * tensor.shape[1] // 2].contiguous()
            for tensor in (weight.values, weight.mask)
        )
        assert same(prepared[-1], PackedWeight(values, mask, weight.scale))


@dtypes
@pytest.mark.parametrize("split", ["output", "input"])
def test_the_ranks_together_multiply_as_one(plugin: ModuleType, dtype: torch.dtype, split: str) -> None:
    x, weight = drawn(9, is_sparse=False, rows=3), weight_of(0, dtype)
    shares = [single(plugin, dtype, split=split, ranks=2, rank=rank) for rank in range(2)]
    for share in shares:
        share.read(tensors_of(weight))
    if split == "output":
        y = torch.cat([share(x) for share in shares], dim=1)
    else:
        y = sum((share(half).double() for share, half in zip(shares, x.chunk(2, dim=1), strict=True)), torch.zeros(()))
    assert is_product(y, x, exact(weight))


@dtypes
def test_a_dense_part_beside_scaled_ones(
    plugin: ModuleType, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    x, dense = drawn(9, is_sparse=False, rows=3), drawn(3, is_sparse=False, rows=PARTS[1])
    q, _, v = parts_of(dtype)
    layer = qkv(plugin, dtype, f"{ATTENTION}.k_proj")
    with caplog.at_level(logging.INFO):
        layer.read({**tensors_of(q, None, v), "weight": [None, dense, None]})
    assert layer.weight.dtype == torch.bfloat16
    assert is_product(layer(x), x, torch.cat([exact(q), dense.double(), exact(v)]))
    assert "halve: 1 linear layers are dense: vLLM fuses them with k_proj, which is not 2:4" in said(
        caplog, logging.INFO
    )


# What is missing or wrong


@dtypes
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("part", range(3))
def test_what_was_never_read_is_named(plugin: ModuleType, dtype: torch.dtype, tensor: str, part: int) -> None:
    found = tensors_of(*parts_of(dtype))
    found[tensor][part] = None
    message = rf"no tensor {ATTENTION}\.{'qkv'[part]}_proj\.{tensor};"
    with pytest.raises(CorruptCheckpointError, match=message):
        qkv(plugin, dtype).read(found)

    # Another loader than that of checkpoints, of which nothing is recorded.
    layer = qkv(plugin, dtype)
    for name, tensors in found.items():
        for number, read in enumerate(tensors):
            if read is not None:
                layer.take(layer.get_parameter(name), read, number)
    with pytest.raises(CorruptCheckpointError, match=message):
        layer.quant_method.process_weights_after_loading(layer)


@dtypes
@pytest.mark.parametrize("tensor", TENSORS)
def test_a_row_that_was_never_read_is_noticed(plugin: ModuleType, dtype: torch.dtype, tensor: str) -> None:
    layer = single(plugin, dtype)
    for name, (read,) in tensors_of(weight_of(0, dtype)).items():
        assert read is not None
        layer.take(layer.get_parameter(name), read)
    unread = single(plugin, dtype).get_parameter(tensor)
    layer.get_parameter(tensor).data[-1].copy_(unread.data[-1])
    with pytest.raises(CorruptCheckpointError, match=rf"{ATTENTION}\.o_proj: .* (row|at \[)"):
        layer.quant_method.process_weights_after_loading(layer)


@dtypes
def test_weights_may_be_what_one_could_take_for_none(plugin: ModuleType, dtype: torch.dtype) -> None:
    weight = pack(torch.zeros(SIZE, SIZE))
    layer = single(plugin, dtype)
    layer.read(tensors_of(quantize(weight, dtype)))
    assert not layer(drawn(9, is_sparse=False, rows=3)).any()
    ones = PackedWeight(weight.values.fill_(1).to(dtype), weight.mask, torch.ones(SIZE, 1))
    layer.read_anew(tensors_of(ones))
    assert torch.equal(layer(torch.eye(SIZE).bfloat16()).T.double(), exact(ones))


def wrong() -> list[Any]:
    scale, kept = "weight_scale", "weight_packed"
    kinds: dict[str, tuple[torch.dtype, str, Any, str]] = {
        "half scale": (torch.int8, scale, lambda t: t.half(), r"float16 \[64, 1\], and float32 \[rows, 1\] belongs"),
        "flat scale": (torch.int8, scale, lambda t: t[:, 0], r"float32 \[64\], and float32 \[rows, 1\] belongs"),
        "wide scale": (torch.int8, scale, lambda t: t.expand(-1, 2), r"\[64, 2\], and float32 \[rows, 1\] belongs"),
        "one scale": (torch.int8, scale, lambda t: t[:1], r"weight_scale \[1, 1\] does not fit into \[64, 1\]"),
        "short scale": (torch.int8, scale, lambda t: t[1:], r"weight_scale \[63, 1\] does not fit"),
        "float values": (torch.int8, kept, lambda t: t.bfloat16(), r"bfloat16 \[64, 32\], and int8 \[rows, 32\] belongs"),
        "other values": (torch.float8_e4m3fn, kept, lambda t: t.float().to(torch.int8), "int8 .* float8_e4m3fn .* belongs"),
        "narrow values": (torch.int8, kept, lambda t: t[:, 1:], r"\[64, 31\], and int8 \[rows, 32\] belongs"),
        "signed mask": (torch.int8, "weight_mask", lambda t: t.view(torch.int8), r"int8 \[64, 8\], and uint8 \[rows, 8\]"),
    }  # fmt: skip
    return [pytest.param(*fields, id=name) for name, fields in kinds.items()]


@pytest.mark.parametrize(("dtype", "tensor", "change", "message"), wrong())
@pytest.mark.parametrize("split", ["output", "input"])
def test_what_does_not_fit_is_refused(
    plugin: ModuleType, dtype: torch.dtype, tensor: str, change: Any, message: str, split: str
) -> None:
    found = tensors_of(weight_of(0, dtype))
    found[tensor] = [change(found[tensor][0])]
    layer = single(plugin, dtype, split=split)
    with pytest.raises(CorruptCheckpointError, match=message) as raised:
        layer.read({name: tensor for name, (tensor,) in found.items() if tensor is not None})
    assert f"{ATTENTION}.o_proj.{tensor}" in str(raised.value)


@pytest.mark.parametrize("name", ["weight_packed", "weight"])
@dtypes
def test_8_bit_values_are_not_cast_to_floating_point(plugin: ModuleType, name: str, dtype: torch.dtype) -> None:
    """They mean nothing without their scales."""
    values = weight_of(0, dtype).values
    how = Stored("packed", value_dtype=torch.bfloat16) if name == "weight_packed" else Stored("dense")
    layer = LinearBase(plugin.HalveQuantization(how), f"{ATTENTION}.o_proj", [SIZE], SIZE)
    with pytest.raises(CorruptCheckpointError, match=rf"o_proj\.{name} is {dtype} .*, and floating-point .* belongs"):
        layer.read({name: values if name == "weight_packed" else values.repeat(1, 2)})


@dtypes
def test_damage_is_named(plugin: ModuleType, dtype: torch.dtype) -> None:
    for value in (0.0, -1.0, float("nan"), float("inf")):
        parts = parts_of(dtype)
        scale = parts[1].scale
        assert scale is not None
        scale[5] = value
        with pytest.raises(CorruptCheckpointError, match=rf"{ATTENTION}\.k_proj: 1 scales are not .* row 5"):
            qkv(plugin, dtype).read(tensors_of(*parts))
    parts = parts_of(dtype)
    parts[2].values.view(torch.uint8)[3, 4] = 0x80 if dtype == torch.int8 else 0xFF
    with pytest.raises(CorruptCheckpointError, match=rf"{ATTENTION}\.v_proj: 1 packed values are .* \[3, 4\]"):
        qkv(plugin, dtype).read(tensors_of(*parts))


@pytest.mark.parametrize("model_type", ["llama4_text", "llama4"])
def test_rows_that_vllm_reorders_are_refused(plugin: ModuleType, model_type: str) -> None:
    """Values and scales of Llama 4's q and k move, and the mask does not."""
    quantization = plugin.HalveQuantization(Stored("packed", value_dtype=torch.int8))
    quantization.packed_modules_mapping = FUSED
    quantization.maybe_update_config("someone/model", hf_config=SimpleNamespace(model_type=model_type))
    with pytest.raises(SourceError, match=r"self_attn\.q_proj is packed, and vLLM reorders"):
        LinearBase(quantization, f"{ATTENTION}.qkv_proj", PARTS, SIZE)


# Weights that are read anew, and such as are made up


@dtypes
@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_weights_are_read_anew_with_their_scales(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: str
) -> None:
    monkeypatch.setenv("HALVE_BACKEND", backend)
    x, layer = drawn(9, is_sparse=False, rows=3), qkv(plugin, dtype)
    layer.read(tensors_of(*parts_of(dtype)))
    ((_, held),) = layer.named_parameters()
    for seed in (7, 8):
        again = [weight_of(seed * 10 + number, dtype, rows) for number, rows in enumerate(PARTS)]
        layer.read_anew(tensors_of(*again))
        assert next(layer.parameters()) is held
        assert is_product(layer(x), x, torch.cat([exact(part) for part in again]))


@dtypes
def test_what_is_missing_of_weights_that_are_read_anew(
    plugin: ModuleType, prepared: list[PackedWeight], dtype: torch.dtype
) -> None:
    layer, first, again = single(plugin, dtype), weight_of(0, dtype), weight_of(1, dtype)
    layer.read(tensors_of(first))
    layer.read_anew(tensors_of(again))
    assert same(prepared[0], first)
    assert same(prepared[1], again)
    assert int(layer.weight_packed[0]) == 2, "the second one was copied into the tensor of the first"
    found = tensors_of(again)
    del found["weight_scale"]
    with pytest.raises(CorruptCheckpointError, match=r"no tensor .*o_proj\.weight_scale;"):
        layer.read_anew(found)


@dtypes
@pytest.mark.parametrize("ignore", [(), (f"{ATTENTION}.v_proj",)])
def test_weights_that_vllm_makes_up(plugin: ModuleType, dtype: torch.dtype, ignore: tuple[str, ...]) -> None:
    x = torch.eye(SIZE, dtype=torch.bfloat16)
    layer = qkv(plugin, dtype, *ignore)
    layer.make_up()
    weight = layer(x).T[: PARTS[0] + PARTS[1]]
    assert torch.equal(weight > 0, torch.tensor([True, True, False, False]).repeat(SIZE // 4).expand(len(weight), -1))
    assert weight.max() < 0.01
    assert layer(x).isfinite().all()


# What decides, and what compiled graphs know


@dtypes
def test_the_dtype_of_the_values_decides(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch, prepared: list[PackedWeight], dtype: torch.dtype
) -> None:
    asked: list[Any] = []

    def note(result: Any) -> Any:
        return lambda device, *rest: asked.append(rest) or result

    linear = sys.modules["serve.vllm.linear"]
    monkeypatch.setattr(linear, "choose", note(linear.choose()))
    monkeypatch.setattr(tuned, "decision", note(None))
    layer = single(plugin, dtype)
    layer.read(tensors_of(weight_of(0, dtype)))
    computed_in, (n, k) = torch.bfloat16, weight_of(0, dtype).shape
    assert asked == [(computed_in, n, k, dtype, False), (dtype, 1, n, k, None, computed_in, False)]
    assert list(layer._parameters) == ["weight_packed"]

    monkeypatch.setattr(tuned, "decision", note(Decision(None, "dense is faster here")))
    x, layer = drawn(9, is_sparse=False, rows=3), single(plugin, dtype)
    layer.read(tensors_of(weight_of(0, dtype)))
    assert list(layer._parameters) == ["weight"]
    assert layer.weight.dtype == torch.bfloat16
    assert is_product(layer(x), x, exact(weight_of(0, dtype)))


def test_the_hash_counts_the_dtype_of_the_values(plugin: ModuleType, prepared: list[PackedWeight]) -> None:
    """Prepared weights of both may be as long."""

    def hash_of(dtype: torch.dtype) -> str:
        quantization = plugin.HalveQuantization(Stored("packed", value_dtype=dtype))
        layer = LinearBase(quantization, f"{ATTENTION}.o_proj", [SIZE], SIZE)
        layer.read(tensors_of(weight_of(0, dtype)))
        return VllmConfig(quantization).compute_hash()

    assert hash_of(torch.int8) == hash_of(torch.int8)
    assert hash_of(torch.int8) != hash_of(torch.float8_e4m3fn)
