"""Between the two artefacts, to the bit: `pack` a dense 2:4 checkpoint, `unpack` a packed one. Only values of 8 bits are rounded.

The recipe, the report and the model card go with it, and say afterwards what holds of the new directory.
"""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import artefact, packed, stranded
from compress.checkpoint import PackedConfig, check_files, parse_config
from compress.errors import CheckError, CorruptCheckpointError, OutputError, SourceError, UsageError
from compress.files import Entry, TensorFiles, TensorInfo, explain_os_error, sibling
from compress.layout import Layout, LinearInfo
from compress.packed import DENSE_SUFFIX, MASK_SUFFIX, PACKED_SUFFIXES, SCALE_SUFFIX, VALUES_SUFFIX, PackedWeight
from compress.records import Records
from compress.sources import read_config, said_dtype

Note = Callable[[str], None]


def pack_checkpoint(
    source: Path,
    out: Path,
    value_dtype: str = "auto",
    activation_dtype: str = "auto",
    note: Note = lambda text: None,
) -> dict[str, int]:
    """Packs every linear of the decoder blocks that is 2:4 already; the others stay as they are.

    A checkpoint of compressed-tensors (see `compress.stranded`) has values of 8 bits as they are, and what of it is not 2:4 becomes dense.

    Args:
        value_dtype: what kept values become, ``auto``: they stay as they are; ``int8`` or ``float8_e4m3fn``: see `packed.quantize`, and then
            ``source`` may also be packed, with values that have no scales yet.
        activation_dtype: what the inputs of packed layers are rounded to when they are multiplied: ``auto``: what they are in ``source``;
            ``none``; or that of the values, which may be packed already then.
        note: called with what a user should know of what was changed.

    Returns:
        ``{"packed": layers, "dense": layers}``.

    Raises:
        CheckError: no layer is 2:4, a parameter is not finite, or a file is damaged; SourceError: it is packed already,
            or no model; UsageError: activations of another dtype than the values.
    """
    config = read_config(source)
    theirs = stranded.of_config(config)
    if theirs is not None and stranded.is_theirs(theirs):
        return _pack_stranded(source, out, config, theirs, value_dtype, activation_dtype, note)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        asks = (value_dtype, activation_dtype) != ("auto", "auto")
        if asks and quantization.get("quant_method") == "halve":
            return _repack_checkpoint(source, out, config, parse_config(quantization), value_dtype, activation_dtype)
        raise SourceError(
            f"{source} is packed or quantized already (quant_method {quantization.get('quant_method')!r})"
        )
    scaled, activations = packed.SCALED_DTYPES.get(value_dtype), _activations(activation_dtype, None, value_dtype)
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
        weight = _Dense(files, key, transposed=linear is not None and linear.transposed, scaled=scaled)
        if linear is None or not can_pack(weight.read()):
            entries.append(_as_it_is(files, key, key in parameters))
            continue
        dtype = files.info[key].dtype
        dtypes.add(dtype)
        stored = artefact.entries_of(
            key.removesuffix(DENSE_SUFFIX), (linear.n, linear.k), scaled or dtype, weight.packed
        )
        done[linear.name] = sum(entry.nbytes for entry in stored)
        entries += stored
    if not done:
        raise CheckError(f"no layer of {source} is 2:4; `halve compress` makes one that is")
    if len(dtypes) > 1:
        raise CheckError(
            f"the 2:4 layers of {source} have several dtypes ({', '.join(sorted(map(str, dtypes)))}); the packed format has one"
        )
    dtype = dtypes.pop()
    if scaled is not None and said_dtype(config) is None:  # the values do not tell any more what the model computes in
        config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = artefact.quantization_config(
        scaled or dtype, layout.linears.keys() - done, activations
    )
    _write(source, out, entries, config, Records.of(source, "packed", done, value_dtype, activations))
    return {"packed": len(done), "dense": len(by_key) - len(done)}


