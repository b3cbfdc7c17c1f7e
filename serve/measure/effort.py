"""How long pruning would take, and how much memory: arithmetic on a recipe and a model's configuration, before anything runs.

Operations are counted stage by stage as `compress` does them, and divided by what a device multiplies in a second: measured here
in two short products, or taken from a GPU's data sheet. What a stage reaches of that was fitted to runs of one model on one
processor; so these are estimates, and marked so. ``benchmarks/effort.py`` says how far they are off from runs on this machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compress import wide
from compress.distill import LOGITS_HELD
from compress.patterns import NMPattern
from compress.pipeline import BATCH_TOKENS
from compress.recipe import Recipe
from compress.repair import HELD_OUT, HELD_OUT_TOKENS
from compress.rotation import COLUMNS, ROWS
from serve.measure.gpus import Gpu
from serve.measure.shapes import ModelShape

FORWARD_REACHES, TRAINING_REACHES, GRAM_REACHES, SOLVING_REACHES = 0.75, 0.55, 0.65, 0.5
"""Of the rate of a large product: norms, rotations, softmax and what else lies between products are the rest."""
COLUMN_SECONDS = {"cpu": 3e-4, "cuda": 1e-4}
"""A column of a layer in the loops of SparseGPT and APT, which are bound by calls and not by arithmetic; for GPUs it is a guess."""
STAGES = 5
"""Passes over the observed windows that targets take from the dense model: one a stage, each ending at its own layers."""
GPU_REACHES = 0.7
"""Of what the data sheet says of products on tensor cores, and without them."""
DISK_BYTES_A_SECOND = 1e9
"""Read, or written with a digest; taken for granted."""
ADMM_STEPS = 20
REFIT_STEPS = 10
ROTATION_OPERATIONS = 2400
"""Of a weight in a step of a rotation's descent, besides products: scores, masks and their gradients are passes over memory, which
take as long as so many operations of a large product; fitted."""
ADAM_BYTES = 21
"""A trained weight in float32: itself, its gradient, two moments, the best state so far, and its mask."""
GRAMS = frozenset({"gram", "split_gram"})
SQUARES = 6
"""Float32 matrices of a Gram matrix's size at once, while a layer is solved."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of large products: in the run's dtype, and in float32; where they come from, and the kind of device."""

    low: float
    single: float
    source: str
    kind: str = "cpu"


@dataclass(frozen=True)
class Stage:
    """A part of a run: operations in the run's dtype, in float32, and seconds."""

    name: str
    low: float
    single: float
    seconds: float


def of_gpu(gpu: Gpu) -> Rates:
    """A share of what the data sheet says."""
    return Rates(gpu.flops * GPU_REACHES, gpu.single * GPU_REACHES, f"{gpu.name}'s data sheet", "cuda")


