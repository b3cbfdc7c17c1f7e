"""The work directory of a run: what is done already, so that a run that is killed at any moment can go on.

``OUT.partial/`` holds a manifest, one file for each finished block, and from time to time the activations
that go into the next block. Everything is written under a temporary name, synced and renamed, and the
manifest is replaced last, so whatever the manifest names is whole. Blocks after the last saved activations
are done again; a run is deterministic, so they come out the same.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from compress.errors import CorruptCheckpointError, OutputError
from compress.files import Entry, check_digest, explain_os_error, sibling, write_shard, write_text

MANIFEST = "manifest.json"
LOCK = "lock"
_OURS = re.compile(
    r"(block|distilled|activations)-[0-9]{5}\.safetensors|[a-z_]+\.activations|[0-9]+\.targets|gradients|source|final|"
    r"manifest\.json"
)
"""What a run makes in its work directory."""


class Journal:
    """The state of one run on disk.

    Args:
        out: the directory that the run will make; the work directory is its sibling ``OUT.partial``.
        identity: what must be the same for a run to go on: recipe, source, calibration, device, attention, versions.
        resume: go on with what is there.
        interval: seconds between saved activations.

    Raises:
        OutputError: the output directory is not empty, an interrupted run is in the way, or (resuming) there is
            none or it was made with another recipe or source.
    """

    def __init__(self, out: Path, *, resume: bool, interval: float = 60.0) -> None:
        self.out = out
        self.directory = work_directory(out)
        self._interval = interval
        self._saved_at = time.monotonic()
        self._manifest: dict[str, Any] = {}
        self._lock = None
        self._resumed = resume
        try:
            self._enter()
        except BaseException:
            self.close()
            raise

    def _enter(self) -> None:
        """Looks at what is there and takes the lock."""
        out, existing = self.out, self.directory / MANIFEST
        if out.is_symlink() or (out.is_dir() and out.is_mount()):
            raise OutputError(
                f"{out} is {'a link' if out.is_symlink() else 'a mount point'}, which cannot be replaced by the artefact in the end; "
                "choose a new directory inside of it as --out"
            )
        if self.directory.is_dir():
            if foreign := [path for path in self._contents() if not _is_ours(path.name)]:
                raise OutputError(
                    f"{self.directory} is where this run would work, and it holds {foreign[0].name}, which is not halve's; "
                    "move that directory, or choose another --out"
                )
            self._take_lock()  # first: whether a run is interrupted or still going on shows only here
        if self._resumed and existing.is_file():
            self._manifest = json.loads(existing.read_text())
        occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
        # An empty work directory beside an artefact is what `finish` leaves when it is killed at its very end.
        remainder = self._resumed and self.directory.is_dir() and not self._contents()
        self.completed = occupied and (self._manifest.get("assembled", False) or remainder)
        if occupied and not self.completed:
            raise OutputError(f"{out} is there already and is not empty; choose another --out, or remove it")
        if self._resumed:
            if not self._manifest and not self.completed:
                raise OutputError(
                    f"there is nothing to resume: {self.directory} holds no interrupted run; run without --resume"
                )
            return
        if existing.is_file():
            raise OutputError(
                f"an interrupted run is in {self.directory}; go on with --resume, or remove that directory"
            )
        if self._lock is None:
            try:
                self.directory.mkdir(parents=True)
            except OSError as error:
                raise explain_os_error(error, self.directory) from None
            self._take_lock()
        self._clear(self._contents())  # of a run that was killed before its manifest was written

    def _take_lock(self) -> None:
        try:
            self._lock = (self.directory / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another run is writing to {self.directory} right now") from None
        except OSError as error:
            raise explain_os_error(error, self.directory) from None

    def _contents(self) -> list[Path]:
        try:
            return [path for path in self.directory.iterdir() if path.name != LOCK]
        except OSError as error:
            raise explain_os_error(error, self.directory) from None

    def _clear(self, paths: list[Path]) -> None:
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def open(self, identity: dict[str, Any]) -> None:
        """Starts the manifest, or compares the resumed one with this run."""
        if self.completed and not self._manifest:
            return
        if not self._manifest:
            self._manifest = {"identity": identity, "blocks": {}, "activations": None, "assembled": False}
            self._write()
            return
        before = self._manifest["identity"]
        if before != identity:
            changes = _differences(before, json.loads(json.dumps(identity)))
            raise OutputError(
                f"the interrupted run in {self.directory} was made differently: {'; '.join(changes)}. "
                "Repeat the call as it was, or remove that directory and start again"
            )

    def begun_with(self, name: str) -> Any:
        """A field of the identity of the run that is resumed; None for a new run."""
        return self._manifest.get("identity", {}).get(name)

    def abandon_if_new(self) -> None:
        """Removes the work directory of a run that failed before it did anything worth keeping; never a resumed one's."""
        if not self._resumed and not self._manifest.get("blocks") and not self._manifest.get("allocation"):
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def next_block(self) -> int:
        """The block to go on with: the first one, or the one that saved activations go into."""
        saved = self._manifest["activations"]
        return saved["block"] if saved else 0

    def finished(self, blocks: int) -> bool:
        """Whether all blocks are on disk, so that no activations are needed any more."""
        return all(str(index) in self._manifest["blocks"] for index in range(blocks))

    def block_file(self, index: int) -> Path:
        """Where a finished block's tensors lie: as the last stage that is done left them."""
        stage = "distilled" if self.distillation is not None else "block"
        return self.directory / f"{stage}-{index:05d}.safetensors"

    @property
    def distillation(self) -> dict[str, Any] | None:
        """What was noted of the distillation, or None before it is done."""
        return self._manifest.get("distillation")

    def save_distilled(self, blocks: Iterable[dict[str, Tensor]], record: dict[str, Any]) -> None:
        """Writes every block again, beside what is there, and notes it once all are written."""
        for index, tensors in enumerate(blocks):
            write_shard(self.directory / f"distilled-{index:05d}.safetensors", _entries(tensors))
        self._manifest["distillation"] = record
        self._write()

    @property
    def allocation(self) -> dict[str, Any] | None:
        """What was noted of the allocation, or None before it is done."""
        return self._manifest.get("allocation")

    def save_allocation(self, record: dict[str, Any]) -> None:
        """Notes which linears stay dense; before any block."""
        self._manifest["allocation"] = record
        self._write()

    def record(self, index: int) -> dict[str, Any]:
        """What was noted of a finished block."""
        return self._manifest["blocks"][str(index)]

    def save_block(self, index: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Writes a finished block and notes it."""
        write_shard(self.block_file(index), _entries(tensors))
        self._manifest["blocks"][str(index)] = record
        self._write()

    def save_activations(self, index: int, activations: Mapping[str, list[Tensor]]) -> None:
        """Writes the activations that go into block ``index``, of every kind one tensor a batch, if the last ones are old
        enough."""
        if time.monotonic() - self._saved_at < self._interval:
            return
        file = self.directory / f"activations-{index:05d}.safetensors"
        named = {
            f"{kind}.{batch:06d}": states
            for kind, batches in activations.items()
            for batch, states in enumerate(batches)
        }
        write_shard(file, _entries(named))
        before = self._manifest["activations"]
        self._manifest["activations"] = {"block": index, "file": file.name}
        self._write()
        if before and before["file"] != file.name:
            (self.directory / before["file"]).unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def load_activations(self) -> dict[str, list[Tensor]] | None:
        """The saved activations of `next_block` by kind, or None where none were saved yet."""
        saved = self._manifest["activations"]
        if not saved:
            return None
        file = self.directory / saved["file"]
        if not file.is_file():
            raise CorruptCheckpointError(f"{file} is missing; remove {self.directory} and start again")
        check_digest(file)
        found: dict[str, list[Tensor]] = {}
        with safe_open(file, framework="pt") as handle:
            for name in sorted(handle.keys()):
                found.setdefault(name.rpartition(".")[0], []).append(handle.get_tensor(name))
        return found

    def finish(self, final: Path) -> None:
        """Gives the assembled directory ``final`` its name and removes the work directory, the manifest last."""
        if not self.completed:
            self._manifest["assembled"] = True
            self._write()
            try:
                if self.out.is_dir():
                    self.out.rmdir()  # empty, as checked at the start
                final.replace(self.out)
            except OSError as error:
                raise explain_os_error(error, self.out) from None
        manifest = self.directory / MANIFEST
        self._clear([path for path in self._contents() if path != manifest])
        (self.directory / LOCK).unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)
        self.directory.rmdir()
        self.close()

    def close(self) -> None:
        """Lets another process resume the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _write(self) -> None:
        write_text(self.directory / MANIFEST, json.dumps(self._manifest))


def _is_ours(name: str) -> bool:
    """Whether a run made it, or was writing it."""
    return _OURS.fullmatch(name.removeprefix(".").removesuffix(".tmp")) is not None


def work_directory(out: Path) -> Path:
    """``OUT.partial``."""
    return sibling(out, ".partial")


def _entries(tensors: dict[str, Tensor]) -> list[Entry]:
    return [
        Entry(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()
    ]


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    """``"recipe.samples: 64 instead of 128"`` for each leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            found += _differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
        return found
    return [] if before == now else [f"{where}: {now!r} instead of {before!r}"]
