"""Where to compute, and why there."""

from __future__ import annotations

import torch

from compress.errors import UsageError


def choose_device(wish: str) -> tuple[torch.device, str]:
    """The device for a wish (``auto``, ``cpu``, ``cuda``, ``cuda:N``), and the reason.

    Raises:
        UsageError: the device is not there.
    """
    cuda = torch.cuda.is_available()
    if wish == "auto":
        if cuda:
            return torch.device("cuda"), f"a CUDA device is there: {torch.cuda.get_device_name()}"
        return torch.device("cpu"), "no CUDA device is there"
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise UsageError(f"--device {wish!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"--device {wish}: this machine has {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} can use; leave the flag out to let halve choose"
        )
    return device, "asked for"
