"""What a layer is fitted to where the blocks before it are pruned already: the dense model, not itself.

By itself, a layer W that is pruned is fitted to its own dense output W x_p on the inputs x_p that the pruned layers before it
give. What these have lost stays lost. With dense targets it is fitted to what the dense model has in its place. Let s be the
tensor in which the layer's output shows (`compress.stages`): the residual sum that it goes into, or else its output. If s_d is
that in the dense model and s_p with the pruned prefix and this W, then the weights that come closest,

    min over W' of  Σ_t ‖s_p + (W' − W) x_p − s_d‖² + λ ‖W' − W‖²,

are W' = W + Δ (H + λI)⁻¹ with Δ = Σ_t (s_d − s_p) x_pᵀ, H = Σ_t x_p x_pᵀ. They take the place of W in whatever prunes
the layer. Where several layers read one input (q, k, v) and their outputs are what shows, s_d − s_p = W (x_d − x_p), and one
matrix [K, K] serves them all; so it is done wherever no sum is known and the input is not wider than the output.

The idea of fitting to the dense model's output is GPTAQ's, for quantization (asymmetric calibration; Li et al. 2025, arXiv
2504.02692). New here are the residual sums, with which every block takes back a part of all errors before it, the ridge,
without which few tokens are learned by heart, and that it comes before any method instead of within one.

A layer that has a bias is fitted about the means, and the bias takes over the mean of what is missing.

Axes: ``T`` tokens, ``N`` output features, ``K`` input features, ``R`` features of what is missing: N, or K where it is
seen at the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.activations import Growing
from compress.errors import NumericalError
from compress.gram import exact_products
from compress.layer_statistics import LayerStatistics
from compress.methods import Options
from compress.stages import BLOCK_OUTPUT, Stage, Tap, Taps

TARGET_NEEDS = frozenset({"gram", "sum"})
TENSORS_OF_TARGETS = 3
"""Activations that are kept of a dense block, beside its output: about, for space on the disk where they are too large for
the memory."""


class TargetOptions(Options):
    damping: float = Field(
        0.1,
        gt=0,
        le=10,
        description="ridge towards the weights as they are, as a share of the Gram matrix's mean diagonal",
    )


@dataclass(frozen=True)
class Targets:
    """What layers are fitted to; any metric and reconstruction then prunes these weights."""

    name: str
    paper: str
    cost: str
    needs: frozenset[str] = TARGET_NEEDS
    options: type[Options] = TargetOptions


TARGETS = Targets(
    name="dense",
    paper="outputs and residual sums of the dense model; after Li et al. 2025, GPTAQ (arXiv 2504.02692)",
    cost="about three more forward passes over the observed windows, and the activations of a block four times more",
)


class DenseTensors:
    """What the dense block has at the taps of all its stages, for the observed batches.

    Args:
        block: the loaded dense block.
        stages: see `compress.stages.plan_stages`.
        batches: how many batches, the first ones, are kept.
        directory: where they go if they are large.
    """

    def __init__(self, block: nn.Module, stages: Sequence[Stage], batches: int, directory: Path) -> None:
        self._block = block
        self._taps = dict.fromkeys(tap for stage in stages for tap in stage.shows.values())
        self._batches = batches
        self._directory = directory
        self._kept: dict[Tap, list[Tensor]] = {}

    def gather(self, dense: list[Tensor], advance: Callable[[int], None]) -> None:
        """Keeps the tensors while ``advance(batch)`` turns ``dense`` [batch, length, hidden] each, from inputs to outputs."""
        kept = {
            tap: Growing(self._batches, self._directory / f"{number}.targets")
            for number, tap in enumerate(self._taps)
            if tap != BLOCK_OUTPUT
        }
        taps = Taps(self._block, kept)
        try:
            for batch in range(len(dense)):
                if batch == self._batches:
                    taps.remove()
                advance(batch)
                if batch < self._batches:
                    for tap, batches in kept.items():
                        batches.append(taps.tensors[tap])
        finally:
            taps.remove()
        self._kept = {tap: batches.tensors for tap, batches in kept.items()}
        self._kept[BLOCK_OUTPUT] = dense

    def at(self, tap: Tap, batch: int) -> Tensor:
        """[batch, length, R]"""
        return self._kept[tap][batch]

    def forget(self, taps: Iterable[Tap]) -> None:
        """They are not needed any more."""
        for tap in taps:
            self._kept.pop(tap, None)


class Missing:
    """Δ = Σ_t m_t x_tᵀ [R, K] float32 and Σ_t m_t [R] float64 of what is missing at a tap, m_t = s_d − s_p."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.products = torch.zeros(rows, columns, device=device)
        self.sum = torch.zeros(rows, dtype=torch.float64, device=device)

    def update(self, missing: Tensor, x: Tensor) -> None:
        """Adds ``missing`` [T, R] float32, for the inputs ``x`` [T, K]."""
        # (with inputs of bfloat16, the small differences are rounded to bfloat16, too: noise that averages out)
        with exact_products(x.dtype):
            self.products.addmm_(missing.T, x.float())
        self.sum += missing.sum(dim=0, dtype=torch.float32)


