"""What `benchmarks.gpu` measured, as Markdown."""

from __future__ import annotations

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
    if "tests" in document:
        lines.append(f"Tests marked gpu: {document['tests']}.")
    if copy := document.get("copy_gigabytes_per_second"):
        lines.append(f"A copy within the memory reaches {copy:.0f} GB/s (both ways counted).")
    if "decode" in document:
        lines += [
            "",
            "| layer | rows of x | 2:4, us | cuBLAS, us | faster | quartiles | with overlap | 2:4, GB/s | of a copy | cuBLAS, GB/s |",
            "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
        ]
        for row in document["decode"]:
            us, gain, rate = row["microseconds"], row["speedup"], row["gigabytes_per_second"]
            overlap = f"{gain['2:4 overlap']['median']:.2f}" if "2:4 overlap" in gain else ""
            share = f"{row['of_copy']:.0%}" if row["of_copy"] else ""
            lines.append(
                f"| {row['n']} x {row['k']} | {row['rows']} | {us['2:4']:.2f} | {us['dense']:.2f} | "
                f"{gain['2:4']['median']:.2f} | {gain['2:4']['p25']:.2f} to {gain['2:4']['p75']:.2f} | {overlap} | "
                f"{rate['2:4']:.0f} | {share} | {rate['dense']:.0f} |"
            )
    for section, title in (
        ("block", "decoder block of Llama-3-8B's shape"),
        ("prefill", "many rows"),
        ("triton", "Triton"),
    ):
        if section in document:
            sides = list(dict.fromkeys(name for row in document[section] for name in row["microseconds"]))
            lines += ["", "| " + " | ".join([title, *(f"{side}, us" for side in sides), "faster than dense"]) + " |"]
            lines.append("|---|" + "---:|" * (len(sides) + 1))
            for row in document[section]:
                name = (
                    f"{row['tokens']} tokens" if section == "block" else f"{row['n']} x {row['k']}, {row['rows']} rows"
                )
                cells = [f"{row['microseconds'][side]:.1f}" if side in row["microseconds"] else "" for side in sides]
                gains = ", ".join(f"{side} {gain['median']:.2f}" for side, gain in row["speedup"].items())
                lines.append(f"| {name} | " + " | ".join([*cells, gains]) + " |")
    if "pruning" in document:
        lines += ["", "Pruning a layer by SparseGPT, 2:4:", ""]
        for row in document["pruning"]:
            shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in row["seconds"].items())
            lines.append(f"- {row['n']} x {row['k']}: {shown}; peak memory {row['peak_bytes'] / 1e9:.1f} GB")
    for row in document.get("host", []):
        shown = ", ".join(f"{name} {us:.1f} us" for name, us in row["microseconds"].items())
        lines += ["", f"Time of the processor for a call, without a graph: {shown}."]
    for section in ("splits", "forms"):
        if section in document:
            lines += ["", f"{section.capitalize()}, microseconds by the number of blocks that share a sum:", ""]
            for row in document[section]:
                what = row.get("form") or f"chosen {row['chosen']}"
                shown = row.get("refused") or ", ".join(f"{s}: {us:.2f}" for s, us in row["microseconds"].items())
                lines.append(f"- {row['n']} x {row['k']}, {row['rows']} rows, {what}: {shown}")
    lines += ["", *(f"Broken: {name}: {said}" for name, said in document["broken"].items())]
    if document["left_out"]:
        lines.append(f"Left out for want of time: {', '.join(document['left_out'])}.")
    return "\n".join(lines).rstrip() + "\n"
