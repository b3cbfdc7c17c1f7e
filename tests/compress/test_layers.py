"""One layer through the slots: what is saved, what is recorded, and what a faulty method cannot get past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.layer_statistics import LayerStatistics
from compress.layers import importance, prune_layer, relative_output_error
from compress.methods import Metric, Options, Pruning, Reconstructed, Reconstruction
from compress.metrics import METRICS
from compress.recipe import Recipe
from compress.reconstruction import RECONSTRUCTIONS
from compress.statistics import InputStatistics

NAME = "model.layers.0.self_attn.q_proj"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layer(n: int = 12, k: int = 64, t: int = 300, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(t, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5 + 0.3
    return weight.to(dtype), x.to(dtype)


def gathered(x: Tensor) -> LayerStatistics:
    statistics = InputStatistics({"gram", "sum_of_squares", "sample"}, x.shape[1], tokens=len(x))
    statistics.update(x)
    return LayerStatistics(statistics)


def brute_force_error(dense: Tensor, pruned: Tensor, x: Tensor) -> float:
    lost = total = 0.0
    for row in x.double().tolist():
        for w, v in zip(dense.double().tolist(), pruned.double().tolist(), strict=True):
            before = sum(a * b for a, b in zip(row, w, strict=True))
            after = sum(a * b for a, b in zip(row, v, strict=True))
            lost += (after - before) ** 2
            total += before**2
    return lost / total


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_output_error(dtype: torch.dtype) -> None:
    weight, x = layer(5, 24, 30, dtype)
    pruned = weight * (torch.arange(24) % 3 > 0)
    assert relative_output_error(weight, pruned, x) == pytest.approx(brute_force_error(weight, pruned, x), rel=1e-5)
    assert relative_output_error(weight, weight, x) == 0
    assert relative_output_error(weight, torch.zeros_like(weight), x) == pytest.approx(1)


def test_relative_output_error_without_output() -> None:
    weight, x = layer(5, 24, 30)
    assert relative_output_error(weight * 0, weight * 0, x) == 0
    assert relative_output_error(weight, weight, x * 0) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", [None, "wanda", "magnitude"])
@pytest.mark.parametrize("reconstruction", ["sparsegpt", "none"])
def test_result_and_record(dtype: torch.dtype, metric: str | None, reconstruction: str) -> None:
    weight, x = layer(dtype=dtype)
    before = weight.clone()
    result = prune_layer(NAME, weight, gathered(x), Recipe.create(metric=metric, reconstruction=reconstruction))
    assert result.weight.dtype == dtype
    assert result.bias is None
    assert (result.weight != 0).view(12, 16, 4).sum(dim=2).eq(2).all()
    assert torch.equal(weight, before)
    record = result.record
    assert record["metric"] == (metric or {"sparsegpt": "sparsegpt", "none": "wanda"}[reconstruction])
    assert record["reconstruction"] == reconstruction
    assert record["sparsity"] == 0.5
    error = (x.double() @ (result.weight.double() - weight.double()).T).square().sum()
    energy = (x.double() @ weight.double().T).square().sum()
    assert record["relative_output_error"] == pytest.approx(float(error / energy), rel=1e-4)
    assert record.get("damping") == (0.01 if reconstruction == "sparsegpt" else None)
    if reconstruction == "none":
        assert torch.equal(result.weight[result.weight != 0], weight[result.weight != 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_stored_transposed(dtype: torch.dtype) -> None:
    """A Conv1D's weight [N, K] is a view of what the model stores; it gives the same result and is not written to."""
    weight, x = layer(dtype=dtype)
    stored = weight.T.contiguous()
    plain = prune_layer(NAME, weight, gathered(x), Recipe.create())
    viewed = prune_layer(NAME, stored.T, gathered(x), Recipe.create())
    assert torch.equal(viewed.weight, plain.weight)
    assert viewed.record == plain.record
    assert plain.record["relative_output_error"] > 1e-3
    assert torch.equal(stored.T, weight)


def test_unstructured_record() -> None:
    weight, x = layer()
    recipe = Recipe.create(pattern="unstructured", sparsity=0.75, format="dense")
    result = prune_layer(NAME, weight, gathered(x), recipe)
    assert result.record["sparsity"] == 0.75
    assert int((result.weight == 0).sum()) == 0.75 * weight.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_negative_zero_is_saved(dtype: torch.dtype) -> None:
    """Neither a −0.0 of the dense weight nor one that rounding to the stored dtype makes."""
    weight, x = layer(4, 8, 20, dtype)
    weight[:, :4] = -0.0
    for reconstruction in ("none", "sparsegpt"):
        result = prune_layer(NAME, weight, gathered(x), Recipe.create(metric="wanda", reconstruction=reconstruction))
        assert not torch.signbit(result.weight[result.weight == 0]).any()


Run = Callable[[Tensor, Pruning, LayerStatistics, Options], Reconstructed]


def inject(monkeypatch: pytest.MonkeyPatch, run: Run) -> Recipe:
    """A recipe with Wanda's mask and a method of our own."""
    monkeypatch.setitem(RECONSTRUCTIONS, "ours", Reconstruction("ours", run, paper="", cost=""))
    return Recipe.create(metric="wanda", reconstruction="ours")


def given(pruning: Pruning) -> Tensor:
    assert pruning.mask is not None
    return pruning.mask


