"""Predicts the times of a whole model from two models of a few of its blocks, with random weights.

All blocks of a kind take the same time, so the time of a model is a fixed part (embeddings, output layer, what Python does
around them) and one for each block. Two depths give both, for dense and for sparse; they run in the real engine's modules on
the real prompt, so attention, norms and the overhead of calls are in it. The four models take turns, and a round predicts from
its own times only, because a machine's speed drifts from one round to the next.

Where blocks differ (attention in a window and to everything, dense first blocks), both depths hold whole periods of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.architecture import linears_of
from compress.errors import SourceError
from compress.layout import Layout
from serve.linear import Sparse24Conv1D, prepare_for_serving
from serve.measure import tuned
from serve.measure.kernel_entries import Shape
from serve.measure.kernel_table import noise, random_packed
from serve.measure.shapes import ModelShape, build
from serve.measure.speed import CACHES, synchronize

ROUNDS = (3, 25)  # fewest, most
_DECODED = 8  # tokens of a round, in the middle of the answer
_DEPTH_OF_REST = (
    4  # the deeper model has at least such a part of what is missing in the shallower one: noise grows with it
)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Load:
    """Attributes:
    prompt: tokens of a prompt; output: tokens of an answer, the first one of which the prompt's pass gives.
    batch: sequences at once.
    """

    prompt: int
    output: int
    batch: int


@dataclass(frozen=True)
class Depths:
    """Numbers of blocks: of the two models that are measured, and of the whole."""

    shallow: int
    deep: int
    whole: int

    def predict(self, at_shallow: float, at_deep: float) -> float:
        """The time of the whole, from the times at both depths."""
        if self.deep == self.whole:
            return at_deep
        block = (at_deep - at_shallow) / (self.deep - self.shallow)
        return at_shallow + (self.whole - self.shallow) * block


@dataclass(frozen=True)
class Times:
    """Seconds predicted for the whole model in each round, dense and sparse: ``ttft`` and ``tpot``."""

    ttft: dict[str, list[float]]
    tpot: dict[str, list[float]]
    depths: Depths


def period(kinds: Sequence[Hashable]) -> tuple[int, int]:
    """(blocks at the beginning that do not repeat, length of what repeats after them), the shortest of both together."""
    count = len(kinds)
    for both in range(1, count + 1):
        for length in range(both, 0, -1):
            start = both - length
            if all(kinds[i] == kinds[i + length] for i in range(start, count - length)):
                return start, length
    return 0, count


def choose_depths(kinds: Sequence[Hashable], *, cached: int, most: int) -> Depths:
    """The depths to measure.

    Args:
        kinds: of every block.
        cached: blocks that a processor could keep in its last cache; the shallower model has more, if it can.
        most: blocks that there is memory for.

    Raises:
        SourceError: there is not enough memory for blocks of every kind, twice.
    """
    whole = len(kinds)
    start, length = period(kinds)
    rest = (whole - start) % length
    shallow = start + rest or length
    while shallow <= cached and shallow + 2 * length <= whole:
        shallow += length
    wanted = max(length, -(-(whole - shallow) // _DEPTH_OF_REST) // length * length)
    deep = min(whole, shallow + wanted)
    if deep > most:
        deep = shallow + (most - shallow) // length * length
    if deep > most or (deep <= shallow and deep < whole):
        raise SourceError(
            f"there is memory for {most} of the {whole} blocks, and two models of {shallow} and {min(whole, shallow + length)} "
            "of them are needed to measure; free memory, or name a --device to estimate for"
        )
    return Depths(min(shallow, deep), deep, whole)


@torch.inference_mode()
def measure(
    model: ModelShape,
    depths: Depths,
    load: Load,
    *,
    device: torch.device,
    budget: float,
    progress: Progress = lambda done, total, text: None,
) -> Times:
    """Runs the four models in turn until the budget (in seconds) is spent, at least `ROUNDS` [0] times.

    Raises:
        SourceError: the model cannot be shortened, or keeps nothing from one token to the next.
    """
    models = _models(model, depths, device)
    tokens = torch.randint(
        model.config.get_text_config().vocab_size,
        (load.batch, load.prompt),
        generator=torch.Generator().manual_seed(0),
    ).to(device)
    times = Times({"dense": [], "sparse": []}, {"dense": [], "sparse": []}, depths)
    began = time.monotonic()
    for turn in range(ROUNDS[1] + 1):
        taken: dict[Any, tuple[float, float]] = {}
        for key in list(models) if turn % 2 else reversed(models):
            taken[key] = _generate(models[key], tokens, load.output)
        progress(turn, ROUNDS[1], "warm-up" if not turn else f"{depths.shallow} and {depths.deep} blocks, round {turn}")
        if not turn:
            began = time.monotonic()
            continue
        for form in ("dense", "sparse"):
            shallow, deep = taken[form, depths.shallow], taken[form, depths.deep]
            times.ttft[form].append(depths.predict(shallow[0], deep[0]))
            times.tpot[form].append(depths.predict(shallow[1], deep[1]))
        spent = time.monotonic() - began
        if turn >= ROUNDS[0] and spent * (turn + 1) / turn > budget:
            break
    return times


def _models(model: ModelShape, depths: Depths, device: torch.device) -> dict[tuple[str, int], PreTrainedModel]:
    """By form and depth. What they have in common they share: the shallow one's blocks are the first of the deep one."""
    deep = build(model, depths.deep, device)
    filled: set[int] = set()
    for parameter in deep.parameters():
        if id(parameter) not in filled:
            filled.add(id(parameter))
            parameter.copy_(noise(parameter.shape, model.dtype) if parameter.ndim > 1 else torch.ones_like(parameter))
    sparse = build(model, depths.deep, torch.device("cpu") if device.type == "cpu" else device)
    pruned = {linear.name for linear in Layout(deep).linears.values() if model.is_pruned(linear)}
    packed = {
        name: random_packed(layer, model.dtype, device, model.value_dtype, model.quantizes_x)
        for name, layer in linears_of(deep, "").items()
        if name in pruned
    }
    measured = tuned.decisions(device)
    for layer in packed.values():
        found = measured.get(
            (
                Shape(layer.out_features, layer.in_features, isinstance(layer, Sparse24Conv1D)),
                model.kind,
            )
        )
        layer.preferred = None if found is None else found.backend
    models: dict[tuple[str, int], PreTrainedModel] = {}
    for depth in (depths.shallow, depths.deep):
        for form in ("dense", "sparse"):
            if (form, depth) in models:
                continue
            one = deep if (form, depth) == ("dense", depths.deep) else sparse if depth == depths.deep else None
            one = build(model, depth, device) if one is None else one
            if one is not deep:
                _share(one, deep)
            if form == "sparse":
                for name in linears_of(one, "").keys() & packed.keys():
                    _replace(one, name, packed[name])
            models[form, depth] = one
    for one in models.values():
        prepare_for_serving(one)
    return models


