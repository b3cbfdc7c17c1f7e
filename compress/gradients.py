"""Gradients of the dense model for the metrics that need them, one decoder block in memory at a time.

The whole model's loss reaches every weight, but neither the model nor its graph has to be in memory for that. The
forward pass goes through the blocks one by one and leaves the input of each block on disk (the checkpoint of
activation checkpointing); the backward pass goes through them in reverse, runs each block again from its saved input,
and passes the gradient of the input on to the block before it. So memory holds one block, its float32 accumulators
and the activations of the calibration set twice; disk holds the inputs of all blocks until they have been used, and
the accumulators of each block once it is done. With the gradients that the backward pass has arrived at, what is on disk is
also where a pass that was killed goes on, whatever its way back: at the block that it was killed in.

The gradient is taken sample by sample (GBLM-Pruner sums |g| or g² over samples, not the gradients themselves) and is
accumulated in float32. A float16 model is run in float32 here: small gradients would vanish.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from compress.backward import Accumulator, loss_of, no_gradient
from compress.blocks import BlockModel
from compress.calibration import CalibrationSet
from compress.errors import OutputError, SourceError
from compress.files import Entry, TensorFiles, check_digest, explain_os_error, write_shard, write_text
from compress.layer_statistics import GRADIENT_NEEDS

Progress = Callable[[int, int, str], None]
RECORD = "gradients.json"
BEGUN = "begun.json"
"""What a pass that is not finished gathers, and from what: the files beside it belong to that."""
LOCK = "lock"


class GradientStore:
    """Accumulated gradients on disk, a file a block; `read` gives those of one block.

    A directory may be kept for several runs, at the same time, too: who gathers holds its lock alone, who reads shares
    it, and `provide` waits for the other.

    Args:
        directory: where they lie; made when they are gathered. One that is complete and fits is used as it is.
        identity: what they were made from: source, calibration, dtype, versions.

    Raises:
        OutputError: the directory holds gradients of something else, or is none.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        self._identity = json.loads(json.dumps(identity))
        self._kinds: set[str] = set()
        self._lock: IO[str] | None = None
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{directory} is not a directory; give a new or an empty one for the gradients")
        self._look()

    def _look(self) -> None:
        """What is complete in the directory now."""
        self._kinds = set()
        record = self.directory / RECORD
        if record.is_file():
            kinds, blocks, identity = _read_record(record)
            if identity != self._identity:
                changed = sorted(
                    key for key in {*identity, *self._identity} if identity.get(key) != self._identity.get(key)
                )
                raise OutputError(
                    f"{self.directory} holds the gradients of another run (it differs in: {', '.join(changed)}); give "
                    "another directory, or remove that one"
                )
            if all(self._file(index).is_file() for index in range(blocks)):
                self._kinds = kinds
        elif self.directory.is_dir() and not all(_is_ours(path) for path in self.directory.iterdir()):
            raise OutputError(f"{self.directory} is not a directory of gradients; give a new or an empty one")

    def has(self, kinds: Iterable[str]) -> bool:
        """Whether these kinds are complete already."""
        return self._kinds >= set(kinds)

    def provide(
        self,
        kinds: Iterable[str],
        model: Callable[[], BlockModel],
        samples: CalibrationSet,
        layers: Sequence[Sequence[str]],
        required: Collection[str],
        progress: Progress,
    ) -> None:
        """Sees to it that these kinds are there, and holds them until `close`: gathers them, or waits for the run that
        does. ``model`` makes the dense model where it is needed; the rest as for `gather`.

        Raises:
            OutputError: the place cannot be written, is too small, or was taken by another run's gradients meanwhile.
        """
        kinds = set(kinds)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / LOCK).open("w")
        except OSError as error:
            raise explain_os_error(error, self.directory) from None
        for mode in (fcntl.LOCK_SH, fcntl.LOCK_EX):
            try:
                fcntl.flock(self._lock, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(0, 1, f"gradients: waiting for the run that is using {self.directory}")
                fcntl.flock(self._lock, mode)
            self._look()
            if self.has(kinds):
                break
        else:
            self.gather(model(), samples, layers, kinds, progress, required)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Lets go of the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def gather(
        self,
        model: BlockModel,
        samples: CalibrationSet,
        layers: Sequence[Sequence[str]],
        kinds: Iterable[str],
        progress: Progress = lambda done, total, text: None,
        required: Collection[str] | None = None,
    ) -> None:
        """Runs the forward and the backward pass over the dense model and writes a file for each block; or what is left of
        them, where a pass for the same was interrupted here.

        Args:
            model: the dense model, in the dtype of the passes.
            layers: for each block the full names of the linears that are wanted.
            kinds: names out of ``GRADIENT_NEEDS``.
            required: which of the layers must have a gradient; left out: all.

        Raises:
            SourceError: the model gives no gradient: no loss, or one that does not reach a required layer.
            OutputError: there is not enough space on the disk.
        """
        wanted = self._begin(sorted({*self._kinds, *kinds} & GRADIENT_NEEDS), layers)
        count = len(model.blocks)
        arguments = list(samples.batches(1))
        hidden = model.record_calls(arguments)
        model.refuse_carried("a metric that needs gradients")  # they would end at what a later block reads
        self._require_space(model, hidden, layers, len(wanted))
        left = self._left_backward(count)
        if left is None:
            hidden = self._forward(model, hidden, progress)
            upstream = self._loss_gradients(model, samples, arguments, hidden)
            self._write(self._upstream(count), upstream)
            left = count
        else:
            upstream = self._read(self._upstream(left))
        del hidden
        for index in reversed(range(left)):
            progress(2 * count - 1 - index, 2 * count, f"gradients: backward through {model.block_name(index)}")
            model.load_block(index)
            found = self._backward(model, index, layers[index], wanted, upstream, required)
            model.drop_block(index)
            write_shard(self._file(index), _entries(found))
            if index:  # (the first block's upstream is of no use)
                self._write(self._upstream(index), upstream)
                # Only now is there something else to go on from.
                self._inputs(index).unlink()
                self._upstream(index + 1).unlink()
        record = {"identity": self._identity, "kinds": wanted, "blocks": count}
        write_text(self.directory / RECORD, json.dumps(record))
        self._kinds = set(wanted)
        for path in list(self.directory.iterdir()):
            if _is_ours(path) and path.name.startswith((BEGUN, "inputs", "upstream")):
                path.unlink()

    def _begin(self, kinds: list[str], layers: Sequence[Sequence[str]]) -> list[str]:
        """Notes what is gathered, and clears the directory of everything that was not made for it.

        Returns:
            The kinds to gather: those of an interrupted pass, if it gathers more than these.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        wanted = {"identity": self._identity, "kinds": kinds, "layers": [list(names) for names in layers]}
        begun = _read_begun(self.directory / BEGUN)
        same = {**begun, "kinds": kinds} == wanted and set(begun["kinds"]) >= set(kinds)
        for path in list(self.directory.iterdir()):
            kept = path.name == LOCK or (same and path.name != RECORD and path.suffix != ".tmp")
            if _is_ours(path) and not kept:
                path.unlink()
        if same:
            return begun["kinds"]
        write_text(self.directory / BEGUN, json.dumps(wanted))
        return kinds

    def _left_backward(self, count: int) -> int | None:
        """How many blocks, the first ones, the backward pass has still before it; None where it has not begun."""
        for left in range(1, count + 1):
            if self._upstream(left).is_file():
                needed = [self._inputs(i) if i < left else self._file(i) for i in range(count)]
                return left if all(path.is_file() for path in needed) else None
        return None

    def _forward(self, model: BlockModel, hidden: list[Tensor], progress: Progress) -> list[Tensor]:
        """Writes the inputs of every block; the output of the last one. ``hidden`` goes into the first."""
        count = len(model.blocks)
        saved = next((index for index in range(count) if not self._inputs(index).is_file()), count)
        if saved > 1:
            hidden = self._read(self._inputs(saved - 1))
        for index in range(max(saved - 1, 0), count):
            progress(index, 2 * count, f"gradients: forward through {model.block_name(index)}")
            if index >= saved:
                self._write(self._inputs(index), hidden)
            model.load_block(index)
            hidden = [model.run_block(index, n, states).to(states.device) for n, states in enumerate(hidden)]
            model.drop_block(index)
        return hidden

    def read(
        self, index: int, layers: Iterable[str], kinds: Iterable[str], device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """The gradients of a block: layer -> kind -> [N, K] float32.

        Raises:
            SourceError: a layer has none; CorruptCheckpointError: the file is damaged.
        """
        check_digest(self._file(index))
        files = TensorFiles(self.directory, [self._file(index)])
        kinds, layers = list(kinds), list(layers)
        if missing := [layer for layer in layers for kind in kinds if f"{layer}.{kind}" not in files]:
            raise no_gradient("the model", missing)
        return {layer: {kind: files.read(f"{layer}.{kind}", str(device)) for kind in kinds} for layer in layers}

    def _loss_gradients(
        self,
        model: BlockModel,
        samples: CalibrationSet,
        arguments: Sequence[Mapping[str, Any]],
        hidden: Sequence[Tensor],
    ) -> list[Tensor]:
        """∂loss/∂(output of the last block) for each sample."""
        gradients = []
        with model.after_blocks() as run:
            for n, (inputs, states) in enumerate(zip(arguments, hidden, strict=True)):
                leaf = states.to(model.device).detach().requires_grad_()
                with torch.enable_grad():
                    loss = loss_of(run, leaf, inputs, samples, n)
                    if not isinstance(loss, Tensor) or not loss.requires_grad:
                        raise SourceError(
                            f"the method needs gradients, and {type(model.model).__name__} gives none: its loss does not "
                            "depend on the output of its blocks; choose a metric without gradients (see `halve methods`)"
                        )
                    (gradient,) = torch.autograd.grad(loss, [leaf])
                gradients.append(gradient.to(states.device))
        return gradients

    def _backward(
        self,
        model: BlockModel,
        index: int,
        layers: Sequence[str],
        kinds: Sequence[str],
        upstream: list[Tensor],
        required: Collection[str] | None,
    ) -> dict[str, Tensor]:
        """One block; ``upstream`` is overwritten with the gradients of the block's inputs."""
        linears = {name: module for name, module in model.linears(index).items() if name in set(layers)}
        total = Accumulator(linears, kinds)
        inputs = TensorFiles(self.directory, [self._inputs(index)])
        for n, gradient in enumerate(upstream):
            leaf = inputs.read(f"{n:06d}").to(model.device).requires_grad_()
            with torch.enable_grad(), total.tracked():
                output = model.run_block(index, n, leaf.clone())  # blocks may write into their input
                upstream[n] = total.add(output, gradient.to(model.device), leaf).to(gradient.device)
        return total.result(type(model.model).__name__, required)

    def _require_space(
        self, model: BlockModel, hidden: Sequence[Tensor], layers: Sequence[Sequence[str]], kinds: int
    ) -> None:
        blocks = range(len(model.blocks))
        weights = sum(
            module.weight.numel()
            for index in blocks
            for name, module in model.linears(index).items()
            if name in layers[index]
        )
        size = (len(blocks) + 2) * sum(states.nbytes for states in hidden) + 4 * weights * kinds
        size -= sum(path.stat().st_size for path in self.directory.iterdir())  # what an interrupted pass left
        free = shutil.disk_usage(self.directory).free
        if free < size:
            raise OutputError(
                f"not enough disk space at {self.directory}: the gradients need about {size / 1e9:.2f} GB while they are "
                f"gathered, and {free / 1e9:.2f} GB are free"
            )

    def _file(self, index: int) -> Path:
        return self.directory / f"gradients-{index:05d}.safetensors"

    def _inputs(self, index: int) -> Path:
        return self.directory / f"inputs-{index:05d}.safetensors"

    def _upstream(self, index: int) -> Path:
        """Of the gradients of a block's inputs, or behind the last block of its outputs."""
        return self.directory / f"upstream-{index:05d}.safetensors"

    def _write(self, path: Path, states: Sequence[Tensor]) -> None:
        """One tensor a sample."""
        write_shard(path, _entries({f"{n:06d}": tensor for n, tensor in enumerate(states)}))

    def _read(self, path: Path) -> list[Tensor]:
        check_digest(path)
        files = TensorFiles(self.directory, [path])
        return [files.read(name) for name in sorted(files)]


def _entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def _read_begun(path: Path) -> dict[str, Any]:
    """What an unfinished pass gathers; nothing where there is none."""
    try:
        begun = json.loads(path.read_text())
        return {"identity": begun["identity"], "kinds": list(begun["kinds"]), "layers": begun["layers"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"identity": None, "kinds": [], "layers": []}


def _read_record(record: Path) -> tuple[set[str], int, dict[str, Any]]:
    """The kinds, the number of blocks and the identity of what lies in a directory of gradients."""
    try:
        found = json.loads(record.read_text())
        return set(found["kinds"]), int(found["blocks"]), dict(found["identity"])
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{record} is not a record of gradients; give a new or an empty directory") from None


def _is_ours(path: Path) -> bool:
    """Whether a store wrote the file, or was killed while it did."""
    name = path.name.removeprefix(".").removesuffix(".tmp")
    return (
        name in (RECORD, BEGUN, LOCK)
        or re.fullmatch(r"(gradients|inputs|upstream)-\d{5}\.safetensors", name) is not None
    )
