"""A run that is killed at any moment goes on and ends with the files of a run that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from compress import pipeline, pruner
from compress.errors import HalveError, NumericalError, OutputError
from compress.journal import Journal
from compress.space import bytes_needed
from tests import tiny_models
from tests.runs import (
    LENGTH,
    ROOT,
    SAMPLES,
    Halve,
    beside,
    calibration,
    command,
    compress,
    environment,
    flags,
    stored,
    tree,
)


class Killed(BaseException):
    """Stands for the end of a process in tests that need no other process."""


def stop_after(blocks: int) -> Any:
    def progress(done: int, total: int, text: str) -> None:
        if done == blocks and "error" in text:
            raise Killed

    return progress


def interrupted(source: Path, out: Path, *, blocks: int = 2, **settings: Any) -> Path:
    """The work directory of a run that ended after some blocks."""
    with pytest.raises(Killed):
        compress(source, out, checkpoint_seconds=0, progress=stop_after(blocks), **settings)
    assert not out.exists()
    return out.with_name(out.name + ".partial")


EVERYTHING = (
    *("--reconstruction", "admm", "--permutation", "fold", "--targets", "dense", "--allocate", "0.1"),
    *("--rotation", "heads", "--rotation-options", "steps=20"),
    *("--repair", "block", "--repair-options", "passes=1", "--repair-options", "rounds=1", "--training-samples", "16"),
    *("--distill", "640", "--distill-options", "batch=2"),
)
"""Every stage that writes something of its own."""


@pytest.mark.parametrize(
    "stages", [(), pytest.param(EVERYTHING, marks=pytest.mark.slow)], ids=["default", "everything"]
)
def test_killed_at_every_change_of_the_disk(stages: tuple[str, ...], tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    given = [str(source), "--calibration", str(calibration(tmp_path)), "--samples", "4", "--length", str(LENGTH)]
    given += ["--checkpoint-seconds", "0", *stages]
    done = subprocess.run(
        [sys.executable, "-m", "tests.compress.killing", str(tmp_path / "runs"), *given],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=3000 if stages else 300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    at_random, *history = json.loads(done.stdout)
    never_killed = history.pop()
    assert never_killed["codes"] == [0], never_killed
    assert len(history) > 40  # there are that many moments
    expected = tree(Path(never_killed["directory"]))
    assert expected.keys() == {f"out/{name}" for name in tree(Path(never_killed["directory"]) / "out")}
    for run in history:
        assert "Traceback" not in run["log"], run["log"]
        assert run["codes"][0] == -signal.SIGKILL
        assert run["codes"][-1] == 0, run
        assert 2 not in run["codes"] or not run["started"], run
        now = tree(Path(run["directory"]))
        assert now.keys() == expected.keys(), (run, now.keys() ^ expected.keys())
        assert [name for name in expected if now[name] != expected[name]] == [], run
        assert os.listdir(run["directory"]) == ["out"], run  # noqa: PTH208
    assert at_random["codes"].count(-signal.SIGKILL) > 0, at_random
    assert at_random["codes"][-1] == 0, at_random
    assert "Traceback" not in at_random["log"]
    assert tree(Path(at_random["directory"])) == expected
    assert os.listdir(at_random["directory"]) == ["out"]  # noqa: PTH208


@pytest.mark.parametrize("seconds", [0, 3600])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_goes_on_where_it_was(seconds: float, blocks: int, tmp_path: Path) -> None:
    source = tiny_models.build("gemma3", tmp_path / "source")
    expected = compress(source, tmp_path / "expected").directory
    out = tmp_path / "out"
    with pytest.raises(Killed):
        compress(source, out, checkpoint_seconds=seconds, progress=stop_after(blocks))
    steps: list[tuple[int, str]] = []
    compress(source, out, resume=True, progress=lambda done, _, text: steps.append((done, text)))
    pruned = [done for done, text in steps if "error" in text]
    # Activations are saved before a block; without them all is done again, once all is done nothing is.
    assert pruned == ([] if blocks == 3 else list(range(blocks if seconds == 0 else 1, 4)))
    assert tree(out) == tree(expected)
    assert beside(out) == ["calibration.txt", "expected", "out", "source"]


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_changes_are_refused_by_name(blocks: int, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source")
    other = tiny_models.build("llama", tmp_path / "other")
    out = tmp_path / "out"
    if blocks:
        partial = interrupted(source, out, blocks=blocks)
    else:
        with pytest.raises(Killed):
            compress(source, out, progress=lambda *_: (_ for _ in ()).throw(Killed))
        partial = out.with_name("out.partial")
    left = tree(partial)

    def refusal(model: Path = source, **settings: Any) -> str:
        with pytest.raises(OutputError, match="was made differently") as caught:
            compress(model, out, resume=True, **settings)
        assert tree(partial) == left, "what was done must not be lost"
        return str(caught.value)

    assert f"recipe.samples: {SAMPLES - 1} instead of {SAMPLES}" in refusal(samples=SAMPLES - 1)
    assert "recipe.metric: 'wanda' instead of None" in refusal(metric="wanda")
    assert "recipe.format: 'dense' instead of 'packed'" in refusal(format="dense")
    assert "recipe.reconstruction_options.damping: 0.1 instead of None" in refusal(
        reconstruction_options={"damping": 0.1}
    )
    message = refusal(other)
    assert f"model: {str(other)!r} instead of {str(source)!r}" in message

    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json"):
        file = source / name
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        os.utime(file, ns=(times[0], times[1] + 10**9))
        assert f"source.{name}" in refusal()
        os.utime(file, ns=times)
    text = calibration(tmp_path)
    content = text.read_text()
    text.write_text("Once upon a time. " + content)
    assert "calibration: " in refusal()
    text.write_text(content)

    with pytest.raises(HalveError):  # and a call that fails for another reason loses nothing either
        compress(source, out, resume=True, calibration=str(tmp_path / "missing.txt"))
    assert tree(partial) == left
    compress(source, out, resume=True)
    assert beside(out) == ["calibration.txt", "other", "out", "source"]


def test_a_changed_call_is_refused_after_the_last_rename_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    out = tmp_path / "out"
    replace = Path.replace

    def killed_after(self: Path, target: Path) -> Path:
        result = replace(self, target)
        if target == out:
            raise Killed
        return result

    monkeypatch.setattr(Path, "replace", killed_after)
    with pytest.raises(Killed):
        compress(source, out)
    monkeypatch.undo()
    assert beside(out) == ["calibration.txt", "out", "out.partial", "source"]
    with pytest.raises(OutputError, match=r"recipe\.seed: 1 instead of 0"):
        compress(source, out, seed=1, resume=True)
    done = compress(source, out, resume=True)
    assert done.report["summary"]["layers_pruned"] == 7
    assert beside(out) == ["calibration.txt", "out", "source"]


def test_changed_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"one")
    converted: list[bytes] = []

    def from_gguf(file: Path, directory: Path) -> Path:
        converted.append(file.read_bytes())
        return tiny_models.build("llama", directory, layers=2, seed=len(converted))

    monkeypatch.setattr("compress.sources.from_gguf", from_gguf)
    out = tmp_path / "out"
    interrupted(gguf, out, blocks=1)
    gguf.write_bytes(b"another")
    with pytest.raises(OutputError, match=r"source\.model\.gguf"):
        compress(gguf, out, resume=True)
    assert converted == [b"one"]

    # A conversion that is left over from a run that never got to its first block is not taken for another file's.
    (tmp_path / "out.partial" / "manifest.json").unlink()
    compress(gguf, out)
    assert converted == [b"one", b"another"]
    assert beside(out) == ["calibration.txt", "model.gguf", "out"]


def test_nothing_to_resume(tmp_path: Path, halve: Halve) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    called = halve(*flags(source, tmp_path / "out"), "--resume")
    assert called.code == 2
    assert "nothing to resume" in called.message
    assert "run without --resume" in called.message
    assert beside(source) == ["calibration.txt", "source"]
    # A finished run is nothing to resume either, and stays as it is.
    compress(source, tmp_path / "out")
    before = tree(tmp_path)
    called = halve(*flags(source, tmp_path / "out"), "--resume")
    assert called.code == 2
    assert "not empty" in called.message
    assert tree(tmp_path) == before


def test_interrupted_run_is_in_the_way(tmp_path: Path, halve: Halve) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    partial = interrupted(source, tmp_path / "out", blocks=1)
    left = tree(partial)
    called = halve(*flags(source, tmp_path / "out"))
    assert called.code == 2
    assert "an interrupted run is in" in called.message
    assert "--resume" in called.message
    assert tree(partial) == left
    assert halve(*flags(source, tmp_path / "out"), "--resume").code == 0


def test_attention_of_the_interrupted_run(tmp_path: Path) -> None:
    """It is taken again, whatever a resumed run is called with: another one gives other bits."""
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    compress(source, tmp_path / "whole", attention="eager")
    interrupted(source, tmp_path / "out", blocks=1, attention="eager")
    compress(source, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_two_runs_at_a_time(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    out = tmp_path / "out"
    refusals: list[str] = []

    def second_run(done: int, total: int, text: str) -> None:
        for resume in (True, False):
            with pytest.raises(OutputError) as caught:
                compress(source, out, resume=resume)
            refusals.append(str(caught.value))

    compress(source, out, progress=second_run)
    assert len(refusals) >= 6
    assert all("another run is writing to" in refusal for refusal in refusals), refusals
    assert tree(out) == tree(compress(source, tmp_path / "again").directory)


def test_second_process_is_refused(tmp_path: Path, halve: Halve) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(*flags(source, out)), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        while process.poll() is None and not (tmp_path / "out.partial" / "manifest.json").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None
        called = halve(*flags(source, out), "--resume")
        assert called.code == 2
        assert "another run is writing to" in called.message
    finally:
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert beside(out) == ["calibration.txt", "out", "source"]


@pytest.mark.parametrize(
    "settings", [{"samples": 10_000}, {"calibration": "no-such-text.txt"}, {"ignore": ("*.no_proj",)}, {"length": 5000}]
)
def test_failed_new_run_leaves_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    calibration(tmp_path)
    with pytest.raises(HalveError):
        compress(source, tmp_path / "out", **settings)
    assert beside(source) == ["calibration.txt", "source"]
    compress(source, tmp_path / "out")


@pytest.mark.parametrize("block", [0, 1])
def test_a_failure_keeps_the_blocks_that_are_finished(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the first block: nothing is worth keeping. In the second: hours of others may be, and where they are is said."""
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    expected = tree(compress(source, tmp_path / "whole" / "out").directory)
    prune = pruner.prune_layer

    def failing(name: str, *args: Any) -> Any:
        if name.startswith(f"model.layers.{block}."):
            raise NumericalError(f"{name}: not finite")
        return prune(name, *args)

    monkeypatch.setattr(pruner, "prune_layer", failing)
    said = r"q_proj: not finite" + (r" \(what was finished is kept in .*out\.partial\)" if block else "$")
    with pytest.raises(NumericalError, match=said):
        compress(source, tmp_path / "out")
    assert beside(source) == ["calibration.txt", *(["out.partial"] if block else []), "source", "whole"]
    monkeypatch.undo()
    if block:
        assert tree(compress(source, tmp_path / "out", resume=True).directory) == expected