class StageTargets:
    """Gathers what is missing for the layers of one stage, from the passes over the pruned prefix.

    Args:
        stage: whose layers are observed.
        dense: what there should be.
    """

    def __init__(self, stage: Stage, dense: DenseTensors) -> None:
        self._stage = stage
        self._dense = dense
        self._missing: dict[tuple[Tap, Tap], Missing] = {}
        """By where it shows and the input that it is multiplied with."""

    @property
    def taps(self) -> list[Tap]:
        """What has to be seen in each pass."""
        return list(dict.fromkeys(tap for pair in self._pairs() for tap in pair))

    def _pairs(self) -> list[tuple[Tap, Tap]]:
        return [self._pair(name) for name in self._stage.shows]

    def _pair(self, name: str) -> tuple[Tap, Tap]:
        tap = self._stage.shows[name]
        # Layers that show their error at an input share it.
        return (tap, tap) if self._at_input(name) else (tap, Tap(name, "input"))

    def _at_input(self, name: str) -> bool:
        tap = self._stage.shows[name]
        return tap.side == "input" and tap.module in self._stage.layers

    def update(self, batch: int, tensors: Mapping[Tap, Tensor]) -> None:
        """Adds one batch, seen at the taps."""
        for pair in dict.fromkeys(self._pairs()):
            at, source = pair
            x = tensors[source].flatten(0, -2)  # [T, K]
            is_now = tensors[at].flatten(0, -2).float()  # [T, R]
            missing = self._dense.at(at, batch).to(x.device).flatten(0, -2).float() - is_now
            if pair not in self._missing:
                self._missing[pair] = Missing(missing.shape[1], x.shape[1], x.device)
            self._missing[pair].update(missing, x)

    def of(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the output of a layer with ``weight`` [N, K] is missing: Δ [N, K] and the sum over the tokens [N] float64.

        None where nothing is known.
        """
        if name not in self._stage.shows:
            return None
        missing = self._missing[self._pair(name)]
        if self._at_input(name):
            return weight.float() @ missing.products, weight.double() @ missing.sum
        return missing.products, missing.sum


@dataclass(frozen=True)
class Aligned:
    """``weight`` W' [N, K] float32, ``bias`` [N] float32 where the layer has one, ``notes`` for the report."""

    weight: Tensor
    bias: Tensor | None
    notes: dict[str, Any]


def aligned(
    weight: Tensor, missing: Tensor, total: Tensor, statistics: LayerStatistics, options: TargetOptions
) -> Aligned:
    """The weights that make up for what is missing.

    Args:
        weight: W [N, K].
        missing: Δ [N, K].
        total: Σ_t m_t [N] float64.
        statistics: of the layer's input and its bias.

    Raises:
        NumericalError: the Gram matrix is not finite.
    """
    weight = weight.float()
    has_bias = statistics.bias is not None
    key = ("targets", has_bias, options.damping)
    if key not in statistics.factors:
        statistics.factors[key] = _factor(statistics, options.damping, about_mean=has_bias)
    factor, mean = cast(tuple[Tensor, Tensor], statistics.factors[key])
    missing = missing.double()
    if has_bias:
        missing = missing - torch.outer(total, mean)
    change = torch.cholesky_solve(missing.T, factor).T
    size = float(weight.norm())
    notes = {"moved_to_dense": float(change.norm()) / size if size else 0.0}
    changed = (weight.double() + change).float()
    if statistics.bias is None:
        return Aligned(changed, None, notes)
    bias = statistics.bias.double() + total / max(statistics.count, 1) - change @ mean
    return Aligned(changed, bias.float(), notes)


def _factor(statistics: LayerStatistics, damping: float, *, about_mean: bool) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor [K, K] of H + λI, and the mean of the input [K], float64 both."""
    gram = statistics.gram.double()
    mean = statistics.sum / max(statistics.count, 1)
    if about_mean:
        gram = gram - statistics.count * torch.outer(mean, mean)
    diagonal = gram.diagonal()
    ridge = damping * float(diagonal.mean())
    diagonal.add_(ridge if ridge > 0 else 1.0)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        raise NumericalError(
            f"the Gram matrix cannot be factored with the targets' damping of {damping:g} of its mean diagonal; more "
            "calibration samples or a larger damping (--targets-options damping=1) may help"
        )
    return factor, mean
