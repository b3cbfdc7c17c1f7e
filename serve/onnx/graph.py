"""What an ONNX graph of a language model has to be: the names and axes of its inputs and outputs, and which of its weights are 2:4.

Inputs, with N layers: ``input_ids`` [batch, sequence], ``attention_mask`` [batch, total], ``position_ids`` [batch, sequence],
``past_key_values.N.key`` and ``.value`` [batch, heads, past, head_dim], and ``logits_to_keep`` [kept], the positions of the sequence whose logits are
asked for. Outputs: ``logits`` [batch, kept, vocabulary], ``present.N.key`` and ``.value`` [batch, heads, total, head_dim]. Where total is past and
sequence together; past may be none.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from compress.packed import is_two_of_four

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
