"""Compiles ``src/*.cpp`` into one shared library, with whatever C++17 compiler there is.

    python -m serve.kernels.cpu.build        (or the path of this file, where halve is not installed)

The package's build loads this file by its path, in an environment that holds nothing but the build tool, so it
imports the standard library only.

No flag ties the library to the machine that builds it: functions choose their instruction set one by one, by target
attributes, and the processor is asked at run time. The same sources and the same compiler give the same bytes,
wherever they lie and whenever it is done.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "src"
LIBRARY = SOURCES.parent / "libhalve_cpu.so"
"""Where `compile_library` is asked to write it, and where `library` looks for it."""

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
)
_SANITIZED_FLAGS = ("-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
_MOST_AT_ONCE = 4
_MOST_LINES = 60


class BuildError(Exception):
    """The library was not built; the message says what was tried and what the compiler said."""


class NoCompilerError(BuildError):
    """There is no C++ compiler here."""


def find_compiler(compiler: str | None = None) -> list[str]:
    """The start of a compiler's command line.

    Args:
        compiler: a program, with arguments if need be (``"ccache g++"``). Left out: the environment's ``CXX``, else
            the first of c++, g++ and clang++ that is there. What was named is never replaced by another one.

    Raises:
        NoCompilerError: there is none, or not the one that was named.
    """
    named = compiler or os.environ.get("CXX", "")
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise NoCompilerError(f"the C++ compiler {named!r} cannot be read as a command: {error}") from None
    if command:
        program = shutil.which(command[0])
        if program is None:
            where = "given" if compiler else "named by CXX"
            raise NoCompilerError(f"the C++ compiler {command[0]!r}, {where}, is no program that can be run here")
        return [program, *command[1:]]
    for name in _COMPILERS:
        program = shutil.which(name)
        if program is not None:
            return [program]
    raise NoCompilerError(
        f"no C++ compiler: CXX is not set, and none of {', '.join(_COMPILERS)} is on PATH"
        " (on Debian and Ubuntu, 'apt install g++' brings one)"
    )


def compile_library(
    output: Path, *, sources: Path | None = None, compiler: str | None = None, sanitize: Sequence[str] = ()
) -> None:
    """Compiles every ``.cpp`` of a directory, and links them into a shared library.

    A compiler's warnings go to standard error. The library appears under its name when it is whole.

    Args:
        output: the file to write; one that is there is replaced.
        sources: the directory with the sources; left out: the kernels of halve.
        compiler: as for `find_compiler`.
        sanitize: ``("address", "undefined")`` for a library that ends the process at the first error of that kind.

    Raises:
        NoCompilerError: there is no compiler.
        BuildError: it refuses a source, or the output cannot be written.
    """
    command = find_compiler(compiler)
    sources = (sources or SOURCES).absolute()
    files = sorted(sources.glob("*.cpp"))
    if not files:
        raise BuildError(f"nothing to compile: {sources} holds no .cpp file")
    flags = [*_FLAGS]
    link_flags = ["-shared"]
    if sanitize:
        flags += [*_SANITIZED_FLAGS, f"-fsanitize={','.join(sanitize)}"]
        link_flags.append(flags[-1])
    elif sys.platform == "linux":
        # A missing function is found now, not by the user who loads it. (Sanitizers define theirs when loaded.)
        link_flags.append("-Wl,-z,defs")
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", suffix=".partial", dir=output.parent) as directory:
            scratch = Path(directory)
            objects = [scratch / f"{file.stem}.o" for file in files]

            def compile_one(file: Path, to: Path) -> None:
                _run([*command, *flags, "-c", file.name, "-o", str(to)], sources, f"{file} was not compiled")

            with ThreadPoolExecutor(min(_MOST_AT_ONCE, _cores())) as pool:
                list(pool.map(compile_one, files, objects))
            linked = scratch / output.name
            _run([*command, *link_flags, *map(str, objects), "-o", str(linked)], sources, f"{output} was not linked")
            linked.replace(output)
    except OSError as error:
        raise BuildError(f"cannot write {output}: {error}") from error


def _run(command: list[str], directory: Path, failure: str) -> None:
    """Runs a compiler in the sources' directory, so that what it records of their names is the same everywhere."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise NoCompilerError(f"the C++ compiler {command[0]} cannot be run: {error}") from error
    said = done.stdout.strip().splitlines()
    if len(said) > _MOST_LINES:
        said = [*said[:_MOST_LINES], f"... and {len(said) - _MOST_LINES} lines more"]
    if done.returncode:
        raise BuildError(
            "\n".join([f"{failure} (exit code {done.returncode}) by", f"  {shlex.join(command)}", "which said", *said])
        )
    if said:
        print("\n".join(said), file=sys.stderr)


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compiles halve's kernels for processors.")
    parser.add_argument("--output", type=Path, default=LIBRARY, metavar="FILE", help="left out: where halve looks")
    parser.add_argument("--sanitize", metavar="NAMES", help="address,undefined: a library that checks itself")
    parser.add_argument(
        "--if-possible", action="store_true", help="exit code 0 where there is no compiler (an error still counts)"
    )
    arguments = parser.parse_args()
    sanitize = tuple(filter(None, (arguments.sanitize or "").split(",")))
    try:
        compile_library(arguments.output, sanitize=sanitize)
    except NoCompilerError as error:
        if not arguments.if_possible:
            sys.exit(f"error: {error}")
        print(f"kernels not built: {error}", file=sys.stderr)
        return
    except BuildError as error:
        sys.exit(f"error: {error}")
    print(f"built {arguments.output} with {shlex.join(find_compiler())}")


if __name__ == "__main__":
    main()
