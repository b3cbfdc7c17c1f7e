"""Between the two artefacts, to the bit: `pack` a dense 2:4 checkpoint, `unpack` a packed one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import artefact, packed
from compress.checkpoint import check_files, parse_config
from compress.errors import CheckError, OutputError, SourceError
from compress.files import Entry, TensorFiles, explain_os_error, sibling
from compress.layout import Layout
from compress.packed import DENSE_SUFFIX, MASK_SUFFIX, VALUES_SUFFIX, PackedWeight
from compress.sources import read_config


def pack_checkpoint(source: Path, out: Path) -> dict[str, int]:
    """Packs every linear of the decoder blocks that is 2:4 already; the others stay as they are.

    Returns:
        ``{"packed": layers, "dense": layers}``.

    Raises:
        CheckError: no layer is 2:4; SourceError: it is packed already, or no model.
    """
    config = read_config(source)
    if isinstance(config.get("quantization_config"), dict):
        raise SourceError(
            f"{source} is packed or quantized already (quant_method {config['quantization_config'].get('quant_method')!r})"
        )
    files, layout = TensorFiles(source), Layout.of(source)
    layout.require_tensors(files.info, (), "")
    check_files(files.files)  # what is damaged must not get a new digest
    by_key = {layout.key(linear.name + DENSE_SUFFIX, files): linear for linear in layout.block_linears}
    entries: list[Entry] = []
    done: set[str] = set()
    dtypes: set[torch.dtype] = set()
    for key in files:
        linear = by_key.get(key)
        weight = _Dense(files, key, transposed=linear is not None and linear.transposed)
        if linear is None or not can_pack(weight.read()):
            entries.append(files.entry(key))
            continue
        done.add(linear.name)
        dtype = files.info[key].dtype
        dtypes.add(dtype)
        stem = key.removesuffix(DENSE_SUFFIX)
        entries.append(Entry(stem + VALUES_SUFFIX, dtype, (linear.n, linear.k // 2), weight.values))
        entries.append(Entry(stem + MASK_SUFFIX, torch.uint8, (linear.n, linear.k // 8), weight.mask))
    if not done:
        raise CheckError(f"no layer of {source} is 2:4; `halve compress` makes one that is")
    if len(dtypes) > 1:
        raise CheckError(
            f"the 2:4 layers of {source} have several dtypes ({', '.join(sorted(map(str, dtypes)))}); the packed format has one"
        )
    config["quantization_config"] = artefact.quantization_config(dtypes.pop(), layout.linears.keys() - done)
    _write(source, out, entries, config)
    return {"packed": len(done), "dense": len(by_key) - len(done)}


def unpack_checkpoint(source: Path, out: Path) -> dict[str, int]:
    """Writes a packed checkpoint as an ordinary dense one with zeros.

    Returns:
        ``{"unpacked": layers}``.

    Raises:
        SourceError: it is not packed; CorruptCheckpointError: a layer is damaged.
    """
    config = read_config(source)
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "halve":
        raise SourceError(f"{source} is not packed by halve")
    parsed = parse_config(quantization)
    files, layout = TensorFiles(source), Layout.of(source)
    layout.require_tensors(files.info, layout.packed(parsed.ignore), parsed.value_dtype)
    check_files(files.files)  # what is damaged must not get a new digest
    by_key = {layout.key(linear.name + VALUES_SUFFIX, files): linear for linear in layout.block_linears}
    entries = []
    for key in files:
        linear = by_key.get(key)
        if linear is not None:
            stem = key.removesuffix(VALUES_SUFFIX)
            shape = (linear.k, linear.n) if linear.transposed else (linear.n, linear.k)
            weight = _Packed(files, stem, linear.transposed)
            entries.append(Entry(stem + DENSE_SUFFIX, files.info[key].dtype, shape, weight.read))
        elif not key.endswith(MASK_SUFFIX):
            entries.append(files.entry(key))
    _write(source, out, entries, config)
    return {"unpacked": sum(key.endswith(VALUES_SUFFIX) for key in files)}


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


def _write(source: Path, out: Path, entries: list[Entry], config: dict[str, Any]) -> None:
    """Writes the checkpoint under a temporary name, then gives it its own."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there already and is not empty; choose another --out, or remove it")
    partial = sibling(out, ".converting")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        artefact.write_weights(partial, entries)
        artefact.copy_companions(source, partial)
        if (recipe := source / artefact.RECIPE_NAME).is_file():
            shutil.copyfile(recipe, partial / artefact.RECIPE_NAME)
        artefact.write_config(partial, config)
        if out.is_dir():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        raise explain_os_error(error, out) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
