"""What an ONNX graph of a language model has to be: the names and axes of its inputs and outputs, and which of its weights are 2:4.

Inputs, with N layers: ``input_ids`` [batch, sequence], ``attention_mask`` [batch, total], ``position_ids`` [batch, sequence],
``past_key_values.N.key`` and ``.value`` [batch, heads, past, head_dim], and ``logits_to_keep`` [kept], the positions of the sequence whose logits are
asked for. Outputs: ``logits`` [batch, kept, vocabulary], ``present.N.key`` and ``.value`` [batch, heads, total, head_dim]. Where total is past and
sequence together; past may be none.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from compress.packed import PackedWeight, is_two_of_four, validate_mask

DOMAIN, OPERATOR = "ai.halve", "Sparse24Linear"
"""The operator that multiplies packed weights; `serve/kernels/cpu/src/onnxruntime.cpp` says what it takes."""
KEEP = "logits_to_keep"
LOGITS = "logits"
_CACHE = re.compile(r"(?:(?:in|out)put\.)?past_key_values\.layers\.(\d+)\.(key|value)s")
_AXES = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total"),
    "position_ids": ("batch", "sequence"),
    KEEP: ("kept",),
    LOGITS: ("batch", "kept", None),
}
_PRODUCTS = {"MatMul", "Gemm"}


def past(layer: int, kind: str) -> str:
    """The name of an input of keys or values; ``kind``: key or value."""
    return f"past_key_values.{layer}.{kind}"


def present(layer: int, kind: str) -> str:
    """The name of an output of keys or values."""
    return f"present.{layer}.{kind}"


def name_all(graph: Any) -> None:
    """Gives the inputs and outputs of an `onnx_ir` graph, as transformers' exporter calls them, their names and the names of their axes."""
    import onnx_ir

    for values, name, length in ((graph.inputs, past, "past"), (graph.outputs, present, "total")):
        for value in values:
            if found := _CACHE.fullmatch(value.name or ""):
                value.name = name(int(found[1]), found[2])
                axes = ("batch", None, length, None)
            else:
                axes = _AXES[value.name]
            assert value.shape is not None
            value.shape = onnx_ir.Shape(
                [_known(old) if axis is None else axis for axis, old in zip(axes, value.shape, strict=True)]
            )


def _known(length: Any) -> Any:
    """A length that the exporter took for a name of it, as a number."""
    return int(str(getattr(length, "value", length)))


def forget_traces(graph: Any) -> None:
    """Takes away what torch notes of each node: where in which file of this machine it comes from, ten times the bytes of the node."""
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


@dataclass(frozen=True)
class Products:
    """The products of a graph with constant weights.

    Attributes:
        sparse: how many weights are 2:4 along the axis that is summed over, by (N, K).
        dense: the others.
    """

    sparse: Counter[tuple[int, int]]
    dense: Counter[tuple[int, int]]


def products(graph: Any) -> Products:
    """Looks at every weight of an `onnx_ir` graph that is multiplied: TensorRT takes sparse kernels where it is constant, and 2:4 along the
    axis that is summed over."""
    found = Products(Counter(), Counter())
    for node in graph:
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
            validate_mask(torch.from_numpy(node.inputs[2].const_value.numpy().copy()), node.inputs[2].name)
            found.sparse[node.attributes["n"].as_int(), node.attributes["k"].as_int()] += 1
            continue
        if node.op_type not in _PRODUCTS:
            continue
        for operand in (0, 1):
            constant = node.inputs[operand].const_value
            if constant is None or len(constant.shape) != 2:
                continue
            weight = torch.from_numpy(constant.numpy().copy())
            if _sums_over_rows(node, operand):
                weight = weight.T
            counted = found.sparse if is_two_of_four(weight) else found.dense
            counted[weight.shape[0], weight.shape[1]] += 1
    return found


def _sums_over_rows(node: Any, operand: int) -> bool:
    """Whether a product sums over the first axis of one of its matrices: of the second one, if it is not transposed."""
    transposed = node.attributes.get("transB" if operand else "transA")
    return (operand == 1) != bool(transposed is not None and transposed.as_int())


CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
"""The kernels' numbers of dtypes."""


def pack_products(model: Any, layers: Iterable[tuple[torch.Tensor, PackedWeight]], io: torch.dtype) -> None:
    """Puts `OPERATOR` in the place of each product of an `onnx_ir` model with one of some weights.

    Args:
        layers: dense weights [N, K] as the graph has them, and what they are packed.
        io: what x is rounded to, and y comes in, where values have scales; else it is their dtype.
    """
    import onnx_ir

    weights = {_digest(dense): weight for dense, weight in layers}
    graph = model.graph
    for node in list(graph):
        if node.op_type not in _PRODUCTS or node.inputs[1].const_value is None:
            continue
        constant = node.inputs[1].const_value
        if len(constant.shape) != 2:
            continue
        dense = torch.from_numpy(constant.numpy().copy())
        weight = weights.get(_digest(dense.T if _sums_over_rows(node, 1) else dense))
        if weight is None or not _is_plain(node):
            continue
        name = node.inputs[1].name
        inputs = [
            node.inputs[0],
            *(_constant(graph, f"{name}.{part}", value) for part, value in _parts(weight).items()),
        ]
        n, k = weight.shape
        numbers = {
            "n": n,
            "k": k,
            "dtype": CODES[weight.values.dtype],
            "io": CODES[io if weight.scale is not None else weight.values.dtype],
            "quantizes_x": int(weight.quantizes_x),
        }
        product = onnx_ir.Node(
            DOMAIN, OPERATOR, inputs, [onnx_ir.AttrInt64(key, value) for key, value in numbers.items()]
        )
        nodes, result = [product], product.outputs[0]
        if len(node.inputs) > 2 and node.inputs[2] is not None:  # of Gemm
            nodes.append(onnx_ir.Node("", "Add", [result, node.inputs[2]]))
            result = nodes[-1].outputs[0]
        old = node.outputs[0]
        result.name, result.type, result.shape = f"{old.name}.sparse", old.type, old.shape
        graph.insert_before(node, nodes)
        old.replace_all_uses_with(result)
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    model.opset_imports[DOMAIN] = 1


def _digest(weight: torch.Tensor) -> bytes:
    return hashlib.sha256(weight.contiguous().numpy().tobytes() + str(tuple(weight.shape)).encode()).digest()


def _is_plain(node: Any) -> bool:
    """Whether a product is one and nothing else: Gemm may scale its operands."""
    factors = (node.attributes.get(name) for name in ("alpha", "beta"))
    transposed = node.attributes.get("transA")
    return all(factor is None or factor.as_float() == 1 for factor in factors) and not (
        transposed and transposed.as_int()
    )


def _parts(weight: PackedWeight) -> dict[str, torch.Tensor]:
    scales = torch.empty(0) if weight.scale is None else weight.scale.flatten()
    return {"values": weight.values.contiguous().view(torch.uint8), "mask": weight.mask, "scales": scales}


def _constant(graph: Any, name: str, value: torch.Tensor) -> Any:
    import onnx_ir

    constant = onnx_ir.tensor(value.numpy(), name=name)
    made = onnx_ir.Value(
        name=name,
        const_value=constant,
        type=onnx_ir.TensorType(constant.dtype),
        shape=onnx_ir.Shape(tuple(value.shape)),
    )
    if name in graph.initializers:  # the same weight twice
        return graph.initializers[name]
    graph.register_initializer(made)
    return made
