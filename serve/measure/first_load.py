"""Measures the layer shapes of a model that this device's table does not know, before the model is loaded for serving."""

from __future__ import annotations

import logging
from pathlib import Path

from compress.console import progress_bar
from compress.device import choose_device
from compress.errors import HalveError, one_line
from compress.sources import read_config

GPU_SECONDS = 30.0
"""Where nothing was said. On a processor nothing is measured then: its kernels were, and start-up is what is waited for."""

log = logging.getLogger("halve.serve")


def measure_unknown(directory: Path, *, device: str, seconds: float | None, fused: bool) -> None:
    """Fills the kernel table with what is missing for a packed checkpoint; nothing is measured for any other, which
    is said where ``seconds`` were asked for.

    A measurement that fails is no reason not to serve: it is logged in one line.

    Args:
        seconds: at most; 0: nothing is measured; None: `GPU_SECONDS` on a GPU, else 0.
        fused: also the layers that vLLM makes of several.

    Raises:
        UsageError: the device is not there. SourceError: this is no model directory.
    """
    quantization = read_config(directory).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "halve":
        if seconds:
            log.warning(
                "nothing is measured before serving (--tune): %s is not packed (`halve pack` packs a checkpoint with zeros)",
                directory,
            )
        return
    place, _ = choose_device(device)
    budget = (GPU_SECONDS if place.type == "cuda" else 0.0) if seconds is None else seconds
    if budget <= 0:
        return
    from serve.measure import model_kernels

    try:
        with progress_bar("measuring 2:4 against dense, once on this device") as progress:
            document = model_kernels.document(
                directory, device=str(place), budget=budget, fresh=False, fused=fused, progress=progress
            )
    except (HalveError, RuntimeError) as error:
        log.warning("2:4 is served without a measurement on this device: %s", one_line(error))
        return
    for shape, reason in document["served_dense"].items():
        log.info("%s is served dense: %s", shape, reason)
