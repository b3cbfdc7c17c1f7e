"""The result files of a report, and which checkpoint each of them is of."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.measure import documents
from serve.measure.compare import compared
from serve.measure.documents import Side
from serve.measure.report.checkpoint import Checkpoint


@dataclass(frozen=True)
class Result:
    """One document of `halve eval` or `halve bench`: what was measured, and the dense model beside it, if there was one."""

    path: Path
    sha256: str
    document: dict[str, Any]
    measured: Side
    dense: Side | None

    @property
    def kind(self) -> str:
        return str(self.document["kind"])

    @property
    def directory(self) -> str | None:
        """Of the model that was measured, as it was called then; None where only an address is known."""
        found = self.measured.entry.get("directory")
        return found if isinstance(found, str) else None

    @functools.cached_property
    def beside_dense(self) -> dict[str, dict[str, Any]]:
        """The figures beside those of the dense model, as `halve compare` finds them."""
        return compared(self.measured, self.dense) if self.dense else {}

    @property
    def environment(self) -> dict[str, Any]:
        return dict(self.document.get("environment") or {})


def load(path: Path) -> Result:
    """Reads a result.

    Raises:
        DocumentError: it is of another kind, damaged, or not there.
    """
    document, digest = documents.load(path, "report")
    measured, dense = documents.sides(path, document, digest)
    return Result(path, digest, document, measured, dense)


def assign(results: list[Result], checkpoints: list[Checkpoint]) -> tuple[dict[Path, list[Result]], list[str]]:
    """The results of each checkpoint by its directory, and what is wrong with those that are of none."""
    by_directory: dict[Path, list[Result]] = {checkpoint.directory: [] for checkpoint in checkpoints}
    left_out = []
    for result in results:
        owners = [checkpoint for checkpoint in checkpoints if belongs(result, checkpoint)]
        if len(owners) > 1:  # the same weights in several places
            owners = [owner for owner in owners if is_named(result, owner)] or owners
        if len(owners) == 1:
            by_directory[owners[0].directory].append(result)
        elif owners:
            named = " and ".join(str(owner.directory) for owner in owners)
            left_out.append(f"{result.path} could be of {named} by the name in it, and was left out; measure again")
        else:
            what = f"is of {result.directory}" if result.directory else "does not say of which directory it is"
            other = "another checkpoint" if result.directory else "so it"
            left_out.append(f"{result.path} {what}, {other} {'and ' if result.directory else ''}was left out")
    return by_directory, left_out


def belongs(result: Result, checkpoint: Checkpoint) -> bool:
    """Whether a result is of that checkpoint: by the digest of its weights, or (where one of the two has none) by its path.

    Paths are the same where one is the end of the other: results travel to other machines and working directories.
    """
    sealed = result.measured.entry.get("weights_sha256")
    if isinstance(sealed, str) and checkpoint.sealed is not None:
        return sealed == checkpoint.sealed
    return is_named(result, checkpoint)


def is_named(result: Result, checkpoint: Checkpoint) -> bool:
    """Whether the directory in a result is that of the checkpoint."""
    return result.directory is not None and _same_end(Path(result.directory), checkpoint.directory)


def _same_end(a: Path, b: Path) -> bool:
    return (
        a.resolve() == b.resolve()
        or _is_end(a, b.resolve())
        or _is_end(a, Path.cwd() / b)
        or (a.is_absolute() and _is_end(b, a))
    )


def _is_end(end: Path, path: Path) -> bool:
    parts = [part for part in end.parts if part != end.anchor]
    return bool(parts) and ".." not in parts and list(path.parts[-len(parts) :]) == parts
