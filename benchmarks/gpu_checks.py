"""What the GPU kernels compute, against float64, on the GPU itself. `benchmarks.gpu` runs these first; the tests marked
gpu are the same ones. Needs torch and a GPU, nothing else.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_checks_scaled import of_8_bits, rounded_x, rounding_of_x
from benchmarks.gpu_checks_triton import in_triton, in_triton_of_8_bits, pruning
from benchmarks.gpu_problems import (
    DTYPES,
    WrongError,
    check,
    exact,
    loaded,
    poison,
    product,
    random_input,
    random_scaled,
    random_weight,
)
from compress.packed import PackedWeight, unpack_bits
from serve.kernels import ops, plain
from serve.kernels.cuda import backend, layout, plan

ROWS = (*range(1, 81), 96, 127, 128, 200, 256, 257, 1000, 2049)
FAMILIES = {
    "Llama-3-8B": ((4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)),
    "Llama-3-70B": ((8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672)),
    "Qwen3-0.6B": ((2048, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (1024, 3072)),
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "GPT-2": ((2304, 768), (768, 768), (3072, 768), (768, 3072)),
}
"""Shapes [N, K] of the linear layers of five families."""


def packing() -> None:
    """A weight that is prepared on the GPU has the bytes of one that is prepared on the processor, and comes back."""
    for dtype in DTYPES:
        for n, k in ((1, 8), (100, 200), (1000, 1024)):
            weight = random_weight(n, k, dtype)
            prepared = layout.prepare(weight)
            on_cpu = layout.prepare(PackedWeight(weight.values.cpu(), weight.mask.cpu()))
            restored = layout.restore(prepared)
            same = torch.equal(prepared.cpu(), on_cpu) and torch.equal(restored.mask, weight.mask)
            if not same or not torch.equal(restored.values, weight.values):
                raise WrongError(f"a weight [{n}, {k}] in {dtype} is not what was prepared")


def rows() -> None:
    """Every number of rows of x, through the operator, with and without a bias."""
    for dtype in DTYPES:
        for n, k in ((200, 1032), (129, 264)):
            weight = random_weight(n, k, dtype)
            prepared, dense, bias = backend.prepare(weight), plain.expand(weight), random_input(1, n, dtype)[0]
            for count in ROWS:
                x, added = random_input(count, k, dtype, count), bias if count % 2 else None
                poison(count * n, dtype)
                y = ops.sparse24_linear(x, prepared, added, n)
                check(y, x, dense, added, f"{count} rows, weight [{n}, {k}], {dtype}")
                if count > plan.MOST_ROWS and not torch.equal(y, ops.sparse24_linear(x, prepared, added, n)):
                    raise WrongError(f"{count} rows, weight [{n}, {k}], {dtype}: another result than before")
        n = k = 4096
        weight = random_weight(n, k, dtype)
        prepared, dense = backend.prepare(weight), plain.expand(weight)
        for count in range(1, plan.MOST_ROWS + 1):
            x = random_input(count, k, dtype, count)
            check(product(loaded(dtype), x, prepared, None, n), x, dense, None, f"{count} rows, [{n}, {k}], {dtype}")


def edges() -> None:
    """Small and odd weights, written into memory that held NaN."""
    for dtype in DTYPES:
        kernels = loaded(dtype)
        for n in (1, 2, 3, 7, 63, 64, 65, 127, 128, 130, 257):
            for k in (8, 24, 64, 72, 136, 520, 2056):
                weight = random_weight(n, k, dtype, n)
                prepared, dense = backend.prepare(weight), plain.expand(weight)
                for count in (1, 9, 17, 33, 64):
                    x = random_input(count, k, dtype)
                    check(product(kernels, x, prepared, None, n), x, dense, None, f"{count} rows, [{n}, {k}], {dtype}")


def every_way() -> None:
    """Every kernel in every cluster, with and without the overlap of launches, gives right numbers, the same ones every time. So
    deep that all pipelines are filled anew."""
    for dtype in DTYPES:
        kernels, (n, k) = loaded(dtype), (1000, 8200)
        weight = random_weight(n, k, dtype)
        prepared, dense = backend.prepare(weight), plain.expand(weight)
        for form, clusters in kernels.active.items():
            x = random_input(8 * form.tiles, k, dtype)
            for splits in clusters:
                for overlap in (False, True) if plan.has_clusters(kernels.device.capability) else (False,):
                    what = f"{form.name}, {splits} splits, overlap {overlap}, {dtype}"
                    how = {"form": form, "splits": splits, "overlap": overlap}
                    first = product(kernels, x, prepared, None, n, **how)
                    check(first, x, dense, None, what)
                    for _ in range(20):
                        if not torch.equal(first, product(kernels, x, prepared, None, n, **how)):
                            raise WrongError(f"{what}: another result than before")


def families() -> None:
    """The shapes of real models."""
    for dtype in DTYPES:
        kernels = loaded(dtype)
        for name, shapes in FAMILIES.items():
            for n, k in shapes:
                weight = random_weight(n, k, dtype)
                prepared, dense = backend.prepare(weight), plain.expand(weight)
                for count in (1, 8, 16, 64):
                    x = random_input(count, k, dtype)
                    check(
                        product(kernels, x, prepared, None, n),
                        x,
                        dense,
                        None,
                        f"{name} [{n}, {k}], {count} rows, {dtype}",
                    )


def adversarial() -> None:
    """Cancellation, huge and tiny values, and NaN where the weight keeps nothing."""
    for dtype in DTYPES:
        n, k = 300, 2048
        weight = random_weight(n, k, dtype)
        prepared, dense = backend.prepare(weight), plain.expand(weight)
        kernels = loaded(dtype)
        x = random_input(16, k, dtype)
        x[::2] *= 100
        x[1::2, ::7] *= 1e-3
        x[3] = x[3].view(-1, 2).roll(1, 1).view(-1)
        check(product(kernels, x, prepared, None, n), x, dense, None, f"values of many sizes, {dtype}")
        x[5, 77] = float("nan")
        y = product(kernels, x, prepared, None, n)
        kept = unpack_bits(weight.mask)
        if not torch.equal(y[5].isnan(), kept[:, 77]) or bool(y[torch.arange(16, device="cuda") != 5].isnan().any()):
            raise WrongError(f"a NaN in x is seen where the weight keeps nothing, or not where it does, {dtype}")
        other = torch.bfloat16 if dtype is torch.float16 else torch.float16
        if not bool(product(loaded(other), x.to(other), prepared, None, n).isnan().all()):
            raise WrongError(f"a weight in {dtype} gives numbers for x in {other}")


def graphs_and_streams() -> None:
    """A captured product replays to the same bits, on new inputs too, and streams do not disturb each other."""
    dtype, n, k = torch.bfloat16, 4096, 4096
    of_8_bits = random_scaled(n, k, torch.int8)
    weight = random_weight(n, k, dtype)
    cases = [(weight, count) for count in (1, 64, 100, 300)] + [(of_8_bits, count) for count in (8, 300)]
    for packed, count in cases:
        x, prepared = random_input(count, k, dtype), backend.prepare(packed)
        expanded = count > plan.MOST_PASSES * plan.MOST_ROWS  # then the products of values and scales are rounded
        dense = plain.expand(packed, dtype) if expanded else exact(packed)
        ops.sparse24_linear(x, prepared, None, n)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.sparse24_linear(x, prepared, None, n)
        for seed in (5, 6):
            x.copy_(random_input(count, k, dtype, seed))
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            check(y, x, dense, None, f"graph replay, {count} rows")
            if not torch.equal(y, ops.sparse24_linear(x, prepared, None, n)):
                raise WrongError(f"a graph's product has other bits than the same product outside, {count} rows")
    prepared = backend.prepare(weight)
    inputs = [random_input(8, k, dtype, seed) for seed in range(4)]
    alone = [ops.sparse24_linear(x, prepared, None, n) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        outputs = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(ops.sparse24_linear(x, prepared, None, n))
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True)):
            raise WrongError("products on several streams disturb each other")


def chained_overlap() -> None:
    """Launches that overlap see all that the launch before them wrote: chains of them with nothing in between, also in a graph and
    in a thread in which torch was not used before."""
    dtype, n, links = torch.bfloat16, 2048, 64
    kernels, weight = loaded(dtype), random_weight(n, n, dtype)
    if not plan.has_clusters(kernels.device.capability):
        return
    prepared = backend.prepare(weight)

    def follow(chain: Tensor, **how: Any) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for before, after in itertools.pairwise(chain):
            kernels.multiply(before, prepared, None, after, stream, **how)

    def begun(rows: int) -> Tensor:
        chain = torch.full((links + 1, rows, n), float("nan"), dtype=dtype, device="cuda")
        chain[0] = random_input(rows, n, dtype)
        return chain

    for rows in (1, 8, 16, 32, 64):
        for form in plan.for_rows(kernels.active, rows):
            for splits in kernels.active[form]:
                how = {"form": form, "splits": splits}
                plainly = begun(rows)
                follow(plainly, overlap=False, **how)
                for _ in range(3):
                    chain = begun(rows)
                    follow(chain, overlap=True, **how)
                    if not torch.equal(plainly, chain):
                        raise WrongError(
                            f"{form.name}, {splits} splits: an overlapping launch read what was not there yet"
                        )
    plainly, chain = begun(8), begun(8)
    follow(plainly, overlap=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        follow(chain, overlap=True)
    for _ in range(10):
        chain[1:] = float("nan")
        graph.replay()
        if not torch.equal(plainly, chain):
            raise WrongError("in a graph, an overlapping launch read what was not there yet")
    chain = begun(8)
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: kernels.multiply(chain[0], prepared, None, chain[1], 0))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    if not torch.equal(plainly[1], chain[1]):
        raise WrongError("a launch from a thread of its own gives nothing, or something else")


def expansion() -> None:
    """Above the kernels' rows: the expanded weight, to the bit."""
    for dtype in DTYPES:
        for n, k in ((1, 8), (65, 72), (1000, 2056), (4096, 4096)):
            weight = random_weight(n, k, dtype)
            dense = torch.full((n, k), float("nan"), dtype=dtype, device="cuda")
            loaded(dtype).expand(backend.prepare(weight), dense, torch.cuda.current_stream().cuda_stream)
            if not torch.equal(dense, plain.expand(weight)):
                raise WrongError(f"the expanded weight [{n}, {k}] in {dtype} is wrong")
            x = random_input(plan.MOST_PASSES * plan.MOST_ROWS + 1, k, dtype)
            if not torch.equal(
                ops.sparse24_linear(x, backend.prepare(weight), None, n), functional.linear(x, plain.expand(weight))
            ):
                raise WrongError(f"{len(x)} rows, [{n}, {k}], {dtype}: not the dense product")


FIRST: tuple[Callable[[], None], ...] = (packing, every_way, chained_overlap, adversarial)
"""Of `CHECKS`, those that are done soon and see most."""


CHECKS: tuple[Callable[[], None], ...] = (
    packing,
    rows,
    edges,
    every_way,
    adversarial,
    graphs_and_streams,
    chained_overlap,
    expansion,
    of_8_bits,
    rounded_x,
    families,
)
"""Of the kernels on sparse tensor cores."""


WITHOUT_THEM: tuple[Callable[[], None], ...] = (
    rounding_of_x,
    in_triton,
    in_triton_of_8_bits,
    pruning,
)
"""Of what runs where those do not, too."""


def run(checks: Sequence[Callable[[], None]]) -> Iterator[tuple[str, str | None]]:
    """Runs checks: the name of each, and what was wrong or None."""
    for one in checks:
        try:
            one()
            torch.cuda.synchronize()
        except Exception as error:  # what Triton and the driver raise, too: the next check has to run
            yield one.__name__, f"{type(error).__name__}: {error}"
        else:
            yield one.__name__, None
