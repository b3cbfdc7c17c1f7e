"""The version of halve and of what its results depend on."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """halve's own version."""
    return importlib.metadata.version("halve")


def versions() -> dict[str, str]:
    """Versions of halve and of the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in ("halve", "torch", "transformers", "safetensors")}
