"""Where a block's channels can be rotated for free, found by proof, and the rotation.

What can be reordered within attention heads (`compress.folding`) can often be mixed, too, and the proof is the same: with both
sides mixed by random rotations the block's output must stay, with the output projection alone it must change. What scales the
channels of a head one by one, such as a gate, lets orders pass and refuses this. A block is rotated before anything of it is observed,
so everything that comes after sees nothing but other weights of the same block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress import packed
from compress.activations import first_tokens
from compress.architecture import LinearModule, oriented
from compress.blocks import BlockModel
from compress.folding import Fold, FoldsOfAlike
from compress.observe import InputObserver
from compress.patterns import NMPattern
from compress.rotation import (
    HeadProblem,
    RotationOptions,
    best_rotations,
    record_of,
    rotate_columns,
    rotate_rows,
)

Observe = Callable[[dict[str, LinearModule], list[Tensor], frozenset[str]], InputObserver]
"""The statistics of some linears on some of the block's inputs."""


def rotate_block(
    model: BlockModel,
    index: int,
    hidden: list[Tensor],
    pruned: Mapping[str, LinearModule],
    observe: Observe,
    pattern: NMPattern,
    options: RotationOptions,
    known: FoldsOfAlike,
) -> dict[str, dict[str, Any]]:
    """Rotates what can be rotated of a loaded block, weights and biases in place.

    Args:
        hidden: the block's inputs, [batch, length, hidden] each.
        pruned: the linears that will be pruned, by full name; only their input channels are rotated.
        known: what was proved of the blocks before it.

    Returns:
        For each output projection what the report says of it; ``with`` names the projections of the values.

    Raises:
        NumericalError: a weight or an input is not finite.
    """
    first = observe(dict(pruned), hidden[:1], frozenset())
    alone = [name for name in pruned if first.statistics(name) is not None and first.sharing(name) == [name]]
    found = known.of(model, index, hidden[0], alone, pattern)
    if not found:
        return {}
    involved = {name for fold in found for name in (fold.consumer, *fold.producers)}
    observer = observe(
        {name: module for name, module in pruned.items() if name in involved},
        first_tokens(hidden, options.tokens),
        frozenset({"gram", "sum_of_squares"}),
    )
    linears = model.linears(index)
    records = {}
    for fold in found:
        problem = _problem(fold, linears, observer, pattern)
        rotations = best_rotations(problem, options)
        rotate_columns(linears[fold.consumer], rotations, fold.columns)
        for name, rows in fold.producers.items():
            rotate_rows(linears[name], rotations, rows)
        records[fold.consumer] = {"with": list(fold.producers), **record_of(problem, rotations)}
    return records


def _problem(
    fold: Fold, linears: Mapping[str, LinearModule], observer: InputObserver, pattern: NMPattern
) -> HeadProblem:
    def weight_of(name: str) -> Tensor:
        weight = oriented(linears[name].weight.data, linears[name])
        packed.require_finite(weight, name)
        return weight.float()

    statistics = observer.statistics(fold.consumer)
    assert statistics is not None, "only observed layers are consumers"
    statistics.require_finite(fold.consumer)
    weight, gram = weight_of(fold.consumer), statistics.gram
    columns = fold.columns.to(weight.device)  # [P, R, C]
    values, squares = [], []
    for name, rows in fold.producers.items():
        inputs = observer.statistics(name)
        if inputs is None:  # it stays dense
            continue
        inputs.require_finite(name)
        values.append(weight_of(name)[rows.to(weight.device)].squeeze(1))  # [P, C, K]
        squares.append(inputs.sum_of_squares.float())
    return HeadProblem(
        weight[:, columns].permute(1, 2, 0, 3).contiguous(),
        gram[columns[..., :, None], columns[..., None, :]],
        torch.cat(values, dim=2) if values else None,
        torch.cat(squares) if values else None,
        pattern,
    )
