"""The pictures of a report, as SVG that stands inside of the page.

matplotlib draws them, without a window and without its global state. Its SVG is plain text, needs no script, and is small;
the other candidates (plotly, bokeh) put megabytes of script into every file. `drawing` makes it part of the page.

A picture is made for a width on the screen, because letters that are scaled cannot be read; the heat map, which uses the whole
width, is made twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from compress.console import human_bytes
from compress.errors import UsageError
from compress.extras import how_to_install
from serve.measure.report.checkpoint import Allocation, Layer
from serve.measure.report.drawing import (
    COLOURS,
    STEPS,
    Picture,
    bare,
    drawn,
    place_labels,
    plain_log_ticks,
)
from serve.measure.report.speed import Level
from serve.measure.report.summary import Memory, Run

_SIDES = {"dense": "dense", "sparse": "accent"}


def require_matplotlib() -> None:
    """Raises UsageError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            f"halve report draws with matplotlib, which is not installed: {how_to_install('report')}"
        ) from None


def heat_map(layers: Sequence[Layer]) -> Picture | None:
    """The relative output error of every layer: blocks from left to right, kinds from top to bottom, on a log scale.

    Where a block has several layers of a kind (experts), their mean.
    """
    known = [layer for layer in layers if layer.block is not None]
    errors = [layer.error for layer in known if layer.error]
    if not errors:
        return None
    description = f"{len(known)} layers; the least error is {min(errors):.2g}, the largest {max(errors):.2g}. The table below has each."
    title = "Relative output error by block and kind of layer"
    return Picture(
        _heat_map(known, 1080, "heat", title, description), _heat_map(known, 350, "heat-narrow", title, description)
    )


def latency(levels: Sequence[Level], called: str, name: str) -> dict[str, Picture]:
    """Time to first token, time per output token and throughput against the load, by title; none for less than two loads.

    ``levels``: loads of one family in one file. ``name``: what the pictures go by on the page.
    """
    pictures: dict[str, Picture] = {}
    shown = {
        "ttft": ("Time to first token", "ms", 1e3),
        "tpot": ("Time per output token", "ms", 1e3),
        "output_tokens_per_second": ("Output tokens a second", "tokens / s", 1.0),
    }
    for key, (title, unit, scale) in shown.items():
        sides = {side: [level for level in levels if level.times.get(key, {}).get(side)] for side in _SIDES}
        if any(len(own) > 1 for own in sides.values()):
            pictures[title] = _latency(sides, key, title, unit, scale, called, f"{name}-{key}")
    return pictures


def accuracy_against_speed(runs: Sequence[Run], front: set[str]) -> Picture | None:
    """Every placed run, and the dense model at (1, 1); None for less than two runs."""
    placed = [run for run in runs if run.placed]
    if len(placed) < 2:
        return None
    points = []
    for run in placed:
        assert run.perplexity is not None
        assert run.speed is not None
        points.append((run.speed.times_as_fast or 1.0, run.perplexity.ratio or 1.0, run))
    points.sort(key=lambda point: point[:2])
    return Picture(_pareto(points, front, 520, "pareto"), _pareto(points, front, 350, "pareto-narrow"))


def _pareto(points: Sequence[tuple[float, float, Run]], front: set[str], size: int, name: str) -> Markup:
    with drawn(size, 320, name) as (figure, finish):
        axes = figure.add_axes((44 / size, 0.15, 1 - 52 / size, 0.75))
        bare(axes)
        axes.set_yscale("log")
        axes.axvline(1, color=COLOURS["rule"], linewidth=1, zorder=0)
        axes.axhline(1, color=COLOURS["rule"], linewidth=1, zorder=0)
        axes.plot(1, 1, "D", color=COLOURS["dense"], markersize=7)
        line = [(x, y) for x, y, run in points if run.directory in front]
        axes.plot(*zip(*line, strict=True), color=COLOURS["accent"], linewidth=1.2, alpha=0.6, zorder=1)
        for x, y, run in points:
            face = COLOURS["accent" if run.directory in front else "paper"]
            axes.plot(x, y, "o", markersize=9, markerfacecolor=face, markeredgecolor=COLOURS["accent"])
        xs, ys = [1.0, *(x for x, _, _ in points)], [1.0, *(y for _, y, _ in points)]
        width, height = max(xs) - min(xs) or 0.2, math.log(max(ys) / min(ys)) or 0.2
        axes.set_xlim(min(xs) - 0.1 * width, max(xs) + (0.45 if size > 500 else 0.7) * width)
        axes.set_ylim(min(ys) * math.exp(-0.12 * height), max(ys) * math.exp(0.15 * height))
        marks = [(1.0, 1.0, "dense"), *((x, y, _shortened(run.label, 30)) for x, y, run in points)]
        place_labels(axes, marks, size)
        axes.set_xlabel("decode speed, times dense", loc="left")
        axes.text(0, 1.04, "perplexity, times dense (log scale)", transform=axes.transAxes, color=COLOURS["muted"])
        plain_log_ticks(axes, min(ys), max(ys))
        described = "; ".join(
            f"{run.name}: {x:.2f} times as fast, perplexity {y:.2f} times dense"
            f"{', not beaten by another' if run.directory in front else ''}"
            for x, y, run in points
        )
        return finish("Accuracy against speed", described)


