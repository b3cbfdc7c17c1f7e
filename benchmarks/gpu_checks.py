"""What the GPU kernels compute, against float64, on the GPU itself. `benchmarks.gpu` runs these first; the tests marked
gpu are the same ones. Needs torch and a GPU, nothing else.

A sum of K/2 products may be off by what float32 loses in as many additions as the tensor cores do one after the other,
and by the rounding of the result. A group that is left out or a value in another column changes it by far more.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress import fused
from compress.columns import prune_columns
from compress.linalg import inverse_factor
from compress.packed import LARGEST, PATTERN, PackedWeight, quantize, quantize_rows, unpack, unpack_bits
from compress.patterns import UnstructuredPattern
from serve.kernels import narrow, ops, plain
from serve.kernels.cuda import backend, layout, plan
from serve.kernels.proof import lost_by
from serve.kernels.triton import backend as triton
from serve.kernels.triton import rounding

DTYPES = (torch.bfloat16, torch.float16)
SCALED = tuple(LARGEST)
"""Of kept values, with a scale for each row."""
ROWS = (*range(1, 81), 96, 127, 128, 200, 256, 257, 1000, 2049)
FAMILIES = {
    "Llama-3-8B": ((4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)),
    "Llama-3-70B": ((8192, 8192), (10240, 8192), (57344, 8192), (8192, 28672)),
    "Qwen3-0.6B": ((2048, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (1024, 3072)),
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "GPT-2": ((2304, 768), (768, 768), (3072, 768), (768, 3072)),
}
"""Shapes [N, K] of the linear layers of five families."""

DEEP = (1000, 4104)
ODD = ((1, 8), (65, 72), (130, 520), (257, 2056))
"""Weights with values of 8 bits [N, K] for every kernel, and for the operator."""
ROUNDED = ((1, 8), (70, 264), (300, 14336), (2048, 4096))
"""x that is rounded to values of 8 bits [rows, K]."""

_PATTERNS = (3, 5, 6, 9, 10, 12)


class WrongError(AssertionError):
    """A kernel computed something wrong; says what."""


def random_weight(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> PackedWeight:
    """A packed weight on the GPU with all patterns."""
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(n, k // 2, generator=generator, device="cuda", dtype=dtype) / k**0.5
    patterns = torch.tensor(_PATTERNS, dtype=torch.uint8, device="cuda")
    halves = patterns[torch.randint(6, (n, k // 8, 2), generator=generator, device="cuda")]
    return PackedWeight(values, halves[..., 0] | halves[..., 1] << 4)


def random_scaled(n: int, k: int, values: torch.dtype, seed: int = 0) -> PackedWeight:
    """One with values of 8 bits on the GPU; every third row of float8 has small values alone, many of them subnormal."""
    weight = quantize(random_weight(n, k, torch.float32, seed), values)
    if values != torch.int8:
        small = weight.values.view(torch.uint8)[::3]
        small &= 0x8F
        small[small == 0x80] = 0
    return weight


def exact(weight: PackedWeight) -> Tensor:
    """The dense weight [n, k] in float64, values times scales if there are some."""
    scale = 1.0 if weight.scale is None else weight.scale.double()
    return unpack(PackedWeight(weight.values.double() * scale, weight.mask))


def random_input(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def uneven_input(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Rows of five sizes in turn, so that no two next to each other have scales that are alike."""
    sizes = torch.exp2(torch.arange(rows, device="cuda") % 5 - 2.0)[:, None]
    return (random_input(rows, k, torch.float32, seed) * sizes).to(dtype)


def rounded_input(x: Tensor, values: torch.dtype) -> Tensor:
    """What is multiplied where x is rounded to values of 8 bits, in float64."""
    rounded, scale = quantize_rows(x, values)
    return rounded.double() * scale.double()


