"""Block-wise repair: what is left of a decoder block learns to give the dense block's output again.

Layer-wise reconstruction makes up for each linear alone. What the linears of a block lose together, and what the pruned
blocks before it lost already, only the block as a whole can make up for. So once its masks are set, the kept weights of
the block's pruned linears, its norms and the biases of the pruned linears are trained to bring the block's output on the
*pruned* prefix's activations to the dense block's output on the *dense* prefix's activations,

    loss = mean over tokens of ‖block(x_pruned) − block_dense(x_dense)‖² / ‖block_dense(x_dense)‖².

Block-wise matching without labels is known as EBFT (Guo et al. 2024, arXiv 2402.12419) and Transformer Matching (3BASiL,
Makni et al. 2025, arXiv 2603.01376), which take inputs and targets from one prefix, and steps a tenth as long as these. It stays
within one block: memory holds the block in float32, its optimizer, and two sets of activations. No token is predicted, so
the text needs no labels and the model's own outputs are all that is learned from.

The last windows are held out, a tenth or what tells enough: they are never trained on (nor seen by the layer-wise
statistics), the best state on them is kept, and training ends when their error stops to fall. Where it still falls when
training ends, as in the first blocks, whose errors all others inherit, it begins again.

The last block can be trained on, by what the model predicts in place of the block's output (`compress.predictions`).

On request rounds of new masks follow (`compress.remask`), each trained, and kept only where the held-out error is lower
than before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from compress.architecture import join_names
from compress.blocks import BlockModel
from compress.course import Course
from compress.errors import NumericalError, RecipeError
from compress.methods import Options
from compress.patterns import NMPattern, Pattern
from compress.predictions import divergence_of_predictions
from compress.seeds import named_seed
from compress.training import MaskedAdam

HELD_OUT = 0.1
"""Share of the calibration batches that nothing is fitted to, at most."""
HELD_OUT_TOKENS = 24_576
"""More of them would tell no more, and are missed where something is learned."""
PATIENCE = 2
"""Passes without a better held-out error after which training ends."""
FEW_TOKENS = 8
"""Tokens per input channel of the widest linear below which a block is trained for fewer passes than asked for."""

STILL_FALLING = 0.05
"""Share of a held-out error by which the last pass has to lower it for training to begin again."""
REMASK_RATE = 0.5
"""Of the rate, in a round of new masks: what is trained already has less far to go."""

Telling = Callable[[str], None]


class RepairOptions(Options):
    passes: int = Field(4, ge=1, le=1000, description="how often a block sees the calibration windows")
    rate: float = Field(
        0.012,
        gt=0,
        le=1,
        description="length of a step, as a share of the root mean square of a parameter's kept values",
    )
    cycles: int = Field(
        1,
        ge=1,
        le=100,
        description="how often a block is trained for so many passes, at most: again where the last pass still lowered the "
        "held-out error by 5 %",
    )
    clip: float = Field(1.0, gt=0, description="the gradient's norm is cut to this")
    predictions: int = Field(
        0,
        ge=0,
        description="on about how many tokens the last block, once repaired, learns the dense model's predictions, behind the "
        "final norm and the head, in place of its own output",
    )
    predictions_rate: float = Field(0.003, gt=0, le=1, description="length of a step meanwhile, as rate is")
    rounds: int = Field(
        0,
        ge=0,
        le=100,
        description="rounds of new masks for a trained block: kept weights are exchanged for pruned ones of their group, then "
        "another pass; undone where the held-out error does not fall",
    )
    exchanged: float = Field(
        0.01, gt=0, le=1, description="groups, at most, whose mask a round changes, as a share of the block's"
    )

    def check(self, pattern: Pattern) -> None:
        if self.rounds and not isinstance(pattern, NMPattern):
            raise RecipeError(
                f"repair: rounds exchanges weights within the groups of an N:M pattern, and the pattern is '{pattern}'; "
                "leave rounds out"
            )


@dataclass(frozen=True)
class Repair:
    """How a block is repaired after its linears were pruned and reconstructed."""

    name: str
    paper: str
    cost: str
    needs: frozenset[str] = frozenset()
    options: type[Options] = RepairOptions


BLOCK = Repair(
    name="block",
    paper="block-wise matching of the dense model's activations; after Guo et al. 2024, EBFT (arXiv 2402.12419)",
    cost="three forward passes for each pass over the windows, the activations twice, one block and its optimizer in float32",
)
REPAIRS = {BLOCK.name: BLOCK}


def held_out_batches(batches: int, tokens: int = 1) -> int:
    """How many of the calibration batches of so many tokens, the last ones, are held out; none where there is only one."""
    return min(math.ceil(HELD_OUT * batches), math.ceil(HELD_OUT_TOKENS / tokens), batches - 1)


def repair_block(
    model: BlockModel,
    index: int,
    masks: dict[str, Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    options: RepairOptions,
    pattern: Pattern,
    *,
    batches: Sequence[Mapping[str, Any]] = (),
    held_out: int,
    seed: int,
    tell: Telling = lambda text: None,
) -> Repaired:
    """Trains a loaded, pruned block in place. Where a gradient is not finite, training ends, and the best state so far stays.

    Args:
        masks: for every pruned linear by its full name, True where a weight is kept, shaped as the module's weight; overwritten
            with those of the rounds that are kept.
        inputs: the block's inputs from the pruned prefix, [batch, length, hidden] each.
        targets: the dense block's outputs from the dense prefix, shaped alike.
        pattern: of the masks.
        batches: what the model is called with for each of the inputs; read where predictions are learned.
        held_out: how many of the batches, the last ones, nothing is fitted to.
        seed: of the order of the batches.
        tell: called with a line about the progress.

    Raises:
        NumericalError: the block's error is not finite before it is trained; the message names the block.
    """
    name = model.block_name(index)
    if not masks:
        return Repaired({"name": name, "status": "nothing to repair: no linear of it was pruned"}, set())
    if not held_out:
        status = "not repaired: a single calibration window leaves none to hold out"
        return Repaired({"name": name, "status": status, "warning": f"{status}; raise --samples"}, set())
    course = Course(model, index, masks, inputs, targets, held_out)
    passes, notes = _passes(options.passes, course.tokens, course.widest)
    generator = torch.Generator().manual_seed(named_seed(seed, f"{name}:repair"))
    before = best = course.held_out_error()
    if not math.isfinite(before):
        raise NumericalError(f"{name}: its error against the dense block is not finite; try --dtype float32")
    taken = cycles = 0
    rounds: list[dict[str, Any]] = []
    learned: dict[str, Any] = {}
    try:
        for cycle in range(options.cycles):
            cycles, last = cycle + 1, best
            for done in _train(course, passes, options.rate, options.clip, best, generator):
                last, best, taken = best, done.best, taken + done.steps
                again = f" (cycle {cycles})" if cycle else ""
                tell(f"{name}: pass {done.passes} of {passes}{again}, held-out error {before:.4f} to {best:.4f}")
            if best > last * (1 - STILL_FALLING):
                break
        for number in range(options.rounds):
            assert isinstance(pattern, NMPattern), "the options were checked"
            said = f"{name}: masks {number + 1} of {options.rounds}, held-out error {before:.4f}"
            record, steps = _round(
                course, pattern.m, best, options, generator, lambda x, said=said: tell(f"{said} to {x:.4f}")
            )
            rounds.append(record)
            taken += steps
            if not record["kept"]:
                break  # much the same would be tried again
            best = record["held_out_error"]
        if options.predictions and index == len(model.blocks) - 1:
            with divergence_of_predictions(model, batches, targets) as divergence, course.judged_by(divergence):
                _learn_predictions(course, options, generator, lambda text: tell(f"{name}: {text}"), learned)
    except NumericalError as error:  # of a block that was sound before: hours of other blocks need not go for it
        notes |= {"warning": f"training ended early, the best state so far is kept: {error}"}
    if learned:
        best = learned["held_out_error"] = course.held_out_error()
    course.write_back()
    masks.update(course.masks)
    record = {
        "name": name,
        "status": "repaired",
        "held_out_error_before": before,
        "held_out_error": best,
        "training_error": course.error(course.fitted[:held_out]),
        "steps": taken,
        "passes": passes,
        "cycles": cycles,
        "tokens": course.tokens,
        "tokens_per_input": round(course.tokens / course.widest, 3),
        **({"rounds": rounds} if rounds else {}),
        **({"predictions": learned} if learned else {}),
        **notes,
    }
    return Repaired(record, {join_names(name, parameter) for parameter in course.parameters})


@dataclass(frozen=True)
class Repaired:
    """What happened to a block."""

    record: dict[str, Any]
    """What the report says: errors against the dense block before and after, held out and on as many windows that were trained
    on (both of the state that was kept), steps, and tokens."""
    changed: set[str]
    """Full names of the parameters that may be other ones now."""


@dataclass(frozen=True)
class _Pass:
    """What a pass over the windows gave."""

    passes: int
    """So far."""
    steps: int
    """Of this pass."""
    best: float
    """The lowest held-out error so far."""


def _train(
    course: Course,
    passes: int,
    rate: float,
    clip: float,
    best: float,
    generator: torch.Generator,
    steps: int | None = None,
) -> Iterator[_Pass]:
    """Trains a block pass after pass; when it ends, whatever ended it, the block is in its best state.

    Args:
        best: the held-out error of the state that it is in; a pass with a higher one is not kept.
        steps: in a pass, each with another batch of those that are fitted to; left out: all of them.

    Raises:
        NumericalError: a gradient is not finite.
    """
    steps = steps or len(course.fitted)
    adam = MaskedAdam(course.parameters, rate=rate, steps=passes * steps, clip=clip)
    kept, since = adam.snapshot(), 0
    try:
        for number in range(passes):
            order = torch.randperm(len(course.fitted), generator=generator)[:steps].tolist()
            for position in order:
                course.loss(course.fitted[position]).backward()
                adam.step()
            error = course.held_out_error()
            since += 1
            if error < best:
                best, kept, since = error, adam.snapshot(kept), 0
            yield _Pass(number + 1, len(order), best)
            if since == PATIENCE:
                break
    finally:
        adam.restore(kept)
    adam.require_masks()


def _round(
    course: Course,
    m: int,
    best: float,
    options: RepairOptions,
    generator: torch.Generator,
    tell: Callable[[float], None],
) -> tuple[dict[str, Any], int]:
    """Exchanges weights of a trained block, and trains it for one more pass; as it was where that helps nothing.

    Args:
        best: the held-out error of the block as it is.

    Returns:
        What the report says of the round, and how many steps were taken.
    """
    before = course.state()
    groups, exchanged = course.exchange(m, options.exchanged, generator)
    record = {"groups": groups, "exchanged": exchanged}
    if not exchanged:
        return {**record, "held_out_error": best, "kept": False}, 0
    error, steps, kept = math.inf, 0, False
    try:
        for done in _train(course, 1, REMASK_RATE * options.rate, options.clip, error, generator):
            error, steps = done.best, done.steps
        kept = error < best
    finally:
        if not kept:
            course.set_state(before)
    tell(min(error, best))
    return {**record, "held_out_error": error, "kept": kept}, steps


def _learn_predictions(
    course: Course, options: RepairOptions, generator: torch.Generator, tell: Telling, record: dict[str, Any]
) -> None:
    """Trains a course that is judged by the model's predictions on about as many tokens as asked for; notes in ``record`` what the
    report says of it after every pass, so that it is right where training ends early."""
    before = course.held_out_error()
    if not math.isfinite(before):
        raise NumericalError("the divergence of its predictions is not finite; try --dtype float32")
    batches = len(course.fitted)
    asked = max(1, round(options.predictions * batches / course.tokens))
    passes = math.ceil(asked / batches)
    taken = 0
    rate, steps = options.predictions_rate, math.ceil(asked / passes)
    for done in _train(course, passes, rate, options.clip, before, generator, steps):
        taken += done.steps
        record |= {
            "held_out_divergence_before": before,
            "held_out_divergence": done.best,
            "tokens": round(taken * course.tokens / batches),
            "steps": taken,
        }
        tell(f"predictions, pass {done.passes} of {passes}, held-out divergence {before:.4f} to {done.best:.4f}")


def _passes(asked: int, tokens: int, widest: int) -> tuple[int, dict[str, Any]]:
    """Fewer passes where there are too few tokens to learn from: they would be learned by heart."""
    if tokens >= FEW_TOKENS * widest:
        return asked, {}
    passes = max(1, asked * tokens // (FEW_TOKENS * widest))
    if passes == asked:
        return asked, {}
    return passes, {
        "warning": f"{tokens / widest:.2g} training tokens per input channel are few (at least {FEW_TOKENS}): {passes} passes "
        f"instead of {asked}; raise --samples or --length"
    }
