"""How a multiplication is cut for a GPU: which kernels there are, which one a product gets, how many blocks share a sum.

A processor always has the same warps and reads ahead as far as its shared memory goes: in units of `layout.unit_bytes`, which are smaller
where values are of 8 bits. What differs between the kernels for one
number of rows of x is how these warps are divided among blocks: few large blocks finish a small weight without adding up their
sums across blocks, many small ones fill the processors evenly with a large one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from serve.kernels.cuda import layout
from serve.kernels.cuda.layout import UNIT, ceil_div

MOST_ROWS = 64
"""Of x, for the kernels that read the weight once."""

MOST_PASSES = 4
"""How often the weight is read for more rows, before it is rather expanded.

By bytes: a pass reads 1.125 for each weight, expanding reads and writes 3.125 and the dense product reads 2 again, so four passes
are less (of 8-bit values 0.625 against 4.625, so seven would be); and up to some hundred rows neither way is bound by its products. Not
measured: `benchmarks.gpu` (prefill) does.
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

_PANELS = {1: 1, 2: 1, 4: 2, 8: 4}
"""By tiles, panels that share x in a block: more rows of x are more bytes from the second cache for each weight."""
TILES = tuple(_PANELS)
"""Of 8 rows of x, that kernels take."""
_WARPS = 8
"""Of a processor, in all of its blocks."""
_MOST_STAGES = {layout.UNIT_BYTES: 5, layout.SCALED_UNIT_BYTES: 8}
"""By bytes of a unit: x of all of them goes through registers once."""
_SPLITS = (1, 2, 4, 8)
"""Blocks in a cluster; 8 are the most that every device with clusters runs."""

EXPAND_WARPS = 8

# What `choose` takes for granted; `benchmarks.gpu` (variants) measures what comes of it.
_BYTES_A_MICROSECOND = {(8, 0): 19e3, (8, 6): 11e3, (8, 9): 8e3, (9, 0): 30e3, (10, 0): 52e3}
"""From the memory, for each processor: data sheets' bandwidth by processors (H100 25, H200 36); others: 10."""
_ALONE = 2.0
"""A processor draws so many times its share where others have nothing to do."""
_LATENCY = 1.0
"""Microseconds of the memory under load: a block draws at most what it has under way in this time."""
_WAVE = 1.0
"""Microseconds to fill and to drain the pipelines of all blocks that run at the same time."""
_SHARING = 0.8
"""Microseconds to add up sums across a cluster."""
_CACHE_BYTES_A_MICROSECOND = 45e3
"""From the second cache, for each processor, weights and x together; at least 1.35 times what the memory delivers."""


@dataclass(frozen=True)
class Form:
    """One kernel: up to 8 times ``tiles`` rows of x.

    Attributes:
        panels: of 64 rows of the weight, for a block, one for each warp of a group, which share x.
        groups: of warps, which take turns along K.
        stages: of the pipeline.
        resident: blocks that a processor holds at the same time.
        unit_bytes: of a unit of the weight.
    """

    tiles: int
    panels: int
    groups: int
    stages: int
    resident: int
    unit_bytes: int = layout.UNIT_BYTES

    @property
    def name(self) -> str:
        return f"multiply_{self.tiles}_{self.panels}_{self.groups}_{self.stages}_{self.resident}"

    @property
    def threads(self) -> int:
        return 32 * self.panels * self.groups

    @property
    def shared_bytes(self) -> int:
        return self.groups * self.stages * stage_bytes(self.tiles, self.panels, self.unit_bytes)

    @property
    def bytes_ahead(self) -> int:
        """Of weights that a block has under way."""
        return (self.stages - 1) * self.groups * self.panels * self.unit_bytes

    def row_blocks(self, n: int) -> int:
        """Into how many blocks n rows of the weight are cut."""
        return ceil_div(ceil_div(n, UNIT), self.panels)


@dataclass(frozen=True)
class Device:
    """What launches depend on."""

    capability: tuple[int, int]
    processors: int


Active = Mapping[Form, Mapping[int, int]]
"""By form and splits: how many clusters of so many blocks a device runs at the same time. Ones that it does not run are left out."""


def stage_bytes(tiles: int, panels: int, unit_bytes: int = layout.UNIT_BYTES) -> int:
    """Of one group of warps: a unit of each panel, and 64 columns of 8 ``tiles`` rows of x."""
    return panels * unit_bytes + tiles * 8 * UNIT * 2


def _sum_bytes(tiles: int, panels: int) -> int:
    """What one group leaves in the place of its stages in the end: a float32 for each of 8 ``tiles`` rows of x and each row of its panels,
    of which there are 4 more so that they lie in different banks."""
    return tiles * 8 * (panels * UNIT + 4) * 4


def shared_kib(capability: tuple[int, int]) -> int:
    """Shared memory of a processor."""
    return _SHARED_KIB.get(capability, 100)


def has_clusters(capability: tuple[int, int]) -> bool:
    """Whether blocks can read each other's shared memory."""
    return capability >= (9, 0)