def test_a_method_that_breaks_its_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: Options) -> Reconstructed:
        v = weight * given(pruning)
        v[3, ~given(pruning)[3]] = 1e-3
        return Reconstructed(v, given(pruning))

    weight, x = layer()
    with pytest.raises(AssertionError, match="q_proj: the reconstruction left a weight where"):
        prune_layer(NAME, weight, gathered(x), inject(monkeypatch, leak))


def test_a_method_that_keeps_too_much_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_all(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: Options) -> Reconstructed:
        return Reconstructed(weight, torch.ones_like(given(pruning)))

    weight, x = layer()
    with pytest.raises(AssertionError, match="q_proj: the mask keeps"):
        prune_layer(NAME, weight, gathered(x), inject(monkeypatch, keep_all))


def test_a_method_that_keeps_the_right_number_in_the_wrong_groups_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: Options) -> Reconstructed:
        mask = torch.zeros_like(given(pruning))
        mask[:, 0::8] = mask[:, 1::8] = mask[:, 2::8] = mask[:, 4::8] = True  # three of four, then one of four
        return Reconstructed(weight * mask, mask)

    weight, x = layer()
    with pytest.raises(AssertionError, match="q_proj: the mask keeps"):
        prune_layer(NAME, weight, gathered(x), inject(monkeypatch, shift))


def test_a_result_beyond_the_stored_dtype_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: Options) -> Reconstructed:
        return Reconstructed(weight * given(pruning) * 1e6, given(pruning))

    weight, x = layer(dtype=torch.float16)
    with pytest.raises(NumericalError, match=r"q_proj after ours: .* NaN or infinite"):
        prune_layer(NAME, weight, gathered(x), inject(monkeypatch, grow))


def test_a_new_bias_and_notes_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_bias(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: Options) -> Reconstructed:
        return Reconstructed(weight * given(pruning), given(pruning), torch.arange(12.0), {"steps": 3})

    weight, x = layer()
    result = prune_layer(NAME, weight, gathered(x), inject(monkeypatch, with_bias))
    assert result.bias is not None
    assert torch.equal(result.bias, torch.arange(12.0))
    assert result.record["steps"] == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_name_the_layer(bad: float) -> None:
    weight, x = layer()
    weight[2, 7] = bad
    with pytest.raises(NumericalError, match=r"q_proj: 1 values are NaN or infinite \(the first at \[2, 7\]\)"):
        prune_layer(NAME, weight, gathered(x), Recipe.create())
    weight, x = layer()
    x[5, 5] = bad
    with pytest.raises(NumericalError, match="q_proj: the calibration activations contain NaN or infinity"):
        prune_layer(NAME, weight, gathered(x), Recipe.create())


def test_a_gram_matrix_that_cannot_be_factored_names_the_layer() -> None:
    weight, x = layer()
    statistics = gathered(x)
    vars(statistics.inputs)["gram"] = -statistics.gram
    with pytest.raises(NumericalError, match=r"q_proj: the Gram matrix cannot be factored"):
        prune_layer(NAME, weight, statistics, Recipe.create())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_scores_that_are_not_finite_name_the_layer_and_the_metric(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be ties, and the mask one of positions."""

    def score(weight: Tensor, statistics: LayerStatistics, options: Options) -> Tensor:
        scores = weight.abs()
        scores[0, :8] = bad
        return scores

    monkeypatch.setitem(METRICS, "ours", Metric("ours", score, paper="", cost=""))
    weight, x = layer()
    recipe = Recipe.create(metric="ours", reconstruction="none", permutation="fold")
    for prune in (prune_layer, importance):
        with pytest.raises(NumericalError, match=r"q_proj: 8 of 768 scores of ours are NaN or infinite"):
            prune(NAME, weight, gathered(x), recipe)


def test_a_metric_whose_options_overflow_says_so() -> None:
    weight, x = layer()
    recipe = Recipe.create(metric="ria", metric_options={"alpha": 4}, reconstruction="none")
    assert prune_layer(NAME, weight, gathered(x), recipe).record["sparsity"] == 0.5
    with pytest.raises(
        NumericalError, match=r"q_proj: .* scores of ria alpha=4 are NaN or infinite.*use smaller options"
    ):
        prune_layer(NAME, weight, gathered(x * 1e10), recipe)


@pytest.mark.parametrize(
    ("reconstruction", "options"), [("swaps", {}), ("sparsegpt", {}), ("admm", {"refit_steps": 0}), ("admm", {})]
)
def test_a_gram_matrix_of_few_tokens_is_warned_of(reconstruction: str, options: dict[str, Any]) -> None:
    """Whether or not the method damps it."""
    weight, x = layer(t=100)
    recipe = Recipe.create(metric="wanda", reconstruction=reconstruction, reconstruction_options=options)

    def record(x: Tensor) -> dict[str, Any]:
        inputs = InputStatistics({*recipe.needs, "sample"}, x.shape[1], tokens=len(x), windows=4)
        inputs.update(x)
        return prune_layer(NAME, weight, LayerStatistics(inputs, windows=4), recipe).record

    few = record(x)
    assert few["tokens_per_input"] == pytest.approx(100 / 64, abs=1e-3)
    assert few["warning"].startswith("1.6 calibration tokens per input channel are few")
    assert "raise --samples or --length" in few["warning"]
    enough = record(layer(t=4 * 64)[1])
    assert enough["tokens_per_input"] == 4
    assert "warning" not in enough
    recipe = Recipe.create(metric="wanda", reconstruction="none")
    assert "tokens_per_input" not in record(x), "there is no Gram matrix"