def _share(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Gives a model the parameters of a deeper one."""
    for name, parameter in other.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue  # of a block that the model does not have
        setattr(module, attribute, parameter)


def _replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _generate(model: PreTrainedModel, tokens: Tensor, output: int) -> tuple[float, float]:
    """Seconds of the prompt [batch, prompt], and of one token in the middle of an answer of ``output`` tokens."""
    started = _now(tokens)
    result = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    token = result.logits[:, -1:].argmax(dim=-1)
    prefill = _now(tokens) - started
    name = next((name for name in CACHES if result.get(name) is not None), None)
    if name is None:
        raise SourceError(
            f"{type(model).__name__} keeps nothing from one token to the next, so its decoding has no time"
        )
    warm_up = min(1, output - 1)  # (together no more positions than an answer has)
    decoded = max(1, min(_DECODED, output - warm_up))
    between = (output - decoded) // 2
    if between and name == "past_key_values":  # a state does not grow, so its length takes no time
        result = model(
            input_ids=tokens[:, :1].expand(-1, between), use_cache=True, logits_to_keep=1, **{name: result[name]}
        )
    for turn in range(warm_up + decoded):
        if turn == warm_up:
            started = _now(tokens)
        result = model(input_ids=token, use_cache=True, **{name: result[name]})
        token = result.logits[:, -1:].argmax(dim=-1)
    return prefill, (_now(tokens) - started) / decoded


def _now(tokens: Tensor) -> float:
    synchronize(tokens.device)
    return time.perf_counter()


def blocks_that_fit(model: ModelShape, memory: float) -> int:
    """How many blocks, dense and sparse, beside what is not in blocks, take so many bytes."""
    block = model.block_bytes
    outside = model.weights - block * len(model.kinds)
    return int((memory - max(0, outside)) // (block * 1.6))


def blocks_that_a_cache_holds(model: ModelShape, cache: int) -> int:
    """How many blocks of the sparse model lie in a cache of so many bytes, with the output layer."""
    head = 0 if model.head is None else model.head.n * model.head.k * model.dtype.itemsize
    block = max(1, (model.packed_bytes) // len(model.kinds))
    return max(0, (2 * cache - head) // block)
