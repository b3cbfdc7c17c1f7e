"""Seeds for what is drawn at random, each from the recipe's seed and the name of what draws."""

from __future__ import annotations

import hashlib


def named_seed(seed: int, name: str) -> int:
    """The same for the same two, on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
