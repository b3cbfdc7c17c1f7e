"""Where to compute, and why there; what is known of a processor."""

from __future__ import annotations

import platform

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
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise UsageError(f"--device {wish!r}: halve runs on processors and CUDA devices; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"--device {wish}: this machine has {torch.cuda.device_count()} CUDA devices that torch "
            f"{torch.__version__} can use; leave the flag out to let halve choose"
        )
    return device, "asked for"


def has_known_instructions() -> bool:
    """Whether torch tells of this processor what it can multiply."""
    return platform.machine().lower() in ("x86_64", "amd64")


def instructions() -> str | None:
    """The widest of the instructions that matter for products on this processor; None where torch does not tell."""
    if not has_known_instructions():
        return None
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX-512 BF16"
    if torch.cpu._is_avx512_supported():
        return "AVX-512"
    return "AVX2" if torch.cpu._is_avx2_supported() else "no AVX2"
