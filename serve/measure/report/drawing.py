"""How the pictures of a report are drawn: matplotlib's SVG as an element of the page.

Text stays text in the page's font, and colours are the page's CSS variables, so that one picture does for light and dark. While
matplotlib draws, each variable is stood for by a colour of its own, which is replaced afterwards.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

STEPS = 9
"""Colours of a heat map."""
_VARIABLES = ("ink", "muted", "rule", "paper", "dense", "accent", "dense-soft", "accent-soft", "cache")
COLOURS = {name: f"#0000{10 + index:02x}" for index, name in enumerate(_VARIABLES)}
COLOURS |= {f"heat-{step}": f"#0001{10 + step:02x}" for step in range(STEPS)}
_NAMES = {colour: name for name, colour in COLOURS.items()}
_SVG = "http://www.w3.org/2000/svg"
_LINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Picture:
    """SVG for the page; ``narrow`` is another one for small screens."""

    wide: Markup
    narrow: Markup | None = None


def place_labels(axes: Any, marks: Sequence[tuple[float, float, str]], width: int) -> None:
    """Writes a label beside each mark (x, y, text): on the first side where it meets no mark and no other label."""
    at = [tuple(axes.transData.transform((x, y))) for x, y, _ in marks]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    for (x, y), (_, _, text) in zip(at, marks, strict=True):
        length = 6.6 * len(text)  # of 12 px letters
        sides = [(x + 9, y - 4), (x - 9 - length, y - 4), (x - length / 2, y + 10), (x - length / 2, y - 19)]
        sides += [(x + 9, y - 4 - 14 * step) for step in (1, 2, 3, 4)]
        boxes = [(left, down - 2, left + length, down + 11) for left, down in sides]
        free = (
            box for box in boxes
            if box[0] >= 0 and box[2] <= width
            and not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken)
        )  # fmt: skip
        box = next(free, boxes[0])
        taken.append(box)
        axes.annotate(text, (box[0], box[1] + 2), xycoords="figure pixels", color=COLOURS["ink"], fontsize=12)


def bare(axes: Any) -> None:
    """Horizontal rules and letters only."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["rule"])
    axes.tick_params(length=0, labelcolor=COLOURS["muted"], pad=6)
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(COLOURS["muted"])


def plain_log_ticks(axes: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    candidates = [factor * 10**power for power in range(-2, 7) for factor in (1, 1.5, 2, 3, 5, 7)]
    inside = [tick for tick in candidates if low * 0.95 <= tick <= high * 1.05]
    axes.yaxis.set_major_locator(FixedLocator(inside[:: max(1, math.ceil(len(inside) / 7))] or [low]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


Finish = Callable[..., Markup]


@contextmanager
def drawn(width: int, height: int, name: str) -> Iterator[tuple[Any, Finish]]:
    """A matplotlib figure of so many CSS pixels, and ``finish(title, description, titles of parts by id)`` -> SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "axes.unicode_minus": False,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 12, "axes.labelsize": 11,
        "xtick.labelsize": 11, "ytick.labelsize": 11, "figure.dpi": 72, "savefig.dpi": 72, "path.simplify": False,
        "axes.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # the page's fonts have it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(width / 72, height / 72), facecolor="none", edgecolor="none")
        canvas = FigureCanvasSVG(figure)

        def finish(title: str, description: str, parts: dict[str, str] | None = None) -> Markup:
            file = io.StringIO()
            none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            canvas.print_svg(file, metadata=none)
            return _page_svg(file.getvalue(), name, width, height, title, description, parts or {})

        yield figure, finish


def _page_svg(
    text: str, name: str, width: int, height: int, title: str, description: str, parts: dict[str, str]
) -> Markup:
    """matplotlib's file as an element of the page: ids of its own, colours as variables, a title and a description."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        if (own := element.get("id")) in parts:
            element.insert(0, _text_element("title", parts[own]))
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id":
                if own not in parts and "clip" not in value and element.tag.endswith("}g"):
                    continue  # of groups, nothing refers to
                value = f"{name}-{value}"
            elif key == f"{{{_LINK}}}href":
                key, value = "href", value.replace("#", f"#{name}-")
            value = re.sub(r"url\(#", f"url(#{name}-", value)
            value = re.sub(r"#00[0-9a-f]{4}\b", lambda match: f"var(--{_NAMES.get(match[0], 'ink')})", value)
            value = re.sub(r"font-family: [^;]*; ", "", value)
            value = re.sub(r"font: (?:[a-z]+ |\d+ )*([\d.]+px)[^;]*", r"font-size: \1", value)
            element.set(key, value)
    root.attrib.clear()
    attributes = {
        "viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height), "role": "img",
        "aria-labelledby": f"{name}-title {name}-description",
    }  # fmt: skip
    root.attrib.update(attributes)
    root.insert(0, _text_element("desc", description, f"{name}-description"))
    root.insert(0, _text_element("title", title, f"{name}-title"))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # in a page, <svg> needs no namespace
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _text_element(tag: str, text: str, name: str | None = None) -> ElementTree.Element:
    element = ElementTree.Element(f"{{{_SVG}}}{tag}", {} if name is None else {"id": name})
    element.text = text
    return element
