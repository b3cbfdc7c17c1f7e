"""What a measurement was made on and with; part of every result."""

from __future__ import annotations

import datetime
import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from compress.device import instructions
from compress.version import versions


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Date, versions, machine and threads; of what runs in this process, or in one that is started from it."""
    device = torch.device(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def elsewhere() -> dict[str, Any]:
    """Of a measurement of what runs on a machine that is not known: what asked it, and when."""
    return {name: value for name, value in environment().items() if name not in ("machine", "cores", "threads")} | {
        "client": processor()
    }


def processor() -> str:
    """The processor's name as the kernel gives it, with the widest instructions that products run on: machines that are lent
    often say no more than whose processor it is, and two of one name differ several times in speed."""
    machine = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    known = [machine, *([found] if (found := instructions()) else [])]
    return f"{names[0] if names else machine} ({', '.join(known)})"


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
