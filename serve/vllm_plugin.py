"""Lets vLLM read 2:4 checkpoints: the entry point ``vllm.general_plugins``, which vLLM calls in each of its processes.

Nothing of vLLM is imported before that, so halve runs without it.
"""

from __future__ import annotations

import logging
import re

from serve import support

_logger = logging.getLogger("vllm.halve")  # below vLLM's own logger, so its level and handlers hold


def register() -> None:
    """Registers the quantization method ``halve``. Can be called again.

    vLLM only logs what a plugin raises and then says that it does not know the method, so what is wrong is logged here.
    """
    import vllm

    problem, fatal = version_problem(vllm.__version__)
    if problem:
        _logger.log(logging.ERROR if fatal else logging.WARNING, problem)
    if fatal:
        return
    try:
        import serve.vllm.quantization  # noqa: F401  registers it
    except ImportError as error:
        if not (error.name or "").startswith("vllm"):
            raise
        _logger.error(
            "halve's plugin does not fit vLLM %s: %s. It was written for vLLM %s; install one of these, or serve with "
            "`halve serve DIR --engine transformers`.",
            *(vllm.__version__, error, supported()),
        )


def supported() -> str:
    """The versions of vLLM that the plugin is written for."""
    return support.versions("vllm")


def version_problem(version: str) -> tuple[str | None, bool]:
    """What is wrong with that version of vLLM, if anything is, and whether the plugin cannot run with it."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:  # a build from a repository without tags
        return f"halve does not know vLLM {version!r} and takes it for one of {supported()}", False
    found = int(numbers[1]), int(numbers[2])
    oldest, newest = support.ENGINES["vllm"].oldest, support.ENGINES["vllm"].newest
    if oldest is not None and found < oldest:
        return (
            f"halve's plugin needs vLLM {supported()}, and this is {version}: 2:4 checkpoints cannot be loaded. Install a "
            "newer vLLM, or serve with `halve serve DIR --engine transformers`.",
            True,
        )
    if newest is not None and found > newest:
        return f"halve's plugin was written for vLLM {supported()}, and this is {version}: it may not fit", False
    return None, False
