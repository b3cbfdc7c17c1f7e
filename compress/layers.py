"""One layer through metric, mask and reconstruction, and what it did to the layer's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.bias import NO_BIAS, mean_correction
from compress.damping import gram_notes
from compress.errors import NumericalError
from compress.gram import exact_products
from compress.layer_statistics import GRAM_NEEDS, LayerStatistics
from compress.methods import Metric, Pruning, parse_options
from compress.metrics.wanda import WANDA
from compress.packed import canonical, require_finite
from compress.patterns import NMPattern, Pattern
from compress.recipe import Recipe


@dataclass(frozen=True)
class PrunedLayer:
    """``weight`` [N, K] in the dtype it is saved in, ``mask`` [N, K] of what it keeps, ``bias`` [N] where it changed,
    ``record`` for the report."""

    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    record: dict[str, Any]


def prune_layer(
    name: str, weight: Tensor, statistics: LayerStatistics, recipe: Recipe, target: Tensor | None = None
) -> PrunedLayer:
    """Prunes a ``weight`` [N, K] by the recipe; computes in float32 and rounds once, at the end.

    Args:
        target: weights [N, K] float32 that are pruned instead, if there are better ones than the layer's own.

    Raises:
        NumericalError: the weight, the statistics, the scores or the result are not finite, or the Gram matrix is singular;
            the message names the layer.
    """
    require_finite(weight, name)
    statistics.require_finite(name)
    metric, reconstruction, pattern = (
        recipe.chosen_metric,
        recipe.chosen_reconstruction,
        recipe.parsed_pattern,
    )
    dense = weight.float() if target is None else target
    mask = scores = None
    if metric is not None:
        scores = _scores(name, dense, statistics, metric, recipe.metric_options)
        mask = pattern.mask(scores, recipe.chosen_group)
    options = parse_options(reconstruction, recipe.reconstruction_options)
    try:
        result = reconstruction.run(dense, Pruning(pattern, recipe.chosen_group, mask, scores), statistics, options)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from None
    pruned = canonical(result.weight.to(weight.dtype))
    require_finite(pruned, f"{name} after {reconstruction.name}")
    _check_mask(name, pruned, result.mask, pattern)
    bias, notes = result.bias, dict(result.notes)
    if metric is not None and metric.corrects_bias and statistics.bias is None:
        notes["bias"] = NO_BIAS
    elif bias is None and metric is not None and metric.corrects_bias and statistics.bias is not None:
        bias = statistics.bias.float() + mean_correction(dense, pruned.float(), statistics.moments.mean)
        notes["bias"] = "corrected"
    if metric is not None and "after_norm" in metric.needs:
        notes["after_norm"] = statistics.after_norm
    if reconstruction.needs & GRAM_NEEDS or target is not None:
        notes = {**gram_notes(statistics), **notes}  # of those that damp it, with what they did about few tokens
    if bias is not None:
        require_finite(bias, f"the bias of {name} after {reconstruction.name}")
    record = {
        "metric": metric.name if metric else reconstruction.name,
        "reconstruction": reconstruction.name,
        "sparsity": 1 - float(result.mask.float().mean()),
        "relative_output_error": relative_output_error(dense, pruned, statistics.sample, _shift(bias, statistics)),
        **notes,
    }
    return PrunedLayer(pruned, result.mask, bias, record)


def importance(name: str, weight: Tensor, statistics: LayerStatistics, recipe: Recipe) -> Tensor:
    """The scores [N, K] float32 of a ``weight`` [N, K] by the recipe's metric, or Wanda's where it has none.

    Raises:
        NumericalError: the weight, the statistics or the scores are not finite.
    """
    require_finite(weight, name)
    statistics.require_finite(name)
    metric = recipe.chosen_metric or WANDA  # (without a metric, there are no options of one)
    return _scores(name, weight.float(), statistics, metric, recipe.metric_options)


def _scores(name: str, weight: Tensor, statistics: LayerStatistics, metric: Metric, given: Mapping[str, Any]) -> Tensor:
    """[N, K]. Ones that are not finite would prune by position, as all of them are ties, or by whatever a NaN compares to."""
    scores = metric.score(weight, statistics, parse_options(metric, given))
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        options = "".join(f" {key}={value}" for key, value in given.items())
        raise NumericalError(
            f"{name}: {int((~finite).sum())} of {scores.numel()} scores of {metric.name}{options} are NaN or infinite, so "
            "they do not say which weights to keep; use smaller options, or another metric"
        )
    return scores


def _shift(bias: Tensor | None, statistics: LayerStatistics) -> Tensor | None:
    """By how much a new bias moves the output [N], or None."""
    if bias is None or statistics.bias is None:
        return bias
    return bias.float() - statistics.bias.float()


def relative_output_error(dense: Tensor, pruned: Tensor, inputs: Tensor, shift: Tensor | None = None) -> float:
    """‖X (V − W)ᵀ + shift‖² / ‖X Wᵀ‖² for ``dense`` W and ``pruned`` V [N, K] over ``inputs`` X [T, K]; 0 for no output
    at all. ``shift`` [N] is the change of the bias."""
    with exact_products(inputs.dtype, dense.dtype):
        before = inputs.float() @ dense.float().T  # [T, N]
        after = inputs.float() @ pruned.float().T
    if shift is not None:
        after += shift.float()
    energy = float(before.square().sum(dtype=torch.float64))
    return float((after - before).square().sum(dtype=torch.float64)) / energy if energy else 0.0


def _check_mask(name: str, pruned: Tensor, mask: Tensor, pattern: Pattern) -> None:
    """A method's promise, checked on what will be saved: zero where the mask says so, and N kept in every group of M."""
    if bool(pruned.masked_fill(mask, 0).any()):
        raise AssertionError(f"{name}: the reconstruction left a weight where its mask says that it is pruned")
    if isinstance(pattern, NMPattern):
        kept = mask.unflatten(-1, (-1, pattern.m)).sum(dim=-1)
        if wrong := int((kept != pattern.keep_n).sum()):
            raise AssertionError(
                f"{name}: the mask keeps another number than {pattern.keep_n} in {wrong} of {kept.numel()} groups of {pattern.m}"
            )
