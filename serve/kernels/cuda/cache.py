"""Compiled kernels on disk, so that they are compiled once for a machine and not once for a process.

A file is named after all that its content depends on. It is written under another name and then renamed, so processes that
do so at the same time only do it twice, and it carries a checksum, so one that is damaged is made anew. Where nothing can
be written (a read-only directory, a full disk) kernels are compiled for this process alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

_MAGIC = b"halve cubin 1\n"
_DIGEST_BYTES = 32

logger = logging.getLogger(__name__)


def directory() -> Path:
    """``HALVE_CACHE_DIR``, or ``halve`` in the user's cache directory (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    if given := os.environ.get("HALVE_CACHE_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~"), ".cache")) / "halve"  # noqa: PTH111  never raises


def cubin(source: str, arch: int, version: tuple[int, int], make: Callable[[], bytes]) -> bytes:
    """The code for a source, from the cache or made now and kept there."""
    path = directory() / _name(source, arch, version)
    if (kept := _read(path)) is not None:
        return kept
    made = make()
    _write(path, made)
    return made


def _name(source: str, arch: int, version: tuple[int, int]) -> str:
    digest = hashlib.sha256(source.encode()).hexdigest()
    return f"sparse24-sm_{arch}-nvrtc_{version[0]}.{version[1]}-{digest[:24]}.cubin"


def _read(path: Path) -> bytes | None:
    """The content, if the file is there and whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.info("%s cannot be read: %s", path, error)
        return None
    head, digest = len(_MAGIC), len(_MAGIC) + _DIGEST_BYTES
    code = content[digest:]
    if content[:head] != _MAGIC or content[head:digest] != hashlib.sha256(code).digest():
        logger.warning("%s is damaged, so its kernels are compiled again", path)
        return None
    return code


def _write(path: Path, code: bytes) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".partial", delete=False) as file:
            temporary = Path(file.name)
            file.write(_MAGIC + hashlib.sha256(code).digest() + code)
        temporary.replace(path)
    except OSError as error:
        logger.info("compiled kernels are not kept: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
