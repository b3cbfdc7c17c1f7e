"""The GPU kernels through NVRTC, for every architecture, and the cubins on disk. No GPU is needed."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from serve.kernels.cuda import cache as disk
from serve.kernels.cuda import compiler, layout, plan
from serve.kernels.cuda.compiler import CompilerError
from serve.kernels.cuda.plan import Form
from tests.runs import beside, environment

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
NAMES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_120"}
REGISTERS_OF_A_PROCESSOR = 65536


@cache
def why_no_nvrtc() -> str | None:
    try:
        compiler.version()
    except CompilerError as error:
        return str(error)
    return None


needs_nvrtc = pytest.mark.skipif(why_no_nvrtc() is not None, reason=str(why_no_nvrtc()))


@cache
def compiled(capability: tuple[int, int], dtype: str, values: str) -> tuple[bytes, str]:
    text = compiler.source(forms_of(capability, values), dtype, values)
    return compiler.compile_cubin(text, compiler.architecture(capability))


def forms_of(capability: tuple[int, int], values: str) -> tuple[Form, ...]:
    return plan.forms(capability, layout.UNIT_BYTES if values == "Same" else layout.SCALED_UNIT_BYTES)


@needs_nvrtc
@pytest.mark.parametrize(
    ("capability", "dtype", "values"),
    [
        *((capability, "BFloat16", values) for capability in CAPABILITIES for values in ("Same", "Int8", "Float8")),
        *(((9, 0), "Float16", values) for values in ("Same", "Int8", "Float8")),
        *(((8, 0), "Float16", values) for values in ("Int8", "Float8")),
    ],
    ids=lambda value: NAMES.get(value, value),
)
class TestArchitectures:
    def test_nothing_is_spilled(self, capability: tuple[int, int], dtype: str, values: str) -> None:
        cubin, report = compiled(capability, dtype, values)
        assert cubin.startswith(b"\x7fELF")
        assert f"'{NAMES[capability]}'" in report
        assert "warning" not in report
        used = compiler.usage(report)
        forms = {form.name: form for form in forms_of(capability, values)}
        assert used.keys() == forms.keys() | {"expand_weight"} | (set() if values == "Same" else {"expand_values"})
        for name, usage in used.items():
            assert (usage.stack_bytes, usage.spill_store_bytes, usage.spill_load_bytes) == (0, 0, 0), name
            if name in forms:  # as many blocks fit on a processor as `plan` counts on
                assert usage.registers * forms[name].threads * forms[name].resident <= REGISTERS_OF_A_PROCESSOR

    def test_what_becomes_of_it(self, capability: tuple[int, int], dtype: str, values: str, tmp_path: Path) -> None:
        """Weights are copied and multiplied in the widest form there is, and nothing is in local memory."""
        code = disassemble(compiled(capability, dtype, values)[0], tmp_path)
        kind = {"BFloat16": "F32.BF16", "Float16": "F32"}[dtype]
        for form in forms_of(capability, values):
            instructions = code[form.name]
            multiplications = [line for line in instructions if "MMA" in line]
            assert len(multiplications) % (8 * form.tiles) == 0
            assert all(re.search(rf"HMMA\.SP\.16832\.{kind} ", line) for line in multiplications)
            assert {line.rsplit(",", 1)[1].strip(" ;") for line in multiplications} == {"0x0", "0x1"}
            copies = [line for line in instructions if "LDGSTS" in line]
            assert len(copies) >= form.unit_bytes // 512 * form.stages
            assert all(".BYPASS" in line and ".128" in line for line in copies)
            # Nothing waits for the memory before the first weights are asked for, the header of the weight least of all.
            waited_for: set[str] = set()
            for line in instructions[: instructions.index(copies[0])]:
                assert not waited_for & set(re.findall(r"\bR\d+\b", used_by(line))), line
                waited_for |= set(loaded_by(line))
            assert len([line for line in instructions if "LDSM" in line and ".4 " in line]) % (2 * form.tiles) == 0
            if values != "Same":
                conversions_are_few(instructions, values, len(multiplications) // (8 * form.tiles))
        for name, instructions in code.items():
            assert not [line for line in instructions if re.search(r"\b(LDL|STL)\b", line)], name


def conversions_are_few(instructions: list[str], values: str, steps: int) -> None:
    """Of the 64 values of 8 bits that a lane has in each of so many steps: one packed instruction for two of them, after one that picks
    their bytes or puts their bits in place, and none of the slow conversions."""
    packed = [line for line in instructions if re.search(r"\bH(FMA|MUL)2(\.BF16_V2)? ", line) and not is_constant(line)]
    assert len(packed) == 32 * steps
    picked = [line for line in instructions if re.search(r"\bPRMT ", line)]
    assert len(picked) >= 32 * steps if values == "Int8" else len(picked) < 32
    assert not [line for line in instructions if re.search(r"\b(I2F|F2F)\.(?!RP)|\bI2FP\b|E4M3", line)]


def is_constant(line: str) -> bool:
    """Whether a packed instruction only puts a constant into a register."""
    return re.search(r", -?RZ, -?RZ,", line) is not None


def loaded_by(line: str) -> list[str]:
    """The registers that a load from the memory fills, if the instruction is one."""
    found = re.search(r"\bLDG\.(\S*) R(\d+),", line)
    return [f"R{int(found[2]) + i}" for i in range(4 if ".128" in found[1] else 1)] if found else []


def used_by(line: str) -> str:
    """The operands of an instruction that is no load, without what it writes."""
    text = re.sub(r"/\*.*?\*/", "", line).strip(" ;")
    return "" if "LDG." in text else text.partition(",")[2]


def disassemble(cubin: bytes, directory: Path) -> dict[str, list[str]]:
    """Instructions by kernel, by nvdisasm: of a CUDA toolkit, or the one that Triton brings."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            import triton
        except ImportError:
            pytest.skip("there is no nvdisasm here (of a CUDA toolkit or of Triton)")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")
    file = directory / "kernels.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([found, "-c", str(file)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return {
        name: [line for line in body.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


class TestCompiler:
    def test_every_kind_of_values_is_a_text_of_its_own(self) -> None:
        """By whose digest cubins are kept."""
        forms = forms_of((9, 0), "Int8")
        texts = {
            compiler.source(forms, dtype, values) for dtype in ("BFloat16", "Float16") for values in ("Int8", "Float8")
        }
        assert len(texts) == 4

    def test_the_architecture_is_one_that_runs(self) -> None:
        known = [75, 80, 86, 89, 90, 100, 120]
        for capability, arch in (((8, 0), 80), ((8, 7), 86), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)):
            assert compiler.architecture(capability, known) == arch

    @needs_nvrtc
    def test_an_architecture_that_is_not_known(self) -> None:
        with pytest.raises(CompilerError, match=r"does not know compute capability 11\.0; install a torch"):
            compiler.architecture((11, 0), [80, 90, 100, 120])

    @needs_nvrtc
    def test_an_error_is_one_line(self) -> None:
        with pytest.raises(CompilerError, match=r"did not compile the kernels for sm_90.*undeclared") as failed:
            compiler.compile_cubin('extern "C" __global__ void f(int *a) { *a = undeclared; }\n', 90)
        assert "\n" not in str(failed.value)

    @needs_nvrtc
    def test_a_spill_is_reported(self) -> None:
        """So that the test above would fail."""
        text = """
            extern "C" __global__ void __launch_bounds__(1024, 2) f(float *a) {
              float v[64];
              for (int i = 0; i < 64; ++i) v[i] = a[i * 1024 + threadIdx.x];
              __syncthreads();
              for (int j = 0; j < 9; ++j)
                for (int i = 0; i < 64; ++i) v[i] += v[(i * 7 + 1) % 64] * a[i + j];
              for (int i = 0; i < 64; ++i) a[i * 1024 + threadIdx.x] = v[i];
            }"""
        report = compiler.compile_cubin(text, 90)[1]
        assert compiler.usage(report)["f"].spill_store_bytes > 0

    def test_without_cuda_bindings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
        compiler._nvrtc.cache_clear()
        with pytest.raises(CompilerError, match=r"cuda\.bindings, which CUDA builds of torch bring, is not there"):
            compiler.version()
        compiler._nvrtc.cache_clear()

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def version() -> Any:
            raise RuntimeError("cannot find libnvrtc.so.13\nanywhere")

        broken = type(sys)("cuda.bindings.nvrtc")
        monkeypatch.setattr(broken, "nvrtcVersion", version, raising=False)
        monkeypatch.setitem(sys.modules, "cuda", type(sys)("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", type(sys)("cuda.bindings"))
        monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", broken)
        compiler._nvrtc.cache_clear()
        with pytest.raises(
            CompilerError, match=r"cannot be loaded \(cannot find libnvrtc.so.13 anywhere\); pip install"
        ):
            compiler.version()
        compiler._nvrtc.cache_clear()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where cubins are kept, not made yet."""
    monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


class Maker:
    """Stands for the compiler, and counts."""

    def __init__(self, code: bytes = b"\x7fELF code") -> None:
        self.code, self.calls = code, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.code


class TestCache:
    def test_it_is_compiled_once(self, directory: Path) -> None:
        make = Maker()
        assert [disk.cubin("source", 90, (13, 0), make) for _ in range(3)] == [make.code] * 3
        assert make.calls == 1
        [name] = beside(directory / "any")
        assert re.fullmatch(r"sparse24-sm_90-nvrtc_13\.0-[0-9a-f]{24}\.cubin", name)

    def test_what_it_depends_on(self, directory: Path) -> None:
        make = Maker()
        for key in (("a", 90, (13, 0)), ("b", 90, (13, 0)), ("a", 80, (13, 0)), ("a", 90, (13, 1)), ("a", 90, (12, 0))):
            disk.cubin(*key, make)
        assert make.calls == len(beside(directory / "any")) == 5

    @pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "extended", "other"])
    def test_a_damaged_file_is_made_anew(self, directory: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
        disk.cubin("source", 90, (13, 0), Maker())
        [file] = directory.iterdir()
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[-3] ^= 4
        file.write_bytes(
            {
                "truncated": whole[:-1],
                "empty": b"",
                "flipped": bytes(flipped),
                "extended": whole + b"\0",
                "other": b"\x7fELF" * 50,
            }[damage]
        )
        make = Maker()
        with caplog.at_level(logging.WARNING, disk.__name__):
            assert disk.cubin("source", 90, (13, 0), make) == make.code
        assert make.calls == 1
        assert [f"{file} is damaged, so its kernels are compiled again"] == caplog.messages
        assert file.read_bytes() == whole

    def test_a_directory_that_cannot_be_written(self, directory: Path, tmp_path: Path) -> None:
        (tmp_path / "deep").write_text("a file where the directory would be")
        make = Maker()
        assert disk.cubin("source", 90, (13, 0), make) == make.code
        assert beside(tmp_path / "any") == ["deep"]

    def test_a_read_only_directory(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What others put there is used."""
        disk.cubin("kept", 90, (13, 0), Maker(b"kept"))

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
        assert disk.cubin("kept", 90, (13, 0), Maker()) == b"kept"
        assert disk.cubin("other", 90, (13, 0), Maker(b"other")) == b"other"
        assert len(beside(directory / "any")) == 1

    def test_a_file_that_cannot_be_read(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        disk.cubin("source", 90, (13, 0), Maker())

        def refused(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refused)
        make = Maker()
        assert disk.cubin("source", 90, (13, 0), make) == make.code
        assert make.calls == 1

    def test_a_full_disk(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: Path, target: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        make = Maker()
        assert disk.cubin("source", 90, (13, 0), make) == make.code
        assert beside(directory / "any") == []  # nothing half-written stays

    def test_processes_at_the_same_time(self, directory: Path) -> None:
        """Each gets whole code, and one whole file stays."""
        code = (
            "import hashlib, sys\n"
            "from serve.kernels.cuda import cache\n"
            "sys.stdin.readline()\n"
            "for i in range(40):\n"
            "    got = cache.cubin(str(i), 90, (13, 0), lambda: bytes([i]) * 300_000)\n"
            "    assert got == bytes([i]) * 300_000\n"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment(), text=True)
            for _ in range(3)
        ]
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [process.wait(60) for process in running] == [0, 0, 0]
        for process in running:
            assert process.stdin is not None
            process.stdin.close()
        assert len(beside(directory / "any")) == 40
        assert all(name.endswith(".cubin") for name in beside(directory / "any"))

    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HALVE_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        assert disk.directory() == Path("/x/halve")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/home/someone")
        assert disk.directory() == Path("/home/someone/.cache/halve")
