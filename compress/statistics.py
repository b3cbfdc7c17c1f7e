"""What one pass over the inputs of a linear layer gathers for the methods that come after it.

Axes: ``T`` tokens, ``K`` input features. Everything is a sum with a count, never a running mean: sums of
unequal batches add up exactly, and several reference codes get the running mean wrong.

A method declares which of the statistics below it needs; the pipeline gathers the union once for all layers
that read the same input (q, k and v share one; gate and up share one).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import NumericalError, did_you_mean

SAMPLE_TOKENS = 512
"""How many tokens, spread evenly over the calibration set, are kept as they are to measure a layer's output error."""
HELD_OUT_WINDOWS = 16
"""Least windows that are held out to choose by, where that is not more than half of them."""
_LOST = 1e-6
"""Share of a diagonal entry of a Gram matrix that rounding may have lost; see `tests.compress.test_statistics`."""


class TokenCount:
    """Number of tokens seen, T."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self.value = 0

    def update(self, x: Tensor) -> None:
        self.value += x.shape[0]

    def permute(self, order: Tensor) -> None:
        """Reorders the input features: feature ``i`` is then what feature ``order[i]`` was."""


class Sum:
    """Σ_t x_t, [K] float64."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self.value = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        self.value += x.sum(dim=0, dtype=torch.float32)

    def permute(self, order: Tensor) -> None:
        self.value = self.value[order]


class SumOfSquares:
    """Σ_t x_t², [K] float64."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self.value = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        copy = x.to(torch.float32, copy=True)  # x itself is the model's activation
        self.value += copy.square_().sum(dim=0)  # many times faster than vector_norm over bfloat16

    def permute(self, order: Tensor) -> None:
        self.value = self.value[order]


class MeanAndVariance(NamedTuple):
    """``mean`` [K] and unbiased ``variance`` [K] over the tokens, float64."""

    mean: Tensor
    variance: Tensor


class Moments:
    """Mean and centred second moment, [K] float64 each.

    Batches are centred by their own mean and merged by the rule of Chan, Golub & LeVeque (1979), so that a mean
    far larger than the spread costs no digits, as Σx² − (Σx)²/T would.
    """

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self._count = 0
        self._mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._centred = torch.zeros(features, dtype=torch.float64, device=device)  # Σ (x − mean)²

    def update(self, x: Tensor) -> None:
        count = x.shape[0]
        if count == 0:
            return
        x = x.float()
        # The mean of the batch in two steps: what float32 loses in the first, the second finds.
        rough = x.mean(dim=0)
        rest = x - rough
        correction = rest.mean(dim=0)
        mean = rough.double() + correction.double()
        centred = rest.sub_(correction).square_().sum(dim=0).double()
        total = self._count + count
        delta = mean - self._mean
        self._centred += centred + delta.square() * (self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total

    @property
    def value(self) -> MeanAndVariance:
        return MeanAndVariance(self._mean, self._centred / max(self._count - 1, 1))

    def permute(self, order: Tensor) -> None:
        self._mean, self._centred = self._mean[order], self._centred[order]


class Gram:
    """XᵀX, [K, K] float32: the Hessian of the layer's squared output error, up to a factor.

    Products are accumulated in float32. Inputs that are bfloat16 may go through bfloat16 units, which is exact for the
    products; no other input is ever rounded.
    """

    panel = 128
    """Only the lower triangle is computed, in panels of this many columns: narrow ones compute less above the diagonal."""
    gpu_panel = 2048
    """A GPU is busy with wide ones only."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self._lower = torch.zeros(features, features, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        stored, panel = x.dtype, self.gpu_panel if x.is_cuda else self.panel
        wide = wide_product(x.device, stored)
        x = x if wide else x.float()
        with exact_products(stored):
            for start in range(0, x.shape[1], panel):
                lower, left, right = (
                    self._lower[start:, start : start + panel],
                    x[:, start:].T,
                    x[:, start : start + panel],
                )
                if wide:
                    lower.add_(wide(left, right))
                else:
                    lower.addmm_(left, right)

    @property
    def value(self) -> Tensor:
        lower = self._lower.tril_()
        return lower + lower.tril(-1).T

    @property
    def diagonal(self) -> Tensor:
        """Σ_t x_t², [K] float32."""
        return self._lower.diagonal()

    def permute(self, order: Tensor) -> None:
        self._lower = self.value[order][:, order]