def test_the_space_that_is_asked_for_is_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end, when finished blocks and the artefact lie side by side; with a distillation, blocks twice."""
    source = tiny_models.build("llama", tmp_path / "source", layers=3, hidden_size=256, intermediate_size=1024)
    finish, asked, used = Journal.finish, [], []

    def watched(self: Journal, final: Path) -> None:
        used.append(sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file()))
        finish(self, final)

    class Disk:
        free = 0

    monkeypatch.setattr(Journal, "finish", watched)
    for settings in ({}, {"distill": 200}, {"dtype": "float32"}, {"dtype": "float16"}, {"format": "dense"}):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.shutil, "disk_usage", lambda path: Disk)
            patch.setattr(pipeline, "bytes_needed", lambda *given: asked.append(bytes_needed(*given)) or asked[-1])
            with pytest.raises(OutputError, match=r"not enough disk space.*needs about 0\.0\d GB"):
                compress(source, tmp_path / "full", samples=8, **settings)
        compress(source, tmp_path / f"out{len(used)}", samples=8, **settings)
    for needed, space in zip(used, asked, strict=True):
        assert needed <= space < 1.5 * needed


def test_damaged_activations_are_noticed(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source")
    partial = interrupted(source, tmp_path / "out", blocks=2)
    (file,) = partial.glob("activations-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(HalveError, match=file.name):
        compress(source, tmp_path / "out", resume=True)


def test_block_files_hold_what_the_artefact_holds(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    partial = interrupted(source, tmp_path / "out", blocks=2)
    parts = {}
    for file in sorted(partial.glob("block-*.safetensors")):
        parts.update(load_file(file))
    compress(source, tmp_path / "out", resume=True)
    whole = stored(tmp_path / "out")
    assert parts
    assert all((parts[name] == whole[name]).all() for name in parts)
