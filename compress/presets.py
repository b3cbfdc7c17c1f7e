"""Named recipes for people who do not want to choose: how much accuracy for how much time.

Each is a plain set of `Recipe` fields that `halve methods` prints in full; what is given beside a preset wins, option by
option. ``benchmarks/accuracy.py`` measures what each stage of them buys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """``fields`` of a `Recipe`, and what they are good for."""

    purpose: str
    fields: Mapping[str, Any]


_LAYERS = {"reconstruction": "admm", "permutation": "fold", "rotation": "heads", "length": 512}

PRESETS = {
    "fast": Preset(
        "a mask and nothing else, to see whether everything runs: two passes over the calibration",
        {"metric": "wanda", "reconstruction": "none", "samples": 128, "length": 512},
    ),
    "balanced": Preset(
        "what each layer can do, made to repair what those before it lost: minutes for a small model",
        {**_LAYERS, "targets": "dense", "samples": 40, "tokens_per_input": 8},
    ),
    "best": Preset(
        "each block trained to give the dense block's output again, a block in memory at a time",
        # (Dense targets gain nothing here: what they repair, the training repairs as well. Many windows want longer steps
        # than few, so the rate is above the default.)
        {
            **_LAYERS,
            "samples": 64,
            "tokens_per_input": 16,
            "repair": "block",
            "repair_options": {"passes": 2, "rate": 0.02, "cycles": 2, "predictions": 120_000},
            "training_samples": 800,
            "substitute": 0.2,
        },
    ),
}


def preset_fields(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a preset with what was given beside it; see `merged`.

    Raises:
        RecipeError: there is no such preset.
    """
    if name not in PRESETS:
        raise RecipeError(f"there is no preset {name!r}{did_you_mean(name, PRESETS)}")
    return merged(PRESETS[name].fields, given)


def merged(
    base: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of a recipe with what was given beside it; ``defaults`` are of the fields that the base does not have.

    What was given wins, and options are merged one by one. What the base says only for the sake of something that was given
    otherwise goes with it, so that nobody reads of a field that he never wrote: options of a method that was replaced,
    windows to train on where nothing trains any more, reordered or rotated channels where the pattern has no groups, rotated ones
    where the metric goes by gradients. Windows of another length come in another number, so that the tokens stay as many.
    """
    fields = dict(base)
    for field, value in given.items():
        options = f"{field}_options"
        if options in fields and _is_another(value, fields.get(field, (defaults or {}).get(field))):
            del fields[options]
        if isinstance(value, Mapping) and isinstance(fields.get(field), Mapping):
            value = {**fields[field], **value}
        fields[field] = value
    kept = base.keys() - given.keys()
    if "training_samples" in kept and fields.get("repair", "none") == "none" and not fields.get("distill"):
        del fields["training_samples"]
    no_groups = given.get("pattern") == "unstructured"
    if no_groups and "permutation" in kept:
        del fields["permutation"]
    if (no_groups or _goes_by_gradients(given.get("metric"))) and "rotation" in kept:
        for name in {"rotation", "rotation_options"} & kept & fields.keys():
            del fields[name]
    if isinstance(base.get("length"), int) and isinstance(given.get("length"), int) and given["length"] > 0:
        for name in {"samples", "training_samples"} & kept & fields.keys():
            if isinstance(fields[name], int):
                fields[name] = max(1, math.ceil(fields[name] * base["length"] / given["length"]))
    if "training_samples" in kept & fields.keys() and _is_more(fields.get("samples"), fields["training_samples"]):
        fields["training_samples"] = fields["samples"]
    return fields


def _is_another(value: Any, before: Any) -> bool:
    """Whether a field chooses something else now. Of another number (of tokens, a share) the options are the same; 0 is none."""
    if _is_number(value) and _is_number(before):
        return not value
    return value != before


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _goes_by_gradients(metric: Any) -> bool:
    """Of the model as it is, so that its weights cannot be made others before."""
    from compress.layer_statistics import GRADIENT_NEEDS
    from compress.metrics import METRICS

    if not isinstance(metric, str) or metric not in METRICS:
        return False
    return bool((METRICS[metric].needs | METRICS[metric].options().needs) & GRADIENT_NEEDS)


def _is_more(one: Any, other: Any) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one > other