@cache
def wide_product(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The product of two 16-bit matrices with sums and results in float32, on a GPU's tensor cores: several times faster than float32
    ones, and as exact. None where torch has none (2.11 is the first that does), or one that is not exact."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32)

    random = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2048, 96, generator=random).add(1).to(dtype)
    try:
        found = product(x.to(device)[:, 32:].T, x.to(device)[:, 32:64]).cpu()
    except (TypeError, RuntimeError):
        return None
    exact = x.double()[:, 32:].T @ x.double()[:, 32:64]
    size = x.double().abs()[:, 32:].T @ x.double().abs()[:, 32:64]
    return product if bool(((found.double() - exact).abs() <= 1e-5 * size).all()) else None


class Part(NamedTuple):
    """Of some ``tokens``: ``gram`` Σ_t x_t x_tᵀ [K, K] float32 and ``sum`` Σ_t x_t [K] float64."""

    gram: Tensor
    sum: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        """[K] float64; zero where there is no token."""
        return self.sum / self.tokens if self.tokens else self.sum

    def about(self, mean: Tensor) -> Tensor:
        """Σ_t (x_t − mean)(x_t − mean)ᵀ for any ``mean`` [K], [K, K] float32.

        What float32 sums have lost by rounding stands out once a mean far larger than the spread is taken away; the
        diagonal is raised by as much as that may be, so that the matrix stays positive semidefinite.
        """
        mean, total = mean.double(), self.sum
        half = torch.outer(total - self.tokens / 2 * mean, mean)
        centred = (self.gram.double() - half - half.T).to(self.gram.dtype)
        centred.diagonal().add_(_LOST * self.gram.diagonal())
        return centred


class Split(NamedTuple):
    """The calibration in two: what is fitted to, and what tells how well that holds elsewhere."""

    fit: Part
    held_out: Part


class SplitGram:
    """The Gram matrix in two parts: of the windows that are held out, and of all the others. Every token is in one.

    A window is a stretch of ``tokens / windows`` tokens of the stream, as the calibration made them; calls bring some
    windows at a time, one after the other. (Of what an expert of a mixture is sent, a stretch holds tokens of several
    neighbouring windows, which is as good.)
    """

    def __init__(self, features: int, device: torch.device, tokens: int, windows: int = 1) -> None:
        self._parts = Gram(features, device, tokens), Gram(features, device, tokens)
        self._sums = Sum(features, device, tokens), Sum(features, device, tokens)
        self._counts = [0, 0]
        self._window = max(tokens // windows, 1)
        self._period = held_out_period(windows)

    def update(self, x: Tensor) -> None:
        while len(x):
            seen = sum(self._counts)
            window = seen // self._window
            part = self._part_of(window)
            end = window + 1
            while self._part_of(end) == part and end * self._window < seen + len(x):
                end += 1  # neighbours of one part go together
            some, x = x[: end * self._window - seen], x[end * self._window - seen :]
            self._counts[part] += len(some)
            self._parts[part].update(some)
            self._sums[part].update(some)

    def _part_of(self, window: int) -> int:
        """1 for a window that is held out."""
        return int(self._period > 0 and window % self._period == self._period // 2)

    @property
    def value(self) -> Split:
        return Split(
            *(
                Part(gram.value, total.value, count)
                for gram, total, count in zip(self._parts, self._sums, self._counts, strict=True)
            )
        )

    @property
    def diagonal(self) -> Tensor:
        """Of both parts together, [K]."""
        return self._parts[0].diagonal + self._parts[1].diagonal

    def permute(self, order: Tensor) -> None:
        for accumulator in (*self._parts, *self._sums):
            accumulator.permute(order)


def held_out_period(windows: int) -> int:
    """Every how many windows one is held out: 8 where that makes ``HELD_OUT_WINDOWS``, else fewer; 0 of a single one."""
    return 0 if windows < 2 else min(max(windows // HELD_OUT_WINDOWS, 2), 8)


class Sample:
    """About ``SAMPLE_TOKENS`` rows of X as they came, spread evenly over the calibration set."""

    def __init__(self, features: int, device: torch.device, tokens: int) -> None:
        self._stride = max(1, tokens // SAMPLE_TOKENS)
        self._seen = 0
        self._rows: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        first = -self._seen % self._stride
        self._rows.append(x[first :: self._stride].clone())
        self._seen += x.shape[0]

    @property
    def value(self) -> Tensor:
        return torch.cat(self._rows)

    def permute(self, order: Tensor) -> None:
        self._rows = [rows[:, order] for rows in self._rows]


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


@contextlib.contextmanager
def exact_products(*dtypes: torch.dtype) -> Iterator[None]:
    """Float32 matmuls inside may use the bfloat16 units if all operands came from bfloat16.

    Their products are exact then and are accumulated in float32. Whether it does is up to oneDNN: with AVX-512 BF16 alone
    (torch 2.13) it was seen not to. With any other dtype this does nothing.
    """
    if not dtypes or any(dtype != torch.bfloat16 for dtype in dtypes):
        yield
        return
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
