"""The C++ kernels as torch operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serve.kernels import ops
from serve.kernels.cpu import attention, backend, library
from tests.serve.cpu_reference import DTYPES, normal, random_weight

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.status())

needs_dense = pytest.mark.skipif(library.paths() == ("portable",), reason="this processor has no dense kernel")
N, K = 37, 72


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_sparse24_linear(dtype: torch.dtype, batch: tuple[int, ...], with_bias: bool) -> None:
    x, stream = normal(*batch, K, dtype=dtype), backend.prepare(random_weight(N, K, dtype))
    bias = normal(N, dtype=dtype) if with_bias else None
    y = torch.ops.halve.sparse24_linear(x, stream, bias, N)
    assert torch.equal(y, backend.linear(x, stream, bias, N))
    torch.library.opcheck(ops.sparse24_linear, (x, stream, bias, N))
    shape = torch.ops.halve.sparse24_linear(*(t if t is None else t.to("meta") for t in (x, stream, bias)), N)
    assert (shape.shape, shape.dtype, shape.device.type) == (y.shape, dtype, "meta")


@needs_dense
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 3)], ids=str)
def test_dense_linear(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    x, weight, bias = normal(*batch, K, dtype=dtype), normal(N, K, dtype=dtype), normal(N, dtype=dtype)
    y = torch.ops.halve.dense_linear(x, weight, bias)
    assert torch.equal(y, backend.dense_linear(x, weight, bias))
    torch.library.opcheck(ops.dense_linear, (x, weight, bias))
    shape = torch.ops.halve.dense_linear(x.to("meta"), weight.to("meta"), None)
    assert (shape.shape, shape.dtype, shape.device.type) == (y.shape, dtype, "meta")


def test_attention_is_there_where_its_instructions_are() -> None:
    """So that its own tests are skipped only on processors that lack them."""
    assert attention.available() == ("avx2" in library.paths())


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own use
def test_inside_torch_compile(compiler: str) -> None:
    """The whole function is one graph, for several numbers of rows."""
    stream, bias = backend.prepare(random_weight(K, K, torch.bfloat16)), normal(K, dtype=torch.bfloat16)

    def layers(x: Tensor) -> Tensor:
        hidden = ops.sparse24_linear(x, stream, bias, K)
        return ops.sparse24_linear(hidden, stream, None, K).relu()

    compiled = torch.compile(layers, fullgraph=True, dynamic=True, backend=compiler)
    for rows in (1, 2, 5, 40):
        x = normal(rows, K, dtype=torch.bfloat16, seed=rows)
        assert torch.equal(compiled(x), layers(x))
