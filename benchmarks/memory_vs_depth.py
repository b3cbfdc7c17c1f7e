"""Peak memory of `halve compress` on two models that differ only in depth: it must not grow with the layers.

    python -m benchmarks.memory_vs_depth [--depths 4,24] [--hidden 640]

Two random Llamas (bfloat16) are generated, alike but for their number of blocks, and compressed one after the
other, each in a process of its own with one thread, by the same recipe. The peak is the high-water mark of the
resident memory that Linux keeps for that process (VmHWM). It lies inside of a block and wobbles with the fragmentation
of the heap, more so the more blocks draw from it, but must not follow the weights: less than half of what the deep
model has more. What is kept from block to block is measured beside it and must be less than half a block over all
blocks. Prints a table and one JSON line, and writes
benchmarks/results/memory_vs_depth.json and .md. About a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serve.measure.environment import environment as measured_on
from tests import tiny_models

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "memory_vs_depth.json"
ALLOWED_BLOCKS = 0.5

_CHILD = """
import sys
from pathlib import Path
from compress.pipeline import compress_model
model, out, calibration, samples, length = sys.argv[1:]
def kilobytes(name):
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(name)))
between = []
compress_model(model, out, calibration=calibration, samples=int(samples), length=int(length), checkpoint_seconds=0,
               progress=lambda done, total, text: between.append(kilobytes("VmRSS")))
print(between[1], between[-2], kilobytes("VmHWM"))  # after the first block, after the last one, the peak
"""


def block_bytes(hidden: int) -> int:
    """Bytes of the linears of one block in bfloat16: q and o, k and v of half the heads, three of the MLP."""
    return 2 * hidden * hidden * (2 + 1 + 9)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def memory_bytes(model: Path, out: Path, calibration: Path, samples: int, length: int) -> list[int]:
    """Resident memory of a process that compresses the model: after the first block, after the last one, the peak."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(model), str(out), str(calibration), str(samples), str(length)],
        cwd=ROOT,
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return [int(word) * 1024 for word in done.stdout.split()[-3:]]


def measure(directory: Path, *, depths: tuple[int, int], hidden: int, samples: int, length: int) -> dict[str, Any]:
    """Both models in one run; see the head of this file."""
    calibration = directory / "calibration.txt"
    calibration.write_text("\n".join(f"{i}. A sparse matrix has few elements that are not zero." for i in range(4000)))
    rows = []
    for depth in depths:
        model = tiny_models.build(
            "llama", directory / f"depth-{depth}", layers=depth, hidden_size=hidden, intermediate_size=3 * hidden
        )
        first, last, peak = memory_bytes(model, directory / f"out-{depth}", calibration, samples, length)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        rows.append(
            {
                "layers": depth,
                "weight_bytes": weights,
                "rss_after_first_block_bytes": first,
                "rss_after_last_block_bytes": last,
                "peak_rss_bytes": peak,
            }
        )
    block = block_bytes(hidden)
    kept = max(row["rss_after_last_block_bytes"] - row["rss_after_first_block_bytes"] for row in rows)
    more = rows[1]["weight_bytes"] - rows[0]["weight_bytes"]
    growth = rows[1]["peak_rss_bytes"] - rows[0]["peak_rss_bytes"]
    return {
        "hidden": hidden,
        "samples": samples,
        "length": length,
        "block_bytes": block,
        "rows": rows,
        "growth_bytes": growth,
        "growth_blocks": growth / block,
        "kept_bytes": kept,
        "allowed_kept_blocks": ALLOWED_BLOCKS,
        "passed": kept < ALLOWED_BLOCKS * block and growth < more / 2,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured on."""
    rows = [
        f"| {row['layers']} | {row['weight_bytes'] / 1e6:.1f} | {row['rss_after_first_block_bytes'] / 1e6:.1f} | "
        f"{row['rss_after_last_block_bytes'] / 1e6:.1f} | {row['peak_rss_bytes'] / 1e6:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join(
        [
            "# Peak memory against depth",
            "",
            "| layers | weights, MB | memory after the first block, MB | after the last block, MB | peak, MB |",
            "|---:|---:|---:|---:|---:|",
            *rows,
            "",
            f"A block has {result['block_bytes'] / 1e6:.1f} MB. {result['samples']} windows of {result['length']} tokens; "
            f"{result['date']}, {result['machine']}, {result['threads']} thread, torch {result['versions']['torch']}.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="4,24")
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    shallow, deep = map(int, arguments.depths.split(","))
    with tempfile.TemporaryDirectory() as directory:
        result = measure(
            Path(directory),
            depths=(shallow, deep),
            hidden=arguments.hidden,
            samples=arguments.samples,
            length=arguments.length,
        )
    result |= measured_on()
    print(f"{'layers':>8} {'weights':>12} {'peak memory':>14}")
    for row in result["rows"]:
        print(f"{row['layers']:>8} {row['weight_bytes'] / 1e6:>9.1f} MB {row['peak_rss_bytes'] / 1e6:>11.1f} MB")
    print(
        f"{deep - shallow} more blocks of {result['block_bytes'] / 1e6:.1f} MB: {result['growth_bytes'] / 1e6:+.1f} MB, "
        f"{result['growth_blocks']:+.2f} blocks at the peak; kept from block to block: {result['kept_bytes'] / 1e6:+.1f} MB"
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    RESULT.with_suffix(".md").write_text(as_markdown(result))
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
