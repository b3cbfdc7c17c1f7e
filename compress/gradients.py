"""Gradients of the dense model for the metrics that need them, one decoder block in memory at a time.

The whole model's loss reaches every weight, but neither the model nor its graph has to be in memory for that. The
forward pass goes through the blocks one by one and leaves the input of each block on disk (the checkpoint of
activation checkpointing); the backward pass goes through them in reverse, runs each block again from its saved input,
and passes the gradient of the input on to the block before it. So memory holds one block, its float32 accumulators
and the activations of the calibration set twice; disk holds the inputs of all blocks until they have been used, and
the accumulators of each block once it is done.

The gradient is taken sample by sample (GBLM-Pruner sums |g| or g² over samples, not the gradients themselves) and is
accumulated in float32. A float16 model is run in float32 here: small gradients would vanish.
"""

from __future__ import annotations

import copy
import fcntl
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from compress.architecture import LinearModule, linears_of, oriented
from compress.blocks import BlockModel
from compress.calibration import CalibrationSet
from compress.errors import OutputError, SourceError, one_line
from compress.files import Entry, TensorFiles, check_digest, explain_os_error, write_shard, write_text
from compress.layer_statistics import GRADIENT_NEEDS

Progress = Callable[[int, int, str], None]
RECORD = "gradients.json"
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
        """Runs the forward and the backward pass over the dense model and writes a file for each block.

        Args:
            model: the dense model, in the dtype of the passes.
            layers: for each block the full names of the linears that are wanted.
            kinds: names out of ``GRADIENT_NEEDS``.
            required: which of the layers must have a gradient; left out: all.

        Raises:
            SourceError: the model gives no gradient: no loss, or one that does not reach a required layer.
            OutputError: there is not enough space on the disk.
        """
        wanted = sorted({*self._kinds, *kinds} & GRADIENT_NEEDS)
        self.directory.mkdir(parents=True, exist_ok=True)
        for left_over in filter(_is_ours, list(self.directory.iterdir())):  # of a run that was killed here, too
            if left_over.name != LOCK:
                left_over.unlink()
        count = len(model.blocks)
        arguments = list(samples.batches(1))
        hidden = model.record_calls(arguments)
        self._require_space(model, hidden, layers, len(wanted))
        for index in range(count):
            progress(index, 2 * count, f"gradients: forward through {model.block_name(index)}")
            self._write(self._inputs(index), {f"{n:06d}": states for n, states in enumerate(hidden)})
            model.load_block(index)
            hidden = [model.run_block(index, n, states).to(states.device) for n, states in enumerate(hidden)]
            model.drop_block(index)
        upstream = self._loss_gradients(model, samples, arguments, hidden)
        del hidden
        for index in reversed(range(count)):
            progress(2 * count - 1 - index, 2 * count, f"gradients: backward through {model.block_name(index)}")
            model.load_block(index)
            found = self._backward(model, index, layers[index], wanted, upstream, required)
            model.drop_block(index)
            self._write(self._file(index), found)
            self._inputs(index).unlink()
        record = {"identity": self._identity, "kinds": wanted, "blocks": count}
        write_text(self.directory / RECORD, json.dumps(record))
        self._kinds = set(wanted)

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
            raise _no_gradient("the model", missing)
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
                    loss = _loss(run, leaf, inputs, samples, n)
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
        total = _Accumulator(linears, kinds)
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
        size = len(blocks) * sum(states.nbytes for states in hidden) + 4 * weights * kinds
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

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        write_shard(path, [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()])


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
    return name in (RECORD, LOCK) or re.fullmatch(r"(gradients|inputs)-\d{5}\.safetensors", name) is not None


def _no_gradient(model: str, layers: Sequence[str]) -> SourceError:
    return SourceError(
        f"the method needs gradients, and {model} gives none for {layers[0]} ({len(layers)} layers): its output does not "
        f"depend on them; add --ignore {layers[0]!r}, or choose a metric without gradients (see `halve methods`)"
    )


