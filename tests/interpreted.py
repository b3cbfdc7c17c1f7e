"""Triton's kernels on a processor: modules whose kernels Triton interprets, one block after the other."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton import knobs, language
from triton.language import standard
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


@contextmanager
def interpreted(name: str) -> Iterator[types.ModuleType]:
    """A copy of a module of its own, with kernels that run on tensors of the processor.

    Triton decides when a kernel is declared, so its own library, which others have imported long since, is declared again.
    What its interpreter (3.9) does otherwise than a GPU is mended here: products of bfloat16 take their bits for integers,
    float32 is not rounded to bfloat16 but cut off, and a call of a function inside of a kernel leaves its library altered.
    """
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", _widening(builder.create_dot))
        patch.setattr(builder, "cast_impl", _rounding(builder.cast_impl))
        patch.setattr(builder, "create_fp_trunc", _rounding(builder.create_fp_trunc))
        patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
        for place in (language, standard):
            for own, function in vars(place).items():
                if isinstance(function, JITFunction):
                    patch.setattr(place, own, interpreter.InterpretedFunction(function.fn))
        patch.setattr(knobs.runtime, "interpret", True)
        before = sys.modules.pop(name, None)
        try:
            module = importlib.import_module(name)
        finally:
            sys.modules.pop(name, None)
            if before is not None:
                sys.modules[name] = before
        yield module


def _call(function: Any, *given: Any, **named: Any) -> Any:
    scope = interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*given, **named)
    finally:
        scope.restore()


def _widening(product: Any) -> Any:
    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        with np.errstate(invalid="ignore"):  # infinity times zero is NaN
            return product(_widened(a), _widened(b), *rest)

    return create_dot


def _widened(side: Any) -> Any:
    if side.dtype.scalar != language.bfloat16:
        return side
    bits = torch.from_numpy(side.data.view(np.int16).copy())
    return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), language.float32)


def _rounding(cast: Any) -> Any:
    def rounded(source: Any, target: Any) -> Any:
        if source.dtype.scalar != language.float32 or target.scalar != language.bfloat16:
            return cast(source, target)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(bits.numpy().view(np.uint16), language.bfloat16)

    return rounded