def _pack_stranded(
    source: Path,
    out: Path,
    config: dict[str, Any],
    theirs: Mapping[str, Any],
    value_dtype: str,
    activation_dtype: str,
    note: Note,
) -> dict[str, int]:
    """A checkpoint of compressed-tensors, with values of 8 bits or of 16, with zeros or as a bitmask."""
    activations = stranded.activations_of(theirs)
    files, layout = TensorFiles(source), Layout.of(source)
    _require_whole(source, files)
    linears = stranded.Linears(files, layout)
    looks = {name: weight.look() for name, weight in linears.weights.items()}
    sparse = {name for name, look in looks.items() if look.is_two_of_four}
    if not sparse:
        raise CheckError(f"no layer of {source} is 2:4; `halve compress` prunes the model that it was made of")
    stored = stranded.value_dtype(linears.weights[name].dtype for name in sparse)
    name_of_stored = str(stored).removeprefix("torch.")
    if stored in packed.LARGEST and value_dtype not in ("auto", name_of_stored):
        raise SourceError(
            f"the values of {source} are {name_of_stored} already, and to round them once more loses more; leave --value-dtype out"
        )
    scaled = None if stored in packed.LARGEST else packed.SCALED_DTYPES.get(value_dtype)
    said = value_dtype if value_dtype != "auto" or stored not in packed.LARGEST else name_of_stored
    before = None if activations == "none" or stored not in packed.LARGEST else name_of_stored
    rounded = _activations(activation_dtype, before, said)
    if activations == "static" and rounded is not None:
        note("the inputs of its layers had one scale each, which calibration found; here each token has its own")
    if lowest := sum(looks[name].lowest for name in sparse):
        note(f"{lowest} values are -127 in place of -128, which the packed format has not")
    if lost := sum(look.lost for look in looks.values()):
        note(
            f"{lost} rows of weights lack their largest value: when compressed-tensors wrote them as a bitmask, it dropped -128. What is "
            "lost cannot be found again; the same model quantized anew, and saved without sparsity compression, has it"
        )
    floats = packed.FLOAT_DTYPES.get(said_dtype(config) or "", torch.float32)
    parameters = layout.parameter_keys(files)
    entries = [_as_it_is(files, key, key in parameters) for key in files if key not in linears.keys]
    done: dict[str, int] = {}
    for name, weight in linears.weights.items():
        if name in sparse and weight.dtype == stored:
            parts = artefact.entries_of(
                weight.stem, weight.shape, scaled or stored, lambda w=weight: _scaled(w.packed(), scaled)
            )
            done[name] = sum(entry.nbytes for entry in parts)
            entries += parts
            continue
        dtype = floats if weight.dtype in packed.LARGEST else weight.dtype
        entries.append(Entry(weight.stem + DENSE_SUFFIX, dtype, weight.shape, partial(weight.dense, dtype)))
    if said_dtype(config) is None:
        config["dtype"] = str(floats if stored in packed.LARGEST else stored).removeprefix("torch.")
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            holder.pop("quantization_config", None)
            holder.pop("compression_config", None)
    config["quantization_config"] = artefact.quantization_config(
        scaled or stored, layout.linears.keys() - done, rounded
    )
    layout.require_tensors(
        {entry.name: TensorInfo(source, entry.dtype, entry.shape) for entry in entries},
        done,
        str(scaled or stored).removeprefix("torch."),
    )
    _write(source, out, entries, config, Records.of(source, "packed", done, said, rounded))
    return {"packed": len(done), "dense": len(linears.weights) - len(done)}


def _scaled(weight: PackedWeight, dtype: torch.dtype | None) -> PackedWeight:
    """With values rounded to 8 bits, if they are to be."""
    return weight if dtype is None else packed.quantize(weight, dtype)


def _activations(activation_dtype: str, before: str | None, value_dtype: str) -> str | None:
    """What activations become, of what they were ``before``. Raises UsageError: another dtype than that of the values."""
    found = before if activation_dtype == "auto" else None if activation_dtype == "none" else activation_dtype
    if found not in (None, value_dtype):
        raise UsageError(
            f"--activation-dtype {found} needs kept values of the same dtype, and they are {value_dtype!r}; add --value-dtype {found}"
        )
    return found


def _repack_checkpoint(
    source: Path,
    out: Path,
    config: dict[str, Any],
    parsed: PackedConfig,
    value_dtype: str,
    activation_dtype: str,
) -> dict[str, int]:
    """A packed checkpoint with values of 8 bits in place of those that have no scales, or with activations of another dtype."""
    stored = value_dtype if value_dtype != "auto" else parsed.value_dtype
    activations = _activations(activation_dtype, parsed.activation_dtype, stored)
    rounds = stored != parsed.value_dtype
    if rounds and parsed.value_dtype in packed.SCALED_DTYPES:
        raise SourceError(
            f"the values of {source} are {parsed.value_dtype} already, and to round them once more loses more; pack the checkpoint "
            "that it was made of"
        )
    if not rounds and activations == parsed.activation_dtype:
        rounded = "as they are" if activations is None else f"in {activations}"
        raise SourceError(f"{source} is packed already, with values in {stored} and activations {rounded}")
    dtype = packed.VALUE_DTYPES[stored]
    files, layout, by_key = _packed_source(source, parsed)
    parameters, masks = layout.parameter_keys(files), _masks(by_key)
    entries: list[Entry] = []
    done: dict[str, int] = {}
    for key in files:
        linear = by_key.get(key)
        if linear is not None:
            stem = key.removesuffix(VALUES_SUFFIX)
            weight = _Packed(files, stem, linear.transposed, None, dtype if rounds else None)
            parts = artefact.entries_of(stem, (linear.n, linear.k), dtype, weight.packed)
            done[linear.name] = sum(entry.nbytes for entry in parts)
            entries += parts
        elif key not in masks:
            entries.append(_as_it_is(files, key, key in parameters))
    if said_dtype(config) is None:
        config["dtype"] = parsed.value_dtype
    config["quantization_config"] = artefact.quantization_config(dtype, parsed.ignore, activations)
    said = stored if stored in packed.SCALED_DTYPES else "auto"
    _write(source, out, entries, config, Records.of(source, "packed", done, said, activations))
    return {"packed": len(done), "dense": len(layout.block_linears) - len(done)}


