"""Which channels of a decoder block can be reordered for free, found by proof, and the reordering.

The columns of a linear (the *consumer*) may be reordered where the rows of the linears that make its input (the
*producers*) can be reordered alike, so that the block computes what it did: then the order costs nothing at run time.
That holds for the input of an MLP's last linear (elementwise: row j of gate and up, or of fc1, makes channel j), and for
the input of an attention's output projection (within a head, where row j of the values makes channel j of every query
head that reads them).

No names of families here. Linears whose shapes fit are proposed; a probe of the block shows which of them make the
consumer's input channel by channel; and each proposal is then put to the proof on the calibration tokens, in float32:
with both sides reordered the block's output must stay, with the consumer alone it must change, else nothing was proved.
Queries and keys never pass the probe (each of their rows moves a whole head), so they are never reordered.

Axes: a reordering has ``P`` independent parts (the key-value heads; 1 for elementwise) of ``C`` channels. Channel c of part
p is in the consumer's columns [P, R, C] R times (the query heads that share a key-value head), and in a producer's rows
[P, S, C] S times (a fused gate and up: 2). All copies move alike.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.architecture import LinearModule, linears_of, make_of, oriented, shape_of
from compress.blocks import BlockModel, stop_forward
from compress.errors import NumericalError
from compress.observe import InputObserver
from compress.patterns import NMPattern
from compress.permutation import best_order, retained
from compress.rotation import rotate_columns, rotate_rows

SHORTEST = 8
"""Tokens in a window below which nothing is proved: with one token, attention does not depend on its heads."""
_LOCAL = 1e-2
"""A channel has moved in a probe if it did by this share of the one that moved most."""
_EQUAL = 1e-3
"""Most that a reordering may change the output, as a share of what reordering the consumer alone does."""
_POWER = 1e-4
"""Least that reordering the consumer alone must change the output, as a share of the output: far above float32's
rounding, so that `_EQUAL` can tell the two apart."""


@dataclass(frozen=True)
class Fold:
    """Channels that can be reordered together; see the axes above."""

    consumer: str
    columns: Tensor
    """[P, R, C] into the consumer's K columns, each of them once."""
    producers: Mapping[str, Tensor]
    """[P, S, C] each, into a producer's N rows."""
    within_heads: bool

    def renamed(self, rename: Callable[[str], str]) -> Fold:
        """The same fold of another block that is made alike."""
        producers = {rename(name): rows for name, rows in self.producers.items()}
        return Fold(rename(self.consumer), self.columns, producers, self.within_heads)


def spread(orders: Tensor, index: Tensor, size: int) -> Tensor:
    """The order [size] of a whole dimension that moves the places ``index`` [P, S, C] by ``orders`` [P, C]; others stay."""
    index, orders = index.cpu(), orders.cpu()
    whole = torch.arange(size)
    whole[index] = index.gather(2, orders[:, None, :].expand_as(index))
    return whole


def find_folds(
    model: BlockModel,
    index: int,
    hidden: Tensor,
    consumers: Iterable[str],
    pattern: NMPattern,
    *,
    rotations: bool = False,
) -> Iterator[Fold]:
    """What is proved of a loaded block, at most one fold a consumer, in the order of the consumers.

    Args:
        hidden: the block's input in the first batch, [batch, length, hidden].
        consumers: full names of linears that are alone in reading their input.
        pattern: no group of it may lie across two heads.
        rotations: those within heads alone whose channels may not only be reordered but mixed (`compress.rotation`).
    """
    consumers = list(consumers)
    if not consumers or hidden.shape[-2] < SHORTEST:
        return
    trial = Trial(model, index, hidden)
    for consumer in consumers:
        for fold in proposals(trial, consumer, model.config, pattern, within_heads=rotations):
            if trial.proves(fold, rotations=rotations):
                yield fold
                break


