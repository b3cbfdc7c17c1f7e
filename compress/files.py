"""Safetensors files in and out: read a tensor at a time, write without holding a file in memory, seal with a digest.

A sealed file carries ``halve_sha256`` in its header's metadata: the SHA-256 of the whole file with the 64
characters of the digest themselves replaced by zeros. It covers names, shapes and bytes, needs no second
file, and other readers ignore it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import CorruptCheckpointError, OutputError, SourceError

DIGEST_KEY = "halve_sha256"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_NO_DIGEST = "0" * 64
_CHUNK = 1 << 24

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the header alone."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return _numel(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; ``read`` is called when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return _numel(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The safetensors files of a directory as one mapping from name to tensor; tensors are read when asked for.

    Raises:
        SourceError: there are none, or the index names files that are missing.
        CorruptCheckpointError: a file is truncated or is not safetensors.
    """

    def __init__(self, directory: Path, files: list[Path] | None = None) -> None:
        self.directory = directory
        self.files = _find_files(directory) if files is None else files
        self.info: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in read_header(file)[0].items():
                if name in self.info:
                    raise CorruptCheckpointError(
                        f"{name} is both in {self.info[name].file} and in {file}; one of them is stale"
                    )
                self.info[name] = info

    def __contains__(self, name: str) -> bool:
        return name in self.info

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def read(self, name: str, device: str = "cpu", rows: int | None = None) -> Tensor:
        """The tensor as it is stored; ``rows``: only so many of the first."""
        info = self.info[name]
        try:
            with safe_open(info.file, framework="pt", device=device) as file:
                return file.get_tensor(name) if rows is None else file.get_slice(name)[:rows]
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpointError(f"{info.file}: cannot read {name}: {error}") from None

    def entry(self, name: str, dtype: torch.dtype | None = None) -> Entry:
        """The tensor as something to write, cast to ``dtype`` if it is a floating-point one."""
        info = self.info[name]
        to = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
        return Entry(name, to, info.shape, lambda: self.read(name).to(to))


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """The tensors, the metadata and the length of the header of a safetensors file, checked against its size.

    Raises:
        CorruptCheckpointError: the file is truncated, has trailing bytes, or is not safetensors.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise ValueError(f"the header says it has {length} bytes, the file has {size}")
            header: dict[str, Any] = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the header's metadata are not a mapping of texts")
        tensors = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"halve does not know the dtype {entry['dtype']} of {name}")
            info = TensorInfo(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if begin != end or stop - begin != info.nbytes:
                raise ValueError(f"the header's offsets of {name} do not fit its shape and dtype")
            tensors[name] = info
            end = stop
        if size != 8 + length + end:
            raise ValueError(f"the header describes {8 + length + end} bytes, the file has {size}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{file} is truncated or damaged: {error}. Get the file again.") from None
    return tensors, metadata, 8 + length


def write_shard(path: Path, entries: Iterable[Entry]) -> None:
    """Writes one sealed safetensors file, a tensor at a time, under a temporary name first."""
    # Wide dtypes first keeps every tensor aligned to its own width.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", DIGEST_KEY: _NO_DIGEST}}
    offset = 0
    for entry in ordered:
        assert entry.name not in header, f"{entry.name} is written twice"
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as handle:
        head = struct.pack("<Q", len(text)) + text
        digest.update(head)
        handle.write(head)
        for entry in ordered:
            tensor = entry.read()
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise AssertionError(
                    f"{entry.name}: announced {entry.dtype} {entry.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
                )
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            handle.write(data)
        handle.seek(8 + text.index(_NO_DIGEST.encode()))
        handle.write(digest.hexdigest().encode())
        handle.flush()
        os.fsync(handle.fileno())


def check_digest(file: Path) -> bool:
    """Reads the whole file and compares it with its digest. False where it carries none.

    Raises:
        CorruptCheckpointError: the digest does not fit.
    """
    _, metadata, length = read_header(file)
    expected = metadata.get(DIGEST_KEY)
    if expected is None:
        return False
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        head = handle.read(length)
        digest.update(head.replace(expected.encode(), _NO_DIGEST.encode(), 1))
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CorruptCheckpointError(f"{file} is not what halve wrote: its SHA-256 does not fit. Get the file again.")
    return True


def seal(directory: Path) -> str | None:
    """What a checkpoint's weights are known by, from the headers alone: the SHA-256 of its files' names and digests.

    None where a file carries no digest, or there is none.
    """
    known = hashlib.sha256()
    try:
        files = TensorFiles(directory).files
    except SourceError:
        return None
    for file in files:
        digest = read_header(file)[1].get(DIGEST_KEY)
        if digest is None:
            return None
        known.update(f"{file.name} {digest}\n".encode())
    return known.hexdigest()


def file_digest(file: Path) -> str:
    """The SHA-256 of a file as it is."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def inside(directory: Path, name: str, said_by: Path) -> Path:
    """The path of a file that ``said_by``, a file of a checkpoint, names.

    Raises:
        CorruptCheckpointError: it is not below the checkpoint's directory.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CorruptCheckpointError(
            f"{said_by} names {name!r}, which is outside of {directory}; get the checkpoint again"
        )
    return directory / name


def sibling(directory: Path, suffix: str) -> Path:
    """The path beside a directory that is to be made, where it is put together: its name with a suffix."""
    if directory.name in ("", ".."):
        raise OutputError(f"--out {str(directory)!r} names no new directory; give it a name")
    return directory.with_name(directory.name + suffix)


def try_place(path: Path) -> None:
    """Finds out, before hours of work, whether a file can be written there; leaves nothing behind.

    Raises:
        OutputError: it is a directory, or the place cannot be written.
    """
    temporary = _temporary(path)
    try:
        if path.is_dir():
            raise OutputError(f"--out {path} is a directory; name a file in it")
        if not path.resolve().parent.is_dir():
            raise OutputError(f"--out {path}: there is no directory {path.resolve().parent}")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OutputError(f"--out {path} cannot be written: {error.strerror}") from None


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` that takes its name when the block ends well and goes when it does not.

    Raises:
        OutputError: there is no space left, or the place cannot be written.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # a read-only place refuses this, too; the first error is the one to explain
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explain_os_error(error, path) from None
        raise


def explain_os_error(error: OSError, path: Path) -> Exception:
    """An OutputError for the failures that a user can mend, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"no disk space left while writing {path}; free some and run the same command again (`halve compress` goes on with --resume)"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        return OutputError(f"cannot write {path}: {error.strerror}")
    return error


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _find_files(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not inside(directory, name, index).is_file()]
            if not names:
                raise ValueError("it names no tensor")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CorruptCheckpointError(f"{index} is not a safetensors index: {error}") from None
        if missing:
            raise CorruptCheckpointError(
                f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(names)} files are missing)"
            )
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if (directory / SINGLE_NAME) in files:
        return [directory / SINGLE_NAME]
    if not files:
        others = [
            path.name
            for path in sorted(directory.glob("*"))
            if path.suffix in {".bin", ".pt", ".pth", ".h5", ".msgpack"}
        ]
        hint = f"; {others[0]} has to be converted to safetensors first" if others else ""
        raise SourceError(f"{directory} has no .safetensors files{hint}")
    return files


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
