"""What one pass over the inputs of a linear layer gathers for the methods that come after it.

Axes: ``T`` tokens, ``K`` input features. What is summed is in `compress.sums` and `compress.gram`.

A method declares which of the statistics below it needs; the pipeline gathers the union once for all layers
that read the same input (q, k and v share one; gate and up share one).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.errors import NumericalError, did_you_mean
from compress.gram import Gram, Split, SplitGram
from compress.sums import MeanAndVariance, Moments, Sum, SumOfSquares, TokenCount

SAMPLE_TOKENS = 512
"""How many tokens, spread evenly over the calibration set, are kept as they are to measure a layer's output error."""


class Sample:
    """About ``SAMPLE_TOKENS`` rows of X as they came: one of each stretch of the calibration set, drawn at random.

    Not the first one: stretches and windows have lengths with common divisors, so that would take the same few places of every
    window, and the first of all, whose activations are like no others, far too often.
    """

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self._positions = positions_of_sample(tokens)
        self._seen = 0
        self._rows: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        first, behind = torch.searchsorted(
            self._positions, torch.tensor([self._seen, self._seen + x.shape[0]])
        ).tolist()
        self._rows.append(x[(self._positions[first:behind] - self._seen).to(x.device)])
        self._seen += x.shape[0]

    @property
    def value(self) -> Tensor:
        return torch.cat(self._rows)

    def permute(self, order: Tensor) -> None:
        self._rows = [rows[:, order] for rows in self._rows]


def positions_of_sample(tokens: int) -> Tensor:
    """Which of so many tokens are kept, ascending; the same ones every time."""
    stride = max(1, tokens // SAMPLE_TOKENS)
    stretches = torch.arange(0, tokens, stride)
    drawn = stretches + torch.randint(stride, stretches.shape, generator=torch.Generator().manual_seed(0))
    return drawn[drawn < tokens]


ACCUMULATORS = {
    "count": TokenCount,
    "sum": Sum,
    "sum_of_squares": SumOfSquares,
    "moments": Moments,
    "gram": Gram,
    "split_gram": SplitGram,
    "sample": Sample,
}


class InputStatistics:
    """The statistics of one input that one or several linear layers read.

    Args:
        needs: names out of ``ACCUMULATORS``.
        features: K.
        device: where the sums live.
        tokens: how many tokens will come in all (the sample is spread over them).
        windows: in how many windows, or images, of equal length.
    """

    def __init__(
        self,
        needs: Iterable[str],
        features: int,
        *,
        device: torch.device | str = "cpu",
        tokens: int,
        windows: int = 1,
    ) -> None:
        self.features = features
        self._accumulators = {}
        needs = {"count", *needs}
        if "split_gram" in needs:
            needs.discard("gram")  # it is the sum of the two
        for name in sorted(needs):
            if name not in ACCUMULATORS:
                raise KeyError(f"no statistic {name!r}{did_you_mean(name, ACCUMULATORS)}")
            more = {"windows": windows} if name == "split_gram" else {}
            self._accumulators[name] = ACCUMULATORS[name](features, torch.device(device), tokens, **more)

    def update(self, x: Tensor) -> None:
        """Adds the inputs ``x`` [..., K] of one call."""
        x = x.detach().reshape(-1, self.features)  # [T, K]
        for name, accumulator in self._accumulators.items():
            accumulator.update(x)
            self._forget(name)

    def permute(self, order: Tensor) -> None:
        """Reorders the input features [K]: feature ``i`` is from now on what feature ``order[i]`` was."""
        for name, accumulator in self._accumulators.items():
            accumulator.permute(order)
            self._forget(name)
        self.__dict__.pop("factors", None)

    def _forget(self, name: str) -> None:
        """What was read before is out of date."""
        self.__dict__.pop(name, None)
        if name == "split_gram":
            self.__dict__.pop("gram", None)

    def _get(self, name: str) -> Any:
        try:
            return self._accumulators[name].value
        except KeyError:
            raise KeyError(
                f"the statistic {name!r} was not gathered: the method has to declare that it needs it"
            ) from None

    @property
    def count(self) -> int:
        """T."""
        return self._accumulators["count"].value

    @cached_property
    def sum(self) -> Tensor:
        return self._get("sum")

    @cached_property
    def sum_of_squares(self) -> Tensor:
        return self._get("sum_of_squares")

    @cached_property
    def moments(self) -> MeanAndVariance:
        return self._get("moments")

    @cached_property
    def gram(self) -> Tensor:
        if "split_gram" in self._accumulators:
            return self.split_gram.fit.gram + self.split_gram.held_out.gram
        return self._get("gram")

    @cached_property
    def split_gram(self) -> Split:
        return self._get("split_gram")

    @cached_property
    def sample(self) -> Tensor:
        return self._get("sample")

    @cached_property
    def factors(self) -> dict[object, object]:
        """Where a reconstruction keeps what it derived from the Gram matrix (a factorization), for the next
        layer that reads the same input."""
        return {}

    def require_finite(self, layer: str) -> None:
        """Raises NumericalError, naming the layer, if an input had a NaN or an infinity (or its sums overflowed)."""
        for name, accumulator in self._accumulators.items():
            # (of a Gram matrix, the diagonal tells)
            value = accumulator.diagonal if isinstance(accumulator, Gram | SplitGram) else accumulator.value
            parts = value if isinstance(value, tuple) else (value,)
            for part in parts:
                if isinstance(part, Tensor) and not bool(torch.isfinite(part).all()):
                    bad = int((~torch.isfinite(part)).sum())
                    raise NumericalError(
                        f"{layer}: the calibration activations contain NaN or infinity ({bad} of {part.numel()} entries of "
                        f"the statistic {name!r}). Check the model in this dtype (try --dtype float32) and the calibration "
                        "text."
                    )
