"""One layer through metric, mask and reconstruction, and what it did to the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.bias import mean_correction
from compress.errors import NumericalError
from compress.layer_statistics import LayerStatistics
from compress.methods import Pruning, parse_options
from compress.metrics.wanda import WANDA
from compress.packed import canonical, require_finite
from compress.patterns import NMPattern, Pattern
from compress.recipe import Recipe
from compress.statistics import exact_products


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
        NumericalError: the weight, the statistics or the result are not finite, or the Gram matrix is singular;
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
        scores = metric.score(dense, statistics, parse_options(metric, recipe.metric_options))
        mask = pattern.mask(scores, recipe.chosen_group)
    options = parse_options(reconstruction, recipe.reconstruction_options)
    try:
        result = reconstruction.run(dense, Pruning(pattern, recipe.chosen_group, mask, scores), statistics, options)
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from None
    pruned = canonical(result.weight.to(weight.dtype))
    require_finite(pruned, f"{name} after {reconstruction.name}")
    _check_mask(name, pruned, result.mask, pattern)
    bias, notes = result.bias, result.notes
    if bias is None and metric is not None and metric.corrects_bias and statistics.bias is not None:
        shift = mean_correction(dense, pruned.float(), statistics.moments.mean)
        bias, notes = statistics.bias.float() + shift, {**notes, "bias": "corrected"}
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
        NumericalError: the weight or the statistics are not finite.
    """
    require_finite(weight, name)
    statistics.require_finite(name)
    metric = recipe.chosen_metric
    if metric is None:
        return WANDA.score(weight.float(), statistics, WANDA.options())
    return metric.score(weight.float(), statistics, parse_options(metric, recipe.metric_options))


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