def proposals(
    trial: Trial, consumer: str, config: Any, pattern: NMPattern, *, within_heads: bool = False
) -> Iterator[Fold]:
    """Folds of a consumer that fit the shapes and of whose producers a probe shows that they make its input channel by
    channel: first over all channels, then within the heads; or those within the heads alone."""
    columns = shape_of(trial.linears[consumer])[1]
    others = {name: shape_of(module)[0] for name, module in trial.linears.items() if name != consumer}

    def propose(parts: int, channels: int, rows_of: Mapping[str, list[Tensor]], within_heads: bool) -> Iterator[Fold]:
        places = torch.arange(columns).view(parts, -1, channels)  # [P, R, C]
        probed = 0, slice(None), channels // 2
        producers = {
            name: rows
            for name, layouts in rows_of.items()
            for rows in layouts
            if trial.makes(name, rows[probed], consumer, places[probed])
        }
        if producers:
            yield Fold(consumer, places, producers, within_heads)

    if not within_heads:
        fitting = {
            name: [torch.arange(n).view(1, -1, columns)] for name, n in others.items() if n in (columns, 2 * columns)
        }
        yield from propose(1, columns, fitting, False)

    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if not isinstance(heads, int) or columns % heads or (columns // heads) % pattern.m:
        return
    head_dim = columns // heads
    by_parts: dict[int, dict[str, list[Tensor]]] = {}
    for name, n in others.items():
        for parts, rows in value_rows(n, heads, head_dim):
            by_parts.setdefault(parts, {}).setdefault(name, []).append(rows)
    for parts, fitting in sorted(by_parts.items()):
        yield from propose(parts, head_dim, fitting, True)


def value_rows(rows: int, heads: int, head_dim: int) -> Iterator[tuple[int, Tensor]]:
    """Where the values can be among the rows of a projection: (key-value heads P, rows [P, 1, head_dim]) each.

    The whole of it; or of a fused one, which has as many rows as all queries, keys and values, the last rows (GPT-2, Phi-3),
    or the last rows of each key-value head's part (GPT-NeoX).
    """
    vectors, rest = divmod(rows, head_dim)
    if rest:
        return
    if vectors and heads % vectors == 0:
        yield vectors, torch.arange(rows).view(vectors, 1, head_dim)
    parts = (vectors - heads) // 2
    if parts > 0 and vectors == heads + 2 * parts and heads % parts == 0:
        every = torch.arange(rows)
        yield parts, every[-parts * head_dim :].view(parts, 1, head_dim)
        yield parts, every.view(parts, -1, head_dim)[:, -1:]


class Trial:
    """A copy of a loaded block in float32 that is probed and changed; the block itself is not touched.

    Args:
        hidden: the block's input in the first batch, [batch, length, hidden].
    """

    def __init__(self, model: BlockModel, index: int, hidden: Tensor) -> None:
        self._block = copy.deepcopy(model.blocks[index]).float()
        self.linears = linears_of(self._block, model.block_name(index))
        self._call = lambda: model.run_copy(index, 0, hidden, self._block, torch.float32)
        self._inputs: dict[str, Tensor | None] = {}

    @functools.cached_property
    def _output(self) -> Tensor:
        """Of the block as it is, so it is asked for before anything is changed."""
        return self._run()

    def makes(self, producer: str, rows: Tensor, consumer: str, columns: Tensor) -> bool:
        """Whether a push at some ``rows`` of the producer's output moves those ``columns`` of the consumer's input and no
        other."""
        if consumer not in self._inputs:
            self._inputs[consumer] = self._input_of(consumer)
        before = self._inputs[consumer]

        def push(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            pushed = output.clone()
            pushed[..., rows.to(output.device)] += output.abs().amax().clamp_min(1)
            return pushed

        handle = self.linears[producer].register_forward_hook(push)
        try:
            after = self._input_of(consumer)
        finally:
            handle.remove()
        if before is None or after is None or before.shape != after.shape:
            return False
        moved = (after - before).abs().flatten(0, -2).amax(dim=0).cpu()  # [K]
        return float(moved.max()) > 0 and set((moved > _LOCAL * moved.max()).nonzero()[:, 0].tolist()) == set(
            columns.tolist()
        )

    def proves(self, fold: Fold, *, rotations: bool = False) -> bool:
        """Whether the block's output stays under a reordering of the fold's kind that moves every channel, and does not
        stay where only the consumer's columns are reordered; or the same of a random rotation."""
        before = self._output
        parts, _, channels = fold.columns.shape
        change = _drawn_rotations(parts, channels) if rotations else _drawn(parts, channels)
        change_columns, change_rows = (rotate_columns, rotate_rows) if rotations else (reorder_columns, reorder_rows)
        weights = {name: module.weight.data for name, module in self.linears.items()}
        biases = {name: module.bias.data for name, module in self.linears.items() if module.bias is not None}
        try:
            change_columns(self.linears[fold.consumer], change, fold.columns)
            consumer_alone = self._distance(before)
            for name, rows in fold.producers.items():
                change_rows(self.linears[name], change, rows)
            both = self._distance(before)
        finally:
            for name, weight in weights.items():
                self.linears[name].weight.data = weight
            for name, bias in biases.items():
                self.linears[name].bias.data = bias
        # (a NaN makes every comparison False)
        return consumer_alone > _POWER and both <= _EQUAL * consumer_alone

    def _distance(self, before: Tensor) -> float:
        """How far the output is from what it was, as a share of that; by token, so that no single one outweighs all."""
        difference = (self._run() - before).norm(dim=-1).sum(dtype=torch.float64)
        return float(difference / before.norm(dim=-1).sum(dtype=torch.float64))

    def _run(self) -> Tensor:
        output = self._call()
        assert output is not None, "no hook ends this pass"
        return output

    def _input_of(self, name: str) -> Tensor | None:
        """What goes into a linear when it is called first, or None where it is not called."""
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else next(iter(kwargs.values())))
            stop_forward()

        handle = self.linears[name].register_forward_pre_hook(see, with_kwargs=True)
        try:
            self._call()
        finally:
            handle.remove()
        return seen[0] if seen else None


def _drawn(parts: int, channels: int) -> Tensor:
    """A reordering [P, C] for each part in one cycle, so that every channel moves; always the same one."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.empty(parts, channels, dtype=torch.int64)
    for part in orders:
        cycle = torch.randperm(channels, generator=generator)
        part[cycle] = cycle.roll(1)
    return orders


def _drawn_rotations(parts: int, channels: int) -> Tensor:
    """A rotation [P, C, C] for each part that mixes every channel with every other; always the same one."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(parts, channels, channels, generator=generator)).Q


def reorder_columns(module: LinearModule, orders: Tensor, columns: Tensor) -> Tensor:
    """Reorders a linear's input channels; returns the order [K]."""
    order = spread(orders, columns, shape_of(module)[1])
    weight = oriented(module.weight.data, module)[:, order.to(module.weight.device)]
    module.weight.data = oriented(weight, module).contiguous()
    return order


def reorder_rows(module: LinearModule, orders: Tensor, rows: Tensor) -> Tensor:
    """Reorders a linear's output channels with their biases; returns the order [N]."""
    order = spread(orders, rows, shape_of(module)[0])
    weight = oriented(module.weight.data, module)[order.to(module.weight.device)]
    module.weight.data = oriented(weight, module).contiguous()
    if module.bias is not None:
        module.bias.data = module.bias.data[order.to(module.bias.device)]
    return order


class FoldsOfAlike:
    """Folds that were proved of a block hold for all blocks that are made alike, so they are proved once.

    Args:
        rotations: see `find_folds`.
    """

    def __init__(self, *, rotations: bool = False) -> None:
        self._rotations = rotations
        self._known: dict[object, dict[str, Fold]] = {}

    def of(self, model: BlockModel, index: int, hidden: Tensor, consumers: list[str], pattern: NMPattern) -> list[Fold]:
        """What `find_folds` gives, or gave for a block that is made like this one."""
        prefix = f"{model.block_name(index)}."
        known = self._known.setdefault((make_of(model.blocks[index]), pattern), {})
        # Where nothing was proved before, the weights may have been to blame.
        unknown = [name for name in consumers if name.removeprefix(prefix) not in known]
        proved = find_folds(model, index, hidden, unknown, pattern, rotations=self._rotations) if unknown else ()
        for fold in proved:
            known[fold.consumer.removeprefix(prefix)] = fold.renamed(lambda name: name.removeprefix(prefix))
        found = [known.get(name.removeprefix(prefix)) for name in consumers]
        folds = [fold.renamed(lambda name: prefix + name) for fold in found if fold is not None]
        # Of zeros alone nothing could be proved, so a fold that was proved before does not count either: what a block becomes
        # must not depend on which blocks this run has seen.
        linears = model.linears(index)
        return [
            fold for fold in folds if all(bool(linears[name].weight.any()) for name in (fold.consumer, *fold.producers))
        ]


def fold_block(
    model: BlockModel,
    index: int,
    hidden: Tensor,
    observer: InputObserver,
    gradients: Mapping[str, dict[str, Tensor]],
    pattern: NMPattern,
    score: Callable[[str, LinearModule], Tensor],
    folds: FoldsOfAlike | None = None,
) -> dict[str, dict[str, Any]]:
    """Reorders what can be folded of a loaded and observed block, so that the pattern keeps more of the scores.

    Weights and biases of the block, the observed statistics and the gradients [N, K] are changed in place.

    Args:
        hidden: the block's input in the first batch.
        score: the scores [N, K] of a linear that will be pruned, by its full name.
        folds: of the blocks before it.

    Returns:
        For each consumer what the report says of it.
    """
    linears = model.linears(index)
    alone = [
        name for name in observer.linears if observer.statistics(name) is not None and observer.sharing(name) == [name]
    ]
    records = {}
    for fold in (folds or FoldsOfAlike()).of(model, index, hidden, alone, pattern):
        consumer = linears[fold.consumer]
        orders, gain = _best_orders(score(fold.consumer, consumer), fold, pattern)
        order = reorder_columns(consumer, orders, fold.columns).to(consumer.weight.device)
        statistics = observer.statistics(fold.consumer)
        assert statistics is not None, "only observed layers are consumers"
        statistics.permute(order)
        for kind, gradient in gradients.get(fold.consumer, {}).items():
            gradients[fold.consumer][kind] = gradient[:, order]
        for name, rows in fold.producers.items():
            order = reorder_rows(linears[name], orders, rows).to(consumer.weight.device)
            if name in observer.outputs:
                observer.outputs[name].permute(order)
            for kind, gradient in gradients.get(name, {}).items():
                gradients[name][kind] = gradient[order]
        records[fold.consumer] = {
            "kept_score_gain": gain,
            "folded_into": list(fold.producers),
            "within_heads": fold.within_heads,
        }
    return records


def _best_orders(scores: Tensor, fold: Fold, pattern: NMPattern) -> tuple[Tensor, float]:
    """The best orders [P, C] found for the consumer's ``scores`` [N, K], and the relative gain of the retained score."""
    if not bool(torch.isfinite(scores).all()):
        raise NumericalError(f"{fold.consumer}: its scores contain NaN or infinity, so its channels cannot be ordered")
    keep_n, m = pattern.keep_n, pattern.m
    orders, before, after = [], 0.0, 0.0
    for places in fold.columns.to(scores.device):  # [R, C]
        copies = scores[:, places].flatten(0, 1)  # [N R, C]: all copies move alike, so they count as further rows
        order = best_order(copies, keep_n, m)
        before += retained(copies, keep_n, m)
        after += retained(copies[:, order], keep_n, m)
        orders.append(order)
    return torch.stack(orders), after / before - 1 if before else 0.0
