"""The kernel table of this machine on disk, so that a shape is measured once.

A file is named after the device, the threads and what environment variables asked for, and says what it was measured with. One that is damaged, or of another
version, code path or number of threads, is not used: the caller gets the reason, and measures again. It is written under
another name and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from compress.version import versions
from serve.kernels.cpu import backend as cpu
from serve.kernels.cpu import library
from serve.kernels.cuda import beside, prefill
from serve.kernels.cuda.cache import directory
from serve.measure.environment import environment
from serve.measure.kernel_entries import Entry, Failure, Shape, Way


class Identity(BaseModel):
    """What a table holds for, and only for.

    Attributes:
        kernels: the code path and a digest of the library on a processor; the compute capability and a digest of the kernels'
            sources on a GPU.
        backend: what ``HALVE_BACKEND`` asked for.
        many_rows: how a GPU multiplies many rows, as ``HALVE_PREFILL`` and ``HALVE_KEEP_BOTH`` asked. Each code path, backend that was asked
            for, and such way has a file of its own: to try one does not cost the table of another.
    """

    model_config = ConfigDict(extra="forbid")

    device: str
    threads: int
    kernels: str
    backend: str
    halve: str
    torch: str
    many_rows: str = "dense"

    @classmethod
    def of(cls, device: torch.device) -> Identity:
        """Of this process."""
        found, using = environment(device), versions()
        return cls(
            device=found["machine"],
            threads=found["threads"] if device.type == "cpu" else 1,
            kernels=_kernels(device),
            backend=os.environ.get("HALVE_BACKEND", "auto"),
            halve=using["halve"],
            torch=using["torch"],
            many_rows=_many_rows(device),
        )


GPU_KERNELS = Path(cpu.__file__).parents[1]


class KernelTable(BaseModel):
    """The content of a file."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    identity: Identity
    entries: list[Entry]
    failures: list[Failure] = []
    ways: list[Way] = []


def _many_rows(device: torch.device) -> str:
    if device.type != "cuda":
        return "dense"
    return f"{prefill.wanted()}{'-kept' if beside.wanted() else ''}"


def _kernels(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor} {sources_digest()}"
    if cpu.path() is None:
        return "none"
    return f"{cpu.path()} {hashlib.sha256(library.find().path.read_bytes()).hexdigest()[:16]}"


@cache
def sources_digest() -> str:
    """Of all that decides how fast the kernels of GPUs are, but for what it is compiled with."""
    files = [*sorted((GPU_KERNELS / "cuda").rglob("*.cu*")), *sorted(GPU_KERNELS.rglob("*.py"))]
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def path_of(identity: Identity) -> Path:
    """Where the table of a device lies."""
    name = re.sub(r"[^a-z0-9]+", "-", identity.device.lower()).strip("-")
    asked = [
        *(identity.many_rows for _ in range(identity.many_rows != "dense")),
        *(f"only-{identity.backend}" for _ in range(identity.backend != "auto")),
    ]
    path = identity.kernels.split(maxsplit=1)[0]  # of the code
    return directory() / "kernel-tables" / f"{'-'.join([name, str(identity.threads), path, *asked])}.json"


def load(identity: Identity) -> tuple[list[Entry], str | None]:
    """What was measured with this very device, versions and threads; and why there is nothing, if a file is there."""
    table, why = _read(identity)
    return table.entries, why


def failures(identity: Identity) -> list[Failure]:
    """The backends that could not be measured for a shape."""
    return _read(identity)[0].failures


def ways(identity: Identity) -> list[Way]:
    """The ways that were the fastest."""
    return _read(identity)[0].ways


def _read(identity: Identity) -> tuple[KernelTable, str | None]:
    path, nothing = path_of(identity), KernelTable(identity=identity, entries=[])
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return nothing, None
    except OSError as error:
        return nothing, f"the kernel table {path} cannot be read ({error.strerror}), so it is measured again"
    table = _parse(content)
    if table is None:
        return nothing, f"the kernel table {path} is damaged, so it is measured again"
    if table.identity != identity:
        then, now = table.identity.model_dump(), identity.model_dump()
        changed = ", ".join(f"{key} was {then[key]!r} and is {now[key]!r}" for key in now if then[key] != now[key])
        return nothing, f"the kernel table {path} is out of date ({changed}), so it is measured again"
    return table, None


def save(
    identity: Identity, entries: Iterable[Entry], failures: Iterable[Failure] = (), ways: Iterable[Way] = ()
) -> str | None:
    """Adds entries and ways to the table, in the place of older ones for the same shape and backend; gives the reason if that cannot be.

    A backend that failed for a shape keeps no entries of it, until it is measured again.
    """
    path, old = path_of(identity), _read(identity)[0]
    new, failed = {_key(entry): entry for entry in entries}, {_side(failure): failure for failure in failures}
    measured = {_side(entry) for entry in new.values()}
    failed = {
        side: failure for side, failure in {_side(f): f for f in old.failures}.items() if side not in measured
    } | failed
    kept = {
        key: entry
        for key, entry in ({_key(entry): entry for entry in old.entries} | new).items()
        if _side(entry) not in failed
    }
    fastest = {(*_side(way), way.rows): way for way in [*old.ways, *ways]}
    table = KernelTable(
        identity=identity,
        entries=list(kept.values()),
        failures=list(failed.values()),
        ways=list(fastest.values()),
    ).model_dump()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, suffix=".partial", delete=False
        ) as file:
            temporary = Path(file.name)
            json.dump({"sha256": _digest(table), "table": table}, file)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        return f"the kernel table is not kept: {error}"
    return None


def find(entries: Sequence[Entry], shape: Shape, rows: int, dtype: str) -> list[Entry]:
    """What is known of a shape at a number of rows, one entry for each backend."""
    return [e for e in entries if e.shape == shape and e.rows == rows and e.dtype == dtype]


def _parse(content: bytes) -> KernelTable | None:
    """The table, if the file is whole."""
    try:
        document = json.loads(content)
        if document["sha256"] != _digest(document["table"]):
            return None
        return KernelTable.model_validate(document["table"])
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        return None


def _digest(table: object) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _key(entry: Entry) -> tuple[Shape, int, str, str]:
    return entry.shape, entry.rows, entry.dtype, entry.backend


def _side(measured: Entry | Failure | Way) -> tuple[Shape, str, str]:
    return measured.shape, measured.dtype, measured.backend
