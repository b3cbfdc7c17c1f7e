"""The benchmark of the GPU kernels, as far as a machine without one can see it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_problems, gpu_pruning, gpu_run, gpu_sections, gpu_table, gpu_timing
from serve.kernels.cuda import backend
from serve.kernels.cuda.driver import DriverError
from tests.runs import ROOT, beside


def document() -> dict[str, Any]:
    """A run's document with a row of every section. The figures are made up."""
    gain = {"2:4": {"median": 1.5, "p25": 1.4, "p75": 1.6}}
    times = {"microseconds": {"2:4": 2.0, "dense": 3.0}, "speedup": gain}
    return {
        "environment": {"date": "2000-01-01", "gpu": "None", "capability": "9.0", "torch": "2", "cuda": "13", "nvrtc": "13"},
        "checks": [{"name": "rows", "wrong": None}, {"name": "edges", "wrong": "3 outputs are wrong"}],
        "copy_gigabytes_per_second": 1000.0,
        "decode": [{"n": 64, "k": 128, "rows": 1, **times, "of_copy": 0.75, "gigabytes_per_second": {"2:4": 750, "dense": 800}}],
        "tuned": [{"n": 64, "k": 128, "rows": 1, **times, "of_copy": 0.75, "gigabytes_per_second": {"2:4": 750, "dense": 800}, "settling_seconds": 1.0, "way": "multiply_a in 2", "gain": 1.25}],
        "ways": [[64, 128, 8, "multiply_a in 2"]],
        "proof": [{"dtype": "torch.bfloat16", "seconds": 9.25, "overlap": True}],
        "block": [{"name": "1 sequence, 1 token", **times}],
        "prefill": [{"n": 64, "k": 128, "rows": 2048, **times}],
        "libraries": [{"n": 64, "k": 128, "rows": 2048, "sm_mhz": 1980, **times}, {"n": 64, "k": 128, "rows": 128, "sm_mhz": 345, **times}],
        "triton": [{"n": 64, "k": 128, "rows": 16, **times}],
        "scaled": [{"n": 64, "k": 256, "rows": 4, "microseconds": {"int8": 1.5, "dense": 3.0}, "speedup": {"int8": gain["2:4"]}}],
        "narrow": [{"n": 64, "k": 96, "rows": 2048, "microseconds": {"int8": 1.5, "dense": 3.0}, "speedup": {"int8": gain["2:4"]}, "parts": {"int8, expanding": 7.5, "int8, scaling": 9.0}}],
        "pruning": [{"n": 64, "k": 128, "seconds": {"fused": 0.25, "torch": 0.5}, "peak_bytes": 3e9}],
        "host": [{"microseconds": {"operator": 9.0}}],
        "unsearched": [{"n": 64, "k": 128, "rows": 2048, "microseconds": 55.5}],
        "variants": [{"n": 64, "k": 128, "rows": 1, "chosen": "a in 1", "microseconds": {"a in 1": 3.0, "b in 2": 2.0}, "wrong": {}}],
        "broken": {"host": "RuntimeError: why"},
        "left_out": ["rest"],
    }  # fmt: skip


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One line, exit code 2, and no result."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: no GPU to measure: torch finds none that it can use\n"
    assert beside(tmp_path / "any") == []


SECTION = """
import json, os, pathlib, signal, sys, time
directory, *names = sys.argv[1:]
file = pathlib.Path(directory, "gpu.json")
once = pathlib.Path(directory, "once")
if once.exists() or names == ["never"]:
    once.unlink(missing_ok=True)
    sys.exit("the driver is not ready")
for name in names:
    document = json.loads(file.read_text()) if file.is_file() else {"environment": {}, "broken": {}, "left_out": []}
    document["running"] = name
    document.setdefault("ran", []).append(name)
    file.write_text(json.dumps(document))
    if name == "dies":
        print("an illegal address", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "fails":
        print("Traceback: it failed", file=sys.stderr)
        sys.exit(3)
    if name == "hangs":
        time.sleep(60)
    if name == "once":
        pathlib.Path(directory, "once").touch()
        sys.exit(3)
"""
"""Stands for `gpu_sections`."""


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    script = tmp_path / "sections.py"
    script.write_text(SECTION)
    monkeypatch.setattr(gpu_table, "render", lambda document: "a page")

    def watch(*names: str, seconds: float = 60, quiet: float = 30) -> dict[str, Any]:
        command = [sys.executable, str(script), str(tmp_path)]
        return gpu.watch(command, list(names), tmp_path, time.time() + seconds, quiet)

    return watch


