"""Images as calibration samples of an image classifier.

An image goes through the model's own image processor (``preprocessor_config.json``), so the model sees what it was
trained on. That needs Pillow, and nothing else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture import load_config
from compress.calibration import BUILTIN, CalibrationSet
from compress.errors import CalibrationError, SourceError, one_line
from compress.extras import how_to_install
from compress.own_code import NEVER, explain

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
TOKENS_OF_AN_IMAGE = 256
"""About how many tokens a vision transformer makes of one image (197 of 224 x 224 pixels in patches of 16)."""
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_images(source: str, model: Path, *, samples: int, seed: int, at_least: int | None = None) -> CalibrationSet:
    """Images as ``pixel_values`` [samples, 3, height, width] float32.

    The class of an image is the nearest directory above it, within ``source``, that has the name of a label of the
    model (in any case) or its number; the set has classes if every image drawn has one.

    Args:
        source: a directory with images in it, at any depth, of which ``samples`` are drawn; or ``random`` for normal
            noise, which is no image: what is measured on it says nothing about accuracy.
        model: the model's directory.
        samples: how many images.
        seed: of the draw, or of the noise.
        at_least: how many will do where there are no more; left out, all of ``samples``.

    Raises:
        CalibrationError: there are too few images, or one of them cannot be read.
        SourceError: the model directory has no usable image processor.
    """
    config = load_config(model)
    generator = torch.Generator().manual_seed(seed)
    if source == "random":
        return CalibrationSet("pixel_values", torch.randn(samples, *_shape(config, model), generator=generator))
    if (channels := getattr(config, "num_channels", 3)) != 3:
        raise SourceError(
            f"{model} reads images of {channels} channels; calibration images have 3, red, green and blue"
        )
    root = Path(source).expanduser()
    files = find_images(root, source)
    if at_least is not None and at_least <= len(files) < samples:
        samples = len(files)
    if len(files) < samples:
        samples = samples if at_least is None else at_least
        raise CalibrationError(
            f"{root} holds {len(files)} images, and {samples} were asked for; add images, or give --samples {len(files)}"
        )
    chosen = [files[i] for i in torch.randperm(len(files), generator=generator)[:samples].tolist()]
    processor = _image_processor(model)
    pixels = [_pixels(path, processor) for path in chosen]
    for path, image in zip(chosen, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise CalibrationError(
                f"{path} becomes {list(image.shape)} and {chosen[0]} becomes {list(pixels[0].shape)} in the model's image "
                "processor; give images of one size"
            )
    labels = _labels(config)
    classes = [_class_of(path.relative_to(root), labels) for path in chosen]
    known = [number for number in classes if number is not None]
    return CalibrationSet(
        "pixel_values",
        torch.stack(pixels),
        classes=torch.tensor(known, dtype=torch.int64) if len(known) == samples else None,
    )


def find_images(root: Path, source: str) -> list[Path]:
    """The images below a directory, ``2.png`` before ``10.png``.

    Raises:
        CalibrationError: it is no directory, or has none.
    """
    what = f"the model reads images; give --calibration a directory of images ({', '.join(sorted(SUFFIXES))})"
    if source in BUILTIN:
        raise CalibrationError(f"calibration {source!r} is text, and {what}")
    if not root.is_dir():
        raise CalibrationError(f"there is no directory {root}; {what}")
    files = [path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise CalibrationError(f"{root} holds no images; {what}")
    return sorted(files, key=lambda path: _natural(path.relative_to(root)))


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts runs of digits by their value; the path itself decides between what is equal then ("1.png", "01.png")."""
    parts = re.split(r"([0-9]+)", path.as_posix())
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], path.as_posix()


def _shape(config: Any, model: Path) -> tuple[int, int, int]:
    """(channels, height, width) of what a model reads, by its configuration alone."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise CalibrationError(
            f"{model / 'config.json'} has no image_size, so random pixels have no shape; give --calibration a directory"
        )
    return getattr(config, "num_channels", 3), int(size[0]), int(size[1])


def _image_processor(model: Path) -> Any:
    """The image processor of a model directory.

    Raises:
        CalibrationError: Pillow is not installed.
        SourceError: there is none that transformers can read.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise CalibrationError(f"reading images needs the package 'pillow': {how_to_install('vision')}") from None
    from transformers import AutoImageProcessor

    if not any((model / name).is_file() for name in _PROCESSOR_FILES):
        raise SourceError(
            f"{model} has no {_PROCESSOR_FILES[0]}, which says how images become pixel values; copy the model's own, or "
            "give --calibration random to try without images"
        )
    try:
        return AutoImageProcessor.from_pretrained(model, **NEVER)
    except Exception as error:  # anything can come out of a damaged file
        raise SourceError(f"{model} has no usable image processor: {explain(error)}") from None


def _pixels(path: Path, processor: Any) -> Tensor:
    """One image as the model reads it, [3, height, width] float32.

    Raises:
        CalibrationError: it cannot be read; the message names the file.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        (pixels,) = processor(images=[upright], return_tensors="pt")["pixel_values"]
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError) as error:
        raise CalibrationError(f"cannot read the image {path}: {one_line(error)}; mend it or take it away") from None
    return pixels.float()


def _labels(config: Any) -> dict[str, int]:
    """What a directory of images of a class may be called, in lower case -> the class."""
    numbers = {str(number): number for number in range(config.num_labels)}
    names: Mapping[str, int] = config.label2id or {}
    return {**numbers, **{str(name).lower(): int(number) for name, number in names.items()}}


def _class_of(path: Path, labels: Mapping[str, int]) -> int | None:
    found = (labels[part.lower()] for part in reversed(path.parts[:-1]) if part.lower() in labels)
    return next(found, None)
