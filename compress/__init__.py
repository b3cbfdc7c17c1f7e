"""A dense model goes in, a verified 2:4 checkpoint comes out.

from compress import compress_model
compress_model("Qwen/Qwen3-0.6B", "qwen3-2to4", metric="wanda")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import HalveError

if TYPE_CHECKING:
    from compress.pipeline import Compressed, compress_model
    from compress.recipe import Recipe

__all__ = ["Compressed", "HalveError", "Recipe", "compress_model"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; who only wants an error class should not wait for them.
    if name in ("Compressed", "compress_model"):
        from compress import pipeline

        return getattr(pipeline, name)
    if name == "Recipe":
        from compress.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
