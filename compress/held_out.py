"""The best weights for a mask, with the damping chosen on calibration windows that were held out.

The joint refit (`compress.refit`) has as many unknowns as weights are kept. On its own calibration it always wins;
elsewhere it loses to the plain mask when there are few tokens for each input channel, unless the ridge towards the dense
weights is strong enough. How strong depends on the layer: so the refit is made on most of the windows at several
dampings, each result V is judged on the others by

    tr((V − W) H (V − W)ᵀ) / tr(W H Wᵀ),       H = XᵀX of the held-out windows,

and the best damping then serves a refit on all of them. A layer that has a bias is fitted to inputs without their
mean, as the bias takes over the mean of what changes; held out, the inputs are taken about the mean of the fitted ones.

Axes: ``N`` output features, ``K`` input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor

from compress.bias import mean_correction
from compress.damping import FEW_TOKENS, chosen_damping
from compress.gram import Part
from compress.layer_statistics import LayerStatistics
from compress.methods import Options, Reconstructed
from compress.refit import Refit, joint_refit

FIRST_GRID = (-2, -3, -4)
"""Dampings that are tried first, in half decades: 0.1, 0.032, 0.01."""
STRONGEST, WEAKEST = 2, -10
"""How far the grid goes where its edge wins: 10 and 0.00001."""
ENOUGH = 1e-3
"""Share of the error that a step beyond the edge must gain for another step."""
ROWS = 128
"""Rows of a layer that the choice is made on, spread evenly: a damping fits all rows, and these tell which."""
LEAST_HELD_OUT = 32
"""Tokens below which nothing is chosen by them."""


class RefitOptions(Options):
    damping: float | None = Field(
        None,
        gt=0,
        le=10,
        description="ridge of the refit towards the dense weights, as a share of the Gram matrix's mean diagonal; left "
        "out: chosen for each layer on the windows that were held out",
    )
    refit_steps: int = Field(30, ge=0, le=1000, description="conjugate gradient steps of a refit at most; 0: no refit")
    refit_tolerance: float = Field(
        3e-4, gt=0, lt=1, description="a refit stops after a step that lowers the error by less than this share"
    )


@dataclass(frozen=True)
class LayerProblem:
    """The Gram matrices [K, K] of what a layer is fitted to, is judged by, and of both together."""

    fit: Tensor
    held_out: Tensor
    whole: Tensor
    mean: Tensor
    """Of the input [K], over all tokens."""
    has_bias: bool
    """The matrices are without the mean, which the bias takes over."""


def layer_problem(statistics: LayerStatistics) -> LayerProblem:
    """Made once for the layers that read one input."""
    has_bias = statistics.bias is not None
    key = ("layer problem", has_bias)
    if key not in statistics.factors:
        fit, held_out = statistics.split_gram
        both = Part(
            statistics.gram,
            fit.sum + held_out.sum,
            fit.tokens + held_out.tokens,
        )
        if has_bias:
            about = fit.mean if fit.tokens else both.mean
            made = LayerProblem(fit.about(about), held_out.about(about), both.about(both.mean), both.mean, True)
        else:
            made = LayerProblem(fit.gram, held_out.gram, both.gram, both.mean, False)
        statistics.factors[key] = made
    return cast(LayerProblem, statistics.factors[key])


@dataclass(frozen=True)
class Choice:
    """A damping, and the relative errors of the refit that it gives."""

    damping: float
    held_out_error: float
    fit_error: float
    tried: dict[float, float]
    """Held-out errors by damping."""


def choose_damping(dense: Tensor, mask: Tensor, problem: LayerProblem, *, steps: int, tolerance: float) -> Choice:
    """The damping whose refit on the one part has the least error on the other.

    Every refit starts from the dense weights or from one before: what else there is to start from has seen the
    windows that are held out.

    Args:
        dense, mask: [N, K] each, see `joint_refit`; not all rows are used.
    """
    stride = max(len(dense) // ROWS, 1)
    dense, mask = dense[::stride], mask[::stride]
    solution = dense
    errors: dict[int, tuple[float, float]] = {}

    def measure(half_decade: int) -> None:
        nonlocal solution  # the next one starts where this one ends
        refit = joint_refit(
            dense,
            mask,
            problem.fit,
            damping=10 ** (half_decade / 2),
            start=solution,
            steps=steps,
            tolerance=tolerance,
        )
        solution = refit.weight
        errors[half_decade] = (
            relative_error(dense, solution, problem.held_out),
            relative_error(dense, solution, problem.fit),
        )

    for half_decade in FIRST_GRID:
        measure(half_decade)
    while True:
        best = min(errors, key=lambda tried: errors[tried][0])
        beyond = best - 1 if best == min(errors) else best + 1
        if beyond in errors or not WEAKEST <= beyond <= STRONGEST:
            break
        measure(beyond)
        if errors[beyond][0] > errors[best][0] * (1 - ENOUGH):
            break
    best = min(errors, key=lambda tried: errors[tried][0])
    return Choice(10 ** (best / 2), *errors[best], {10 ** (tried / 2): errors[tried][0] for tried in sorted(errors)})


def relative_error(dense: Tensor, changed: Tensor, gram: Tensor) -> float:
    """tr((V − W) H (V − W)ᵀ) / tr(W H Wᵀ); 0 for no output at all."""

    def energy(weight: Tensor) -> float:
        return float(((weight @ gram) * weight).sum(dtype=torch.float64))

    before = energy(dense)
    return max(energy(changed - dense), 0.0) / before if before > 0 else 0.0


def refitted(
    dense: Tensor, mask: Tensor, start: Tensor, statistics: LayerStatistics, options: RefitOptions
) -> Reconstructed:
    """The refit of a mask at the options' damping or the one chosen, and the bias where there is one.

    Args:
        dense: W [N, K].
        mask: [N, K], True where a weight is kept.
        start: weights [N, K] to start from; with no refit, they are the result.
    """
    problem = layer_problem(statistics)
    result, notes = start, dict[str, Any]()
    if options.refit_steps:
        damping, notes = _damping(dense, mask, problem, statistics, options)
        refit: Refit = joint_refit(
            dense,
            mask,
            problem.whole,
            damping=damping,
            start=start,
            steps=options.refit_steps,
            tolerance=options.refit_tolerance,
        )
        result = refit.weight
        notes |= {"refit_steps": refit.steps, "refit_last_gain": refit.last_gain}
    if statistics.bias is None:
        return Reconstructed(result, mask, notes=notes)
    bias = statistics.bias.float() + mean_correction(dense, result, problem.mean)
    return Reconstructed(result, mask, bias, {**notes, "bias": "corrected"})


def _damping(
    dense: Tensor,
    mask: Tensor,
    problem: LayerProblem,
    statistics: LayerStatistics,
    options: RefitOptions,
) -> tuple[float, dict[str, Any]]:
    """The damping, and what the report says of it."""
    default, notes = chosen_damping(options.damping, statistics)
    held_out = statistics.split_gram.held_out.tokens
    if options.damping is not None or held_out < LEAST_HELD_OUT:
        return default, {**notes, "damping": default}
    choice = choose_damping(dense, mask, problem, steps=options.refit_steps, tolerance=options.refit_tolerance)
    notes |= {
        "damping": choice.damping,
        "held_out_error": choice.held_out_error,
        "fit_error": choice.fit_error,
        "held_out_tokens": held_out,
    }
    if "warning" in notes:
        per_channel = notes["tokens_per_input"]
        notes["warning"] = (
            f"{per_channel:.2g} calibration tokens per input channel are few for a refit (at least {FEW_TOKENS}, better "
            f"{2 * FEW_TOKENS} or more); a damping of {choice.damping:.2g} was chosen on {held_out} held-out tokens; "
            "raise --samples or --length"
        )
    return choice.damping, notes
