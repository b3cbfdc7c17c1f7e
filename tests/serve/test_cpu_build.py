"""Building the C++ library, putting it into a wheel, finding it, and the threads it is handed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.kernels.cpu import build, library
from tests.runs import ROOT, beside, environment


def _has_compiler() -> bool:
    try:
        build.find_compiler()
    except build.NoCompilerError:
        return False
    return True


NAME = f"halve-{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}"

needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="there is no C++ compiler here")

EXPORT = '#include "export.h"\n'
HEADER = '#define HALVE_EXPORT extern "C" __attribute__((visibility("default")))\n'
PATHS = EXPORT + 'HALVE_EXPORT const char *halve_cpu_paths(void) { return "avx2,portable"; }\n'


def abi(version: int) -> str:
    return EXPORT + f"HALVE_EXPORT int halve_cpu_abi_version(void) {{ return {version}; }}\n"


def write_sources(directory: Path, **files: str) -> Path:
    """A directory of sources that compile in no time, with a header."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "export.h").write_text(HEADER)
    for name, text in files.items():
        (directory / f"{name}.cpp").write_text(text)
    return directory


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    """Compiles texts into a library of its own."""

    def compile_them(name: str = "library", **files: str) -> Path:
        output = tmp_path / name / "lib.so"
        build.compile_library(output, sources=write_sources(tmp_path / name / "src", **files))
        return output

    return compile_them


