"""Distillation: the whole pruned model learns the dense model's predictions, from end to end.

A stage of its own, off unless asked for, and named in the artefact, because it is training of the model as a whole. No
label of the text is used: for every token the pruned model's distribution q is drawn to the dense model's p by

    loss = mean over tokens of KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)

(Hinton, Vinyals & Dean 2015, arXiv 1503.02531, at temperature 1 and without the hard labels). Masks are fixed; what is
trained is what the repair of blocks trains: the kept weights of pruned linears, their biases, and the norms, with the
last one. Embeddings and output head stay.

Unlike everything else here this needs the whole model in memory at once: the dense one as it is, the pruned one in
float32 with its gradients and the optimizer's two moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compress import packed
from compress.architecture import auto_class, find_blocks, oriented
from compress.artefact import weight_entries
from compress.blocks import BlockModel
from compress.divergence import KLDivergence
from compress.errors import CalibrationError, NumericalError, UsageError
from compress.files import TensorFiles
from compress.methods import Options
from compress.norms import norms_of
from compress.own_code import NEVER
from compress.repair import Repair
from compress.seeds import named_seed
from compress.training import MaskedAdam, Trainable, autocast, precision

CHECKS = 4
"""How often the held-out divergence is looked at; the best state is kept."""
CHECKED_WINDOWS = 16
"""Held-out windows that are looked at, at most."""
LOGITS_AT_ONCE = 1 << 28
"""Of the windows that go through the models together."""
LOGITS_HELD = 3
"""Tensors of the size of the logits: both models', and the gradient."""
KEPT_SHARE = 0.5
"""Of the free memory that may hold what the backward pass needs; blocks are run twice where it would be more."""

Telling = Callable[[int, int, str], None]


class DistillOptions(Options):
    rate: float = Field(
        0.0012,
        gt=0,
        le=1,
        description="length of a step, as a share of the root mean square of a parameter's kept values",
    )
    batch: int = Field(2, ge=1, description="windows in one step")
    windows: int | None = Field(
        None,
        ge=2,
        description="calibration windows to learn from, or all where the text holds fewer, and never fewer than the stages before "
        "have; those that they have not seen come first; left out: the same as theirs",
    )
    clip: float = Field(1.0, gt=0, description="the gradient's norm is cut to this")


DISTILL = Repair(
    name="distill",
    paper="Hinton et al. 2015, Distilling the Knowledge in a Neural Network (arXiv 1503.02531), on logits, without labels",
    cost="four forward passes of the whole model for each token, five where memory is short; the model and its optimizer in float32 in memory",
    options=DistillOptions,
)


def distill(
    model: BlockModel,
    blocks: Mapping[int, TensorFiles],
    pruned: Collection[str],
    windows: Tensor,
    options: DistillOptions,
    *,
    tokens: int,
    seen: int,
    held_out: int,
    format: str,
    seed: int,
    tell: Telling = lambda done, total, text: None,
) -> tuple[Iterator[dict[str, Tensor]], dict[str, Any]]:
    """Trains the pruned model on the dense one's logits.

    Args:
        model: the dense model; its parts need not be loaded.
        blocks: the tensors of every pruned block under the checkpoint's names.
        pruned: full names of the pruned linears.
        windows: calibration windows of token ids [n, length].
        tokens: about how many to train on, windows counted as often as they are seen.
        seen: how many of the windows, the first ones, the stages before were fitted to.
        held_out: how many of the windows, the last ones, are not trained on.
        format: ``packed`` or ``dense``, of ``blocks`` and of the result.
        seed: of the order of the windows.
        tell: called with the steps done, all steps, and a line.

    Returns:
        The tensors of every block in turn, under the names that ``blocks`` has, and what the report says. Where a gradient is
        not finite on the way, the training ends, and the best state so far stays.

    Raises:
        CalibrationError, UsageError: see `require_room`. NumericalError: the divergence is not finite before anything is trained.
    """
    require_room(model, windows, held_out, options)
    course = _Course(model, blocks, set(pruned), windows)
    fitted = len(windows) - held_out
    length = windows.shape[1]
    steps = max(1, round(tokens / (options.batch * length)))
    adam = MaskedAdam(course.parameters, rate=options.rate, steps=steps, clip=options.clip)
    watched = range(fitted, fitted + min(held_out, CHECKED_WINDOWS))
    before = best = course.divergence(watched)
    kept = adam.snapshot()
    order = _order(fitted, seen, seed)
    checks = {round(steps * (number + 1) / CHECKS) for number in range(CHECKS)}
    taken, notes = 0, {}
    try:
        for taken in range(1, steps + 1):
            course.learn([next(order) for _ in range(options.batch)])
            adam.step()
            if taken in checks:
                error = course.divergence(watched)
                if error < best:
                    best, kept = error, adam.snapshot(kept)
            tell(taken, steps, f"distilling, step {taken} of {steps}, held-out divergence {before:.4f} to {best:.4f}")
    except NumericalError as error:
        notes = {"warning": f"distillation ended early, the best state so far is kept: {error}"}
    adam.restore(kept)
    adam.require_masks()
    record = {
        "tokens": taken * options.batch * length,
        "steps": taken,
        "windows": fitted,
        "held_out_divergence_before": before,
        "held_out_divergence": best,
        "training_divergence": course.divergence(range(min(fitted, len(watched)))),
        **notes,
    }
    return course.blocks(blocks, format), record


