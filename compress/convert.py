"""Between the two artefacts, to the bit: `pack` a dense 2:4 checkpoint, `unpack` a packed one.

The recipe, the report and the model card go with it, and say afterwards what holds of the new directory.
"""

from __future__ import annotations

import errno
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import artefact, packed
from compress.checkpoint import check_files, parse_config
from compress.errors import CheckError, CorruptCheckpointError, OutputError, SourceError
from compress.files import Entry, TensorFiles, explain_os_error, sibling
from compress.layout import Layout
from compress.packed import DENSE_SUFFIX, MASK_SUFFIX, VALUES_SUFFIX, PackedWeight
from compress.records import Records
from compress.sources import read_config


def pack_checkpoint(source: Path, out: Path) -> dict[str, int]:
    """Packs every linear of the decoder blocks that is 2:4 already; the others stay as they are.

    Returns:
        ``{"packed": layers, "dense": layers}``.

    Raises:
        CheckError: no layer is 2:4, a parameter is not finite, or a file is damaged; SourceError: it is packed already,
            or no model.
    """
    config = read_config(source)
    if isinstance(config.get("quantization_config"), dict):
        raise SourceError(
            f"{source} is packed or quantized already (quant_method {config['quantization_config'].get('quant_method')!r})"
        )
    files, layout = TensorFiles(source), Layout.of(source)
    layout.require_tensors(files.info, (), "")
    _require_whole(source, files)
    by_key = {layout.key(linear.name + DENSE_SUFFIX, files): linear for linear in layout.block_linears}
    parameters = layout.parameter_keys(files)
    entries: list[Entry] = []
    done: dict[str, int] = {}
    dtypes: set[torch.dtype] = set()
    for key in files:
        linear = by_key.get(key)
        weight = _Dense(files, key, transposed=linear is not None and linear.transposed)
        if linear is None or not can_pack(weight.read()):
            entries.append(_as_it_is(files, key, key in parameters))
            continue
        dtype = files.info[key].dtype
        dtypes.add(dtype)
        stem = key.removesuffix(DENSE_SUFFIX)
        pair = [
            Entry(stem + VALUES_SUFFIX, dtype, (linear.n, linear.k // 2), weight.values),
            Entry(stem + MASK_SUFFIX, torch.uint8, (linear.n, linear.k // 8), weight.mask),
        ]
        done[linear.name] = sum(entry.nbytes for entry in pair)
        entries += pair
    if not done:
        raise CheckError(f"no layer of {source} is 2:4; `halve compress` makes one that is")
    if len(dtypes) > 1:
        raise CheckError(
            f"the 2:4 layers of {source} have several dtypes ({', '.join(sorted(map(str, dtypes)))}); the packed format has one"
        )
    config["quantization_config"] = artefact.quantization_config(dtypes.pop(), layout.linears.keys() - done)
    _write(source, out, entries, config, Records.of(source, "packed", done))
    return {"packed": len(done), "dense": len(by_key) - len(done)}


def unpack_checkpoint(source: Path, out: Path) -> dict[str, int]:
    """Writes a packed checkpoint as an ordinary dense one with zeros.

    Returns:
        ``{"unpacked": layers}``.

    Raises:
        SourceError: it is not packed; CorruptCheckpointError: a layer is damaged; NumericalError: a parameter is not finite.
    """
    config = read_config(source)
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "halve":
        raise SourceError(f"{source} is not packed by halve")
    parsed = parse_config(quantization)
    files, layout = TensorFiles(source), Layout.of(source)
    packed_names = layout.packed(parsed.ignore)
    layout.require_tensors(files.info, packed_names, parsed.value_dtype)
    _require_whole(source, files)
    by_key = {layout.key(name + VALUES_SUFFIX, files): layout.linears[name] for name in packed_names}
    masks = {layout.key(name + MASK_SUFFIX, files) for name in packed_names}
    parameters = layout.parameter_keys(files)
    entries: list[Entry] = []
    done: dict[str, int] = {}
    for key in files:
        linear = by_key.get(key)
        if linear is not None:
            stem = key.removesuffix(VALUES_SUFFIX)
            shape = (linear.k, linear.n) if linear.transposed else (linear.n, linear.k)
            weight = _Packed(files, stem, linear.transposed)
            entries.append(Entry(stem + DENSE_SUFFIX, files.info[key].dtype, shape, weight.read))
            done[linear.name] = entries[-1].nbytes
        elif key not in masks:
            entries.append(_as_it_is(files, key, key in parameters))
    _write(source, out, entries, config, Records.of(source, "dense", done))
    return {"unpacked": len(done)}


def _require_whole(source: Path, files: TensorFiles) -> None:
    """What is damaged must not get a new digest, nor a new report.

    Raises:
        CorruptCheckpointError: a file is not what its digest or the report says.
    """
    check_files(files.files)
    report = artefact.read_report(source)
    if report is None:
        return
    try:
        artefact.check_account(source, report)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(
            f"{error}. If the change is meant, remove {artefact.REPORT_NAME}; the copy has none, either"
        ) from None


def _as_it_is(files: TensorFiles, key: str, is_parameter: bool) -> Entry:
    """A tensor that is copied; a parameter has to be finite."""
    entry = files.entry(key)
    if not is_parameter:
        return entry

    def read() -> Tensor:
        tensor = entry.read()
        packed.require_finite(tensor, key)
        return tensor

    return replace(entry, read=read)


class _Dense:
    """A dense weight that is read, and packed, when its turn to be written comes."""

    def __init__(self, files: TensorFiles, key: str, transposed: bool) -> None:
        self.files, self.key, self.transposed = files, key, transposed

    def read(self) -> Tensor:
        """[N, K]."""
        weight = self.files.read(self.key)
        return weight.T.contiguous() if self.transposed else weight

    def values(self) -> Tensor:
        return packed.pack(self.read(), self.key).values

    def mask(self) -> Tensor:
        return packed.pack(self.read(), self.key).mask


class _Packed:
    """A packed weight that is read and expanded when its turn to be written comes."""

    def __init__(self, files: TensorFiles, stem: str, transposed: bool) -> None:
        self.files, self.stem, self.transposed = files, stem, transposed

    def read(self) -> Tensor:
        """As the dense checkpoint stores it: [N, K], or [K, N] for a Conv1D."""
        weight = PackedWeight(self.files.read(self.stem + VALUES_SUFFIX), self.files.read(self.stem + MASK_SUFFIX))
        packed.validate(weight, self.stem)
        dense = packed.unpack(weight)
        return dense.T.contiguous() if self.transposed else dense


def can_pack(weight: Tensor) -> bool:
    """Whether ``weight`` [N, K] is 2:4 already and has a shape and dtype that can be packed."""
    if packed.why_not(weight.shape[1]) is not None or weight.dtype not in packed.VALUE_DTYPES.values():
        return False
    return packed.is_two_of_four(weight)


def _write(source: Path, out: Path, entries: list[Entry], config: dict[str, Any], records: Records) -> None:
    """Writes the checkpoint under a temporary name, then gives it its own."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there already and is not empty; choose another --out, or remove it")
    # A name of its own: two that convert into one directory must not write into each other's files.
    partial = sibling(out, f".{uuid.uuid4().hex[:8]}.converting")
    try:
        partial.mkdir(parents=True)
        artefact.write_weights(partial, entries)
        artefact.copy_companions(source, partial)
        artefact.write_config(partial, config)
        records.write(source, partial)
        partial.replace(out)  # takes the place of an empty directory, and of no other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"another command filled {out} in the meantime; choose another --out") from None
        raise explain_os_error(error, out) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
