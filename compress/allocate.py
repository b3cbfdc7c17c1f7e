"""Allocation: which few linears stay dense, where a part of what 2:4 saves may be given back for accuracy.

The linears that read one tensor (q, k and v; gate and up; in parallel blocks all of these) are one unit, because servers
multiply q, k and v, and gate and up, as one, and can only keep such a layer dense as a whole. Before anything is pruned,
every unit is pruned alone, by the recipe's own metric and reconstruction, in the dense model, and the error of its block's
output is measured on windows that the statistics did not see:

    error = mean over tokens of ‖block_pruned(x) − block(x)‖² / ‖block(x)‖².

Then units are kept dense, those with the largest error for what they save first, as long as the budget lasts. What a unit
saves is bytes, or microseconds of one pass, as they were measured on the device that will serve.

Errors of single units in a dense model leave out how they add up, what a later stage repairs, and what a reordering of
channels spares; they are a guide to the order and no forecast. Keeping sensitive layers dense by a budget is a plain
knapsack; the measure is that of `compress.repair`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from compress.architecture import shape_of
from compress.blocks import BlockModel
from compress.course import relative_error
from compress.errors import NumericalError, RecipeError
from compress.methods import Options
from compress.packed import SCALED_DTYPES, bytes_of
from compress.pruner import BlockPruner
from compress.recipe import Recipe
from compress.repair import Repair, held_out_batches

Weight = tuple[int, int, bool]
"""N, K, and whether it is that of a Conv1D, which is another product."""
Savings = Callable[[int, torch.dtype, torch.device, torch.dtype, bool], Mapping[Weight, float]]
"""``savings(rows, dtype, device, value_dtype, quantizes_x)``: microseconds that 2:4 with kept values of that dtype saves in one product there;
negative where it is slower."""
Telling = Callable[[int, int, str], None]


class AllocateOptions(Options):
    by: Literal["bytes", "latency"] = Field(
        "bytes",
        description="what the budget is a share of: bytes, or latency (needs `halve tune MODEL` on the device of the run)",
    )
    rows: int = Field(1, ge=1, description="rows of x, as many as sequences are decoded at once, for by=latency")
    windows: int = Field(48, ge=1, description="calibration windows that the errors are measured with")


ALLOCATE = Repair(
    name="allocate",
    paper="greedy on the block's output error for what a layer saves, each layer pruned alone in the dense model",
    cost="about as long as pruning the model layer by layer on --allocate-options windows",
    options=AllocateOptions,
)


@dataclass(frozen=True)
class Candidate:
    """Linears of one block that stay dense together, or are pruned together.

    Attributes:
        names: full ones.
        error: of the block's output when they alone are pruned.
        saves: bytes or microseconds that pruning them saves.
    """

    names: tuple[str, ...]
    error: float
    saves: float

    @property
    def worth(self) -> float:
        """Error that is avoided for what has to be given back; infinite where nothing has to be."""
        return self.error / self.saves if self.saves > 0 else float("inf")


@dataclass(frozen=True)
class Allocation:
    """What stays dense.

    Attributes:
        candidates: those with the largest error for what they save first.
        kept: indices into them.
    """

    by: str
    share: float
    candidates: list[Candidate]
    kept: frozenset[int]

    @property
    def total(self) -> float:
        """What pruning all of them would save, where it saves anything."""
        return sum(max(candidate.saves, 0.0) for candidate in self.candidates)

    @property
    def spent(self) -> float:
        """What is given back."""
        return sum(max(self.candidates[index].saves, 0.0) for index in self.kept)

    def record(self) -> dict[str, Any]:
        """For the journal and the report, from which `reasons_of` tells what stays dense."""
        left = sum(c.error for index, c in enumerate(self.candidates) if index not in self.kept)
        return {
            "by": self.by,
            "budget": self.share,
            "unit": "bytes" if self.by == "bytes" else "us",
            "saves_all": self.total,
            "given_back": self.spent,
            "error_all": sum(candidate.error for candidate in self.candidates),
            "error_left": left,
            "candidates": [
                {"names": list(c.names), "error": c.error, "saves": c.saves, "kept_dense": index in self.kept}
                for index, c in enumerate(self.candidates)
            ],
        }


def choose(candidates: Iterable[Candidate], share: float, by: str) -> Allocation:
    """Spends a share of what pruning saves on keeping linears dense.

    Greedy by error for what it saves, passing over what does not fit; or the single unit with the largest error that fits,
    where that avoids more than all of these together. So at least half of what the best choice would avoid is avoided.

    Args:
        share: of the sum of what all candidates save, 0 to 1.
    """
    ordered = sorted(candidates, key=lambda c: (-c.worth, -c.error, c.names))
    budget = share * sum(max(candidate.saves, 0.0) for candidate in ordered)
    free = [index for index, candidate in enumerate(ordered) if candidate.saves <= 0]
    greedy, spent = list[int](), 0.0
    for index, candidate in enumerate(ordered):
        if candidate.saves > 0 and candidate.error > 0 and spent + candidate.saves <= budget:
            greedy.append(index)
            spent += candidate.saves
    fitting = [index for index, candidate in enumerate(ordered) if 0 < candidate.saves <= budget]
    largest = max(fitting, key=lambda index: ordered[index].error, default=None)
    if largest is not None and ordered[largest].error > sum(ordered[index].error for index in greedy):
        greedy = [largest]
    return Allocation(by, share, ordered, frozenset([*free, *greedy]))


def allocate(
    model: BlockModel,
    pruner: BlockPruner,
    batches: Iterable[Mapping[str, Any]],
    pass_on: Callable[[int, list[Tensor]], None],
    saves: Mapping[str, float],
    *,
    tell: Telling = lambda done, total, text: None,
) -> Allocation:
    """Measures every unit of a dense model, and spends the budget of the pruner's recipe.

    Args:
        pruner: prunes by the recipe what its decisions let it.
        batches: what the model is called with.
        pass_on: overwrites the inputs of a loaded block with its outputs.
        saves: what pruning saves, by linear; see `what_pruning_saves`.
        tell: called with the blocks done, all blocks, and a line.

    Raises:
        RecipeError: no unit saves anything. NumericalError: an error is not finite; names the unit.
    """
    recipe = pruner.recipe
    options = recipe.chosen_allocation
    assert options is not None, "the recipe asks for it"
    hidden = model.record_calls(batches)
    candidates = []
    for index in range(len(model.blocks)):
        tell(index, len(model.blocks), f"{model.block_name(index)}: its linears pruned alone")
        model.load_block(index)
        for names, error in measure_block(model, index, pruner, hidden):
            candidates.append(Candidate(names, error, sum(saves[name] for name in names)))
        pass_on(index, hidden)
        model.drop_block(index)
    found = choose(candidates, recipe.allocate, options.by)
    if not found.total:
        raise _nothing_to_prune()
    return found


def _nothing_to_prune() -> RecipeError:
    return RecipeError("allocate by latency: 2:4 is faster for no linear on this device, so there is nothing to prune")


def measure_block(
    model: BlockModel, index: int, pruner: BlockPruner, hidden: Sequence[Tensor]
) -> list[tuple[tuple[str, ...], float]]:
    """The linears of every unit of a loaded dense block, and the error of the block's output when they alone are pruned.

    Args:
        hidden: the block's inputs in the dense model, [batch, length, hidden] each; the last tenth of the batches measures,
            the others give the statistics. A single batch does both.
    """
    held_out = held_out_batches(len(hidden))
    fitted = list(hidden[: len(hidden) - held_out])
    measured = range(len(hidden) - held_out, len(hidden)) if held_out else range(len(hidden))
    dense = {batch: model.run_block(index, batch, hidden[batch]) for batch in measured}
    found = []
    for names in pruner.trials(index, model.blocks[index], fitted):
        errors = [
            relative_error(model.run_block(index, batch, hidden[batch]), dense[batch]).flatten() for batch in measured
        ]
        error = float(torch.cat(errors).double().mean())
        if not math.isfinite(error):
            raise NumericalError(
                f"{names[0]}: with it pruned, the block's output is not finite in {model.dtype}; try --dtype float32, or leave "
                "the linear dense (--ignore)"
            )
        found.append((names, error))
    return found


def what_pruning_saves(
    model: BlockModel, recipe: Recipe, decisions: Mapping[str, str | None], savings: Savings | None
) -> dict[str, float]:
    """Bytes or microseconds, for each linear that can be pruned.

    Args:
        decisions: for every linear the reason why it stays dense, or None.
        savings: needed for an allocation by latency.

    Raises:
        RecipeError: what a linear saves is not known, or no linear saves anything.
    """
    options, saves = recipe.chosen_allocation, dict[str, float]()
    asked = "" if recipe.value_dtype == "auto" else f" --value-dtype {recipe.value_dtype}"
    asked += "" if recipe.activation_dtype == "none" else f" --activation-dtype {recipe.activation_dtype}"
    assert options is not None, "the recipe asks for it"
    by_latency = options.by == "latency"
    values = SCALED_DTYPES.get(recipe.value_dtype, model.dtype)
    known: Mapping[tuple[int, int, bool], float] = {}
    if by_latency and savings is not None:
        known = savings(options.rows, model.dtype, model.device, values, recipe.activation_dtype != "none")
    for index in range(len(model.blocks)):
        for name, module in model.linears(index).items():
            if decisions[name] is not None:
                continue
            n, k = shape_of(module)
            if not by_latency:
                dense = n * k * model.dtype.itemsize
                saves[name] = (
                    dense - bytes_of(n, k, values)
                    if recipe.format == "packed"
                    else dense * recipe.parsed_pattern.sparsity
                )
                continue
            weight = (n, k, isinstance(module, Conv1D))
            if weight not in known:
                raise RecipeError(
                    f"allocate by latency: {name} is {n} x {k}, and the kernel table of {model.device.type} does not know that shape "
                    f"at {options.rows} rows of x; run `halve tune MODEL{asked}` there first, or use --allocate-options by=bytes"
                )
            saves[name] = known[weight]
    if not any(value > 0 for value in saves.values()):
        raise _nothing_to_prune()
    return saves


def reasons_of(record: Mapping[str, Any]) -> dict[str, str]:
    """For each linear that stays dense by an allocation's record, why."""
    reasons = {}
    for candidate in record["candidates"]:
        if candidate["kept_dense"]:
            reason = "of all, it loses much for what it saves" if candidate["saves"] > 0 else "2:4 is not faster here"
            reasons |= dict.fromkeys(candidate["names"], f"kept by the allocation: {reason}")
    return reasons
