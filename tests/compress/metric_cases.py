"""One layer with everything that a metric can need, made from plain tensors that a test can compute with itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.layer_statistics import GRADIENT_NEEDS, PLACE_NEEDS, LayerStatistics
from compress.methods import parse_options
from compress.metrics import METRICS
from compress.statistics import ACCUMULATORS, InputStatistics
from compress.sums import SumOfSquares

ALL_NEEDS = frozenset(ACCUMULATORS) | {"output_sum_of_squares", "regional_gradient"} | GRADIENT_NEEDS | PLACE_NEEDS


@dataclass
class Case:
    """``weight`` [N, K], ``x`` [T, K], ``gradients`` and ``regional`` [samples, N, K]: one gradient a sample."""

    weight: Tensor
    x: Tensor
    gradients: Tensor
    regional: Tensor
    after_norm: bool = False
    seed: int = 0

    @property
    def y(self) -> Tensor:
        """The layer's dense output, [T, N] float64."""
        return self.x.double() @ self.weight.double().T

    def statistics(self, needs: Iterable[str] = ALL_NEEDS) -> LayerStatistics:
        """The statistics of those names and no others."""
        needs = frozenset(needs)
        inputs = InputStatistics(
            needs & ACCUMULATORS.keys(), self.x.shape[1], tokens=len(self.x), windows=len(self.gradients)
        )
        inputs.update(self.x)
        outputs = None
        if "output_sum_of_squares" in needs:
            outputs = SumOfSquares(len(self.weight), torch.device("cpu"), len(self.x))
            outputs.update(self.y.float())
        gradients = {
            "gradient_l1": self.gradients.double().abs().sum(dim=0).float(),
            "gradient_l2": self.gradients.double().square().sum(dim=0).sqrt().float(),
            "regional_gradient": self.regional.double().square().mean(dim=0).sqrt().float(),
        }
        return LayerStatistics(
            inputs,
            seed=self.seed,
            windows=len(self.gradients),
            outputs=outputs,
            gradients={name: value for name, value in gradients.items() if name in needs},
            place={"after_norm": self.after_norm} if "after_norm" in needs else {},
        )


def case(n: int = 12, k: int = 32, t: int = 200, samples: int = 4, seed: int = 0, after_norm: bool = False) -> Case:
    """Correlated inputs with a mean and outlier channels; gradients heavy-tailed and as small as they are in models."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(t, max(k // 2, 1)) @ normal(max(k // 2, 1), k) / k**0.5
    x = x + 0.3 * normal(t, k) + normal(k)
    x[:, 3::11] *= 20
    return Case(
        weight=0.05 * normal(n, k) * normal(n, 1).exp(),
        x=x,
        gradients=1e-3 * normal(samples, n, k) * normal(n, k).exp(),
        regional=1e-2 * normal(samples, n, k) * normal(n, k).exp(),
        after_norm=after_norm,
        seed=seed,
    )


def score(name: str, given: Case, options: Mapping[str, Any] | None = None) -> Tensor:
    """The scores of a metric by its name, from the statistics that it declares and no others."""
    metric = METRICS[name]
    parsed = parse_options(metric, options or {})
    return metric.score(given.weight, given.statistics(metric.needs | parsed.needs), parsed)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("random", {}),
    ("magnitude", {}),
    ("wanda", {}),
    ("wanda", {"variant": True}),
    ("ria", {}),
    ("ria", {"alpha": 0}),
    ("ria", {"alpha": 1.3}),
    ("stade", {}),
    ("stade-w", {}),
    ("symwanda", {}),
    ("symwanda", {"input": "relative", "output": "relative"}),
    ("symwanda", {"input": "relative", "output": "relative", "p": 2, "alpha": 0.5}),
    ("symwanda", {"input": "weights", "output": "weights"}),
    ("symwanda", {"input": "constant", "output": "activations", "alpha": 0.25}),
    ("symwanda", {"input": "none", "output": "relative", "p": 3}),
    ("symwanda", {"input": "activations", "output": "none"}),
    ("stochria", {}),
    ("stochria", {"fraction": 0.6, "alpha": 0.2}),
    ("gblm", {}),
    ("gblm", {"norm": "l1", "alpha": 10}),
    ("gblm", {"scale": "free"}),
    ("gblm", {"scale": "free", "alpha": 3, "norm": "l1"}),
    ("pruner-zero", {}),
    ("pruner-zero", {"norm": "l1"}),
    ("wanda++", {}),
    ("wanda++", {"alpha": 0}),
]
"""Every metric, with options that take every path through it."""

VARIANT_IDS = [" ".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in VARIANTS]
