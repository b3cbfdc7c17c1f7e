"""What became of the layers enters the hash under which vLLM keeps compiled graphs.

A graph holds the names and sizes of a layer's tensors, and these depend on more than vLLM's configuration: the table of
`halve tune`, ``HALVE_BACKEND``, the kernels that run here, and the weights, where zeros are found in them. vLLM leaves the
quantization out of `VllmConfig.compute_hash`, takes a kept graph where the hash is the same, and loads it without its guards,
so that the next start would fail on tensors that are not there, or compute with others.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from vllm.config import VllmConfig


def install() -> None:
    """From now on the hash of a configuration counts `HalveQuantization.graph_digest` in. Can be called again.

    Models hold copies of the configuration, of which only the quantization is shared, so no field of it would do.
    """
    original = VllmConfig.compute_hash
    if hasattr(original, "halve"):
        return

    @functools.wraps(original)
    def compute_hash(self: VllmConfig, *arguments: Any, **options: Any) -> str:
        found = original(self, *arguments, **options)
        digest = getattr(self.quant_config, "graph_digest", lambda: "")()
        return hashlib.sha256(f"{found} {digest}".encode()).hexdigest()[: len(found)] if digest else found

    compute_hash.halve = True  # pyright: ignore[reportAttributeAccessIssue]
    VllmConfig.compute_hash = compute_hash