@torch.no_grad()
def regional_gradients(
    model: BlockModel, index: int, linears: Mapping[str, LinearModule], hidden: Sequence[Tensor]
) -> dict[str, Tensor]:
    """sqrt(mean_n g_n²) with g_n = ∂‖block(x_n)‖₂/∂W for each linear of a loaded block, [N, K] float32.

    The regional gradient of Wanda++ (Yang et al. 2025, arXiv 2503.04992): it stays within one block, so nothing but
    the block has to be in memory. ``hidden`` holds the inputs of the block, one sample a tensor.

    Raises:
        SourceError: the output of the block does not depend on a layer.
    """
    # A copy, as some blocks keep what they computed (a recurrent state), which would hold the graph in the block.
    block = copy.deepcopy(model.blocks[index])
    copies = linears_of(block, model.block_name(index))
    total = _Accumulator({name: copies[name] for name in linears}, ["gradient_l2"])
    for n, states in enumerate(hidden):
        with torch.enable_grad(), total.tracked():
            output = model.run_copy(index, n, states, block, model.dtype)
            assert output is not None, "no hook ends this pass"
            total.add(output.float().norm(), None, None)
    scale = max(len(hidden), 1) ** -0.5
    found = total.result(type(model.model).__name__)
    return {name: found[f"{name}.gradient_l2"] * scale for name in linears}


class _Accumulator:
    """Σ|g| and Σg² of the weights of some linears over samples, float32, oriented as [N, K]."""

    def __init__(self, linears: Mapping[str, LinearModule], kinds: Iterable[str]) -> None:
        self._linears = dict(linears)
        self._sums = {
            (name, kind): torch.zeros(module.weight.shape, dtype=torch.float32, device=module.weight.device)
            for name, module in linears.items()
            for kind in kinds
        }
        self._reached: set[str] = set()

    def tracked(self) -> Any:
        """The weights are leaves of the graph inside."""
        return _Tracked([module.weight for module in self._linears.values()])

    def add(self, output: Tensor, gradient: Tensor | None, leaf: Tensor | None) -> Tensor:
        """Backward from ``output``, whose own gradient is ``gradient`` (None for a loss); adds one sample's gradients.

        Returns:
            The gradient of ``leaf``, or an empty tensor where there is none.
        """
        weights = [module.weight for module in self._linears.values()]
        targets = weights if leaf is None else [*weights, leaf]
        if not output.requires_grad:
            return torch.empty(0)
        gradients = torch.autograd.grad(
            output, targets, None if gradient is None else gradient.to(output.dtype), allow_unused=True
        )
        for name, found in zip(self._linears, gradients, strict=False):
            if found is None:
                continue  # an expert that this sample did not reach
            self._reached.add(name)
            if (name, "gradient_l1") in self._sums:
                self._sums[name, "gradient_l1"] += found.float().abs_()
            if (name, "gradient_l2") in self._sums:
                self._sums[name, "gradient_l2"] += found.float().square()
        if leaf is None:
            return torch.empty(0)
        return torch.zeros_like(leaf) if gradients[-1] is None else gradients[-1]

    def result(self, model: str, required: Collection[str] | None = None) -> dict[str, Tensor]:
        """``NAME.gradient_l1`` and ``NAME.gradient_l2``, the latter as a root, of every layer that was reached.

        Raises:
            SourceError: a required layer was not (left out: none may be missing).
        """
        needed = self._linears if required is None else required
        if missing := [name for name in self._linears if name not in self._reached and name in needed]:
            raise _no_gradient(model, missing)
        return {
            f"{name}.{kind}": oriented(
                total.sqrt_() if kind == "gradient_l2" else total, self._linears[name]
            ).contiguous()
            for (name, kind), total in self._sums.items()
            if name in self._reached
        }


class _Tracked:
    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = weights

    def __enter__(self) -> None:
        for weight in self._weights:
            weight.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for weight in self._weights:
            weight.requires_grad_(False)


def _loss(run: Any, hidden: Tensor, inputs: Mapping[str, Any], samples: CalibrationSet, n: int) -> Any:
    """The model's own loss of one sample: of the next token over all of a window, or of the class of an image.

    An image whose class is not known gets the class that the dense model sees in it.
    """
    try:
        if samples.argument == "input_ids":
            return run(hidden, {**inputs, "labels": inputs["input_ids"]}).loss
        if samples.classes is not None:
            label = samples.classes[n : n + 1]
        else:
            with torch.no_grad():
                label = run(hidden.detach(), inputs).logits.argmax(dim=-1)
        return run(hidden, {**inputs, "labels": label}).loss
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise SourceError(f"the method needs gradients, and the model gives no loss: {one_line(error)}") from None