@lru_cache
def forms(capability: tuple[int, int], unit_bytes: int = layout.UNIT_BYTES) -> tuple[Form, ...]:
    """The kernels for a device, those for the least rows of x first.

    Without clusters, x is shared by one panel alone: a small weight has few panels, and each wants a block.
    """
    kib = shared_kib(capability)
    return tuple(form for tiles in _PANELS for form in _divisions(tiles, unit_bytes, kib, has_clusters(capability)))


def _divisions(tiles: int, unit_bytes: int, kib: int, clusters: bool) -> list[Form]:
    """The ways to divide a processor's warps among blocks, as many warps as its shared memory feeds at two stages and more."""
    panels = _PANELS[tiles] if clusters else 1
    for warps in (_WARPS, _WARPS // 2, _WARPS // 4):
        found = []
        for resident in (1, 2, 4, 8):
            groups = warps // panels // resident
            if groups:
                stage = stage_bytes(tiles, panels, unit_bytes)
                stages = min(_MOST_STAGES[unit_bytes], (kib // resident - _RESERVED_KIB) * 1024 // (groups * stage))
                if stages >= 2 and stages * stage >= _sum_bytes(tiles, panels):
                    found.append(Form(tiles, panels, groups, stages, resident, unit_bytes))
        if found:
            return found
    raise AssertionError(f"{kib} KiB of shared memory are too little for {tiles} tiles")


def for_rows(candidates: Iterable[Form], rows: int) -> list[Form]:
    """Of kernels, those of the fewest tiles that take so many rows of x: 1 to `MOST_ROWS`."""
    taking = [form for form in candidates if rows <= 8 * form.tiles]
    least = min(form.tiles for form in taking)
    return [form for form in taking if form.tiles == least]


def choose(active: Active, rows: int, n: int, k: int, device: Device) -> tuple[Form, int]:
    """The kernel for a product, and into how many blocks, a cluster, its sum along K is cut: those that `microseconds` takes to be
    the fastest. Of equals, the fewer blocks.
    """
    return ranked(active, rows, n, k, device)[0]


def ranked(active: Active, rows: int, n: int, k: int, device: Device) -> list[tuple[Form, int]]:
    """All kernels for a product with all numbers of blocks, the one first that `choose` takes."""
    units = ceil_div(k, UNIT)
    ways = [(form, splits) for form in for_rows(active, rows) for splits in active[form] if splits <= max(units, 1)]
    return sorted(
        ways, key=lambda way: (microseconds(*way, active[way[0]][way[1]], n, k, device), way[1], way[0].resident)
    )


def way_name(form: Form, splits: int) -> str:
    """Of a kernel with a number of blocks, in tables (`serve.kernels.ways`)."""
    return f"{form.name} in {splits}"


def microseconds(form: Form, splits: int, clusters: int, n: int, k: int, device: Device) -> float:
    """How long a product takes, by a model and not by a measurement; what every product costs is left out.

    Blocks come in waves, of as many as there is room for. A wave moves its bytes at the rate of the memory, unless its blocks are too
    few to draw that much, and costs what it takes to fill and to drain the pipelines. Sums that are shared cost once.

    Args:
        clusters: of so many blocks that run at the same time.
    """
    blocks, room = form.row_blocks(n) * splits, clusters * splits
    of_block = form.panels * ceil_div(ceil_div(k, UNIT), splits) * form.unit_bytes
    share = _BYTES_A_MICROSECOND.get(device.capability, 10e3)

    def rate(at_once: int) -> float:
        processors = min(at_once, device.processors)
        return min(
            share * device.processors, processors * _ALONE * share, at_once * form.bytes_ahead / _LATENCY
        )  # fmt: skip

    full, rest = divmod(blocks, room)
    moving = full * room * of_block / rate(room) + (rest * of_block / rate(rest) if rest else 0.0)
    of_x = form.tiles * 8 * UNIT * 2 / (form.panels * form.unit_bytes)  # bytes, for each byte of the weight
    cached = max(_CACHE_BYTES_A_MICROSECOND, 1.35 * share)
    return max(1.0, (1 + of_x) * share / cached) * moving + _WAVE * (full + (rest > 0)) + _SHARING * (splits > 1)


def possible_splits(capability: tuple[int, int]) -> tuple[int, ...]:
    """Sizes of a cluster that are worth asking a device for."""
    return _SPLITS if has_clusters(capability) else _SPLITS[:1]


def instantiations(candidates: Sequence[Form], dtype: str, values: str = "Same") -> str:
    """The lines that follow the source: which kernels are compiled. ``dtype``, of x, and ``values`` are types of `primitives.cuh`."""
    types = f"{dtype}, {values}"
    lines = [
        f"HALVE_MULTIPLY({form.name}, {types}, {form.tiles}, {form.panels}, {form.groups}, {form.stages}, {form.resident})"
        for form in candidates
    ]
    lines.append(f"HALVE_EXPAND({types}, {EXPAND_WARPS})")
    if values != "Same":
        lines.append(f"HALVE_EXPAND_VALUES({values}, {EXPAND_WARPS})")
    return "\n".join([*lines, ""])


def functions(candidates: Sequence[Form], scaled: bool) -> list[str]:
    """The names of what `instantiations` compiles; ``scaled``: values are of 8 bits."""
    return [*(form.name for form in candidates), "expand_weight", *(["expand_values"] if scaled else [])]
