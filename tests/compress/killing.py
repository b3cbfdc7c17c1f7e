"""Kills ``halve compress`` at every change that it makes to the disk, one run after the other, and resumes it.

    python -m tests.compress.killing BASE FLAGS...

A run is killed (SIGKILL, by itself) right before its n-th rename, sync, removal or new directory, or in the
middle of its n-th copy of a file, for n = 1, 2, ... until a run comes to its end; each runs in a fork of this
process, so that the imports are paid once. Each n has a directory ``BASE/n`` with nothing but ``out`` in it.
Every third n is killed once more while it is resumed. Then one more run, in ``BASE/random``, is killed from
outside after random times, again and again. Prints one JSON document: for each run what happened.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

CHANGES = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")


def kill_at(number: int) -> None:
    """Arms this process."""
    count = itertools.count(1)

    def armed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, armed(getattr(os, name)))
    copy = shutil.copyfile

    def copyfile(source: Path, target: Path) -> Any:
        if next(count) == number:
            Path(target).write_bytes(Path(source).read_bytes()[:10])
            os.kill(os.getpid(), signal.SIGKILL)
        return copy(source, target)

    shutil.copyfile = copyfile


def attempt(arguments: list[str], kill: int | None, log: Path, seconds: float | None = None) -> int:
    """The exit code of the command, or -9 if it was killed at a change or after some seconds."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = ["halve", *arguments]
            if kill is not None:
                kill_at(kill)
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_at_random(base: Path, flags: list[str]) -> dict[str, Any]:
    """Kills one run after random times until it is done; the last try may take as long as it wants."""
    out, log = base / "random" / "out", base / "random.log"
    out.parent.mkdir(parents=True)
    delays = random.Random(0)
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        resume = ["--resume"] if (out.parent / "out.partial" / "manifest.json").exists() else []
        seconds = delays.uniform(0.005, 0.1) if len(codes) < 15 else None
        codes.append(attempt(["compress", *flags, "--out", str(out), *resume], None, log, seconds))
        if len(codes) > 30:
            break
    return {"directory": str(out.parent), "codes": codes, "log": log.read_text()}


def warm_up(arguments: list[str]) -> None:
    """Loads what is loaded on first use, so that the forks need not."""
    sys.argv = ["halve", *arguments]
    with (
        contextlib.suppress(SystemExit),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        main()


def run(base: Path, flags: list[str]) -> list[dict[str, Any]]:
    """See the head of this file."""
    history = []
    for number in itertools.count(1):
        out = base / f"{number:03d}" / "out"
        log = base / f"{number:03d}.log"
        out.parent.mkdir(parents=True)
        arguments = ["compress", *flags, "--out", str(out)]
        record: dict[str, Any] = {"n": number, "directory": str(out.parent)}
        record["codes"] = codes = [attempt(arguments, number, log)]
        record["left"] = sorted(path.name for path in out.parent.iterdir())
        started = (out.parent / "out.partial" / "manifest.json").exists()
        record["started"] = started
        if codes[0] == -signal.SIGKILL:
            if number % 3 == 0:
                codes.append(attempt([*arguments, "--resume"], 1 + number * 7 % 23, log))
                started = started or (out.parent / "out.partial" / "manifest.json").exists()
            if codes[-1] != 0:
                codes.append(attempt([*arguments, "--resume"], None, log))
            if codes[-1] == 2 and not started:  # killed before there was anything to go on with
                codes.append(attempt(arguments, None, log))
        record["log"] = log.read_text()
        history.append(record)
        if codes[0] != -signal.SIGKILL:
            return history
    raise AssertionError


if __name__ == "__main__":
    import compress.pipeline  # noqa: F401  before the forks
    from serve.cli import main

    base, flags = Path(sys.argv[1]), sys.argv[2:]
    warm_up(["compress", *flags, "--out", str(base / "warm-up")])
    print(json.dumps([run_at_random(base, flags), *run(base, flags)]))
