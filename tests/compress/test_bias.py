"""The bias correction against least squares: no other bias does better, and the mean output stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.layers import prune_layer
from compress.methods import Options, Pruning, Reconstructed
from compress.metrics.magnitude import magnitude
from compress.patterns import NMPattern, Pattern, UnstructuredPattern
from compress.recipe import Recipe
from compress.reconstruction import BIAS
from tests.compress.layers import gathered, layer


def run(weight: Tensor, x: Tensor, bias: Tensor | None, pattern: Pattern) -> Reconstructed:
    scores = magnitude(weight)
    pruning = Pruning(pattern, "row", pattern.mask(scores), scores)
    return BIAS.run(weight, pruning, gathered(x, {"moments", "sum_of_squares", "sample"}, bias=bias), Options())


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), UnstructuredPattern(0.6)], ids=str)
@pytest.mark.parametrize(("n", "k", "t"), [(1, 8, 40), (7, 72, 300), (5, 136, 3)])
def test_the_bias_is_that_of_least_squares(pattern: Pattern, n: int, k: int, t: int) -> None:
    """The target x Wᵀ + b − x Vᵀ is fitted by a column of ones alone."""
    weight, x = layer(n, k, t)
    bias = torch.linspace(-1, 1, n)
    result = run(weight, x, bias, pattern)
    assert torch.equal(result.weight, weight * result.mask)
    target = x.double() @ (weight - result.weight).double().T + bias.double()
    best = torch.linalg.lstsq(torch.ones(t, 1, dtype=torch.float64), target).solution[0]
    assert result.bias is not None
    torch.testing.assert_close(result.bias.double(), best, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(result.bias, bias, atol=1e-3)
    assert result.notes == {"bias": "corrected"}


def test_the_mean_output_stays() -> None:
    weight, x = layer(9, 64, 500)
    bias = torch.randn(9, generator=torch.Generator().manual_seed(1))
    result = run(weight, x, bias, NMPattern(2, 4))
    assert result.bias is not None
    before = (x.double() @ weight.double().T).mean(dim=0) + bias
    after = (x.double() @ result.weight.double().T).mean(dim=0) + result.bias
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_one_token_is_reproduced_exactly() -> None:
    weight, x = layer(5, 16, 1)
    result = run(weight, x, torch.zeros(5), NMPattern(1, 4))
    assert result.bias is not None
    torch.testing.assert_close(x @ result.weight.T + result.bias, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_layer_without_a_bias_is_left_as_none_leaves_it() -> None:
    weight, x = layer(6, 32, 100)
    recipe = {"metric": "magnitude", "format": "dense"}
    given = gathered(x, {"moments", "sum_of_squares", "sample"}, bias=None)
    plain = prune_layer("a", weight, given, Recipe.create(reconstruction="none", **recipe))
    ours = prune_layer("a", weight, given, Recipe.create(reconstruction="bias", **recipe))
    assert torch.equal(ours.weight, plain.weight)
    assert ours.bias is None
    assert ours.record["bias"] == "the layer has none to correct"
    assert ours.record["relative_output_error"] == plain.record["relative_output_error"]


def test_the_recorded_error_counts_the_new_bias() -> None:
    weight, x = layer(6, 32, 100)
    records = {
        name: prune_layer(
            "a",
            weight,
            gathered(x, {"moments", "sum_of_squares", "sample"}, bias=torch.ones(6)),
            Recipe.create(metric="wanda", reconstruction=name),
        )
        for name in ("none", "bias")
    }
    assert records["bias"].record["relative_output_error"] < records["none"].record["relative_output_error"]


def test_zero_rows_and_dead_inputs() -> None:
    weight, x = layer(6, 32, 100)
    weight[2] = 0
    x[:, [0, 5]] = 0
    bias = torch.arange(6.0)
    result = run(weight, x, bias, NMPattern(2, 4))
    assert result.bias is not None
    assert float(result.bias[2]) == 2
    assert bool(torch.isfinite(result.bias).all())
    assert torch.equal(bias, torch.arange(6.0))
