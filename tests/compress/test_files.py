"""Safetensors files: what is written can be read by anyone, and no damage goes unnoticed."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import CorruptCheckpointError, OutputError, SourceError
from compress.files import (
    DIGEST_KEY,
    INDEX_NAME,
    SINGLE_NAME,
    Entry,
    TensorFiles,
    check_digest,
    explain_os_error,
    file_digest,
    read_header,
    replacing,
    write_shard,
    write_text,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.int64,
    torch.uint64,
    torch.float64,
]
SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (3, 7), (2, 3, 4)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bytes of that dtype, NaNs included."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    count = torch.Size(shape).numel()
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)


def entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def same(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A small sealed file: a scalar, an empty tensor, a few values of two widths."""
    path = tmp_path / SINGLE_NAME
    tensors = {"a": torch.tensor(1.5), "none": torch.zeros(0, 2), "b": torch.arange(5, dtype=torch.uint8)}
    write_shard(path, [entry(name, tensor) for name, tensor in tensors.items()])
    return path


def test_all_dtypes_and_shapes_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"{dtype}.{shape}": drawn(shape, dtype) for dtype in DTYPES for shape in SHAPES}
    path = tmp_path / SINGLE_NAME
    write_shard(path, [entry(name, tensor) for name, tensor in tensors.items()])
    assert check_digest(path)
    files, official = TensorFiles(tmp_path), load_file(path)
    assert set(files) == set(official) == set(tensors)
    for name, tensor in tensors.items():
        assert (files.info[name].dtype, files.info[name].shape) == (tensor.dtype, tuple(tensor.shape))
        assert files.info[name].nbytes == tensor.nbytes
        assert same(files.read(name), tensor)
        assert same(official[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt", "transformers refuses a file without it"


def test_tensors_are_aligned_to_their_width(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    odd = [torch.zeros(3, dtype=torch.uint8), torch.zeros(5, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.float64)]
    write_shard(path, [entry(str(i), tensor) for i, tensor in enumerate(odd)])
    header_end = read_header(path)[2]
    raw = path.read_bytes()
    header = json.loads(raw[8:header_end])
    for i, tensor in enumerate(odd):
        assert (header_end + header[str(i)]["data_offsets"][0]) % tensor.itemsize == 0


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    write_shard(tmp_path / SINGLE_NAME, [entry("t", base.T), entry("s", base[1:, ::2])])
    files = TensorFiles(tmp_path)
    assert same(files.read("t"), base.T.contiguous())
    assert same(files.read("s"), base[1:, ::2].contiguous())


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shard(tmp_path / name, [entry("b", torch.ones(3)), entry("a", torch.zeros(2))])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_files_of_others_carry_no_digest(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / SINGLE_NAME)
    assert not check_digest(tmp_path / SINGLE_NAME)
    assert torch.equal(TensorFiles(tmp_path).read("w"), torch.ones(2, 2))


def test_the_digest_is_over_the_file_with_its_own_place_zeroed(sealed: Path) -> None:
    """As the module's docstring says, so that anybody can check it."""
    raw = sealed.read_bytes()
    digest = read_header(sealed)[1][DIGEST_KEY]
    assert hashlib.sha256(raw.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def test_every_changed_byte_is_noticed(sealed: Path) -> None:
    """Each byte with each of its bits flipped, and with all of them.

    A change of the digest's own name is the one that raises nothing: the file then carries no digest, and
    `check_digest` says so.
    """
    raw = sealed.read_bytes()
    assert check_digest(sealed)
    key = raw.index(DIGEST_KEY.encode())
    key_bytes = range(key, key + len(DIGEST_KEY))
    for position in range(len(raw)):
        for change in (*(1 << bit for bit in range(8)), 0xFF):
            damaged = bytearray(raw)
            damaged[position] ^= change
            sealed.write_bytes(damaged)
            try:
                noticed = not check_digest(sealed) and position in key_bytes
            except CorruptCheckpointError:
                noticed = True
            assert noticed, f"byte {position} changed by {change:#x}"


def test_every_truncation_is_noticed(sealed: Path) -> None:
    raw = sealed.read_bytes()
    for length in range(len(raw)):
        sealed.write_bytes(raw[:length])
        with pytest.raises(CorruptCheckpointError, match="truncated or damaged"):
            read_header(sealed)
    with pytest.raises(CorruptCheckpointError, match="truncated or damaged"):
        TensorFiles(sealed.parent)


@pytest.mark.parametrize("extra", [b"\0", b" " * 8, b"x" * 1000])
def test_trailing_bytes_are_noticed(sealed: Path, extra: bytes) -> None:
    sealed.write_bytes(sealed.read_bytes() + extra)
    with pytest.raises(CorruptCheckpointError, match="the header describes"):
        read_header(sealed)


def with_header(header: object, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        with_header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}}, b"\0" * 20),
        with_header({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}),
        with_header({"w": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}),
        with_header({"w": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}}),
        with_header({"w": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}),
        with_header({"w": {"shape": [4], "data_offsets": [0, 16]}}),
        with_header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}),
        with_header({"w": {"dtype": "F32", "shape": [4], "data_offsets": 16}}),
        with_header({"w": None}),
        with_header(["w"]),
        with_header(b"\xff\xfe"),
        with_header(b"{"),
        b"",
        struct.pack("<Q", 2**63),
    ],
)
def test_nonsense_headers_are_explained(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="truncated or damaged"):
        read_header(tmp_path / SINGLE_NAME)


