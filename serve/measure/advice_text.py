"""How `halve advise` and `halve bench --kernels` show their documents to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from compress.console import human_bytes, out, table


def print_advice(document: Mapping[str, Any]) -> None:
    verdict, load, memory = document["verdict"], document["load"], document["memory"]
    mark = "" if document["basis"] == "measured" else " (estimate)"
    out.print(Text(f"{verdict['headline']}{mark}", "bold green" if verdict["prune"] else "bold yellow"))
    for reason in verdict["reasons"]:
        out.print(reason, highlight=False, markup=False)
    model, device = document["model"], document["device"]
    out.print(
        f"{model['name']}: {model['parameters'] / 1e6:,.1f} million parameters, {model['dtype']}, {model['blocks']} blocks; "
        f"{model['pruned_share']:.0%} of the bytes can be pruned\n{device['name']}, {human_bytes(device['memory_bytes'])}",
        highlight=False,
        markup=False,
    )
    rows: list[list[Any]] = []
    if document["times"] is not None:
        times, speedup = document["times"], document["speedup"]
        for label, key in (
            ("time to first token", "ttft"),
            ("time per output token", "tpot"),
            ("a request", "request"),
        ):
            cells = [f"{times[form][f'{key}_seconds']['median'] * 1e3:.2f} ms" for form in ("dense", "sparse")]
            rows.append([label, *cells, _faster(speedup[key])])
        rates = [times[form]["output_tokens_per_second"] for form in ("dense", "sparse")]
        rows.append(
            ["output tokens per second", *(f"{rate:.1f}" for rate in rates), f"{rates[1] / rates[0]:.2f} times as many"]
        )
    weights = memory["weights_bytes"]
    rows.append(
        [
            "weights in memory",
            *(human_bytes(weights[f]) for f in weights),
            f"{weights['sparse'] / weights['dense']:.4f} of dense",
        ]
    )
    if memory["kv_tokens"] is not None:
        tokens = memory["kv_tokens"]
        rows.append(
            ["tokens of keys and values", *(f"{tokens[f]:,}" for f in tokens), f"{memory['freed_tokens']:,} more"]
        )
    rows.append(["fits in memory", *("yes" if memory["fits"][f] else "no" for f in memory["fits"]), ""])
    title = f"prompt {load['prompt']}, output {load['output']}, batch {load['batch']}{mark}"
    out.print(table(title, "", "dense", "2:4", "change", rows=rows))
    _print_layers(document["layers"])
    _print_pruning(document.get("pruning", {}))
    for note in document["notes"]:
        out.print(f"note: {note}", highlight=False, markup=False)


def _print_pruning(pruning: Mapping[str, Mapping[str, Any]]) -> None:
    """What recipes would take."""
    if not pruning:
        return
    rows = [
        [
            name,
            duration(found["seconds"]),
            max(found["stages"], key=lambda stage: stage["seconds"])["name"],
            *(human_bytes(found[key]) for key in ("device_bytes", "activation_bytes", "disk_bytes")),
        ]
        for name, found in pruning.items()
    ]
    source = next(iter(pruning.values()))["rates"]["source"]
    titles = ("recipe", "time", "most of it", "memory", "activations", "on disk")
    out.print(table(f"pruning it there (estimate, by {source})", *titles, rows=rows))


def duration(seconds: float) -> str:
    """``"40 s"``, ``"24 min"``, ``"3.1 h"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _print_layers(layers: list[Mapping[str, Any]]) -> None:
    counts = sorted({int(rows) for layer in layers for rows in layer["ratios"]})
    lines = []
    for layer in layers:
        ratios = [f"{layer['ratios'][str(c)]:.2f}" if str(c) in layer["ratios"] else "" for c in counts]
        worth = {True: "prune", False: "leave dense", None: "not measured"}[layer["worth"]]
        why = f" ({layer['reason']})" if layer["worth"] is False and not layer["ratios"] else ""
        lines.append([layer["name"], f"{layer['count']} x {layer['n']} x {layer['k']}", *ratios, worth + why])
    title = "how many times as fast a packed layer is, by rows of x"
    shown = table(title, "layer", "count x N x K", *map(str, counts), "", rows=lines)
    shown.box = None
    out.print(shown)


def print_kernels(document: Mapping[str, Any]) -> None:
    rows = [
        [
            f"{e['n']} x {e['k']}",
            e["rows"],
            f"{e['dense_seconds'] * 1e3:.3f}",
            f"{e['sparse_seconds'] * 1e3:.3f}",
            _faster(e["ratio"]),
        ]
        for e in document["kernels"]
    ]
    title = f"2:4 against dense, {document['dtype']}, {document['environment']['machine']}, {document['environment']['threads']} threads"
    out.print(table(title, "layer", "rows of x", "dense, ms", "2:4, ms", "2:4 is", rows=rows))
    for shape, wins in document["wins"].items():
        out.print(f"{shape}: 2:4 is faster at rows: {wins}", highlight=False, markup=False)
    for line in others_of(document["other_backends"]):
        out.print(line, highlight=False, markup=False)
    for line in dict.fromkeys(f"{e['backend']}: {e['reason']}; dense: {e['baseline']}" for e in document["kernels"]):
        out.print(line, highlight=False, markup=False)
    for layer in document["layers"]:
        if layer["why_dense"]:
            out.print(f"{layer['name']} stays dense: {layer['why_dense']}", highlight=False, markup=False)
    for note in document["notes"]:
        out.print(f"note: {note}", highlight=False, markup=False)


def others_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each shape and backend that could serve it, and is not the fastest."""
    found: dict[tuple[str, str], list[str]] = {}
    for e in entries:
        shown = f"{e['ratio']['median']:.2f} at {e['rows']}"
        found.setdefault((f"{e['n']} x {e['k']}", e["backend"]), []).append(shown)
    return [
        f"{shape} by {backend}, times as fast by rows: {', '.join(shown)}" for (shape, backend), shown in found.items()
    ]


def print_check(document: Mapping[str, Any]) -> None:
    rows = []
    for name, label in (("tpot", "time per output token"), ("ttft", "time to first token")):
        figure = document["speedup"][name]
        rows.append(
            [
                f"{label}: 2:4 is faster by",
                f"{figure['predicted']:.3f}",
                f"{figure['measured']:.3f}",
                f"{figure['error']:+.1%}",
            ]
        )
        for form, found in figure["seconds"].items():
            cells = [f"{found[key] * 1e3:.2f} ms" for key in ("predicted", "measured")]
            rows.append([f"    {form}", *cells, f"{found['error']:+.1%}"])
    load = document["load"]
    title = f"prompt {load['prompt']}, output {load['output']}, batch {load['batch']}, {document['basis']}"
    out.print(table(title, "", "predicted", "measured", "error", rows=rows))
    outside = [name for name, figure in document["speedup"].items() if abs(figure["error"]) > document["within"]]
    said = f"off by more: {', '.join(outside)}" if outside else "both are"
    out.print(f"ratios are to be within {document['within']:.0%}; {said}", highlight=False)
    for note in document["notes"]:
        out.print(f"note: {note}", highlight=False, markup=False)


def _faster(spread: Mapping[str, float]) -> str:
    middle = f"{spread['median']:.2f} times as fast"
    return middle if spread["p25"] == spread["p75"] else f"{middle} ({spread['p25']:.2f} to {spread['p75']:.2f})"