def check(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None, what: str, lost: float = 0.0) -> None:
    """Compares y [rows, n] with x [rows, k] times ``dense`` [n, k], in float64, some rows of the weight at a time.

    Args:
        lost: by the sums besides, as a share of the sum of the sizes of what is added.

    Raises:
        WrongError: an output is out of its bound.
    """
    k = dense.shape[1]
    part = max(1, (1 << 27) // k)
    for start in range(0, len(dense), part):
        rows = slice(start, start + part)
        weight, inputs = dense[rows].double(), x.double()
        exact, size = inputs @ weight.T, inputs.abs() @ weight.abs().T
        if bias is not None:
            exact, size = exact + bias[rows].double(), size + bias[rows].double().abs()
        limits = torch.finfo(y.dtype)
        bound = (
            size * ((k / 32 + 8) * 2.0**-22 + lost)
            + exact.abs() * limits.eps / 2 * 1.01
            + limits.smallest_normal * limits.eps
        )
        wrong = ~((y[:, rows].double() - exact).abs() <= bound)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise WrongError(
                f"{what}: {int(wrong.sum())} outputs are wrong, the first for row {row} of x and row {start + column} of "
                f"the weight: {float(y[row, start + column])} instead of {float(exact[row, column])}"
            )


def product(kernels: backend.Kernels, x: Tensor, prepared: Tensor, bias: Tensor | None, n: int, **how: Any) -> Tensor:
    """x [rows, k] -> [rows, n], into memory that held NaN, on the current stream."""
    y = torch.full((len(x), n), float("nan"), dtype=x.dtype, device="cuda")
    kernels.multiply(x, prepared, bias, y, torch.cuda.current_stream().cuda_stream, **how)
    return y


def poison(count: int, dtype: torch.dtype) -> None:
    """Leaves NaN in the memory that the next tensor of so many numbers gets."""
    torch.full((count,), float("nan"), dtype=dtype, device="cuda")


def loaded(dtype: torch.dtype, values: torch.dtype | None = None) -> backend.Kernels:
    """The kernels for the current device, x of that dtype, and values of the same or of 8 bits."""
    if refusal := backend.why_not(torch.device("cuda"), values or dtype):
        raise WrongError(f"the cuda backend cannot be used: {refusal}")
    index = torch.cuda.current_device()
    kernels = backend._kernels(index, dtype) if values is None else backend._kernels(index, dtype, values)
    assert isinstance(kernels, backend.Kernels)
    return kernels


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


def of_8_bits() -> None:
    """Values of 8 bits: prepared on the GPU as on the processor, every kernel in every cluster, odd shapes, all ways through the operator,
    and the expanded weight to the bit."""
    for values, dtype in itertools.product(SCALED, DTYPES):
        kernels, what = loaded(dtype, values), f"{values}, x in {dtype}"
        n, k = DEEP
        weight = random_scaled(n, k, values)
        prepared = backend.prepare(weight)
        assert weight.scale is not None
        on_cpu = PackedWeight(weight.values.cpu(), weight.mask.cpu(), weight.scale.cpu())
        if not torch.equal(prepared.cpu(), layout.prepare(on_cpu)):
            raise WrongError(f"{what}: a weight that is prepared on the GPU is another than on the processor")
        dense = exact(weight)
        for form, clusters in kernels.active.items():
            x = random_input(8 * form.tiles, k, dtype)
            for splits in clusters:
                how = {"form": form, "splits": splits}
                first = product(kernels, x, prepared, None, n, **how)
                check(first, x, dense, None, f"{form.name}, {splits} splits, {what}")
                if not torch.equal(first, product(kernels, x, prepared, None, n, **how)):
                    raise WrongError(f"{form.name}, {splits} splits, {what}: another result than before")
        for n, k in ODD:
            weight = random_scaled(n, k, values, n)
            prepared, dense, bias = backend.prepare(weight), exact(weight), random_input(1, n, dtype)[0]
            for count in (1, 9, 17, 64, 65, 256):
                x, added = random_input(count, k, dtype, count), bias if count % 2 else None
                poison(count * n, dtype)
                check(ops.sparse24_linear(x, prepared, added, n), x, dense, added, f"{count} rows, [{n}, {k}], {what}")
            expanded = torch.full((n, k), float("nan"), dtype=dtype, device="cuda")
            kernels.expand(prepared, expanded, torch.cuda.current_stream().cuda_stream)
            if not torch.equal(expanded, plain.expand(weight, dtype)):
                raise WrongError(f"the expanded weight [{n}, {k}], {what}, is wrong")


def rounding_of_x() -> None:
    """x rounded to values of 8 bits: the Triton kernel, and torch's operators on the GPU, have the bits of torch's on the processor."""
    for values, dtype in itertools.product(SCALED, DTYPES):
        module = rounding.kernel_for(torch.device("cuda"), values)
        if module is None:
            raise WrongError("Triton's kernel that rounds x cannot be used; the log says why")
        inputs = [rounding.hard_rows(k, dtype, values).to("cuda") for k in (8, 264, rounding.BLOCK + 8)]
        inputs += [uneven_input(rows, k, dtype) for rows, k in ROUNDED]
        for x, form in itertools.product(inputs, rounding.Form):
            right, what = (
                rounding.by_torch(x.cpu(), values, form),
                f"x {list(x.shape)} in {dtype}, rounded to {values}, {form.name}",
            )
            poison(x.numel(), dtype)
            found = {"Triton": rounding.launch(module, x, values, form), "torch": rounding.by_torch(x, values, form)}
            for name, pair in found.items():
                if not all(rounding.is_same(own.cpu(), one) for own, one in zip(pair, right, strict=True)):
                    raise WrongError(f"{what}: {name} on the GPU has other bits than torch on the processor")


def rounded_x() -> None:
    """Products of x that is rounded to values of 8 bits: every kernel in every cluster, and all ways through the operator, also from a graph
    and for rows that are not finite."""
    for values, dtype in itertools.product(SCALED, DTYPES):
        kernels, what = loaded(dtype, values), f"values and x in {values}, {dtype}"
        n, k = DEEP
        weight = replace(random_scaled(n, k, values), quantizes_x=True)
        prepared, dense = backend.prepare(weight), exact(weight)
        for form, clusters in kernels.active.items():
            x = uneven_input(8 * form.tiles, k, dtype)
            numbers, scales = rounding.round_rows(x, values)
            for splits in clusters:
                how = {"form": form, "splits": splits, "x_scales": scales}
                y = product(kernels, numbers, prepared, None, n, **how)
                check(y, rounded_input(x, values), dense, None, f"{form.name}, {splits} splits, {what}")
        for n, k in ODD:
            weight = replace(random_scaled(n, k, values, n), quantizes_x=True)
            prepared, bias = backend.prepare(weight), random_input(1, n, dtype)[0]
            for count in (1, 9, 17, 64, 65, 256, 257, 1000):
                x, added = uneven_input(count, k, dtype, count), bias if count % 2 else None
                poison(count * n, dtype)
                _check_rounded(x, prepared, weight, added, f"{count} rows, [{n}, {k}], {what}")
        x = uneven_input(9, k, dtype)
        x[2, 1], x[5, 0] = torch.inf, torch.nan
        bad = torch.tensor([row in (2, 5) for row in range(9)], device="cuda")
        y = ops.sparse24_linear(x, prepared, None, n, True)
        if not torch.equal(y.isnan(), bad[:, None].expand_as(y)):
            raise WrongError(f"{what}: a row of x that is not finite gives numbers, or another row does not")
        for count in (9, 300):
            x = uneven_input(count, k, dtype)
            once = ops.sparse24_linear(x, prepared, None, n, True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = ops.sparse24_linear(x, prepared, None, n, True)
            graph.replay()
            torch.cuda.synchronize()
            if not torch.equal(y, once):
                raise WrongError(f"{count} rows, {what}: another result from a graph")


def _check_rounded(x: Tensor, prepared: Tensor, weight: PackedWeight, bias: Tensor | None, what: str) -> None:
    """One product of the operator; of many rows, whose products of values and scales are rounded, torch's of these."""
    y = ops.sparse24_linear(x, prepared, bias, weight.shape[0], True)
    values = weight.values.dtype
    few = len(x) <= plan.MOST_PASSES * plan.MOST_ROWS
    if few or narrow.takes(x.device, values, x.dtype, *weight.shape):
        lost = 0.0 if few or values == torch.int8 else lost_by(values)
        return check(y, rounded_input(x, values), exact(weight), bias, what, lost)
    inputs = rounding.by_torch(x, weight.values.dtype, rounding.Form.PRODUCTS)[0]
    if not torch.equal(y, functional.linear(inputs, plain.expand(replace(weight, quantizes_x=False), x.dtype), bias)):
        raise WrongError(f"{what}: not the dense product of values times scales")
    return None


def in_triton_of_8_bits() -> None:
    """The Triton kernels for values of 8 bits, by both dtypes of x, as it is and rounded to such values."""
    for values in SCALED:
        if refusal := triton.why_not(torch.device("cuda"), values):
            raise WrongError(f"the triton backend cannot be used: {refusal}")
        for n, k in ((1, 8), (129, 264), (1024, 4096)):
            weight = random_scaled(n, k, values)
            prepared, dense = triton.prepare(weight), exact(weight)
            for dtype, count in itertools.product(DTYPES, (1, 17, 64, 200)):
                x, bias = random_input(count, k, dtype, count), random_input(1, n, dtype)[0]
                y = ops.sparse24_linear(x, prepared, bias, n)
                what = f"Triton, {count} rows, weight [{n}, {k}] in {values}, x in {dtype}"
                check(y, x, dense, bias, what)
                x = uneven_input(count, k, dtype, count)
                y = ops.sparse24_linear(x, prepared, bias, n, True)
                check(y, rounded_input(x, values), dense, bias, f"{what}, rounded")


def in_triton() -> None:
    """The Triton kernels, through their operator, with every tile: odd shapes, the same result every time, also from a graph."""
    for dtype in DTYPES:
        if refusal := triton.why_not(torch.device("cuda"), dtype):
            raise WrongError(f"the triton backend cannot be used: {refusal}")
        for n, k in ((1, 8), (129, 264), (4096, 4096), (1024, 14336)):
            weight = random_weight(n, k, dtype)
            prepared, dense, bias = triton.prepare(weight), plain.expand(weight), random_input(1, n, dtype)[0]
            for count in (1, 15, 16, 17, 40, 64, 65, 200, triton.MOST_ROWS + 1):
                x, added = random_input(count, k, dtype, count), bias if count % 2 else None
                y = ops.sparse24_linear(x, prepared, added, n)
                check(y, x, dense, added, f"Triton, {count} rows, weight [{n}, {k}], {dtype}")
                if not torch.equal(y, ops.sparse24_linear(x, prepared, added, n)):
                    raise WrongError(f"Triton, {count} rows, weight [{n}, {k}], {dtype}: another result than before")
                if count in (16, 200):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        captured = ops.sparse24_linear(x, prepared, added, n)
                    captured.fill_(float("nan"))
                    graph.replay()
                    if not torch.equal(y, captured):
                        raise WrongError(
                            f"Triton, {count} rows, weight [{n}, {k}], {dtype}: another result from a graph"
                        )


def pruning_problem(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight transposed [k, n], the Gram matrix of inputs that hang together [k, k] and the factor of its inverse [k, k]."""
    mixing = random_input(k, k, torch.float32) / k**0.5
    x = random_input(4 * k, k, torch.float32, 2) @ (torch.eye(k, device="cuda") + mixing)
    gram = x.T @ x
    return random_input(k, n, torch.float32, 3), gram, inverse_factor(gram, 0.01).upper


def pruning() -> None:
    """The fused kernels of pruning are used, and lose as little as the loop over columns with its own roundings does."""
    kernels, masks = (fused.on(torch.device("cuda"), kind) for kind in ("columns", "masks"))
    if kernels is None or masks is None:
        raise WrongError("the fused kernels cannot be used; the log says why")
    scores = random_input(999, 4096, torch.float32)
    if not torch.equal(masks.keep_largest(scores, 2, 4).cpu(), PATTERN.mask(scores.cpu())):
        raise WrongError("the fused mask is not that of the processor")
    for n, k in ((1000, 1024), (4096, 4096)):
        columns, gram, upper = pruning_problem(n, k)
        for pattern in (PATTERN, UnstructuredPattern(0.5)):
            losses = []
            for how in (None, kernels):
                pruned, mask = prune_columns(columns.clone(), upper, pattern, "block", None, 128, how)
                change = (pruned - columns).double()
                losses.append(float((change * (gram.double() @ change)).sum()))
            if not abs(losses[1] / losses[0] - 1) < 1e-3 or bool(pruned[~mask].any()):
                raise WrongError(
                    f"SparseGPT of [{n}, {k}], {pattern}: the loss is {losses[1]:.6g} instead of {losses[0]:.6g}"
                )


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
