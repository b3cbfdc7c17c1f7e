"""A decoder block of Llama-3-8B's shape with random weights, in every form that `benchmarks.gpu` compares.

Rotary embeddings and the writing of keys and values are left out: engines fuse them into one small kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import gpu_problems
from benchmarks.gpu_run import Run
from benchmarks.gpu_timing import DTYPE, LIBRARIES, Call, by, stream
from serve.kernels import ops, plain
from serve.kernels.cuda import backend, cusparselt

HEADS, KEY_HEADS, DEPTH, HIDDEN, INTERMEDIATE = 32, 8, 128, 4096, 14336
SHAPES = (
    ((HEADS + 2 * KEY_HEADS) * DEPTH, HIDDEN),
    (HIDDEN, HIDDEN),
    (2 * INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
)
"""[N, K]: queries, keys and values; output; gate and up; down."""


@dataclass(frozen=True)
class Case:
    """``sequences`` of ``tokens`` each; one token attends to ``cached`` ones before it, several to each other."""

    name: str
    sequences: int
    tokens: int
    count: int  # of blocks in a row
    cached: int = 1024


CASES = (
    Case("1 sequence, 1 token", 1, 1, 8),
    Case("a prompt of 4096 tokens", 1, 4096, 2),
    Case("16 sequences, 1 token", 16, 1, 8),
)


class Block:
    """``form``: dense, 2:4, or compressed, which is cuSPARSELt's."""

    def __init__(self, form: str, case: Case, library: cusparselt.CusparseLt | None = None) -> None:
        self.form, self.case, self.library = form, case, library
        packed = [gpu_problems.random_weight(n, k, DTYPE, seed) for seed, (n, k) in enumerate(SHAPES)]
        if form == "2:4":
            self.weights = [backend.prepare(weight) for weight in packed]
        else:
            self.weights = [plain.expand(weight) for weight in packed]
        if form == "compressed":
            assert library is not None
            self.weights = [library.compress(weight, stream()) for weight in self.weights]
            for weight, (n, k) in zip(self.weights, SHAPES, strict=True):
                x = gpu_problems.random_input(case.sequences * case.tokens, k, DTYPE)
                library.search(x, weight, n, stream())
        self.norm = torch.ones(HIDDEN, device="cuda", dtype=DTYPE)
        shape = (case.sequences, KEY_HEADS, case.cached, DEPTH)
        self.keys, self.values = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))

    def linear(self, index: int, x: Tensor) -> Tensor:
        weight, n = self.weights[index], SHAPES[index][0]
        if self.form == "2:4":
            return ops.sparse24_linear(x, weight, None, n)
        if self.form == "compressed":
            assert self.library is not None
            return self.library.multiply(x, weight, None, n, stream())
        return functional.linear(x, weight)

    def __call__(self, x: Tensor) -> Tensor:
        """x [sequences times tokens, 4096] -> the same."""
        rows, sequences = len(x), self.case.sequences
        hidden = self.linear(0, functional.rms_norm(x, (HIDDEN,), self.norm))
        parts = hidden.view(sequences, -1, HEADS + 2 * KEY_HEADS, DEPTH).transpose(1, 2)
        query, key, value = parts.split((HEADS, KEY_HEADS, KEY_HEADS), dim=1)
        one = self.case.tokens == 1
        if one:
            key, value = self.keys, self.values
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=not one, enable_gqa=True)
        x = x + self.linear(1, mixed.transpose(1, 2).reshape(rows, HIDDEN))
        gate, up = self.linear(2, functional.rms_norm(x, (HIDDEN,), self.norm)).split(INTERMEDIATE, dim=-1)
        return x + self.linear(3, functional.silu(gate) * up)


@contextmanager
def asking(**wishes: str) -> Iterator[None]:
    """HALVE_PREFILL and others for a while."""
    names = {f"HALVE_{name.upper()}": wish for name, wish in wishes.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, was in before.items():
            if was is None:
                del os.environ[name]
            else:
                os.environ[name] = was


def calls(kind: str, case: Case, library: cusparselt.CusparseLt | None = None) -> list[Call]:
    """A call for each of the blocks that follow each other.

    Args:
        kind: a form; or 2:4 with HALVE_PREFILL=cusparselt, asked, and with HALVE_KEEP_BOTH=1 as well, kept.
    """
    x = torch.randn(case.sequences * case.tokens, HIDDEN, device="cuda", dtype=DTYPE)
    if kind == "kept":
        with asking(prefill="cusparselt", keep_both="1"):
            blocks = [Block("2:4", case) for _ in range(case.count)]
    elif kind == "asked":
        with asking(prefill="cusparselt", keep_both="0"):
            blocks = [Block("2:4", case) for _ in range(case.count)]
    else:
        with asking(keep_both="0"):
            blocks = [Block(kind, case, library) for _ in range(case.count)]

    def by_the_library(b: Block) -> Tensor:
        with asking(prefill="cusparselt"):
            return b(x)

    if kind == "asked":
        return [lambda b=b: by_the_library(b) for b in blocks]
    return [lambda b=b: b(x) for b in blocks]


def measure(run: Run, case: Case, kinds: dict[str, str], library: cusparselt.CusparseLt | None = None) -> None:
    """Kinds of blocks, by the names that they are shown under, against the faster dense one."""
    what = f"block, {case.name}"
    if not run.has_time(what, 12):
        return
    sides: dict[str, list[Call]] = {}
    for name, kind in kinds.items():
        made = run.attempt(f"{what}, {name}", lambda kind=kind: calls(kind, case, library))
        if made is not None:
            sides[name] = made
    dense = calls("dense", case)

    def through(name: str, call: Call) -> Call:
        def called() -> Tensor:
            with by(name):
                return call()

        return called

    for name in LIBRARIES:
        sides[name] = [through(name, call) for call in dense]
    run.add("block", {"name": case.name, **run.compare(what, sides, 9)})
