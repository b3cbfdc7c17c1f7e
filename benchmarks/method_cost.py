"""What each method costs by itself, without the model's forward passes, on the layer shapes of a model.

    python -m benchmarks.method_cost [--model DIR] [--rounds 3] [--blocks 3]

Metrics: scores and the 2:4 mask of every linear of all blocks, seconds in all. Reconstructions: the first ``--blocks``
blocks, seconds, and the ratio to SparseGPT in the same round; factorizations are shared among layers of one input as in
a run, the Gram matrices are made beforehand. Inputs are drawn at random (correlated, with outlier channels): the time
does not depend on them, but for the number of swaps and cycles, which it does for the methods that have them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.files import TensorFiles
from compress.layer_statistics import LayerStatistics
from compress.layout import Layout
from compress.methods import Pruning
from compress.metrics import METRICS
from compress.metrics.wanda import wanda
from compress.patterns import NMPattern
from compress.reconstruction import RECONSTRUCTIONS
from compress.statistics import ACCUMULATORS, InputStatistics
from compress.sums import SumOfSquares
from serve.measure.environment import environment

RESULTS = Path(__file__).parent / "results"
TOKENS = 4096
WINDOWS = 32
PATTERN = NMPattern(2, 4)


def inputs(features: int, needs: set[str]) -> InputStatistics:
    """Statistics of random inputs of a width; what a real run gathers in its forward pass."""
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(TOKENS, features // 2, generator=generator) @ torch.randn(
        features // 2, features, generator=generator
    )
    x = x / features**0.5 + 0.3 * torch.randn(TOKENS, features, generator=generator) + 0.2
    x[:, ::61] *= 15
    gathered = InputStatistics(needs, features, tokens=TOKENS, windows=WINDOWS)
    gathered.update(x)
    return gathered


def layers(model: Path, blocks: int | None) -> list[list[tuple[str, Tensor]]]:
    """Names and weights [N, K] float32 of the linears, by block."""
    layout, files = Layout.of(model), TensorFiles(model)
    by_block: dict[str, list[tuple[str, Tensor]]] = {}
    for linear in layout.block_linears:
        block = ".".join(
            linear.name.split(".")[: next(i for i, p in enumerate(linear.name.split(".")) if p.isdigit()) + 1]
        )
        if blocks is not None and block not in by_block and len(by_block) == blocks:
            break
        key = layout.key(f"{linear.name}.weight", files)
        assert key is not None
        weight = files.read(key).float()
        by_block.setdefault(block, []).append((linear.name, weight.T if linear.transposed else weight))
    return list(by_block.values())


def layer_statistics(weight: Tensor, shared: InputStatistics, gradients: bool) -> LayerStatistics:
    outputs = SumOfSquares(len(weight), weight.device, TOKENS)
    outputs.update(torch.ones(4, len(weight)))
    names = ("gradient_l1", "gradient_l2", "regional_gradient")
    return LayerStatistics(
        shared,
        windows=8,
        outputs=outputs,
        gradients={name: weight.abs() for name in names} if gradients else {},
        place={"after_norm": len(weight) % 3 == 0},
    )


def time_metric(name: str, blocks: list[list[tuple[str, Tensor]]], shared: dict[int, InputStatistics]) -> float:
    metric = METRICS[name]
    ready = [layer_statistics(w, shared[w.shape[1]], gradients=True) for block in blocks for _, w in block]
    weights = [w for block in blocks for _, w in block]
    started = time.perf_counter()
    for weight, statistics_of in zip(weights, ready, strict=True):
        PATTERN.mask(metric.score(weight, statistics_of, metric.options()))
    return time.perf_counter() - started


def time_reconstruction(name: str, blocks: list[list[tuple[str, Tensor]]], shared: dict[int, InputStatistics]) -> float:
    method = RECONSTRUCTIONS[name]
    total = 0.0
    for block in blocks:
        seen: set[tuple[int, bool, bool]] = set()
        for layer, weight in block:
            of_input = shared[weight.shape[1]]
            # q, k, v share an input, gate and up another: their factorization is made once for each.
            group = (weight.shape[1], any(part in layer for part in ("gate", "up")), "o_proj" in layer)
            if group not in seen:
                of_input.__dict__.pop("factors", None)
                seen.add(group)
            stats = layer_statistics(weight, of_input, gradients=False)
            scores = None if method.own_metric else wanda(weight, stats)
            mask = None if scores is None else PATTERN.mask(scores)
            pruning = Pruning(PATTERN, method.group, mask, scores)
            started = time.perf_counter()
            method.run(weight, pruning, stats, method.options())
            total += time.perf_counter() - started
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=3)
    arguments = parser.parse_args()
    from benchmarks.demo import prepare_smollm2

    model = arguments.model or prepare_smollm2(Path("runs") / "smollm2-135m")
    every, some = layers(model, None), layers(model, arguments.blocks)
    widths = {w.shape[1] for block in every for _, w in block}
    shared = {width: inputs(width, set(ACCUMULATORS)) for width in widths}
    for of_input in shared.values():
        _ = of_input.gram, of_input.split_gram  # made before the clock runs
    metric_seconds: dict[str, list[float]] = {name: [] for name in METRICS}
    repair_seconds: dict[str, list[float]] = {name: [] for name in RECONSTRUCTIONS}
    with torch.no_grad():
        for _ in range(arguments.rounds):
            for name in METRICS:
                metric_seconds[name].append(time_metric(name, every, shared))
            for name in RECONSTRUCTIONS:
                repair_seconds[name].append(time_reconstruction(name, some, shared))
    count = sum(len(block) for block in every)
    document: dict[str, Any] = {
        "model": model.name,
        "layers": count,
        "blocks_of_reconstructions": len(some),
        "tokens": TOKENS,
        "metric_seconds": metric_seconds,
        "reconstruction_seconds": repair_seconds,
        "environment": environment(),
    }
    text = render(document)
    (RESULTS / "method_cost.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "method_cost.md").write_text(text)
    print(text)


def render(document: dict[str, Any]) -> str:
    """As Markdown."""
    versions = document["environment"]["versions"]
    rows = [
        f"# What a method costs by itself, {document['model']}",
        "",
        f"Metrics: scores and 2:4 masks of all {document['layers']} layers.",
        "",
        "| metric | seconds, median | least to most |",
        "|---|---:|---:|",
    ]
    for name, seconds in document["metric_seconds"].items():
        rows.append(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")
    rows += [
        "",
        f"Reconstructions: the first {document['blocks_of_reconstructions']} blocks, 2:4.",
        "",
        "| reconstruction | seconds, median | times SparseGPT's, median of the rounds |",
        "|---|---:|---:|",
    ]
    base = document["reconstruction_seconds"]["sparsegpt"]
    for name, seconds in document["reconstruction_seconds"].items():
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        rows.append(f"| {name} | {statistics.median(seconds):.2f} | {ratio:.2f} |")
    environment_of = document["environment"]
    rows += [
        "",
        f"{environment_of['date']}, {environment_of['machine']}, {environment_of['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
