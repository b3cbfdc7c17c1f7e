"""How `halve eval` and `halve compare` show their documents to people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from compress.console import out, table


def print_evaluation(document: dict[str, Any]) -> None:
    models = document["models"]
    if "protocol" in document:
        protocol = document["protocol"]
        rows = [
            [m["directory"], m["dtype"], f"{m['perplexity']:.2f}", _range(m["interval"], ".2f"), f"{m['seconds']:.0f}"]
            for m in models
        ]
        title = f"perplexity of {protocol['text']}, {protocol['windows']} windows of {protocol['length']} tokens"
        out.print(table(title, "checkpoint", "dtype", "perplexity", "95 % interval", "seconds", rows=rows))
    if "ratio" in document:
        out.print(f"ratio {document['ratio']:.3f}{_in_words(document['ratio_interval'], '.3f')}", highlight=False)
    if "agreement" in document:
        top1, kl = document["agreement"]["top1"], document["agreement"]["kl"]
        out.print(
            f"same likeliest token: {top1['value']:.1%}{_in_words(top1['interval'], '.1%')}\n"
            f"KL(dense || this): {kl['value']:.4f} nats a token{_in_words(kl['interval'], '.4f')}",
            highlight=False,
        )
    if "tasks" not in models[-1]:
        return
    rows = []
    for name, task in models[-1]["tasks"].items():
        for metric in task["metrics"]:
            beside = [model["tasks"][name]["metrics"][metric] for model in models]
            cells = [f"{one['value']:.4f}  ({_range(one.get('interval'), '.4f')})" for one in beside]
            rows.append([name, metric, task["examples"], *cells])
    out.print(table("tasks of lm-eval", "task", "metric", "examples", *(m["directory"] for m in models), rows=rows))


def print_comparison(document: dict[str, Any]) -> None:
    for side in ("a", "b"):
        about = ", ".join(f"{key} {value}" for key, value in document[side].items() if key != "name")
        out.print(f"{side.upper()}: {document[side]['name']}{f', {about}' if about else ''}", highlight=False)
    rows = [
        [
            name,
            f"{figure['a']:.5g}",
            f"{figure['b']:.5g}",
            "" if figure["ratio"] is None else f"{figure['ratio']:.4g}",
            "" if figure["interval"] is None else _range(figure["interval"], ".3f"),
            figure["verdict"].replace("no difference", "same"),
        ]
        for name, figure in document["figures"].items()
    ]
    columns = ("A", "B", "A / B", f"{document['confidence'] * 100:.0f} % interval", "A is")
    shown = table("", "figure", *columns, rows=rows)
    shown.box = None
    for column in shown.columns:
        column.no_wrap = True
    out.print(shown)
    unknown = {name: figure["why"] for name, figure in document["figures"].items() if figure["verdict"] == "unknown"}
    for why in dict.fromkeys(unknown.values()):
        out.print(f"unknown: {', '.join(n for n in unknown if unknown[n] == why)}: {why}", highlight=False)
    for note in document["notes"]:
        out.print(f"note: {note}", highlight=False, markup=False)
    for gate in document["gates"]:
        mark = Text("holds", "green") if gate["holds"] else Text("fails", "bold red")
        out.print(Text.assemble("gate ", gate["gate"], ": ", mark, f" ({gate['why']})"))


def _range(interval: Sequence[float] | None, form: str) -> str:
    return "too few" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _in_words(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f" (95 % interval {_range(interval, form)})"