def test_a_section_that_takes_its_process_with_it_loses_nothing_else(watched: Any, tmp_path: Path) -> None:
    document = watched("first", "dies", "second", "fails", "third")
    assert document["ran"] == ["first", "dies", "second", "fails", "third"]
    assert document["broken"] == {
        "dies": "its process was ended by signal 11: an illegal address",
        "fails": "its process ended with code 3: Traceback: it failed",
    }
    assert "running" not in document
    assert gpu.read(tmp_path)["ran"] == document["ran"]  # what is on the disk


def test_a_section_that_hangs_is_ended(watched: Any) -> None:
    document = watched("hangs", "next", quiet=2)
    assert document["ran"] == ["hangs", "next"]
    assert document["broken"] == {"hangs": "no figure for 2 s"}


def test_when_the_time_is_over_nothing_is_begun(watched: Any) -> None:
    document = watched("hangs", "next", seconds=2)
    assert document["ran"] == ["hangs"]
    assert document["broken"] == {}
    assert document["left_out"] == ["the rest of hangs", "next"]


def test_a_process_that_ends_before_its_first_section_is_started_again(watched: Any) -> None:
    """Nothing of what the one before it said is lost, and no section."""
    document = watched("once", "next")
    assert document["ran"] == ["once", "next"]
    assert document["broken"] == {
        "once": "its process ended with code 3",
        "start": "its process ended with code 1: the driver is not ready",
    }
    document = watched("never")
    assert document["left_out"] == ["never"]