class TestCompile:
    @needs_compiler
    def test_the_library_loads(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        sources = write_sources(tmp_path / "src", paths=PATHS, hidden="int hidden() { return 5; }\n")
        shutil.copy(build.SOURCES / "abi.cpp", sources)
        output = tmp_path / "deep" / "lib.so"
        build.compile_library(output, sources=sources)
        loaded = ctypes.CDLL(str(output))
        assert loaded.halve_cpu_abi_version() == library.ABI_VERSION
        assert not hasattr(loaded, "hidden")
        assert not hasattr(loaded, "_Z6hiddenv")
        assert beside(output) == ["lib.so"]
        assert capfd.readouterr() == ("", "")

    @needs_compiler
    def test_the_bytes_depend_on_neither_place_nor_time(self, compiled: Callable[..., Path]) -> None:
        one, other = compiled("one", abi=abi(1), paths=PATHS), compiled("other", abi=abi(1), paths=PATHS)
        assert one.read_bytes() == other.read_bytes()

    def test_no_compiler_on_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(
            build.NoCompilerError, match=r"CXX is not set, and none of c\+\+, g\+\+, clang\+\+ is on PATH"
        ):
            build.compile_library(tmp_path / "lib.so")
        assert not list(tmp_path.iterdir())

    def test_a_named_compiler_is_not_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "nonesuch -O3")
        with pytest.raises(build.BuildError, match="'nonesuch', named by CXX, is no program"):
            build.compile_library(tmp_path / "lib.so")
        with pytest.raises(build.BuildError, match="'othersuch', given, is no program"):
            build.compile_library(tmp_path / "lib.so", compiler="othersuch")
        monkeypatch.setenv("CXX", "g++ '")
        with pytest.raises(build.BuildError, match="cannot be read as a command: No closing quotation"):
            build.compile_library(tmp_path / "lib.so")

    def test_a_compiler_that_cannot_run(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        broken.write_bytes(b"\x7fELF nothing more")
        broken.chmod(0o755)
        with pytest.raises(build.NoCompilerError, match=r"broken cannot be run: .*Exec format error"):
            build.compile_library(tmp_path / "lib.so", compiler=str(broken))

    @needs_compiler
    def test_a_source_with_an_error(self, tmp_path: Path) -> None:
        sources = write_sources(tmp_path / "src", good=PATHS, wrong="int f() { return undeclared; }\n")
        output = tmp_path / "lib.so"
        output.write_text("what was there before")
        with pytest.raises(build.BuildError) as failed:
            build.compile_library(output, sources=sources)
        message = str(failed.value)
        assert message.startswith(f"{sources / 'wrong.cpp'} was not compiled (exit code 1) by\n")
        assert "-std=c++17" in message
        assert "undeclared" in message.partition("which said")[2]
        assert not isinstance(failed.value, build.NoCompilerError)
        assert output.read_text() == "what was there before"
        assert beside(output) == ["lib.so", "src"]

    @needs_compiler
    def test_a_missing_function_is_found_when_linking(self, compiled: Callable[..., Path]) -> None:
        with pytest.raises(build.BuildError, match=r"(?s)lib.so was not linked.*omp_get_thread_num"):
            compiled(a='extern "C" int omp_get_thread_num(); int f() { return omp_get_thread_num(); }\n')

    @needs_compiler
    def test_warnings_are_shown(self, compiled: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
        compiled(a="int f(int unused) { return 1; }\n")
        assert "unused parameter" in capfd.readouterr().err

    @needs_compiler
    def test_nothing_to_compile_and_nowhere_to_write(self, tmp_path: Path) -> None:
        with pytest.raises(build.BuildError, match=r"holds no \.cpp file"):
            build.compile_library(tmp_path / "lib.so", sources=tmp_path)
        (tmp_path / "file").touch()
        sources = write_sources(tmp_path / "src", paths=PATHS)
        with pytest.raises(build.BuildError, match=r"cannot write .*file/lib\.so: .*(Not a directory|File exists)"):
            build.compile_library(tmp_path / "file" / "lib.so", sources=sources)

    @needs_compiler
    def test_flags(self, tmp_path: Path) -> None:
        """No flag ties the library to this machine or loosens floating point; sanitizers come with what they need."""
        wrapper, log = tmp_path / "wrapper", tmp_path / "log"
        wrapper.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {log}\nshift\nexec {build.find_compiler()[0]} "$@"\n')
        wrapper.chmod(0o755)
        sources = write_sources(tmp_path / "src", paths=PATHS)
        build.compile_library(tmp_path / "lib.so", sources=sources, compiler=f"{wrapper} first")
        compiling, linking = log.read_text().splitlines()
        flags = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast -Wall -Wextra"
        assert compiling.startswith(f"first {flags} -c ")
        assert not any(flag in compiling + linking for flag in ("-march", "-mtune", "fast-math", "openmp", "sanitize"))
        log.unlink()
        build.compile_library(
            tmp_path / "lib.so", sources=sources, compiler=f"{wrapper} first", sanitize=("address", "undefined")
        )
        compiling, linking = log.read_text().splitlines()
        assert "-g -O1 -fno-omit-frame-pointer" in compiling
        assert all("-fsanitize=address,undefined" in line for line in (compiling, linking))

    @needs_compiler
    def test_a_sanitized_library_ends_the_process(self, tmp_path: Path) -> None:
        text = EXPORT + "HALVE_EXPORT int shifted(int by) { return 1 << by; }\n"
        output = tmp_path / "lib.so"
        try:
            build.compile_library(output, sources=write_sources(tmp_path / "src", a=text), sanitize=["undefined"])
        except build.BuildError as error:
            pytest.skip(f"the compiler comes without its sanitizers: {error}")
        code = f"import ctypes; f = ctypes.CDLL({str(output)!r}).shifted; print(f(3), flush=True); f(40)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stdout == "8\n"
        assert done.returncode != 0
        assert "shift exponent 40 is too large" in done.stderr


class TestCommand:
    @staticmethod
    def run(file: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """By its path, without site-packages: as a build environment has it."""
        command = [sys.executable, "-I", "-S", str(file), *arguments]
        return subprocess.run(
            command, env={**os.environ, **variables}, cwd="/", capture_output=True, text=True, check=False
        )

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        write_sources(tmp_path / "cpu" / "src", abi=abi(1), paths=PATHS)
        return Path(shutil.copy(build.__file__, tmp_path / "cpu"))

    @needs_compiler
    def test_builds_in_place(self, file: Path) -> None:
        done = self.run(file)
        built = file.parent / "libhalve_cpu.so"
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"built {built} with /")
        assert ctypes.CDLL(str(built)).halve_cpu_abi_version() == 1

    def test_without_a_compiler(self, file: Path) -> None:
        done = self.run(file, CXX="nonesuch")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: the C++ compiler 'nonesuch'")
        done = self.run(file, "--if-possible", CXX="nonesuch")
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.startswith("kernels not built: the C++ compiler 'nonesuch'")

    @needs_compiler
    def test_an_error_counts_even_if_a_compiler_is_optional(self, file: Path) -> None:
        (file.parent / "src" / "abi.cpp").write_text("wrong\n")
        done = self.run(file, "--if-possible")
        assert done.returncode == 1
        assert "abi.cpp was not compiled" in done.stderr
        assert "Traceback" not in done.stderr


class TestWheel:
    """The hook, through hatchling, on a copy of what it looks at."""

    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        project = tmp_path / "project"
        ignored = shutil.ignore_patterns("*.so", "src", "__pycache__")
        shutil.copytree(ROOT / "serve" / "kernels", project / "serve" / "kernels", ignore=ignored)
        shutil.copytree(ROOT / "deploy", project / "deploy", ignore=ignored)
        write_sources(project / "serve" / "kernels" / "cpu" / "src", abi=abi(1), paths=PATHS)
        for name in (
            "pyproject.toml",
            "README.md",
            "LICENSE",
            ".gitignore",
            "serve/__init__.py",
            "compress/__init__.py",
        ):
            (project / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, project / name)
        return project

    @staticmethod
    def build(project: Path, target: str = "wheel", **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", "dist"]
        return subprocess.run(
            command,
            env={**os.environ, "HALVE_REQUIRE_KERNELS": "", **variables},
            cwd=project,
            capture_output=True,
            text=True,
            check=False,
        )

    @needs_compiler
    def test_with_a_compiler(self, project: Path, tmp_path: Path) -> None:
        done = self.build(project)
        assert done.returncode == 0, done.stderr
        [wheel] = (project / "dist").iterdir()
        tag = wheel.stem.removeprefix(f"{NAME}-")
        assert tag.startswith("py3-none-")
        assert tag != "py3-none-any"
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            metadata = archive.read(f"{NAME}.dist-info/WHEEL").decode()
            archive.extract("serve/kernels/cpu/libhalve_cpu.so", tmp_path)
        assert f"Tag: {tag}\n" in metadata
        assert "Root-Is-Purelib: false\n" in metadata
        of_kernels = {
            name.removeprefix("serve/kernels/cpu/") for name in names if name.startswith("serve/kernels/cpu/")
        }
        files = {"__init__.py", "build.py", "library.py", "src/abi.cpp", "src/paths.cpp", "src/export.h"}
        assert of_kernels >= files | {"libhalve_cpu.so"}
        assert not [name for name in names if name.endswith(".o") or ".partial" in name or "hatch_build" in name]
        assert ctypes.CDLL(str(tmp_path / "serve/kernels/cpu/libhalve_cpu.so")).halve_cpu_abi_version() == 1

    def test_without_a_compiler(self, project: Path) -> None:
        """A library that was left by an earlier build is of other sources, and does not go into a pure wheel."""
        (project / "serve/kernels/cpu/libhalve_cpu.so").write_bytes(b"left over")
        done = self.build(project, PATH="", CXX="")
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        assert said.count("warning: halve is installed without its C++ kernels") == 1
        assert "no C++ compiler: CXX is not set" in said
        assert "python -m serve.kernels.cpu.build" in said
        wheel = project / "dist" / f"{NAME}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as archive:
            assert "Root-Is-Purelib: true\n" in archive.read(f"{NAME}.dist-info/WHEEL").decode()
            assert "serve/kernels/cpu/src/abi.cpp" in archive.namelist()
            assert "serve/kernels/cpu/libhalve_cpu.so" not in archive.namelist()

    @needs_compiler
    def test_a_source_with_an_error(self, project: Path) -> None:
        (project / "serve/kernels/cpu/src/abi.cpp").write_text("wrong\n")
        done = self.build(project)
        assert done.returncode == 0, done.stderr
        assert "abi.cpp was not compiled" in done.stdout + done.stderr
        assert [wheel.name for wheel in (project / "dist").iterdir()] == [f"{NAME}-py3-none-any.whl"]

    def test_required_kernels(self, project: Path) -> None:
        done = self.build(project, CXX="nonesuch", HALVE_REQUIRE_KERNELS="1")
        said = done.stdout + done.stderr
        assert done.returncode == 1
        assert "HALVE_REQUIRE_KERNELS is set, and halve's kernels were not built: the C++ compiler 'nonesuch'" in said
        assert "Traceback" not in said
        assert not list(project.glob("dist/*.whl"))

    @needs_compiler
    def test_editable(self, project: Path) -> None:
        """The library is made in the checkout, and hatchling's wheel stays a pure one that points there."""
        code = (
            "from hatchling.builders.wheel import WheelBuilder\n"
            "builder = WheelBuilder('.')\n"
            "data = builder.get_default_build_data() | {'force_include': {}}\n"
            "[hook] = builder.get_build_hooks('dist').values()\n"
            "hook.initialize('editable', data)\n"
            "assert data['pure_python'] and 'tag' not in data and not data['force_include'], data\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ctypes.CDLL(str(project / "serve/kernels/cpu/libhalve_cpu.so")).halve_cpu_abi_version() == 1

    def test_source_distribution(self, project: Path) -> None:
        (project / "serve/kernels/cpu/libhalve_cpu.so").write_bytes(b"left over")
        done = self.build(project, "sdist", CXX="nonesuch")
        assert done.returncode == 0, done.stderr
        [archive] = (project / "dist").iterdir()
        shutil.unpack_archive(archive, project / "unpacked", filter="data")
        unpacked = project / "unpacked" / NAME
        assert {"abi.cpp", "paths.cpp", "export.h"} <= {p.name for p in (unpacked / "serve/kernels/cpu/src").iterdir()}
        assert (unpacked / "deploy" / "hatch_build.py").is_file()
        assert not list(unpacked.rglob("*.so"))


class TestFind:
    @pytest.fixture(autouse=True)
    def no_override(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HALVE_CPU_LIBRARY", raising=False)

    @needs_compiler
    def test_found(self, compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        output = compiled(abi=abi(library.ABI_VERSION), paths=PATHS)
        monkeypatch.setattr(build, "LIBRARY", output)
        assert library.load() is library.load() is not None
        assert library.status() == f"{output} is loaded"
        assert library.paths() == ("avx2", "portable")

    @needs_compiler
    def test_never_built(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "LIBRARY", tmp_path / "lib.so")
        assert library.load() is None
        assert library.paths() == ()
        assert library.status() == (
            f"{tmp_path / 'lib.so'} was not built when halve was installed; "
            "a C++ compiler is there now: `python -m serve.kernels.cpu.build`"
        )

    def test_never_built_without_a_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "LIBRARY", tmp_path / "lib.so")
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        assert library.load() is None
        assert (
            "install a C++ compiler, then `python -m serve.kernels.cpu.build` (no C++ compiler: CXX" in library.status()
        )

    def test_garbage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        garbage = tmp_path / "lib.so"
        garbage.write_bytes(b"no library " * 1000)
        monkeypatch.setattr(build, "LIBRARY", garbage)
        assert library.load() is None
        assert f"{garbage} cannot be loaded: {garbage}: " in library.status()
        assert "; " in library.status()

    @needs_compiler
    def test_another_version(self, compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "LIBRARY", compiled(abi=abi(99), paths=PATHS))
        assert library.load() is None
        assert f"built from other sources: it has ABI version 99, this halve needs {library.ABI_VERSION}; " in (
            library.status()
        )

    @needs_compiler
    def test_another_library(self, compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "LIBRARY", compiled(paths=PATHS))
        assert library.load() is None
        assert "is no library of halve's kernels: " in library.status()
        assert "halve_cpu_abi_version" in library.status()

    @needs_compiler
    def test_override(self, compiled: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "LIBRARY", tmp_path / "nowhere")
        output = compiled(abi=abi(library.ABI_VERSION), paths=PATHS)
        monkeypatch.setenv("HALVE_CPU_LIBRARY", str(output))
        assert library.load() is not None
        monkeypatch.setenv("HALVE_CPU_LIBRARY", str(tmp_path / "none.so"))
        assert library.load() is None
        assert library.status().startswith(
            f"HALVE_CPU_LIBRARY names {tmp_path / 'none.so'}, which is no file; unset it"
        )


@needs_compiler
def test_what_was_built_here_can_be_loaded() -> None:
    """The library in this checkout, as `make` leaves it."""
    if not build.LIBRARY.is_file():
        pytest.skip("it was not built: python -m serve.kernels.cpu.build")
    found = library._open(build.LIBRARY, False)
    assert found.library is not None, found.problem
    known = ("avx512bf16", "avx512", "avx2", "portable")
    runnable = found.library.halve_cpu_paths().decode().split(",")
    assert runnable == [path for path in known if path in runnable]
    assert runnable[-1] == "portable"


TEAM = (
    EXPORT
    + """
#include <atomic>
using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
using Get = int (*)();
struct Team { Get thread_num, num_threads; std::atomic<int> seen, size; };
static void body(void *data) {
    Team *team = static_cast<Team *>(data);
    team->seen |= 1 << team->thread_num();
    team->size = team->num_threads();
}
// The threads that ran as a bit set, times 16, plus the size of the team.
HALVE_EXPORT int run_team(void *parallel, void *thread_num, void *num_threads, unsigned threads) {
    Team team{reinterpret_cast<Get>(thread_num), reinterpret_cast<Get>(num_threads), {0}, {0}};
    reinterpret_cast<Parallel>(parallel)(body, &team, threads, 0);
    return team.seen * 16 + team.size;
}
"""
)

THREADS = """
import ctypes, pathlib, sys
from serve.kernels.cpu import library
pool = library.thread_pool()
assert pool is not None
run_team = ctypes.CDLL(sys.argv[1]).run_team
run_team.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_uint]
for threads in (1, 2, 3):
    seen = run_team(pool.parallel, pool.thread_num, pool.num_threads, threads)
    assert seen == ((1 << threads) - 1) * 16 + threads, (threads, seen)
import torch
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)
lines = [line.split(maxsplit=5) for line in open("/proc/self/maps")]
mapped = {line[5].strip() for line in lines if len(line) == 6 and "omp" in pathlib.Path(line[5]).name}
runtimes = sorted(path for path in mapped if pathlib.Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
assert runtimes == [pool.library], (runtimes, pool)
print("shared")
"""


@needs_compiler
def test_threads_are_shared_with_torch(compiled: Callable[..., Path]) -> None:
    """The addresses run teams of threads, and one OpenMP runtime is in the process, torch's."""
    output = compiled(abi=abi(1), paths=PATHS, team=TEAM)
    command = [sys.executable, "-c", THREADS, str(output)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "shared\n"), done.stderr


def test_a_torch_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: object())
    assert library.thread_pool.__wrapped__() is None