def test_metadata_that_is_no_mapping_is_explained(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(with_header({"__metadata__": ["x"]}, b""))
    with pytest.raises(CorruptCheckpointError, match="truncated or damaged"):
        check_digest(tmp_path / SINGLE_NAME)


def test_a_file_that_shrinks_after_its_header_was_read(sealed: Path) -> None:
    files = TensorFiles(sealed.parent)
    sealed.write_bytes(sealed.read_bytes()[:-3])
    with pytest.raises(CorruptCheckpointError, match="cannot read b"):
        files.read("b")
    sealed.unlink()
    with pytest.raises(CorruptCheckpointError, match="cannot read a"):
        files.read("a")


def test_entries_cast_floating_point_tensors_only(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2), "ids": torch.arange(3)}, tmp_path / SINGLE_NAME)
    files = TensorFiles(tmp_path)
    assert files.entry("w", torch.bfloat16).read().dtype == files.entry("w", torch.bfloat16).dtype == torch.bfloat16
    assert files.entry("ids", torch.bfloat16).read().dtype == files.entry("ids", torch.bfloat16).dtype == torch.int64
    assert files.entry("w").dtype == torch.float32


@pytest.mark.parametrize("actual", [torch.zeros(4), torch.zeros(2, 2), torch.zeros(3, dtype=torch.float16)])
def test_a_tensor_that_is_not_what_was_announced(tmp_path: Path, actual: Tensor) -> None:
    with pytest.raises(AssertionError, match="w: announced"):
        write_shard(tmp_path / SINGLE_NAME, [Entry("w", torch.float32, (3,), lambda: actual)])
    assert not list(tmp_path.iterdir())


def failing(error: BaseException) -> Entry:
    def read() -> Tensor:
        raise error

    return Entry("w", torch.float32, (3,), read)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken disk")])
def test_nothing_half_written_is_left(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_shard(tmp_path / SINGLE_NAME, [entry("a", torch.ones(1000)), failing(error)])
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"
    write_text(path, "new: ä\n")
    assert path.read_bytes() == "new: ä\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_name_appears_when_everything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent, "a rename across file systems is a copy"
        assert not path.exists()
    assert path.read_text() == "whole"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained(tmp_path: Path, number: int) -> None:
    path = tmp_path / SINGLE_NAME
    with pytest.raises(OutputError, match=f"no disk space left while writing .*{SINGLE_NAME}; free some"):
        write_shard(path, [failing(OSError(number, "full"))])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError, match=f"cannot write .*{SINGLE_NAME}: not allowed"):
        write_shard(tmp_path / SINGLE_NAME, [failing(OSError(number, "not allowed"))])


def test_a_place_that_refuses_the_clean_up_too_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system refuses to remove even what is not there."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*: Not a directory"):
        write_text(tmp_path / "file" / "report.json", "x")

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*: Read-only"), replacing(tmp_path / "x"):
        raise OSError(errno.EROFS, "Read-only file system")


def test_other_failures_stay_what_they_are() -> None:
    error = OSError(errno.EIO, "broken disk")
    assert explain_os_error(error, Path("x")) is error


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert file_digest(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


def shards(directory: Path, *contents: dict[str, Tensor], weight_map: dict[str, str] | None = None) -> None:
    names = [f"model-{i:05d}-of-{len(contents):05d}.safetensors" for i in range(1, len(contents) + 1)]
    for name, tensors in zip(names, contents, strict=True):
        save_file(tensors, directory / name)
    given = {tensor: name for name, tensors in zip(names, contents, strict=True) for tensor in tensors}
    write_text(directory / INDEX_NAME, json.dumps({"weight_map": given if weight_map is None else weight_map}))


def test_an_index_is_followed(tmp_path: Path) -> None:
    shards(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(2)})
    save_file({"c": torch.ones(3)}, tmp_path / "adapter.safetensors")
    files = TensorFiles(tmp_path)
    assert set(files) == {"a", "b"}
    assert "c" not in files
    assert files.read("b").shape == (2,)


def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    shards(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(1)}, {"c": torch.ones(1)})
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"names model-00002-of-00003\.safetensors.*1 of 3 files"):
        TensorFiles(tmp_path)


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    shards(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.zeros(1)})
    with pytest.raises(CorruptCheckpointError, match=r"b is both in .*00001.* and in .*00002"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {}}']
)
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(CorruptCheckpointError, match=r"is not a safetensors index"):
        TensorFiles(tmp_path)


def test_a_whole_model_beside_stale_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE_NAME)
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    assert TensorFiles(tmp_path).read("a").item() == 1


def test_a_directory_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no \.safetensors files$"):
        TensorFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin has to be converted to safetensors first"):
        TensorFiles(tmp_path)
