"""Images as calibration samples of an image classifier."""

from __future__ import annotations

from pathlib import Path

from compress.calibration import CalibrationSet

TOKENS_OF_AN_IMAGE = 256
"""About how many tokens a vision transformer makes of one image (197 of 224 x 224 pixels in patches of 16)."""


def load_images(source: str, model: Path, *, samples: int, seed: int) -> CalibrationSet:
    raise AssertionError
