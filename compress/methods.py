"""The two slots that carry the science, and the catalogue of what fits into them.

A **metric** says which weights matter; a **reconstruction** repairs the survivors. Any metric goes with any
reconstruction. A method is one file that builds one `Metric` or one `Reconstruction` and is listed in
``METRICS`` or ``RECONSTRUCTIONS`` of its package. Each declares which statistics it needs, so that one pass
over the calibration set gathers the union.

Axes: ``N`` output features, ``K`` input features. Weights are float32 here whatever the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from compress.errors import RecipeError, did_you_mean
from compress.layer_statistics import LayerStatistics
from compress.patterns import Group, Pattern

MethodT = TypeVar("MethodT", "Metric", "Reconstruction")


class Options(BaseModel):
    """The options of a method: a subclass adds its fields; unknown ones are refused, and so are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that these options need beyond those that the method always needs."""
        return frozenset()

    @property
    def group(self) -> Group | None:
        """The comparison group that these options imply, or None for the method's own."""
        return None

    @property
    def named_layers(self) -> Mapping[str, str]:
        """What the full names of some linear layers have in them, by the option that says so; if none has, it is refused."""
        return {}

    def check(self, pattern: Pattern) -> None:
        """Raises RecipeError where these options cannot be used with the pattern."""


@dataclass(frozen=True)
class Metric:
    """Which weights matter.

    ``score(weight [N, K], statistics, options) -> [N, K]`` is pure; larger is more important.
    ``group`` is the comparison group of the method's paper for unstructured patterns.
    """

    name: str
    score: Callable[[Tensor, LayerStatistics, Any], Tensor]
    paper: str
    cost: str
    needs: frozenset[str] = frozenset()
    group: Group = "row"
    options: type[Options] = Options
    corrects_bias: bool = False
    """The metric assumes that the layer's bias takes over the mean of what is lost. Where there is a bias and the
    reconstruction leaves it alone, it is corrected so (needs the statistic "moments")."""


@dataclass(frozen=True)
class Pruning:
    """What a reconstruction is asked to do with one layer."""

    pattern: Pattern
    group: Group
    mask: Tensor | None
    """[N, K], True where a weight is kept; None when the reconstruction shall choose it by its own metric."""
    scores: Tensor | None = None
    """[N, K], the metric's scores that gave the mask, larger is kept; None where there is no mask."""


@dataclass
class Reconstructed:
    """The new weights of one layer; zero wherever ``mask`` is False."""

    weight: Tensor
    mask: Tensor
    bias: Tensor | None = None
    """The new bias [N], or None to leave it as it is."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What was decided on the way and belongs into the report, such as a damping that had to be raised."""


@dataclass(frozen=True)
class Reconstruction:
    """How the surviving weights are repaired.

    ``run(weight [N, K], pruning, statistics, options) -> Reconstructed`` is pure; it may return another mask than
    the given one (methods that swap weights in and out do).
    ``own_metric`` is True when the method can choose the mask itself; it then does so unless a metric is given.
    """

    name: str
    run: Callable[[Tensor, Pruning, LayerStatistics, Any], Reconstructed]
    paper: str
    cost: str
    needs: frozenset[str] = frozenset()
    own_metric: bool = False
    group: Group = "row"
    options: type[Options] = Options
    corrects_bias: bool = False
    """The method gives layers that have a bias another one."""


def find(kind: Literal["metric", "reconstruction"], name: str, table: Mapping[str, MethodT]) -> MethodT:
    """The method of that name.

    Raises:
        RecipeError: there is none; the message names the near ones.
    """
    if name not in table:
        raise RecipeError(f"unknown {kind} {name!r}{did_you_mean(name, table)}")
    return table[name]


class HasOptions(Protocol):
    """A method, whatever its slot."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> type[Options]: ...


def parse_options(method: HasOptions, given: Mapping[str, Any]) -> Options:
    """The options of a method, checked and filled up with its defaults.

    Raises:
        RecipeError: an option that the method does not know, or a value it cannot take.
    """
    known = method.options.model_fields
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) if known else " (it has none)"
            raise RecipeError(f"{method.name} has no option {name!r}{hint}")
    try:
        return method.options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"option {where!r} of {method.name}: {first['msg']} (got {first['input']!r})") from None
