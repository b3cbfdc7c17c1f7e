"""Every kernel in every cluster, for the products of `benchmarks.gpu`: what `plan.choose` should have chosen.

Beside the kernels that a device gets there are some that `plan` does not make, because its rules say that they lose.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_problems
from benchmarks.gpu_timing import DTYPE, Weights, times
from compress.errors import one_line
from serve.kernels.cuda import backend, driver, plan
from serve.kernels.cuda.plan import Form

ALTERNATIVES = (
    *(Form(1, 1, 8, 4, 1), Form(1, 1, 4, 4, 2), Form(1, 1, 2, 4, 4), Form(1, 2, 4, 4, 1), Form(1, 2, 2, 4, 2)),
    *(Form(2, 1, 4, 3, 2), Form(2, 2, 4, 4, 1), Form(2, 2, 2, 4, 2), Form(2, 2, 1, 4, 4)),
    *(Form(4, 1, 8, 3, 1), Form(4, 1, 4, 3, 2), Form(4, 4, 2, 4, 1), Form(4, 4, 1, 4, 2), Form(4, 2, 2, 3, 2)),
    *(Form(8, 2, 4, 3, 1), Form(8, 2, 2, 3, 2), Form(8, 2, 1, 3, 4), Form(8, 4, 1, 3, 2), Form(8, 4, 2, 3, 1)),
)
"""For Hopper: less ahead, or other numbers of panels that share x."""


def load() -> backend.Kernels:
    """The kernels of this device, and the alternatives. Raises CompilerError, DriverError."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = plan.Device((properties.major, properties.minor), properties.multi_processor_count)
    usual = plan.forms(device.capability)
    room = plan.shared_kib(device.capability)
    more = [
        form for form in ALTERNATIVES if form not in usual and form.resident * (form.shared_bytes / 1024 + 1) <= room
    ]
    return backend.load(device, DTYPE, driver.default(), [*usual, *more])


def measured(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], has_time: Callable[[str], bool]
) -> Iterator[dict[str, Any]]:
    """A row for each product: microseconds by kernel and number of blocks in a cluster, and which one is the plan's choice. Ways that
    compute wrongly are not timed but named.
    """
    kernels = load()
    yield {
        "clusters": {form.name: dict(found) for form, found in kernels.active.items()},
        "usual": [form.name for form in plan.forms(kernels.device.capability)],
    }
    usual = {form: kernels.active[form] for form in plan.forms(kernels.device.capability)}
    for n, k in shapes:
        if not has_time(f"variants {n}x{k}"):
            continue
        weights = Weights(n, k)
        for count in rows:
            x = gpu_problems.random_input(count, k, DTYPE)
            form, splits = plan.choose(usual, count, n, k, kernels.device)
            row = {"n": n, "k": k, "rows": count, "chosen": _name(form, splits)}
            yield {**row, **_times(kernels, weights, x)}
        del weights


def _name(form: Form, splits: int) -> str:
    return f"{form.name} in {splits}"


def _times(kernels: backend.Kernels, weights: Weights, x: Tensor) -> dict[str, Any]:
    """Microseconds by way, and what was wrong with the others."""
    overlap = plan.has_clusters(kernels.device.capability)
    found, wrong = {}, {}
    for form in plan.for_rows(kernels.active, len(x)):
        for splits in kernels.active[form]:
            how = {"form": form, "splits": splits, "overlap": overlap}
            try:
                y = gpu_problems.product(kernels, x, weights.prepared[0], None, weights.n, **how)
                gpu_problems.check(y[-1:], x[-1:], weights.dense[0], None, _name(form, splits))
                samples = times({"it": weights.direct_calls(kernels, x, **how)}, 5)["it"]
            except (gpu_problems.WrongError, driver.DriverError) as error:
                wrong[_name(form, splits)] = one_line(error)
            else:
                found[_name(form, splits)] = statistics.median(samples)
    return {"microseconds": found, "wrong": wrong}
