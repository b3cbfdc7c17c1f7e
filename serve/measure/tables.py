"""How `halve eval`, `halve compare` and `halve bench` show their documents to people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from compress.console import human_bytes, out, table


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
        out.print(
            f"{side.upper()}: {document[side]['name']}{f', {about}' if about else ''}", highlight=False, markup=False
        )
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


def print_bench(document: dict[str, Any]) -> None:
    """Through endpoints: a table for each load, and one for memory."""
    load, models = document["load"], document["models"]
    if not document["complete"]:
        why = "failed" if "error" in document else "interrupted"
        out.print(f"[bold yellow]{why}[/] after {document['rounds_done']} of {load['rounds']} rounds", highlight=False)
    compared = "speedup" in document
    for label in load["levels"]:
        beside = [model["loads"][label] for model in models.values()]
        speedup = document.get("speedup", {}).get(label, {})
        about = load["shapes"][label]
        longest = "up to " if label == "trace" else ""
        before = f" after {about['ramp_up']} that start together" if about.get("ramp_up", 0) > 1 else ""
        title = (
            f"{label}: {about['requests']} requests a round{before}, prompt {longest}{about['prompt']}, "
            f"output {longest}{about['output']}, {document['rounds_done']} rounds"
        )
        rows: list[list[Any]] = [
            [text, *(cell(one, name) for one in beside), *_spread(speedup.get(name.removesuffix("_seconds")))]
            for names, cell in ((_TIMES, _times), (_RATES, _rates))
            for name, text in names.items()
            if any(name in one for one in beside)
        ]
        if any(one["errors"] for one in beside):
            rows.append(
                [Text("requests that failed", "red"), *(f"{one['errors']} of {one['requests']}" for one in beside)]
            )
        if any(one.get("resent") for one in beside):
            rows.append(["sent again", *(str(one.get("resent", 0)) for one in beside)])
        out.print(table(title, "p50 / p90 / p99", *models, *(["times as fast"] if compared else []), rows=rows))
        for name, one in zip(models, beside, strict=True):
            if "first_error" in one:
                out.print(f"{name}, the first failure: {one['first_error']}", highlight=False, markup=False)
    sizes = {key: [model["bytes"].get(key) for model in models.values()] for key in _SIZES}
    sizes["peak"] = [model.get("peak_process_bytes") for model in models.values()]
    sizes["gpu"] = [model.get("peak_gpu_bytes") for model in models.values()]
    rows = [
        [text, *("" if size is None else human_bytes(size) for size in sizes[key]), *_of_dense(sizes[key])]
        for key, text in {**_SIZES, "peak": "the server's processes, at most", "gpu": "on the GPU, at most"}.items()
        if any(size is not None for size in sizes[key])
    ]
    if rows:
        out.print(table("memory", "", *models, *(["of dense"] if compared else []), rows=rows))

    for name, model in models.items():
        _print_backends(model.get("backends", []), f"{name}, " if compared else "")


def _print_backends(backends: Sequence[dict[str, Any]], whose: str = "") -> None:
    """What multiplied how many layers, and why."""
    for used in backends:
        out.print(
            f"{whose}{used['phase']}: {used['layers']} layers by {used['backend']}: {used['reason']}",
            highlight=False, markup=False,
        )  # fmt: skip


_TIMES = {
    "ttft_seconds": "TTFT, ms",
    "tpot_seconds": "TPOT, ms",
    "itl_seconds": "ITL, ms",
    "e2e_seconds": "end to end, ms",
}
_RATES = {
    "requests_per_second": "requests/s",
    "output_tokens_per_second": "output tokens/s",
    "goodput_per_second": "good requests/s",
}
_SIZES = {"disk": "bytes on disk", "weights": "weights, resident", "kv_cache": "keys and values, at most"}


def _times(load: dict[str, Any], name: str) -> str:
    """The percentiles; "failed" for one that lies among the requests that failed."""
    if name not in load:
        return ""
    values = [load[name][percentile] for percentile in ("p50", "p90", "p99")]
    return " / ".join("failed" if value is None else f"{value * 1e3:.1f}" for value in values)


def _rates(load: dict[str, Any], name: str) -> str:
    return f"{load[name]['median']:.2f}" if name in load else ""


def _spread(ratio: dict[str, float] | None) -> list[str]:
    return [] if ratio is None else [f"{ratio['median']:.2f} ({ratio['p25']:.2f}-{ratio['p75']:.2f})"]


def _of_dense(sizes: Sequence[int | None]) -> list[str]:
    return [f"{sizes[1] / sizes[0]:.4f}"] if len(sizes) == 2 and sizes[0] and sizes[1] is not None else []


def print_bench_in_process(document: dict[str, Any]) -> None:
    models = document["models"]
    speedup = document.get("speedup", {})
    ratios = document.get("bytes_ratio", {})

    def times(label: str, key: str, name: str) -> list[str]:
        cells = [f"{model[key]['median'] * 1e3:.1f} ms" for model in models.values()]
        if name in speedup:
            spread = speedup[name]
            cells.append(f"{spread['median']:.2f} times as fast ({spread['p25']:.2f} to {spread['p75']:.2f})")
        return [label, *cells]

    def sizes(label: str, key: str) -> list[str]:
        cells = [human_bytes(model["bytes"][key]) for model in models.values()]
        return [label, *cells, *([f"{ratios[key]:.4f} of dense"] if key in ratios else [])]

    rows = [
        times("time to first token", "ttft_seconds", "ttft"),
        times("time per output token", "tpot_seconds", "tpot"),
        sizes("bytes on disk", "disk"),
        sizes("weights in memory", "weights"),
        sizes("of the pruned layers", "pruned_layers"),
    ]
    load = document["load"]
    title = f"prompt {load['prompt']}, output {load['output']}, batch {load['batch']}, {load['rounds']} rounds"
    out.print(table(title, "", *models, *(["ratio"] if speedup else []), rows=rows))
    _print_backends(document["backends"])


def _range(interval: Sequence[float] | None, form: str) -> str:
    return "too few" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _in_words(interval: Sequence[float] | None, form: str) -> str:
    return "" if interval is None else f" (95 % interval {_range(interval, form)})"
