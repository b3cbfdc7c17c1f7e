"""The page that `against_llmcompressor.py` writes."""

from __future__ import annotations

from typing import Any


def as_markdown(document: dict[str, Any]) -> str:
    protocol, host = document["protocol"], document["machine"]
    lines = [
        "# halve against llm-compressor",
        "",
        f"{document['model']}; 2:4 in all linears of all blocks; calibrated on {protocol['samples']} windows "
        f"of {protocol['length']} tokens of {protocol['calibration']} (the same file for both, seed "
        f"{protocol['seed']}). Perplexity: {protocol['evaluation']}, {protocol['evaluation_windows']} of "
        f"{protocol['evaluation_length']} tokens, one evaluator for all; dense "
        f"{document['dense_perplexity']:.2f}.",
        "",
        "| method | side | pruning, s | process, s | peak memory, GB | perplexity | sparsity |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in document["results"]:
        lines.append(
            f"| {row['method']} | {row['side']} | {row['seconds']:.1f} | {row['wall_seconds']:.1f} | "
            f"{row['peak_rss_bytes'] / 1e9:.2f} | {row['perplexity']:.2f} | {row['sparsity']:.4f} |"
        )
    lines += [
        "",
        "halve divided by llm-compressor (median over the rounds, smallest to largest in brackets); below 1 "
        "is better for halve:",
        "",
        "| method | against | pruning | process | peak memory | perplexity |",
        "|---|---|---:|---:|---:|---:|",
    ]

    def spread(values: list[float]) -> str:
        low, middle, high = values
        return f"{middle:.3f}" if low == high else f"{middle:.3f} ({low:.3f} to {high:.3f})"

    for row in document["ratios"]:
        lines.append(
            f"| {row['method']} | {row['against']} | {spread(row['seconds'])} | "
            f"{spread(row['wall_seconds'])} | {spread(row['peak_rss_bytes'])} | {row['perplexity']:.3f} |"
        )
    versions = {
        side: ", ".join(f"{package} {version}" for package, version in found.items())
        for side, found in document["versions"].items()
    }
    return "\n".join(
        [
            *lines,
            "",
            "Pruning is the time that each side reports (llm-compressor: the `oneshot` call, with the model "
            "loaded before it and saved after it; halve: the run of `halve compress`, which reads and writes "
            "the model as it goes). Peak memory is the resident set: of llm-compressor up to the end of "
            "`oneshot`, of halve up to the end of the process.",
            "",
            f"- machine: {host['processor']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB, "
            f"{host['system']}; {protocol['threads']} threads a side, one side at a time; "
            f"rounds: {protocol['rounds']}",
            f"- date: {document['date']}",
            f"- halve: {versions['halve']}",
            f"- llm-compressor: {versions['llm-compressor']}",
            f"- calibration windows, SHA-256 of the int64 tokens: `{protocol['windows_sha256']}`",
            "",
        ]
    )