@torch.inference_mode()
def measured(dtype: torch.dtype, device: torch.device, features: int = 1536, rows: int = 2048) -> Rates:
    """What this device does, from products of [rows, features] with [features, features]; takes about a second."""

    def rate(of: torch.dtype) -> float:
        x, w = torch.randn(rows, features, device=device).to(of), torch.randn(features, features, device=device).to(of)

        def run() -> float:
            started = time.perf_counter()
            wide.linear(x, w, None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - started

        run()
        return 2 * rows * features * features / statistics.median(run() for _ in range(5))

    single = rate(torch.float32)
    return Rates(single if dtype == torch.float32 else rate(dtype), single, "products measured here", device.type)


def estimate(shape: ModelShape, recipe: Recipe, rates: Rates) -> dict[str, Any]:
    """What a recipe takes on a model.

    Returns:
        A document: ``seconds`` in all, ``stages``, bytes in the device's memory (``device_bytes``), of activations in memory or
        on disk (``activation_bytes``), and of the artefact (``disk_bytes``).
    """
    recipe = recipe.fitted_to(max((layers.shape.k for layers in shape.prunable), default=1))
    memory = _memory(shape, recipe)
    moved = shape.weights + 2 * memory["disk_bytes"]  # blocks are written, and then the artefact of them
    files = Stage("files", 0.0, 0.0, moved / DISK_BYTES_A_SECOND)
    stages = [
        *_rotated(shape, recipe, rates),
        *_layer_wise(shape, recipe, rates),
        *_trained(shape, recipe, rates),
        files,
    ]
    return {
        "seconds": sum(stage.seconds for stage in stages),
        "stages": [vars(stage) for stage in stages],
        **memory,
        "rates": vars(rates),
        "tokens": recipe.windows * recipe.length,
    }


def _stage(
    name: str, rates: Rates, *, low: float = 0.0, single: float = 0.0, reaches: float = 1.0, more: float = 0.0
) -> Stage:
    return Stage(name, low, single, (low / rates.low + single / rates.single) / reaches + more)


def _pass_operations(shape: ModelShape, length: int) -> float:
    """Of one token forward through all blocks, in windows of that length, causal."""
    linears = sum(2 * layers.count * layers.shape.n * layers.shape.k for layers in shape.layers)
    experts = sum(2 * e.parameters * e.chosen / e.experts for e in shape.experts)
    return linears + experts + 4 * shape.attention_width * length / 2


def _rotated(shape: ModelShape, recipe: Recipe, rates: Rates) -> list[Stage]:
    """The descent, as if every head's values could be rotated, and what is observed for it."""
    config = shape.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if (options := recipe.chosen_rotation) is None or not isinstance(heads, int) or not shape.attention_width:
        return []
    width = shape.attention_width / len(shape.kinds)  # of the mean block
    parts = getattr(config, "num_key_value_heads", None) or heads
    hidden, channels = _hidden(shape), width / heads
    judged = parts * channels * (min(ROWS, heads / parts * hidden) + min(COLUMNS, hidden))
    descent = len(shape.kinds) * options.steps * judged * (4 * channels + ROTATION_OPERATIONS)
    tokens = min(options.tokens, recipe.samples * recipe.length)
    observed = tokens * _pass_operations(shape, recipe.length)
    squares = tokens * len(shape.kinds) * width * width
    return [
        _stage("observation for rotations", rates, low=observed, single=squares, reaches=GRAM_REACHES),
        _stage("rotations", rates, single=descent),
    ]


def _layer_wise(shape: ModelShape, recipe: Recipe, rates: Rates) -> list[Stage]:
    """Observation, what passes the activations on, and the solution of every layer."""
    forward = _pass_operations(shape, recipe.length)
    observed, every = recipe.samples * recipe.length, recipe.windows * recipe.length
    trains = recipe.chosen_repair is not None
    dense = trains or recipe.chosen_targets is not None
    observations = STAGES if recipe.chosen_targets is not None else 1
    passed = (every if trains else observed) * (2 if dense else 1)
    work = forward * (observations * observed + passed)
    stages = [_stage("forward passes", rates, low=work, reaches=FORWARD_REACHES)]
    squares = sum(count * k * k for k, count in _inputs(shape).items())
    if recipe.needs & GRAMS or recipe.chosen_targets is not None:
        work = squares * observed
        if recipe.chosen_targets is not None:  # products of what is missing with the inputs
            work += 2 * sum(g.count * min(g.shape.n, g.shape.k) * g.shape.k for g in shape.prunable) * observed
        stages.append(_stage("Gram matrices", rates, single=work, reaches=GRAM_REACHES))
    if (allocation := recipe.chosen_allocation) is not None:
        some = min(allocation.windows, recipe.samples) * recipe.length
        stages.append(
            _stage("allocation", rates, low=2.5 * forward * some, single=squares * some, reaches=GRAM_REACHES)
        )
    work, columns = _solved(shape, recipe)
    if work or columns:
        more = columns * COLUMN_SECONDS[rates.kind]
        stages.append(_stage("solving layers", rates, single=work, reaches=SOLVING_REACHES, more=more))
    return stages


def _solved(shape: ModelShape, recipe: Recipe) -> tuple[float, float]:
    """Of the reconstruction, for all layers: operations, and steps of its loops over columns."""
    factors = sum(count * k**3 for k, count in _inputs(shape).items())
    updates = sum(g.count * g.shape.n * g.shape.k**2 for g in shape.prunable)
    columns = float(sum(g.count * g.shape.k for g in shape.prunable))
    match recipe.reconstruction:
        case "admm" | "alps":
            found = 2 * factors + 2 * ADMM_STEPS * updates, 0.0
        case "sparsegpt":
            found = factors + updates, columns
        case "apt":
            found = factors + (1 + 2 * REFIT_STEPS) * updates, 1.5 * columns
        case "refit":
            found = factors + 2 * REFIT_STEPS * updates, 0.0
        case "swaps":
            found = 10 * updates, columns
        case _:
            found = 0.0, 0.0
    if recipe.chosen_targets is not None:
        found = found[0] + factors / 3 + 2 * updates, found[1]
    return found


def _trained(shape: ModelShape, recipe: Recipe, rates: Rates) -> list[Stage]:
    forward = _pass_operations(shape, recipe.length)
    head = 0 if shape.head is None else 2 * shape.head.n * shape.head.k
    stages = []
    if (repair := recipe.chosen_repair) is not None:
        tokens = recipe.windows * recipe.length
        held_out = min(HELD_OUT, HELD_OUT_TOKENS / tokens)
        # (Of the cycles only the first: few blocks are trained again.)
        work = forward * tokens * (repair.passes * (3 * (1 - held_out) + held_out) + held_out)
        # A round of new masks, if all are kept: one forward and two backward passes to find them, then a pass of training.
        work += forward * tokens * repair.rounds * ((5 + 3) * (1 - held_out) + held_out)
        stages.append(_stage("training of blocks", rates, low=work, reaches=TRAINING_REACHES))
        if repair.predictions:
            block, checked = forward / len(shape.kinds), 2 * held_out * tokens  # (before and after)
            # Of each token: the head for the dense model's output, and forward and back for the block's; it is not trained.
            work = 3 * (head + block) * repair.predictions + (2 * head + block) * checked
            stages.append(_stage("predictions of the last block", rates, low=work, reaches=TRAINING_REACHES))
    if recipe.distill:
        stages.append(
            _stage("distillation", rates, low=4 * (forward + head) * recipe.distill, reaches=TRAINING_REACHES)
        )
    return stages


def _inputs(shape: ModelShape) -> Mapping[int, int]:
    """How many inputs of each width the layers have that read one: of a block's layers of one width, those that read one tensor
    cannot be told apart here, so q, k and v, and gate and up, are taken to share theirs."""
    blocks = len(shape.kinds)
    found: dict[int, int] = {}
    for layers in shape.prunable:
        stem = layers.name.rpartition(".")[0]
        shared = {
            other.name
            for other in shape.prunable
            if other.name.rpartition(".")[0] == stem and other.shape.k == layers.shape.k
        }
        fused = [
            names for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if layers.name.endswith(names)
        ]
        if fused and layers.name != min(name for name in shared if name.endswith(fused[0])):
            continue
        found[layers.shape.k] = found.get(layers.shape.k, 0) + layers.count
    return found or {1: blocks}


def _memory(shape: ModelShape, recipe: Recipe) -> dict[str, float]:
    """Bytes: the largest block with what is held beside it; activations; what is written."""
    itemsize = shape.dtype.itemsize
    block = shape.block_bytes
    widest = max((layers.shape.k for layers in shape.prunable), default=1)
    hidden = _hidden(shape)
    solving = SQUARES * 4.0 * widest * widest if recipe.needs & GRAMS else 0.0
    training = 0.0
    if (repair := recipe.chosen_repair) is not None:
        training = block / itemsize * ADAM_BYTES
        if repair.predictions and shape.head is not None:
            training += LOGITS_HELD * BATCH_TOKENS * shape.head.n * itemsize
    if recipe.distill:
        training = max(training, shape.weights + shape.weights / itemsize * ADAM_BYTES)
    sets = 2 if recipe.chosen_repair is not None or recipe.chosen_targets is not None else 1
    pattern = recipe.parsed_pattern
    packed = recipe.format == "packed" and pattern == NMPattern(2, 4)
    return {
        "device_bytes": 2 * block + max(solving, training) + (shape.weights - len(shape.kinds) * block),
        "activation_bytes": float(sets * recipe.windows * recipe.length * hidden * itemsize),
        "disk_bytes": float(shape.sparse_weights if packed else shape.weights),
    }


def _hidden(shape: ModelShape) -> int:
    return int(getattr(shape.config.get_text_config(), "hidden_size", 0) or (shape.head.k if shape.head else 0))
