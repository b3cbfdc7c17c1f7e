"""Attention on this processor: halve's kernel against torch's, as transformers calls them.

    python -m benchmarks.cpu_attention [--threads 1 2] [--rounds 21] [--smoke]

Causal, bfloat16, in the shapes of real models; queries, keys and values lie as their projections leave them, and both sides
give [batch, length, heads, depth] in a row. The sides take turns; figures are medians over the rounds, a ratio is the
median of the ratios within a round, with its quartiles. ``token``: one query behind so
many keys, several of them padded on the left by up to half; ``forward``: a prompt or a window of text; ``training``: forward
and backward pass. Where the processor has no bfloat16 products, torch's attention is measured in float32, too, queries, keys and values
widened at each call, and what counts is the faster of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compress.wide import is_emulated
from serve import attention
from serve.kernels.cpu import attention as kernel
from serve.measure.environment import environment
from serve.measure.speed import ratio

RESULTS = Path(__file__).parent / "results"
MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64), "Llama-3-8B": (32, 8, 128), "GPT-2": (12, 12, 64)}
"""Heads, heads of keys and values, depth."""
PLACES = (
    *(("token", 1, 128), ("token", 1, 1024), ("token", 4, 1024)),
    *(("forward", 1, 128), ("forward", 1, 512), ("forward", 1, 2048), ("forward", 8, 512), ("training", 4, 512)),
)
"""What, windows, length."""
MOST_SECONDS = 3.0
"""Of one measurement; the rounds that fit are made, three at least."""


def inputs(shape: tuple[int, int, int], what: str, batch: int, length: int) -> list[Tensor]:
    """q [B, H, Q, D], k and v [B, G, L, D], views of [B, positions, heads, D]; keys and values of a token as a cache has them."""
    heads, groups, depth = shape
    queries = 1 if what == "token" else length
    sizes = ((queries, heads), (length, groups), (length, groups))
    drawn = [torch.randn(batch, positions, count, depth).bfloat16().transpose(1, 2) for positions, count in sizes]
    if what == "token":
        drawn = [tensor.contiguous() for tensor in drawn]
    return [tensor.requires_grad_(what == "training") for tensor in drawn]


def padding(what: str, batch: int, length: int) -> Tensor | None:
    """[B, 1, 1, L] bool, the mask of several tokens that are decoded together; None where there is none."""
    if what != "token" or batch == 1:
        return None
    starts = torch.arange(batch) * length // (2 * batch)
    return (torch.arange(length) >= starts[:, None])[:, None, None]


def measure(shape: tuple[int, int, int], what: str, batch: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round for each side."""
    training = what == "training"
    tensors, mask = inputs(shape, what, batch, length), padding(what, batch, length)
    module: Any = nn.Module()
    module.num_key_value_groups = shape[0] // shape[1]
    slope = torch.randn(batch, length, shape[0], shape[2]).bfloat16()

    def side(function: Callable[..., tuple[Tensor, None]]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            y, _ = function(module, *tensors, mask)
            return [y, *torch.autograd.grad(y, tensors, slope)] if training else [y]

        return call

    def in_float32(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        y, _ = sdpa_attention_forward(module, q.float(), k.float(), v.float(), mask)
        return y.bfloat16(), None

    sides = {"halve": side(attention.forward), "torch": side(sdpa_attention_forward)}
    if is_emulated(torch.bfloat16, torch.device("cpu")):
        sides["torch, float32"] = side(in_float32)
    began = time.perf_counter()
    for own, *others in zip(*(call() for call in sides.values()), strict=True):  # warm-up
        if any((own - other).float().norm() > 0.02 * other.float().norm() for other in others):
            raise AssertionError(f"the sides compute different things at {shape}, {batch} x {length}")
    fits = int(MOST_SECONDS / (time.perf_counter() - began))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(max(3, min(rounds, fits))):
        for name in list(sides) if turn % 2 else reversed(sides):
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    others = [samples for name, samples in seconds.items() if name != "halve"]
    return {
        "what": what,
        "batch": batch,
        "length": length,
        "milliseconds": {name: 1e3 * statistics.median(samples) for name, samples in seconds.items()},
        "speedup": ratio(seconds["halve"], min(others, key=statistics.median)),
        "samples": seconds,
    }


def render(document: dict[str, Any]) -> str:
    """The range over the models, and every measurement."""
    lines = [
        "# Attention on a processor, bfloat16, causal",
        "",
        "| threads | what | windows x tokens | times as fast as torch, over the models |",
        "|---:|---|---:|---:|",
    ]
    places = dict.fromkeys((row["threads"], row["what"], row["batch"], row["length"]) for row in document["rows"])
    for place in places:
        gains = [
            row["speedup"]["median"]
            for row in document["rows"]
            if (row["threads"], row["what"], row["batch"], row["length"]) == place
        ]
        threads, what, batch, length = place
        lines.append(f"| {threads} | {what} | {batch} x {length} | {min(gains):.1f} to {max(gains):.1f} |")
    lines += [
        "",
        "| threads | shape of | what | windows x tokens | halve, ms | torch, ms | times as fast (quartiles) |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        gain, took = row["speedup"], row["milliseconds"]
        lines.append(
            f"| {row['threads']} | {row['model']} | {row['what']} | {row['batch']} x {row['length']} | {took['halve']:.3f} | "
            f"{min(value for name, value in took.items() if name != 'halve'):.3f} | {gain['median']:.2f} ({gain['p25']:.2f} to {gain['p75']:.2f}) |"
        )
    place = document["environment"]
    lines += ["", f"{place['machine']}, {place['cores']} cores, torch {place['versions']['torch']}, {place['date']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--name", default="cpu_attention", help="of the results files")
    parser.add_argument("--smoke", action="store_true", help="short windows, printed and not kept: does it run?")
    parser.add_argument("--render", action="store_true", help="only write the table again from the results")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.name}.json"
    if arguments.render:
        path.with_suffix(".md").write_text(render(json.loads(path.read_text())))
        return
    if not kernel.available():
        sys.exit("this processor has no attention kernel of halve's: `halve doctor` says what is there")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for model, shape in MODELS.items():
            for what, batch, length in PLACES:
                length, rounds = (64, 3) if arguments.smoke else (length, arguments.rounds)
                rows.append({"threads": threads, "model": model, **measure(shape, what, batch, length, rounds)})
                print(render({"rows": rows[-1:], "environment": environment()}).splitlines()[-3], file=sys.stderr)
    document = {"environment": environment(), "rows": rows}
    text = render(document)
    if not arguments.smoke:
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
