"""Finds and loads what `build` compiled, and the OpenMP threads that torch brought along.

Nothing here raises when the library is not there: halve works without it, slower, and `status` says why.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ABI_VERSION = 5
"""What the exported functions take and mean; the library says which version it was built as (``src/abi.cpp``)."""

_REBUILD = "`python -m serve.kernels.cpu.build`"


@dataclass(frozen=True)
class Found:
    """What looking for the library came to.

    Attributes:
        path: where it was looked for.
        library: the loaded library, or None.
        problem: why there is none.
        remedy: what to do about that.
    """

    path: Path
    library: ctypes.CDLL | None = None
    problem: str | None = None
    remedy: str | None = None


def find() -> Found:
    """The library, loaded once, or what is wrong with it and what to do.

    ``HALVE_CPU_LIBRARY`` names another file than the one beside this module, for example a sanitized build.
    """
    given = os.environ.get("HALVE_CPU_LIBRARY")
    return _open(Path(given).absolute() if given else _default_path(), bool(given))


def load() -> ctypes.CDLL | None:
    """The library; None where there is none that can be used (`status` says why)."""
    return find().library


def status() -> str:
    """In one line: that the library is loaded, or why it is not, and what to do."""
    found = find()
    return f"{found.path} is loaded" if found.library is not None else f"{found.problem}; {found.remedy}"


def paths() -> tuple[str, ...]:
    """The code paths that this processor can run, the best one first; empty without a library.

    They are out of ``avx512bf16``, ``avx512``, ``avx2`` and ``portable``.
    """
    library = load()
    return tuple(library.halve_cpu_paths().decode().split(",")) if library is not None else ()


def _default_path() -> Path:
    from serve.kernels.cpu import build  # not above: `python -m` warns about a module that its own package imported

    return build.LIBRARY


@cache
def _open(path: Path, given: bool) -> Found:
    if not path.is_file():
        if given:
            problem = f"HALVE_CPU_LIBRARY names {path}, which is no file"
            return Found(path, problem=problem, remedy=f"unset it, or {_REBUILD} with --output {path}")
        return Found(path, problem=f"{path} was not built when halve was installed", remedy=_how_to_build())
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Found(path, problem=f"{path} cannot be loaded: {error}", remedy=_how_to_build())
    try:
        abi_version, runnable = library.halve_cpu_abi_version, library.halve_cpu_paths
    except AttributeError as error:
        return Found(path, problem=f"{path} is no library of halve's kernels: {error}", remedy=_how_to_build())
    abi_version.argtypes, abi_version.restype = (), ctypes.c_int
    runnable.argtypes, runnable.restype = (), ctypes.c_char_p
    if (built := abi_version()) != ABI_VERSION:
        problem = f"{path} was built from other sources: it has ABI version {built}, this halve needs {ABI_VERSION}"
        return Found(path, problem=problem, remedy=_how_to_build())
    return Found(path, library)


def _how_to_build() -> str:
    from serve.kernels.cpu import build

    try:
        build.find_compiler()
    except build.NoCompilerError as error:
        return f"install a C++ compiler, then {_REBUILD} ({error})"
    return f"a C++ compiler is there now: {_REBUILD}"


@dataclass(frozen=True)
class ThreadPool:
    """Addresses of three functions of an OpenMP runtime, and the file that they lie in.

    Attributes:
        library: its path; empty where the system does not tell.
        parallel: ``void GOMP_parallel(void (*)(void *), void *, unsigned threads, unsigned flags)``
        thread_num: ``int omp_get_thread_num(void)``
        num_threads: ``int omp_get_num_threads(void)``
    """

    library: str
    parallel: int
    thread_num: int
    num_threads: int


@cache
def thread_pool() -> ThreadPool | None:
    """The OpenMP runtime that torch itself runs on; None where there is none, and kernels then use one thread.

    A second runtime in the process would have threads of its own, which wait for the processor while torch's still
    spin on it; so the library links to none, and is handed the one that is there.

    Which one that is, the dynamic linker knows: torch makes its OpenMP visible to the whole process, and what a name
    finds there is what torch's own calls find (a runtime that was put before it by LD_PRELOAD, too). Where it is not
    visible, the search starts from torch's own library.
    """
    import torch

    own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for scope in (None, str(own)):
        if scope is not None and not own.is_file():
            continue
        loaded = ctypes.CDLL(scope)
        try:
            addresses = [
                ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value or 0
                for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
            ]
        except AttributeError:
            continue
        return ThreadPool(_mapped_at(addresses[0]), *addresses)
    return None


def _mapped_at(address: int) -> str:
    """The file that is mapped at an address of this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        start, _, end = line.split(maxsplit=1)[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, and a path if there is one
            return fields[5] if len(fields) == 6 else ""
    return ""
