"""The report in a real browser: headless Chromium, wide and narrow, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.measure.report import report
from tests.runs import chromium
from tests.serve.report_documents import Measured, endpoint_bench

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="not run: there is no Chromium (Debian's package is chromium)"),
]


@pytest.fixture(scope="module")
def pages(made: Measured, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One with every picture, and one of a checkpoint of which nothing was measured."""
    directory = tmp_path_factory.mktemp("browser")
    load = directory / "load.json"
    load.write_text(json.dumps(endpoint_bench(made.dense, made.sparse)))
    pages = {"whole": directory / "whole.html", "bare": directory / "bare.html"}
    report(made.sparse, pages["whole"], results=[made.evaluation, made.bench, load], card=False)
    report(made.dense, pages["bare"], card=False)
    return pages


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["whole", "bare"])
def test_it_opens(name: str, width: int, scheme: str, browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert said == []
    assert asked == [pages[name].as_uri()]
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        """[...document.querySelectorAll("svg")].filter(svg => svg.checkVisibility()).map(svg => {
            const box = svg.getBoundingClientRect(), drawn = svg.getBBox();
            const letters = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect().height);
            return {left: box.left, right: box.right, height: box.height, width: drawn.width,
                    shapes: svg.querySelectorAll("path, rect, use").length, least: Math.min(...letters)};
        })"""
    )
    assert len(boxes) == (5 if name == "whole" else 0)  # three latencies, memory, the heat map
    for box in boxes:
        assert box["width"] > 200
        assert box["height"] > 50
        assert box["shapes"] > 5
        assert box["least"] >= 11, box  # the line of a letter of 10 px
        assert 0 <= box["left"] < box["right"] <= width
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    light = [sum(map(int, colour[4:-1].split(","))) > 382 for colour in (ground, ink)]
    assert light == ([True, False] if scheme == "light" else [False, True])
    for fill in page.evaluate("[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"):
        assert fill.startswith("rgb(")
        assert fill != "rgb(0, 0, 0)"  # a variable that is not defined
    assert len(page.screenshot()) > 10_000
    context.close()
