"""Is this a checkpoint at all? Asked before torch is imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from compress.errors import SourceError


def require_checkpoint(directory: str) -> Path:
    """The path of a local Hugging Face checkpoint. Raises `SourceError` where there is none."""
    path = Path(directory)
    if not path.is_dir():
        raise SourceError(f"There is no model directory {directory!r}. Give the path of a checkpoint.")
    if not (path / "config.json").is_file():
        raise SourceError(
            f"{directory!r} holds no config.json, so it is not a Hugging Face checkpoint. "
            "`halve compress MODEL --out DIR` writes one."
        )
    return path
