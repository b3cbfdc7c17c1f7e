"""The version of halve and of what its results depend on."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path


def version() -> str:
    """halve's own version: of the installed distribution, or, in a directory from which nothing was installed, the project's."""
    try:
        return importlib.metadata.version("halve")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        if not project.is_file():
            raise
        return tomllib.loads(project.read_text())["project"]["version"]


def versions() -> dict[str, str]:
    """Versions of halve and of the libraries that compute."""
    others = ("torch", "transformers", "safetensors")
    return {"halve": version(), **{name: importlib.metadata.version(name) for name in others}}
