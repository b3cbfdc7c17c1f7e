"""What there is to choose from: every method with its paper, needs, cost and options, as `halve methods` lists it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeGuard

from compress.allocate import ALLOCATE
from compress.distill import DISTILL
from compress.methods import Metric, Options, Reconstruction
from compress.metrics import METRICS
from compress.permutation import FOLD
from compress.reconstruction import RECONSTRUCTIONS
from compress.repair import REPAIRS
from compress.rotation import HEADS
from compress.targets import TARGETS

LIMITS = {
    "enum": "choices",
    "minimum": "minimum",
    "exclusiveMinimum": "above",
    "maximum": "maximum",
    "exclusiveMaximum": "below",
}
"""What JSON schema calls the limits of an option, and what they are called here."""


class Method(Protocol):
    """What is listed of every method, whatever its slot."""

    @property
    def name(self) -> str: ...

    @property
    def paper(self) -> str: ...

    @property
    def cost(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def options(self) -> type[Options]: ...


SLOTS: dict[str, Iterable[Method]] = {
    "metric": METRICS.values(),
    "reconstruction": RECONSTRUCTIONS.values(),
    "permutation": (FOLD,),
    "rotation": (HEADS,),
    "allocate": (ALLOCATE,),
    "targets": (TARGETS,),
    "repair": REPAIRS.values(),
    "distill": (DISTILL,),
}
"""By the flag that takes the method's name, or turns it on."""


def catalogue() -> list[dict[str, Any]]:
    """A document for each method; with a comparison group for unstructured patterns where it makes masks."""
    return [
        {
            "kind": slot,
            "name": method.name,
            "paper": method.paper,
            "needs": sorted(method.needs | method.options().needs),
            "cost": method.cost,
            **({"group": method.group} if isinstance(method, Metric) or _has_own_metric(method) else {}),
            "options": options_of(method.options),
        }
        for slot, methods in SLOTS.items()
        for method in methods
    ]


def _has_own_metric(method: Method) -> TypeGuard[Reconstruction]:
    return isinstance(method, Reconstruction) and method.own_metric


def options_of(options: type[Options]) -> dict[str, dict[str, Any]]:
    """By option its ``default`` (None: chosen, as the description says), its ``type``, its ``description`` and what it
    takes: ``choices``; ``minimum`` or ``above``, ``maximum`` or ``below``."""
    found = {}
    for name, schema in options.model_json_schema().get("properties", {}).items():
        # (of an option that may be left out, the schema is one of two)
        merged = {**schema, **next((one for one in schema.get("anyOf", ()) if one["type"] != "null"), {})}
        limits = {ours: merged[theirs] for theirs, ours in LIMITS.items() if theirs in merged}
        described = {"default": merged["default"], "type": merged["type"], "description": merged.get("description", "")}
        found[name] = {**described, **limits}
    return found


def takes(option: dict[str, Any]) -> str:
    """In words what an option of `options_of` takes; empty for any text."""
    if "choices" in option:
        return "one of " + ", ".join(option["choices"])
    if option["type"] == "boolean":
        return "true or false"
    low = [f"{word} {option[key]:g}" for key, word in (("minimum", "from"), ("above", "above")) if key in option]
    high = [f"{word} {option[key]:g}" for key, word in (("maximum", "up to"), ("below", "below")) if key in option]
    return " ".join(low + high)