def test_a_process_that_cannot_be_ended_is_left_behind(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose GPU hangs; the time goes to what is left."""
    monkeypatch.setattr(gpu, "END_SECONDS", 0.2)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: survivors.append(process))
    survivors: list[subprocess.Popen[bytes]] = []
    try:
        document = watched("hangs", "next", quiet=1)
    finally:
        for process in survivors:
            process.terminate()
            process.wait()
    assert document["ran"] == ["hangs", "next"]
    assert document["broken"] == {"hangs": "no figure for 1 s"}


def test_the_one_that_watches_needs_nothing_but_python() -> None:
    """So it holds nothing of the GPU; and what it starts needs none of halve's dependencies but torch and safetensors."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'openai', 'fastapi', 'typer', 'uvicorn', 'httpx'): sys.modules[name] = None\n"
        "import benchmarks.gpu, benchmarks.gpu_table\n"
        "assert 'torch' not in sys.modules\n"
        "import benchmarks.gpu_sections\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_table_says_all_that_was_measured() -> None:
    text = gpu_table.render(document())
    for part in (
        "1 of 2 right",
        "WRONG edges: 3 outputs are wrong",
        "| 64 x 128 | 1 | 2.00 | 3.00 | 1.50 | 1.40 to 1.60 |  | 750 | 75% | 800 |",
        "| 64 x 128 | 1 | 2.00 | 3.00 | 1.50 | 1.40 to 1.60 | multiply_a in 2 (1.25 of the guess) | 750 | 75% | 800 |",
        "| 1 sequence, 1 token | 2.0 | 3.0 | 2:4 1.50 |",
        "Kernels for torch.bfloat16: compiled, loaded and proven in 9.2 s; launches overlap.",
        "before its search: 64 x 128, 2048 rows: 55.5 us",
        "| 64 x 128, 2048 rows | 2.0 | 3.0 | 2:4 1.50 |",
        "| 64 x 128, 16 rows | 2.0 | 3.0 | 2:4 1.50 |",
        "| 64 x 256, 4 rows | 1.5 | 3.0 | int8 1.50 |",
        "| 64 x 96, 2048 rows | 1.5 | 3.0 | int8 1.50 |",
        "Besides the product, 64 x 96, 2048 rows: int8, expanding 7.5 us, int8, scaling 9.0 us.",
        "- 64 x 128: fused 0.250 s, torch 0.500 s; peak memory 3.0 GB",
        "operator 9.0 us",
        "| 64 x 128 | 1 | a in 1 | 3.00 | b in 2 | 2.00 | a in 1 3.00 |",
        "| many rows, by libraries | 2:4, us |",
        "345 to 1980 MHz",
        "Broken: host: RuntimeError: why",
        "Left out for want of time: rest",
    ):
        assert part in text, part


def test_any_part_of_the_document_makes_a_table() -> None:
    """It is written after every figure, so whatever is there must do."""
    whole = document()
    needed = {name: whole[name] for name in ("environment", "broken", "left_out")}
    for name, value in whole.items():
        assert gpu_table.render({**needed, name: value}).startswith("# 2:4 on None")


def test_a_table_is_made_of_sides_that_broke_too() -> None:
    """Otherwise nothing would be written from there on."""
    whole = document()
    for side in ("2:4", "dense"):
        row = {**whole["decode"][0], "speedup": {}, "of_copy": None}
        row["microseconds"], row["gigabytes_per_second"] = {side: 2.0}, {side: 750.0}
        for section, how in (("decode", ""), ("tuned", "no time to find it")):
            text = gpu_table.render(
                {name: value for name, value in whole.items() if name != "tuned"} | {section: [row]}
            )
            assert (
                f"| 64 x 128 | 1 | 2.00 |  |  |  | {how} | 750 |  |  |" in text or "| 64 x 128 | 1 |  | 2.00 |" in text
            )


def test_ratios_are_within_a_round() -> None:
    found = gpu_timing.summary({"2:4": [1.0, 2.0, 4.0], "dense": [2.0, 3.0, 4.0]})
    assert found["microseconds"] == {"2:4": 2.0, "dense": 3.0}
    assert found["speedup"]["2:4"]["median"] == 1.5


def test_the_faster_dense_product_is_what_counts() -> None:
    samples = {"2:4": [1.0, 1.0], "cublas": [3.0, 3.0], "cublaslt": [2.0, 2.0]}
    assert gpu_timing.faster_dense(samples) == "cublaslt"
    assert samples == {"2:4": [1.0, 1.0], "dense": [2.0, 2.0]}
    assert gpu_timing.faster_dense({"2:4": [1.0]}) is None


def test_small_weights_are_launched_more_often() -> None:
    small, large = (
        torch.empty(1, dtype=torch.uint8),
        torch.empty(gpu_timing.LARGE_BYTES, dtype=torch.uint8, device="meta"),
    )
    assert len(gpu_timing.cycled([small] * 3)) == 66
    assert len(gpu_timing.cycled([large] * 3)) == 18


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch that finds a GPU, and sections that only say that they ran."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(gpu_run, "environment", lambda: document()["environment"])
    return monkeypatch


def sections(faked: pytest.MonkeyPatch, directory: Path, **real: Any) -> tuple[int, list[str]]:
    """Runs all sections, which do nothing but for some; the exit code, and which ones ran."""
    ran: list[str] = []

    def fake(name: str) -> Any:
        return lambda run: (ran.append(name), real[name](run) if name in real else None)

    faked.setattr(gpu_sections, "SECTIONS", {name: fake(name) for name in gpu_sections.SECTIONS})
    faked.setattr(sys, "argv", ["gpu_sections", str(directory), str(time.time() + 60), *gpu.SECTIONS])
    return gpu_sections.main(), ran


def test_all_sections_are_there() -> None:
    assert tuple(gpu_sections.SECTIONS) == gpu.SECTIONS


def test_where_the_sparse_kernels_do_not_run_the_others_are_measured(faked: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """AMD's GPUs, or no NVRTC: what needs them is left out, and it is said why."""
    faked.setattr(backend, "why_not", lambda device, dtype: "this torch is built without CUDA")
    code, ran = sections(faked, tmp_path, proof=gpu_sections.proof)
    assert code == 0
    assert ran == ["proof", "bandwidth", "libraries", "pruning", "triton"]
    assert "Broken: cuda: this torch is built without CUDA" in (tmp_path / "gpu.md").read_text()
    assert gpu.read(tmp_path)["left_out"] == [
        "checks",
        "decode",
        "tuned",
        "block",
        "prefill",
        "host",
        "scaled",
        "variants",
        "narrow",
        "rest",
    ]


def test_a_section_that_breaks_does_not_hide_the_next(faked: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(run: Any) -> None:
        run.add("decode", {"n": 1})
        raise KeyError("of its own kind")

    faked.setattr(gpu_table, "render", lambda document: "a page")
    code, ran = sections(faked, tmp_path, decode=breaks)
    assert (code, ran) == (0, list(gpu.SECTIONS))
    assert gpu.read(tmp_path)["broken"] == {"decode": "KeyError: 'of its own kind'"}
    assert gpu.read(tmp_path)["decode"] == [{"n": 1}]


def test_an_error_of_the_gpu_ends_the_process(faked: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing works in it afterwards; what is left to do is done in the next one. Whoever was the first to be told, as the driver."""
    faulted: list[bool] = []

    def faults(run: Any) -> None:
        faulted.append(True)
        raise DriverError("the driver could not launch a kernel: CUDA_ERROR_ILLEGAL_ADDRESS")

    def synchronize() -> None:
        if faulted:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    faked.setattr(torch.cuda, "synchronize", synchronize)
    code, ran = sections(faked, tmp_path, checks=faults)
    assert (code, ran) == (3, ["proof", "checks"])
    assert "ILLEGAL_ADDRESS" in gpu.read(tmp_path)["broken"]["checks"]


def test_what_is_optional_may_break(faked: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = gpu_run.Run(tmp_path, time.time() + 60)

    def refuses() -> None:
        raise gpu_problems.WrongError("3 outputs are wrong")

    assert run.attempt("prefill 64x64, cusparselt", refuses) is None
    assert run.attempt("prefill 64x64, torch", lambda: 7) == 7
    assert run.document["broken"] == {"prefill 64x64, cusparselt": "WrongError: 3 outputs are wrong"}
    assert not gpu_run.Run(tmp_path, time.time() + 1).has_time("anything", 5)


def test_a_check_that_breaks_does_not_hide_the_next() -> None:
    def breaks() -> None:
        raise KeyError("of Triton's own kind")

    def right() -> None:
        pass

    found = dict(gpu_checks.run([breaks]))
    assert found["breaks"] is not None
    assert "KeyError" in found["breaks"]
    assert "CUDA" in str(dict(gpu_checks.run([right]))["right"]) or torch.cuda.is_available()


def test_what_a_whole_models_pruning_takes(tmp_path: Path) -> None:
    """The same code on a processor and on tiny blocks, with windows as long as the real ones."""
    width = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert gpu_pruning.WIDTH.keys() == {*width, "max_position_embeddings"}
    width["max_position_embeddings"] = gpu_pruning.WIDTH["max_position_embeddings"]
    settings = {"reconstruction": "sparsegpt", "samples": 2, "length": 2048, "device": "cpu"}
    kept: list[dict[str, Any]] = []
    result = gpu_pruning.measure(tmp_path, 3, 8, width, settings, kept.append)
    run = result["run"]
    assert len(run["done_at"]) == 3
    assert run["fused"] is False
    assert result == kept[-1] or len(kept[-1]["run"]["done_at"]) <= 3
    first, second, third = run["done_at"]
    assert result["block_seconds"] == pytest.approx(((second - first) + (third - second)) / 2)
    assert result["whole_seconds"] == pytest.approx(first + 7 * result["block_seconds"] + run["seconds"] - third)
    text = gpu_pruning.render({**result, "environment": {"machine": "none", "date": "2000-01-01"}})
    assert "3 of 3 blocks, done after" in text
    assert "so 8 would take" in text
    assert "(extrapolated, not run)" in text


def test_of_a_pruning_that_was_interrupted() -> None:
    run = {"done_at": [9.0, 12.0, 15.5], "seconds": None, "fused": None, "gpu_bytes": 5e9, "reserved_bytes": 6e9}
    found = gpu_pruning.extrapolated(run, 32)
    assert (found["block_seconds"], found["whole_seconds"]) == (3.25, 9 + 31 * 3.25)
    assert gpu_pruning.extrapolated({**run, "done_at": [9.0]}, 32)["whole_seconds"] is None
    settings = {"reconstruction": "sparsegpt", "samples": 2, "length": 2048}
    document = {"width": gpu_pruning.WIDTH, "settings": settings, "blocks": 5, "whole_blocks": 32, "run": run, **found}
    text = gpu_pruning.render({**document, "environment": {"machine": "none", "date": "2000-01-01"}})
    assert "3 of 5 blocks; **interrupted**, done after (s): 9.0, 12.0, 15.5." in text
    assert "5.0 GB in tensors, 6.0 GB reserved" in text


def test_a_whole_models_pruning_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_pruning"])
    with pytest.raises(SystemExit) as ended:
        gpu_pruning.main()
    assert ended.value.code == 2
    assert "there is no GPU to measure" in capsys.readouterr().err
