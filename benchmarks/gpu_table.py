"""What `benchmarks.gpu` measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def render(document: dict[str, Any]) -> str:
    """What was measured so far, as Markdown."""
    env = document["environment"]
    lines = [
        f"# 2:4 on {env['gpu']}",
        "",
        f"{env['date']}, compute capability {env['capability']}, torch {env['torch']}, CUDA {env['cuda']}, "
        f"NVRTC {env['nvrtc']}. bfloat16; medians, graph replay, weights from memory.",
    ]
    found = document.get("checks", [])
    wrong = [check for check in found if check["wrong"]]
    lines += ["", f"Checks against float64: {len(found) - len(wrong)} of {len(found)} right."]
    lines += [f"- WRONG {check['name']}: {check['wrong']}" for check in wrong]
    for row in document.get("proof", []):
        overlap = "launches overlap" if row["overlap"] else "launches wait for each other"
        lines.append(f"Kernels for {row['dtype']}: compiled, loaded and proven in {row['seconds']:.1f} s; {overlap}.")
    if copy := document.get("copy_gigabytes_per_second"):
        lines.append(f"A copy within the memory reaches {copy:.0f} GB/s (both ways counted).")
    for section in ("decode", "tuned"):
        if section in document:
            lines += few_rows(document[section], section)
    for section, title in (
        ("block", "decoder block of Llama-3-8B's shape"),
        ("scaled", "values of 8 bits"),
        ("narrow", "many rows, of 8 bits"),
        ("prefill", "many rows"),
        ("libraries", "many rows, by libraries"),
        ("triton", "Triton"),
    ):
        if section in document:
            sides = list(dict.fromkeys(name for row in document[section] for name in row["microseconds"]))
            lines += ["", "| " + " | ".join([title, *(f"{side}, us" for side in sides), "faster than dense"]) + " |"]
            lines.append("|---|" + "---:|" * (len(sides) + 1))
            for row in document[section]:
                name = row["name"] if section == "block" else f"{row['n']} x {row['k']}, {row['rows']} rows"
                cells = [f"{row['microseconds'][side]:.1f}" if side in row["microseconds"] else "" for side in sides]
                gains = ", ".join(f"{side} {gain['median']:.2f}" for side, gain in row["speedup"].items())
                lines.append(f"| {name} | " + " | ".join([*cells, gains]) + " |")
    for row in document.get("narrow", []):
        shown = ", ".join(f"{part} {us:.1f} us" for part, us in row["parts"].items())
        lines.append(f"Besides the product, {row['n']} x {row['k']}, {row['rows']} rows: {shown}.")
    if "pruning" in document:
        lines += ["", "Pruning a layer by SparseGPT, 2:4:", ""]
        for row in document["pruning"]:
            shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in row["seconds"].items())
            lines.append(f"- {row['n']} x {row['k']}: {shown}; peak memory {row['peak_bytes'] / 1e9:.1f} GB")
    for row in document.get("host", []):
        shown = ", ".join(f"{name} {us:.1f} us" for name, us in row["microseconds"].items())
        lines += ["", f"Time of the processor for a call, without a graph: {shown}."]
    if "unsearched" in document:
        shown = (
            f"{row['n']} x {row['k']}, {row['rows']} rows: {row['microseconds']:.1f} us"
            for row in document["unsearched"]
        )
        lines += ["", f"cuSPARSELt {document.get('cusparselt', '')} before its search: {'; '.join(shown)}."]
    if "variants" in document:
        lines += variants(document["variants"])
    if clocks := [
        row["sm_mhz"] for rows in document.values() if isinstance(rows, list) for row in rows if _has_clock(row)
    ]:
        lines += ["", f"Clock of the processors while this was measured: {min(clocks)} to {max(clocks)} MHz."]
    lines += ["", *(f"Broken: {name}: {said}" for name, said in document["broken"].items())]
    if document["left_out"]:
        lines.append(f"Left out for want of time: {', '.join(document['left_out'])}.")
    return "\n".join(lines).rstrip() + "\n"


def _has_clock(row: Any) -> bool:
    return isinstance(row, dict) and bool(row.get("sm_mhz"))


def _shown(figure: float | None, digits: int = 2) -> str:
    """A side that broke has none."""
    return "" if figure is None else f"{figure:.{digits}f}"


def few_rows(rows: Sequence[dict[str, Any]], section: str) -> list[str]:
    """Few rows of x, as Markdown: by the ways that are guessed (``decode``), or by those that were found (``tuned``)."""
    more = "without overlap" if section == "decode" else "way"
    lines = [
        "",
        f"| layer, {section} | rows of x | 2:4, us | dense, us | faster | quartiles | {more} | 2:4, GB/s | of a copy | dense, GB/s |",
        f"|---|---:|---:|---:|---:|---|---{':' if section == 'decode' else ''}|---:|---:|---:|",
    ]
    for row in rows:
        us, gain, rate = row["microseconds"], row["speedup"], row["gigabytes_per_second"]
        ours, waiting = gain.get("2:4"), gain.get("2:4 waiting")
        cells = [f"{row['n']} x {row['k']}", row["rows"], _shown(us.get("2:4")), _shown(us.get("dense"))]
        cells += [f"{ours['median']:.2f}", f"{ours['p25']:.2f} to {ours['p75']:.2f}"] if ours else ["", ""]
        if section == "decode":
            cells.append(f"{waiting['median']:.2f}" if waiting else "")
        else:
            cells.append(f"{row['way']} ({row['gain']:.2f} of the guess)" if "way" in row else "no time to find it")
        cells.append(_shown(rate.get("2:4"), 0))
        cells += [f"{row['of_copy']:.0%}" if row["of_copy"] else "", _shown(rate.get("dense"), 0)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def variants(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The best ways for each product beside the chosen one, as Markdown."""
    lines = ["", "Kernels, `multiply_tiles_panels_groups_stages_resident in blocks that share a sum`:", ""]
    lines += ["| layer | rows of x | chosen | us | best | us | then |", "|---|---:|---|---:|---|---:|---|"]
    for row in rows:
        if "chosen" not in row:
            continue
        ranked = sorted(row["microseconds"].items(), key=lambda way: way[1])
        if not ranked:
            lines.append(f"| {row['n']} x {row['k']} | {row['rows']} | {row['chosen']} | | none is right | | |")
            continue
        (best, least), *others = ranked
        chosen = row["microseconds"].get(row["chosen"])
        then = ", ".join(f"{name} {us:.2f}" for name, us in others[:4])
        lines.append(
            f"| {row['n']} x {row['k']} | {row['rows']} | {row['chosen']} | {'' if chosen is None else f'{chosen:.2f}'} | "
            f"{best} | {least:.2f} | {then} |"
        )
    wrong = {name: said for row in rows for name, said in row.get("wrong", {}).items()}
    return [*lines, *(f"- WRONG {name}: {said}" for name, said in wrong.items())]
