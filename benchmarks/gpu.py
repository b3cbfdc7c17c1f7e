"""The whole check of the GPU kernels, in one command of under nine minutes: are they right, and how fast are they?

    python -m benchmarks.gpu [--minutes 7.5] [--out DIR] [--only proof checks decode ...]

Needs torch with CUDA (and NVRTC, which comes with it) and this directory; nothing has to be installed. Where the kernels on sparse
tensor cores do not run, on AMD's GPUs say, what runs there is measured.

This process only watches. Sections (`gpu_sections`) run in a process of their own, in the order of `SECTIONS`, what matters most
first, and ``gpu.json`` and ``gpu.md`` are written anew after each figure. A kernel that faults takes its process with it, one that
hangs is noticed by no figure coming for a while: then the section is noted as broken with what it said last, and a new process
goes on with the next one. So what was measured stays whatever happens then. Exit codes: 0, 1 a check failed or a section broke, 2
there is no GPU.

Every time is that of one launch in a replayed CUDA graph, behind a replay that does not count, so that no launch of a graph is in
it. For up to 1,023 rows these are 16 launches and more, 64 for small weights, that go through copies of the weight of 256 MB and more in all, so that
none comes from the second cache; for more rows, which take longer than that, four. Sides take turns in each round; a ratio is the
median over the rounds of the ratio within a round. Dense is cuBLAS or cublasLt, whichever is faster. GB/s counts the bytes of the
weight in its own form. What is optional (libraries of others) comes in sections of its own, so that it takes none of ours with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parent.parent
SECTIONS = (
    "proof",
    "checks",
    "bandwidth",
    "decode",
    "tuned",
    "block",
    "prefill",
    "libraries",
    "host",
    "scaled",
    "variants",
    "narrow",
    "pruning",
    "triton",
    "rest",
)
ON_ANY_GPU = ("bandwidth", "libraries", "pruning", "triton")
"""The sections that do not need the kernels on sparse tensor cores."""
TIME_OVER = "the time was over"
QUIET_SECONDS = 100.0
"""Without a new figure for so long, a section counts as hanging; Triton compiles for a minute."""
LAST_WORDS = 400
END_SECONDS = 20.0
"""For a process that is killed to be gone: one whose GPU hangs may stay, and must not be waited for."""
MOST_FALSE_STARTS = 2
NO_GPU = 2


def read(directory: Path) -> dict[str, Any]:
    """The document as it is on the disk; empty before there is one."""
    try:
        return json.loads((directory / "gpu.json").read_text())
    except FileNotFoundError:
        return {}


def watch(
    command: list[str], names: list[str], directory: Path, until: float, quiet: float = QUIET_SECONDS
) -> dict[str, Any]:
    """Runs sections in one process after another until all are done or broken, or the time is over.

    Args:
        command: runs the sections that are appended to it, and writes to ``directory``: before each one its name (as ``running``).
        until: seconds since the epoch.

    Returns:
        The document. ``broken`` has what became of sections that ended their process, ``left_out`` those that there was no time for.

    Raises:
        SystemExit: there is no GPU.
    """
    left, false_starts = list(names), 0
    while left and time.time() < until and false_starts < MOST_FALSE_STARTS:
        document = read(directory)
        if document.pop("running", None) is not None:  # what ends from now on ended in another section
            write(directory, document)
        with tempfile.TemporaryFile("w+") as said:
            child = subprocess.Popen([*command, *left], cwd=ROOT, stderr=said)
            why = _wait(child, directory, until, quiet)
            if child.returncode == NO_GPU and not document:
                said.seek(0)
                print(said.read().strip(), file=sys.stderr)
                raise SystemExit(NO_GPU)
            if why is None:
                left = []
                break
            said.seek(0)
            words = said.read().strip()
            print(words, file=sys.stderr)
        document = read(directory)
        running = document.get("running")
        if why == TIME_OVER and running is not None:
            document.setdefault("left_out", []).append(f"the rest of {running}")
        elif why != TIME_OVER:
            reason = f"{why}: {' '.join(words.split())[-LAST_WORDS:]}".rstrip(": ")
            document.setdefault("broken", {})[running or "start"] = reason
        write(directory, document)
        if running is None:
            false_starts += 1
        else:
            left, false_starts = left[left.index(running) + 1 :], 0
    document = read(directory)
    document.pop("running", None)
    document.setdefault("broken", {})
    document.setdefault("left_out", []).extend(left)
    return document


def _wait(child: subprocess.Popen[bytes], directory: Path, until: float, quiet: float) -> str | None:
    """Waits for a process to end, and ends it where it must not go on; why it ended too early, or None."""
    seen, since = None, time.time()
    while child.poll() is None:
        time.sleep(0.2)
        now, stamp = time.time(), _stamp(directory)
        if stamp != seen:
            seen, since = stamp, now
        if now - since > quiet or now > until:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(END_SECONDS)
            return f"no figure for {quiet:.0f} s" if now - since > quiet else TIME_OVER
    if child.returncode < 0:
        return f"its process was ended by signal {-child.returncode}"
    return f"its process ended with code {child.returncode}" if child.returncode else None


def _stamp(directory: Path) -> int | None:
    try:
        return (directory / "gpu.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def write(directory: Path, document: dict[str, Any]) -> None:
    """The document and its page, each whole or not at all."""
    from benchmarks.gpu_table import render

    directory.mkdir(parents=True, exist_ok=True)
    page = render(document) if "environment" in document else ""
    for name, text in (("gpu.json", json.dumps(document) + "\n"), ("gpu.md", page)):
        temporary = directory / f"{name}.partial"
        temporary.write_text(text)
        temporary.replace(directory / name)


def main() -> int:
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="in all; nothing is begun that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    arguments = parser.parse_args()
    directory = arguments.out.resolve()
    for name in ("gpu.json", "gpu.md"):
        (directory / name).unlink(missing_ok=True)
    until = began + 60 * arguments.minutes
    command = [sys.executable, "-m", "benchmarks.gpu_sections", str(directory), str(until)]
    document = watch(command, [name for name in SECTIONS if name in arguments.only], directory, until)
    write(directory, document)
    print(f"written: {os.path.relpath(directory / 'gpu.md')}")
    return 1 if document["broken"] or any(check["wrong"] for check in document.get("checks", [])) else 0


if __name__ == "__main__":
    sys.exit(main())
