"""The C++ kernels touch no memory beyond their arguments: guard pages, and builds that check themselves."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from serve.kernels.cpu import build, library
from tests.runs import environment
from tests.serve.cpu_guarded import FAULTS

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.status())


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Teams of threads that spin while they wait take the processor away from each other.
    env = {**environment(), "OMP_WAIT_POLICY": "passive", **variables}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


def test_nothing_beyond_the_arguments_is_touched() -> None:
    done = run("-m", "tests.serve.cpu_guarded")
    assert (done.returncode, done.stdout.split()) == (0, list(library.paths())), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by Linux' mprotect")
def test_guard_pages_find_what_is_touched() -> None:
    """Also stores and loads by masked instructions, which a sanitizer does not see."""
    done = run("-m", "tests.serve.cpu_guarded", "--faults")
    assert (done.returncode, done.stdout.splitlines()) == (0, [fault for fault in FAULTS for _ in range(2)]), (
        done.stderr
    )


WRONG = """
#include "export.h"
#include <climits>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
__attribute__((target("avx2"))) int load(const uint8_t* at) {
  return _mm256_extract_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), 7);
}
#else
int load(const uint8_t* at) { return *reinterpret_cast<const int*>(at + 28); }
#endif
HALVE_EXPORT int read_byte(const uint8_t* at) { return *at; }
HALVE_EXPORT int read_vector(const uint8_t* at) { return load(at); }
HALVE_EXPORT int write_byte(uint8_t* at) { return *at = 1; }
HALVE_EXPORT int add(int a) { return a + INT_MAX; }
"""

REPORTS = {
    "fine": "",
    "byte after": "AddressSanitizer: heap-buffer-overflow",
    "byte before": "AddressSanitizer: heap-buffer-overflow",
    "vector": "AddressSanitizer: ",  # partly beyond: which kind of error it takes that for depends on the compiler
    "write": "AddressSanitizer: heap-buffer-overflow",
    "overflow": "signed integer overflow",
}

CALLS = """
import ctypes, os, sys
import torch
lib = ctypes.CDLL(sys.argv[1])
data = torch.zeros(640, dtype=torch.uint8)
pointer = lambda offset: ctypes.c_void_p(data.data_ptr() + offset)
calls = {
    "fine": lambda: (lib.read_byte(pointer(639)), lib.read_vector(pointer(608)), lib.write_byte(pointer(0)), lib.add(0)),
    "byte after": lambda: lib.read_byte(pointer(640)),
    "byte before": lambda: lib.read_byte(pointer(-1)),
    "vector": lambda: lib.read_vector(pointer(609)),
    "write": lambda: lib.write_byte(pointer(640)),
    "overflow": lambda: lib.add(1),
}
for name, call in calls.items():
    child = os.fork()
    if not child:
        os.dup2(1, 2)
        call()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"{name}: {status}", flush=True)
"""


def sanitizers() -> dict[str, str]:
    """Variables that load the runtimes of gcc's sanitizers before Python; skips where there are none."""
    try:
        compiler = build.find_compiler()
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    found = []
    for name in ("libasan.so", "libubsan.so"):
        said = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(said.stdout.strip())
        if not path.is_absolute():
            pytest.skip(f"{shlex.join(compiler)} brings no {name}")
        found.append(str(path))
    # Python never frees all that it has.
    return {"LD_PRELOAD": os.pathsep.join(found), "ASAN_OPTIONS": "detect_leaks=0"}


def test_sanitizers_find_what_is_wrong(tmp_path: Path) -> None:
    """In a process with torch in it, whose memory they guard."""
    preloaded = sanitizers()
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "export.h").write_bytes((build.SOURCES / "export.h").read_bytes())
    (sources / "wrong.cpp").write_text(WRONG)
    build.compile_library(tmp_path / "lib.so", sources=sources, sanitize=("address", "undefined"))
    done = run("-c", CALLS, str(tmp_path / "lib.so"), **preloaded)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for name, report in REPORTS.items():
        before, text = re.split(rf"^{name}: (?=\d)", text, maxsplit=1, flags=re.MULTILINE)
        status, _, text = text.partition("\n")
        assert (int(status) != 0, report in before) == (name != "fine", True), (name, status, before)
    assert not text


@pytest.mark.slow
def test_the_kernels_pass_under_sanitizers(tmp_path: Path) -> None:
    preloaded = sanitizers()
    library_ = tmp_path / "lib.so"
    build.compile_library(library_, sanitize=("address", "undefined"))
    tests = [
        str(Path(__file__).parent / f"test_cpu_{name}.py") for name in ("kernels", "refusals", "scaled", "quantized")
    ]
    # Reports are written by the process that ends, so nothing may capture them.
    done = run(
        *("-m", "pytest", *tests, "-q", "-x", "-s", "-p", "no:cacheprovider"),
        **preloaded, HALVE_CPU_LIBRARY=str(library_),
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:6000]}"
    assert " passed" in done.stdout
    assert " failed" not in done.stdout


@pytest.mark.slow
def test_no_thread_writes_what_another_one_uses(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    program = tmp_path / "threads"
    sources = [Path(__file__).parent / "cpu_threads.cpp", *sorted(build.SOURCES.glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{build.SOURCES}"]
    subprocess.run([*compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:6000]
    calls, paths = done.stdout.split(" calls on ")
    assert paths.strip() == ",".join(library.paths())
    assert int(calls) == 30 * (21 * len(library.paths()) - 1)  # all paths but the portable one have a dense kernel
    done = subprocess.run([program, "fault"], capture_output=True, text=True, check=False)
    assert "ThreadSanitizer: data race" in done.stderr