def allocation(found: Allocation) -> Picture | None:
    """The error that is left against what is given back, unit by unit as the allocation takes them, and what was chosen."""
    if found.saves_all <= 0 or found.error_all <= 0 or len(found.candidates) < 2:
        return None
    return Picture(_allocation(found, 520, "allocation"), _allocation(found, 350, "allocation-narrow"))


def _allocation(found: Allocation, width: int, name: str) -> Markup:
    spent, left = [0.0], [found.error_all]
    for candidate in found.candidates:  # in the order in which they are taken
        spent.append(spent[-1] + max(candidate.saves, 0.0) / found.saves_all)
        left.append(left[-1] - candidate.error)
    with drawn(width, 240, name) as (figure, finish):
        axes = figure.add_axes((52 / width, 0.18, 1 - 64 / width, 0.7))
        bare(axes)
        axes.plot([100 * share for share in spent], left, color=COLOURS["accent"], linewidth=2, drawstyle="default")
        at = (100 * found.given_back / found.saves_all, found.error_left)
        axes.plot(*at, "o", markersize=9, color=COLOURS["accent"])
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 1.08 * found.error_all)
        place_labels(axes, [(*at, "chosen")], width)
        axes.set_xlabel("share of what pruning saves that is given back, %", loc="left")
        axes.text(0, 1.05, "errors of the blocks that are left", transform=axes.transAxes, color=COLOURS["muted"])
        described = "; ".join(
            f"{share:.0%} given back: {error:.3g}"
            for share, error in list(zip(spent, left, strict=True))[:: max(1, len(spent) // 10)]
        )
        return finish("What keeping layers dense buys", f"{described}; chosen: {at[0]:.1f} %, {found.error_left:.3g}")


def memory(found: Memory) -> Picture:
    """A bar for each model: pruned layers, everything else, KV cache."""
    return Picture(_memory(found, 520, "memory"), _memory(found, 350, "memory-narrow"))


def _memory(found: Memory, width: int, name: str) -> Markup:
    height = 46 * len(found.stacks) + 8
    with drawn(width, height, name) as (figure, finish):
        axes = figure.add_axes((52 / width, 0, 1 - 52 / width, 1))
        most = max(stack.total for stack in found.stacks)
        for row, stack in enumerate(reversed(found.stacks)):
            left = 0.0
            colours = ("dense", "dense-soft") if stack.name == "dense" else ("accent", "accent-soft")
            parts = [(stack.pruned, colours[0]), (stack.rest, colours[1]), (stack.cache or 0.0, "cache")]
            for size, colour in parts:
                axes.barh(row, size, left=left, height=0.52, color=COLOURS[colour])
                if size / most * 0.8 * width > 66:
                    ink = "paper" if colour in ("dense", "accent") else "ink"
                    axes.text(left + 0.012 * most, row, human_bytes(size), va="center", color=COLOURS[ink], fontsize=12)
                left += size
            axes.text(-0.012 * most, row, stack.name, ha="right", va="center", color=COLOURS["ink"], fontsize=13)
            axes.text(left + 0.012 * most, row, human_bytes(left), va="center", color=COLOURS["ink"], fontsize=13)
        axes.set_xlim(0, 1.28 * most)
        axes.set_ylim(-0.5, len(found.stacks) - 0.5)
        axes.set_axis_off()
        described = "; ".join(
            f"{stack.name}: {human_bytes(stack.pruned)} in the pruned layers, {human_bytes(stack.rest)} in the rest"
            + (f", {human_bytes(stack.cache)} of KV cache" if stack.cache is not None else "")
            for stack in found.stacks
        )
        return finish("Memory by what it holds", described)


def _heat_map(layers: Sequence[Layer], width: int, name: str, title: str, description: str) -> Markup:
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    blocks = max(layer.block or 0 for layer in layers) + 1
    cells: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        cells.setdefault((layer.block or 0, kinds.index(layer.kind)), []).append(layer)
    means = {place: _mean_error(own) for place, own in cells.items()}
    known = [mean for mean in means.values() if mean]
    shown_from = float(np.percentile(known, 5))  # a layer that lost nothing would leave one colour for all others
    low, high = math.log(shown_from), math.log(max(known))
    labels = [_shortened(label, 22) for label in _short(kinds)]
    letter = 12
    left = min(0.62 * letter * max(map(len, labels)) + 12, 0.4 * width)
    row = 24 if width > 500 else 20
    below = 52
    height = row * len(kinds) + below
    with drawn(width, height, name) as (figure, finish):
        axes = figure.add_axes((left / width, below / height, 1 - (left + 1) / width, 1 - below / height))
        axes.set_xlim(0, blocks)
        axes.set_ylim(len(kinds), 0)
        axes.set_axis_off()
        gap_x, gap_y = 1.5 * blocks / (width - left), 1.5 / row
        titles = {}
        from matplotlib.patches import Rectangle

        for (block, kind), own in cells.items():
            mean = means[block, kind]
            step = 0 if not mean or high == low else round((math.log(mean) - low) / (high - low) * (STEPS - 1))
            step = max(step, 0)
            colour = "none" if mean is None else COLOURS[f"heat-{step}"]
            edge = COLOURS["rule"] if mean is None else "none"
            box = Rectangle(
                (block + gap_x / 2, kind + gap_y / 2), 1 - gap_x, 1 - gap_y, facecolor=colour, edgecolor=edge
            )
            box.set_linewidth(0.8)
            box.set_gid(f"cell-{block}-{kind}")
            titles[f"cell-{block}-{kind}"] = _cell_title(own, mean)
            axes.add_patch(box)
        for index, label in enumerate(labels):
            axes.text(-8 * blocks / (width - left), index + 0.5, label, ha="right", va="center", color=COLOURS["ink"])
        every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if blocks / step * 26 <= width - left or step == 100)
        for block in range(0, blocks, every):
            axes.text(
                block + 0.5, len(kinds) + 0.15, str(block), ha="center", va="top", color=COLOURS["muted"], fontsize=11
            )
        legend = figure.add_axes((left / width, 4 / height, 1 - (left + 1) / width, 14 / height))
        legend.set_xlim(0, width - left)
        legend.set_ylim(0, 14)
        legend.set_axis_off()
        for step in range(STEPS):
            legend.add_patch(Rectangle((58 + 14 * step, 2), 13, 9, facecolor=COLOURS[f"heat-{step}"], edgecolor="none"))
        style: dict[str, Any] = {"va": "center", "color": COLOURS["muted"], "fontsize": 11}
        legend.text(52, 6.5, f"≤ {shown_from:.1g}", ha="right", **style)
        legend.text(
            64 + 14 * STEPS,
            6.5,
            f"{max(known):.1g}" + (" relative output error, log scale" if width > 500 else ""),
            **style,
        )
        legend.text(width - left - 2, 6.5, "block →", ha="right", **style)
        return finish(title, description, titles)


def _latency(
    sides: dict[str, list[Level]], key: str, title: str, unit: str, scale: float, called: str, name: str
) -> Picture:
    every = {level.label: level for own in sides.values() for level in own}
    labels = list(every)
    statistics = ("mean",) if key == "output_tokens_per_second" else ("p50", "p90")
    described = []
    with drawn(350, 236, name) as (figure, finish):
        axes = figure.add_axes((0.13, 0.15, 0.64, 0.72))
        bare(axes)
        ends = []
        for side, own in sides.items():
            for statistic in statistics:
                points = [
                    (labels.index(level.label), level.times[key][side][statistic] * scale)
                    for level in own
                    if statistic in level.times[key][side]
                ]
                if not points:
                    continue
                colour = COLOURS[_SIDES[side]]
                solid = statistic != "p90"
                axes.plot(
                    *zip(*points, strict=True), color=colour, linewidth=2 if solid else 1.2,
                    linestyle="-" if solid else (0, (2, 2)), marker="o" if solid else None, markersize=5,
                )  # fmt: skip
                ends.append((points[-1], f"{called if side == 'sparse' else side} {statistic}", colour))
                described.append(
                    f"{called if side == 'sparse' else side} {statistic}: "
                    + ", ".join(f"{labels[x]} {y:.3g} {unit}" for x, y in points)
                )
        axes.set_ylim(0, None)
        axes.set_xlim(-0.2, len(labels) - 0.8)
        axes.set_xticks(range(len(labels)), [label.partition("=")[2] or label for label in labels])
        axes.set_xlabel(
            {"concurrency": "requests at once", "rate": "requests a second"}.get(labels[0].partition("=")[0], ""),
            loc="left",
        )
        taken: list[float] = []
        for (x, y), label, colour in sorted(ends, key=lambda end: -end[0][1]):
            at = axes.transData.transform((x, y))
            down = min([at[1], *(other - 13 for other in taken)])
            taken.append(down)
            axes.annotate(label, (at[0] + 8, down - 4), xycoords="figure pixels", color=colour, fontsize=11)
        axes.text(-0.02, 1.06, unit, transform=axes.transAxes, color=COLOURS["muted"], fontsize=11)
        return Picture(finish(title, "; ".join(described)))


def _mean_error(layers: Sequence[Layer]) -> float | None:
    errors = [layer.error for layer in layers if layer.error is not None]
    return sum(errors) / len(errors) if errors else None


def _cell_title(layers: Sequence[Layer], mean: float | None) -> str:
    name = layers[0].name if len(layers) == 1 else f"{layers[0].name} and {len(layers) - 1} more"
    if mean is None:
        return f"{name}: dense, {layers[0].why_dense or 'its error is not known'}"
    return f"{name}: {'mean ' if len(layers) > 1 else ''}{mean:.3g}"


def _short(kinds: Sequence[str]) -> list[str]:
    """The last part of each where that tells them apart."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(last) else list(kinds)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"
