"""SymWanda: a weight matters for what enters the layer and for what leaves it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.errors import RecipeError
from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options
from compress.metrics.terms import MOST_POWER, Side, activation_power, input_norm, output_norm, reciprocal, weight_norm

Term = Literal["none", "constant", "activations", "weights", "relative"]


class SymWandaOptions(Options):
    input: Term = Field("activations", description="term of a weight's column: activations is the norm of its input")
    output: Term = Field("activations", description="term of a weight's row: activations is the norm of its output")
    p: float | None = Field(
        None, ge=1, description="norm of a row or column of weights; left out: 2 for weights, 1 for relative"
    )
    alpha: float = Field(0.0, ge=0, le=MOST_POWER, description="power of the input's norm as a further factor")

    @model_validator(mode="after")
    def _has_a_term(self) -> SymWandaOptions:
        if self.input == self.output == "none":
            raise RecipeError(
                "input and output of symwanda are both 'none', so all weights would score 0; leave one of them out for "
                "the activations, or set it to constant, weights or relative"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        wanted = {"sum_of_squares": self.input == "activations" or self.alpha > 0}
        wanted["output_sum_of_squares"] = self.output == "activations"
        return frozenset(name for name, needed in wanted.items() if needed)


def symwanda(weight: Tensor, statistics: LayerStatistics, options: SymWandaOptions) -> Tensor:
    """S_ij = |W_ij| · (a_j + b_i) · ‖X_:j‖₂^α. ``weight`` [N, K] -> [N, K].

    The paper's objective ‖X ΔWᵀ‖ + ‖Y ΔW‖ for inputs X [T, K] and outputs Y [T, N] of the dense layer makes removing
    one weight cost |W_ij| (‖X_:j‖₂ + ‖Y_:i‖₂); that is the default. Other matrices in the place of X and Y give
    the other methods. The terms, for a_j and b_i alike:

        none         0
        constant     1
        activations  ‖X_:j‖₂ and ‖Y_:i‖₂, both over all calibration tokens
        weights      ‖W_:j‖_p and ‖W_i:‖_p; X = Y = Wᵀ of the paper with p = 2
        relative     1 / ‖W_:j‖_p and 1 / ‖W_i:‖_p, 0 where the norm is 0

    Equal to the bit: magnitude (constant, none), Wanda (activations, none) and RIA (relative, relative, p = 1,
    α = 0.5; RIA compares over the whole layer, so add group layer where the pattern is unstructured). The weights of a
    row, and so of an N:M group, share b_i: without an a_j it changes nothing there.

    No code was published, and the paper's numbers could not be checked against one. The sum mixes inputs and
    outputs as they are: where outputs are far larger than inputs, it is the rows that decide.
    """
    terms = [_term(weight, statistics, "input", options), _term(weight, statistics, "output", options)]
    first, *rest = [term for term in terms if term is not None]
    scores = weight.abs() * (first + rest[0] if rest else first)
    return scores * activation_power(statistics, options.alpha) if options.alpha else scores


def _term(weight: Tensor, statistics: LayerStatistics, side: Side, options: SymWandaOptions) -> Tensor | None:
    """a_j, [1, K], or b_i, [N, 1]; None for no term."""
    kind = options.input if side == "input" else options.output
    if kind == "none":
        return None
    if kind == "constant":
        return torch.ones(1, 1, dtype=weight.dtype, device=weight.device)
    if kind == "activations":
        return input_norm(statistics)[None, :] if side == "input" else output_norm(statistics)[:, None]
    p = options.p if options.p is not None else {"weights": 2.0, "relative": 1.0}[kind]
    norm = weight_norm(weight, side, p)
    return reciprocal(norm) if kind == "relative" else norm.float()


SYMWANDA = Metric(
    name="symwanda",
    score=symwanda,
    paper="Yi & Richtárik 2025, Symmetric Pruning of Large Language Models (arXiv 2501.18980)",
    cost="two passes over the weights after the calibration forward",
    group="row",
    options=SymWandaOptions,
)
