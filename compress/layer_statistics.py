"""What is known of one layer when it is pruned: the statistics of its input, its output, its gradients, its place.

Layers that read one tensor share the statistics of their input (`InputStatistics`, which hold the large Gram
matrix); everything else belongs to the layer alone. A metric or reconstruction sees one `LayerStatistics` and
declares by name what it reads of it (``needs``).

Axes: ``N`` output features, ``K`` input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.gram import Split
from compress.statistics import ACCUMULATORS, InputStatistics
from compress.sums import MeanAndVariance, SumOfSquares

OUTPUT_NEEDS = frozenset({"output_sum_of_squares"})
GRADIENT_NEEDS = frozenset({"gradient_l1", "gradient_l2"})
"""Of the whole model's loss, from one backward pass over the dense model before anything is pruned."""
REGIONAL_NEEDS = frozenset({"regional_gradient"})
PLACE_NEEDS = frozenset({"after_norm"})
GRAM_NEEDS = frozenset({"gram", "split_gram"})
KNOWN_NEEDS = frozenset(ACCUMULATORS) | OUTPUT_NEEDS | GRADIENT_NEEDS | REGIONAL_NEEDS | PLACE_NEEDS


@dataclass
class LayerStatistics:
    """The statistics of one linear layer with weight [N, K].

    Reading one that was not gathered is a mistake of the method (it has to declare the need) and raises KeyError.
    """

    inputs: InputStatistics
    """Of the layer's input; shared with the layers that read the same tensor."""
    seed: int = 0
    """For what a method draws at random; differs from layer to layer, fixed by the recipe's seed and the name."""
    windows: int = 1
    """Calibration samples (windows of text, or images), each with the same number of tokens."""
    bias: Tensor | None = None
    """The layer's bias [N], or None where it has none."""
    outputs: SumOfSquares | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """[N, K] float32 each, under the names of ``GRADIENT_NEEDS`` and ``REGIONAL_NEEDS``."""
    place: Mapping[str, bool] = field(default_factory=dict)
    name: str = ""
    """The layer's full name in the model."""

    @property
    def count(self) -> int:
        """T, the tokens that the layer saw."""
        return self.inputs.count

    @property
    def sum(self) -> Tensor:
        """Σ_t x_t, [K] float64."""
        return self.inputs.sum

    @property
    def sum_of_squares(self) -> Tensor:
        """Σ_t x_t², [K] float64."""
        return self.inputs.sum_of_squares

    @property
    def moments(self) -> MeanAndVariance:
        """Mean and unbiased variance of the input, [K] float64 each."""
        return self.inputs.moments

    @property
    def gram(self) -> Tensor:
        """XᵀX, [K, K] float32."""
        return self.inputs.gram

    @property
    def split_gram(self) -> Split:
        """The same in two parts, with sums and counts: to fit to, and held out."""
        return self.inputs.split_gram

    @property
    def sample(self) -> Tensor:
        """Some rows of X as they came, [about 512, K]."""
        return self.inputs.sample

    @property
    def factors(self) -> dict[object, object]:
        """What was derived from the input's statistics; shared like them."""
        return self.inputs.factors

    @property
    def output_sum_of_squares(self) -> Tensor:
        """Σ_t y_t² of the layer's dense output, [N] float64."""
        if self.outputs is None:
            raise _not_gathered("output_sum_of_squares")
        return self.outputs.value

    @property
    def gradient_l1(self) -> Tensor:
        """Σ_n |g_n|, g_n = ∂(loss of sample n)/∂W of the dense model, [N, K] float32."""
        return self._gradient("gradient_l1")

    @property
    def gradient_l2(self) -> Tensor:
        """sqrt(Σ_n g_n²), [N, K] float32."""
        return self._gradient("gradient_l2")

    @property
    def regional_gradient(self) -> Tensor:
        """sqrt(mean_n g_n²), g_n = ∂‖output of the decoder block for sample n‖₂/∂W, [N, K] float32."""
        return self._gradient("regional_gradient")

    @property
    def after_norm(self) -> bool:
        """Whether the layer's input comes straight from a normalization."""
        if "after_norm" not in self.place:
            raise _not_gathered("after_norm")
        return self.place["after_norm"]

    def _gradient(self, name: str) -> Tensor:
        if name not in self.gradients:
            raise _not_gathered(name)
        return self.gradients[name]

    def generator(self) -> torch.Generator:
        """A fresh source of random numbers on the CPU, the same for every device."""
        return torch.Generator().manual_seed(self.seed)

    def require_finite(self, layer: str) -> None:
        """Raises NumericalError, naming the layer, if a statistic has a NaN or an infinity."""
        self.inputs.require_finite(layer)
        others = {**self.gradients, **({"output_sum_of_squares": self.outputs.value} if self.outputs else {})}
        for name, value in others.items():
            if not bool(torch.isfinite(value).all()):
                raise NumericalError(
                    f"{layer}: the statistic {name!r} contains NaN or infinity. Check the model in this dtype (try "
                    "--dtype float32) and the calibration."
                )


def _not_gathered(name: str) -> KeyError:
    return KeyError(f"the statistic {name!r} was not gathered: the method has to declare that it needs it")
