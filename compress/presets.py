"""Named recipes for people who do not want to choose: how much accuracy for how much time.

Each is a plain set of `Recipe` fields that `halve methods` prints in full; what is given beside a preset wins, option by
option. ``benchmarks/accuracy.py`` measures what each stage of them buys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """``fields`` of a `Recipe`, and what they are good for."""

    purpose: str
    fields: Mapping[str, Any]


_LAYERS = {"reconstruction": "admm", "permutation": "fold", "length": 512}

PRESETS = {
    "fast": Preset(
        "a mask and nothing else, to see whether everything runs: two passes over the calibration",
        {"metric": "wanda", "reconstruction": "none", "samples": 128, "length": 512},
    ),
    "balanced": Preset(
        "what each layer can do, made to repair what those before it lost: minutes for a small model",
        {**_LAYERS, "targets": "dense", "samples": 48},
    ),
    "best": Preset(
        "each block trained to give the dense block's output again, a block in memory at a time",
        # (Dense targets gain nothing here: what they repair, the training repairs as well.)
        {**_LAYERS, "samples": 128, "repair": "block", "repair_options": {"passes": 2}, "training_samples": 768},
    ),
}


def preset_fields(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a preset with what was given beside it; options are merged one by one, unless they are those of
    another method than the preset's.

    Raises:
        RecipeError: there is no such preset.
    """
    if name not in PRESETS:
        raise RecipeError(f"there is no preset {name!r}{did_you_mean(name, PRESETS)}")
    fields = dict(PRESETS[name].fields)
    for field, value in given.items():
        options = f"{field}_options"
        if options in fields and value != fields.get(field):
            del fields[options]  # they belong to the method that was replaced
        if isinstance(value, Mapping) and isinstance(fields.get(field), Mapping):
            value = {**fields[field], **value}
        fields[field] = value
    return fields
