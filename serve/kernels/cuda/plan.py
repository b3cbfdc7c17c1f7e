"""How a multiplication is cut for a GPU: which kernels it gets, how deep they read ahead, how many blocks share a sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from serve.kernels.cuda.layout import UNIT, UNIT_BYTES, ceil_div

MOST_ROWS = 64
"""Of x, for the kernels that read the weight once."""

MOST_PASSES = 4
"""How often the weight is read for more rows, before it is rather expanded.

By bytes: a pass reads 1.125 for each weight, expanding reads and writes 3.125 and the dense product reads 2 again, so four passes
are less; and up to some hundred rows neither way is bound by its products. Not measured: `benchmarks.gpu` (prefill) does.
"""

_SHARED_KIB = {
    (8, 0): 164,
    (8, 6): 100,
    (8, 7): 164,
    (8, 9): 100,
    (9, 0): 228,
    (10, 0): 228,
    (10, 3): 228,
    (11, 0): 228,
}
"""Shared memory of a processor (CUDA Programming Guide, "Technical Specifications per Compute Capability"); others: 100."""

_RESERVED_KIB = 1
"""Of shared memory, by the system, for each block."""

_MOST_STAGES = 4
_MOST_SPLITS = 8
"""A cluster of 8 blocks is the largest that every device with clusters runs."""

EXPAND_WARPS = 8


@dataclass(frozen=True)
class Form:
    """One kernel: up to 8 times ``tiles`` rows of x.

    Attributes:
        panels: of 64 rows of the weight, for a block, one for each warp of a group, which share x.
        groups: of warps, which take turns along K.
        stages: of the pipeline.
        resident: blocks that a processor holds at the same time.
    """

    tiles: int
    panels: int
    groups: int
    stages: int
    resident: int

    @property
    def name(self) -> str:
        return f"multiply_{self.tiles}"

    @property
    def threads(self) -> int:
        return 32 * self.panels * self.groups

    @property
    def shared_bytes(self) -> int:
        return self.groups * self.stages * stage_bytes(self.tiles, self.panels)

    def row_blocks(self, n: int) -> int:
        """Into how many blocks n rows of the weight are cut."""
        return ceil_div(ceil_div(n, UNIT), self.panels)


def stage_bytes(tiles: int, panels: int) -> int:
    """Of one group of warps: a unit of each panel, and 64 columns of 8 ``tiles`` rows of x."""
    return panels * UNIT_BYTES + tiles * 8 * UNIT * 2


def has_clusters(capability: tuple[int, int]) -> bool:
    """Whether blocks can read each other's shared memory."""
    return capability >= (9, 0)


@lru_cache
def forms(capability: tuple[int, int]) -> tuple[Form, ...]:
    """The kernels for a device, by the rows of x that they take.

    With clusters, there are as many blocks as are wanted for any weight. Two of them are on a processor, so that one reads
    while the other one adds up; one warp a group up to 16 rows, and above, x is worth sharing between two.

    Without clusters, a small weight has fewer blocks than the device has processors, so each gets as many groups of warps as
    its shared memory feeds.
    """
    kib = _SHARED_KIB.get(capability, 100)
    found = []
    for tiles in (1, 2, 4, 8):
        panels = 1 if tiles <= 2 or not has_clusters(capability) else 2
        candidates = [(4 // panels, 2), (4 // panels, 1)] if has_clusters(capability) else [(8, 1), (4, 1), (2, 1)]
        for groups, resident in candidates:
            stage = groups * stage_bytes(tiles, panels)
            stages = min(_MOST_STAGES, (kib // resident - _RESERVED_KIB) * 1024 // stage)
            if stages >= 2:
                found.append(Form(tiles, panels, groups, stages, resident))
                break
    return tuple(found)


def form_for(candidates: Sequence[Form], rows: int) -> Form:
    """Of kernels by the rows of x that they take, the first that takes so many: 1 to `MOST_ROWS`."""
    return next(form for form in candidates if rows <= 8 * form.tiles)


@lru_cache(maxsize=4096)
def splits(form: Form, n: int, k: int, processors: int, most: int = _MOST_SPLITS) -> int:
    """Into how many blocks the sum along K is cut: 1, 2, 4 or up to ``most``.

    The least of rounds x (steps of a block + what beginning and ending cost, about three steps and one for a cluster).
    This is a model, not a measurement; it knows that idle processors cost more than short blocks.
    """
    units, row_blocks = ceil_div(k, UNIT), form.row_blocks(n)
    costs = {}
    for split in (1, 2, 4, 8):
        if split <= min(most, units):
            rounds = ceil_div(row_blocks * split, processors * form.resident)
            steps = ceil_div(ceil_div(units, split), form.groups)
            costs[split] = rounds * (steps + 3 + (split > 1))
    return min(costs, key=lambda split: (costs[split], split))


def instantiations(candidates: Sequence[Form], dtype: str) -> str:
    """The lines that follow the source: which kernels are compiled. ``dtype`` is a type of `primitives.cuh`."""
    lines = [
        f"HALVE_MULTIPLY({dtype}, {form.tiles}, {form.panels}, {form.groups}, {form.stages}, {form.resident})"
        for form in candidates
    ]
    return "\n".join([*lines, f"HALVE_EXPAND({EXPAND_WARPS})", ""])