def _order(windows: int, seen: int, seed: int) -> Iterator[int]:
    """Windows in a new random order each time all have been seen; the first time the new ones before those that the stages
    before have seen, which are better known already than a new text would be."""
    generator = torch.Generator().manual_seed(named_seed(seed, "distill"))
    if seen < windows:
        yield from (seen + torch.randperm(windows - seen, generator=generator)).tolist()
        yield from torch.randperm(seen, generator=generator).tolist()
    while True:
        yield from torch.randperm(windows, generator=generator).tolist()


class _Course:
    """The dense and the pruned model, and what is trained of the latter."""

    def __init__(self, model: BlockModel, blocks: Mapping[int, TensorFiles], pruned: set[str], windows: Tensor) -> None:
        self._model = model
        self._windows = windows
        self._pruned = pruned
        self._precision = precision(model.dtype, model.device)
        build = partial(
            auto_class(model.config).from_pretrained,
            attn_implementation=model.model.config._attn_implementation,
            **NEVER,
        )
        directory = model.source.directory
        self._dense = build(directory, dtype=model.dtype).to(model.device).eval().requires_grad_(False)
        self._sparse = build(directory, config=model.config, dtype=torch.float32).to(model.device).eval()
        self._sparse.requires_grad_(False)
        named = dict(self._sparse.named_parameters())
        for index, files in blocks.items():
            for name in model.parameters(index):
                value = _stored(files, model.key_of(name), self._sparse.get_submodule(name.rpartition(".")[0]))
                if value is not None:
                    named[name].data.copy_(value)
        self._vocabulary = 1
        """Logits of a token; known once there were some."""
        self._twice: dict[int, bool] = {}
        """Whether blocks are run twice, for so many windows together."""
        self.parameters = self._trainable()
        for trainable in self.parameters.values():
            trainable.parameter.requires_grad_(True)

    def _trainable(self) -> dict[str, Trainable]:
        modules = dict(self._sparse.named_modules())
        linears = {name: modules[name] for name in self._pruned}
        norms = norms_of(self._sparse, lambda: self._logits(self._sparse, [0]))
        masks = {id(module.weight): module.weight.detach() != 0 for module in linears.values()}
        wanted = {id(p) for module in (*linears.values(), *norms) for p in module.parameters(recurse=False)}
        return {
            name: Trainable(parameter, masks.get(id(parameter)))
            for name, parameter in self._sparse.named_parameters()
            if id(parameter) in wanted
        }

    def _logits(self, model: Any, windows: Sequence[int]) -> Tensor:
        """[windows * length, vocabulary]"""
        tokens = self._windows[list(windows)].to(self._model.device)
        low = None if model is self._dense else self._precision
        with autocast(self._model.device, low):
            logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        self._vocabulary = logits.shape[1]
        return logits

    def _divergences(self, windows: Sequence[int]) -> Tensor:
        """KL(p ‖ q) of each token, [windows * length] float32."""
        with torch.no_grad():
            expected = self._logits(self._dense, windows)
        return KLDivergence.apply(self._logits(self._sparse, windows), expected)

    def _groups(self, windows: Iterable[int]) -> Iterator[list[int]]:
        """As many windows as go through the models together. (What fits, by the memory that is free, would make other
        sums on another day.)"""
        count = _together(self._windows.shape[1], self._vocabulary)
        windows = list(windows)
        for start in range(0, len(windows), count):
            yield windows[start : start + count]

    def learn(self, windows: list[int]) -> float:
        """Adds the gradient of the mean loss over some windows; returns the loss."""
        total = 0.0
        for group in self._groups(windows):
            with torch.enable_grad(), self._saving_memory(len(group)):
                loss = self._divergences(group).mean() * (len(group) / len(windows))
                loss.backward()
            total += float(loss.detach())
        return total

    @contextlib.contextmanager
    def _saving_memory(self, windows: int) -> Iterator[None]:
        """Runs blocks twice where what they keep for the backward pass is too much to be held; decided once."""
        if windows not in self._twice:
            fixed, a_window = self._measure_kept_bytes()
            logits = _logits_bytes(self._model, windows * self._windows.shape[1] * self._vocabulary)
            room = KEPT_SHARE * (_free_memory(self._model.device) - logits)
            self._twice[windows] = fixed + windows * a_window > room
        with _checkpointed(self._sparse) if self._twice[windows] else contextlib.nullcontext():
            yield

    def _measure_kept_bytes(self) -> tuple[int, int]:
        """What all blocks keep for the backward pass: copies of weights, and of one window; one block's, times the blocks."""
        blocks = list(find_blocks(self._sparse)[1])
        block = blocks[min(1, len(blocks) - 1)]  # (the first one's input needs no gradient)
        own = {parameter.data_ptr() for parameter in block.parameters()}
        shapes = {shape for p in block.parameters() if p.ndim == 2 for shape in (p.shape, p.shape[::-1])}
        copies: dict[int, int] = {}
        activations: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                (copies if tensor.shape in shapes else activations)[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        def stop(*_: Any) -> None:
            raise _Seen

        forward = block.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                return forward(*args, **kwargs)

        block.forward = counted
        hook = block.register_forward_hook(stop)
        try:
            self._logits(self._sparse, [0])
        except _Seen:
            pass
        finally:
            hook.remove()
            del block.forward
        return sum(copies.values()) * len(blocks), sum(activations.values()) * len(blocks)

    @torch.no_grad()
    def divergence(self, windows: Iterable[int]) -> float:
        found = torch.cat([self._divergences(group) for group in self._groups(windows)])
        if not bool(torch.isfinite(found).all()):
            raise NumericalError("distillation: the divergence from the dense model is not finite; try --dtype float32")
        return float(found.mean())

    def blocks(self, blocks: Mapping[int, TensorFiles], format: str) -> Iterator[dict[str, Tensor]]:
        """The trained tensors of each block, and those that were not trained as they were."""
        named = dict(self._sparse.named_parameters())
        for index, files in blocks.items():
            saved = {name: files.read(name) for name in files}
            for name in self._model.parameters(index):
                if name not in self.parameters:
                    continue
                layer = name.rpartition(".")[0]
                value = named[name].detach().to(self._model.dtype)
                if layer in self._pruned and name.endswith(".weight"):
                    module = self._sparse.get_submodule(layer)
                    saved |= weight_entries(self._model.key_of(name), oriented(value, module), module, layer, format)
                else:
                    saved[self._model.key_of(name)] = value.cpu()
            if index == max(blocks):  # what lies outside of the blocks, such as the last norm, goes with the last one
                inside = {name for number in blocks for name in self._model.parameters(number)}
                for name in self.parameters.keys() - inside:
                    saved[self._model.key_of(name)] = named[name].detach().to(self._model.dtype).cpu()
            yield saved


def _stored(files: TensorFiles, key: str, module: nn.Module) -> Tensor | None:
    """A parameter from a block's file, packed or not, shaped as the module's; None where the file has none of it."""
    stem = key.removesuffix(packed.DENSE_SUFFIX)
    if stem + packed.VALUES_SUFFIX in files:
        both = packed.PackedWeight(files.read(stem + packed.VALUES_SUFFIX), files.read(stem + packed.MASK_SUFFIX))
        return oriented(packed.unpack(both), module)  # type: ignore[arg-type]
    return files.read(key) if key in files else None


class _Seen(Exception):
    """Ends a forward pass once everything that was wanted has been seen."""


@contextlib.contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Blocks keep their inputs only, and are run again in the backward pass.

    Not transformers' own way, which needs the model in training mode and so switches dropout on.
    """
    blocks = list(find_blocks(model)[1])

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    for block in blocks:
        block.forward = again(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def require_room(model: BlockModel, windows: Tensor, held_out: int, options: DistillOptions) -> None:
    """Raises CalibrationError where no window is left to hold out, UsageError where the two models, the optimizer, the best state
    and the logits of a step's tokens will not fit. To be called before anything else is done: pruning may take hours."""
    if not 0 < held_out < len(windows):
        raise CalibrationError(
            "distillation needs at least two calibration windows, one of them to hold out; raise --samples"
        )
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    need = parameters * (model.dtype.itemsize + 5 * 4 + 1)  # dense; pruned, gradients, two moments, best state; masks
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    most = max(options.batch, min(held_out, CHECKED_WINDOWS))  # in a step, or where the divergence is measured
    together = min(most, len(windows), _together(windows.shape[1], vocabulary or 1))
    need += _logits_bytes(model, together * windows.shape[1] * vocabulary)
    free = _free_memory(model.device)
    if need > free:
        raise UsageError(
            f"distillation holds the whole model in float32 with its optimizer: about {need / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; leave --distill out, or use a larger machine"
        )


def _together(length: int, vocabulary: int) -> int:
    """Windows that go through the models together."""
    return max(1, LOGITS_AT_ONCE // (length * vocabulary))


def _logits_bytes(model: BlockModel, logits: int) -> int:
    """What so many logits take: the dense model's in its dtype, the pruned model's and their gradient in that of its products."""
    low = precision(model.dtype, model.device) or torch.float32
    return logits * (model.dtype.itemsize + (LOGITS_HELD - 1) * low.itemsize)


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