def unpack_checkpoint(source: Path, out: Path) -> dict[str, int]:
    """Writes a packed checkpoint as an ordinary dense one with zeros. Scaled values become what they stand for, rounded to the dtype
    that ``config.json`` says.

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
    files, layout, by_key = _packed_source(source, parsed)
    said = packed.FLOAT_DTYPES.get(said_dtype(config) or "", torch.float32)
    parameters, others = layout.parameter_keys(files), _masks(by_key)
    entries: list[Entry] = []
    done: dict[str, int] = {}
    for key in files:
        linear = by_key.get(key)
        if linear is not None:
            stem, stored = key.removesuffix(VALUES_SUFFIX), files.info[key].dtype
            dtype = said if stored in packed.LARGEST else stored
            shape = (linear.k, linear.n) if linear.transposed else (linear.n, linear.k)
            weight = _Packed(files, stem, linear.transposed, dtype)
            entries.append(Entry(stem + DENSE_SUFFIX, dtype, shape, weight.read))
            done[linear.name] = entries[-1].nbytes
        elif key not in others:
            entries.append(_as_it_is(files, key, key in parameters))
    _write(source, out, entries, config, Records.of(source, "dense", done))
    return {"unpacked": len(done)}


def _packed_source(source: Path, parsed: PackedConfig) -> tuple[TensorFiles, Layout, dict[str, LinearInfo]]:
    """The files of a packed checkpoint, found whole, its layout, and the key of each packed linear's values."""
    files, layout = TensorFiles(source), Layout.of(source)
    names = layout.packed(parsed.ignore)
    layout.require_tensors(files.info, names, parsed.value_dtype)
    _require_whole(source, files)
    keys = {layout.key(name + VALUES_SUFFIX, files): layout.linears[name] for name in names}
    return files, layout, {key: linear for key, linear in keys.items() if key is not None}


def _masks(by_key: Iterable[str]) -> set[str]:
    """The keys of what belongs to packed values."""
    return {key.removesuffix(VALUES_SUFFIX) + suffix for key in by_key for suffix in (MASK_SUFFIX, SCALE_SUFFIX)}


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

    def __init__(self, files: TensorFiles, key: str, transposed: bool, scaled: torch.dtype | None) -> None:
        self.files, self.key, self.transposed, self.scaled = files, key, transposed, scaled

    def read(self) -> Tensor:
        """[N, K]."""
        weight = self.files.read(self.key)
        return weight.T.contiguous() if self.transposed else weight

    def packed(self) -> PackedWeight:
        return _scaled(packed.pack(self.read(), self.key), self.scaled)


class _Packed:
    """A packed weight that is read, and expanded or rounded, when its turn to be written comes.

    Args:
        dtype: of the dense weight, where values have scales.
        scaled: what values are rounded to, if they are.
    """

    def __init__(
        self,
        files: TensorFiles,
        stem: str,
        transposed: bool,
        dtype: torch.dtype | None,
        scaled: torch.dtype | None = None,
    ) -> None:
        self.files, self.stem, self.transposed, self.dtype, self.scaled = files, stem, transposed, dtype, scaled

    def packed(self) -> PackedWeight:
        parts = [self.files.read(self.stem + s) for s in PACKED_SUFFIXES if self.stem + s in self.files]
        weight = PackedWeight(parts[0], parts[1], parts[2] if len(parts) > 2 else None)
        packed.validate(weight, self.stem)
        return _scaled(weight, self.scaled)

    def read(self) -> Tensor:
        """As the dense checkpoint stores it: [N, K], or [K, N] for a Conv1D."""
        dense = packed.unpack(self.packed(), self.dtype)
        return dense.T.contiguous() if self.transposed else dense


def can_pack(weight: Tensor) -> bool:
    """Whether ``weight`` [N, K] is 2:4 already and has a shape and dtype that can be packed."""
    if packed.why_not(weight.shape[1]) is not None or weight.dtype not in packed.FLOAT_DTYPES.values():
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
