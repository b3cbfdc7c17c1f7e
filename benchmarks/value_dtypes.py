"""What it costs in accuracy to store the kept values in 8 bits, and to multiply activations of 8 bits by them: perplexity of pruned checkpoints
with values in 16 bits, in int8 and in float8, and with activations in 16 bits and rounded to the same.

    python -m benchmarks.value_dtypes "NAME=DIR" ... [--seed 0] [--only FORM ...]

DIR is a packed checkpoint with values in 16 bits, such as ``benchmarks.accuracy --keep`` leaves. It is packed anew with each dtype, as `halve
pack --value-dtype` does, and each form is served by the kernels of this processor, in a process of its own. The texts and windows are those of
`benchmarks.accuracy`. Results of other names stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import MEASURED, perplexities
from compress.artefact import read_report
from compress.convert import pack_checkpoint
from compress.files import write_text
from serve.measure.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
FORMS = {
    "as it was pruned": ("auto", "none"),
    "int8": ("int8", "none"),
    "float8_e4m3fn": ("float8_e4m3fn", "none"),
    "int8, activations too": ("int8", "int8"),
    "float8_e4m3fn, activations too": ("float8_e4m3fn", "float8_e4m3fn"),
}
"""dtype of kept values, and of activations."""


def measure(directory: Path, seed: int, forms: Sequence[str]) -> dict[str, Any]:
    """Perplexities of a checkpoint in every form, and the bytes of its pruned layers as a part of those of dense ones."""
    found = {}
    for form in forms:
        value_dtype, activation_dtype = FORMS[form]
        with tempfile.TemporaryDirectory(prefix="halve-values-") as place:
            packed = directory
            if value_dtype != "auto":
                packed = Path(place) / "packed"
                pack_checkpoint(directory, packed, value_dtype, activation_dtype)
            command = [sys.executable, "-m", "benchmarks.value_dtypes", "--child", str(packed), "--seed", str(seed)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            report = read_report(packed)
            assert report is not None
            summary = report["summary"]
            found[form] = {
                **json.loads(done.stdout.splitlines()[-1]),
                "part_of_dense": summary["pruned_bytes_after"] / summary["pruned_bytes_before"],
            }
            print(form, found[form], file=sys.stderr, flush=True)
    return found


def render(document: dict[str, Any]) -> str:
    lines = [
        "# Kept values in 8 bits: what it costs in accuracy",
        "",
        "Perplexity of SmolLM2-135M pruned to 2:4, with kept values in bfloat16 as they were pruned, and rounded to int8 and to float8 (e4m3fn) "
        "with a scale for each row; and the inputs of pruned layers rounded to the same, with a scale for each token. Texts and windows are those of accuracy.md.",
        "",
        "| recipe | kept values | pruned layers, of their dense bytes | WikiText-2 | C4, unseen | code |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, forms in document["checkpoints"].items():
        for form, found in forms["forms"].items():
            cells = " | ".join(f"{found[key]:.2f}" for key in MEASURED)
            lines.append(f"| {name} | {form} | {found['part_of_dense']:.4f} | {cells} |")
    env = document["environment"]
    lines += ["", f"{env['machine']}, {env['cores']} cores, torch {env['versions']['torch']}, {env['date']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=DIR")
    parser.add_argument("--seed", type=int, default=0, help="that the checkpoints were pruned with")
    parser.add_argument(
        "--only", nargs="+", choices=FORMS, default=list(FORMS), help="the others stay as they were measured"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(perplexities(arguments.child, arguments.seed)))
        return
    path = RESULTS / "value_dtypes.json"
    document = json.loads(path.read_text()) if path.is_file() else {"checkpoints": {}}
    for checkpoint in arguments.checkpoints:
        name, _, directory = checkpoint.partition("=")
        forms = measure(Path(directory).resolve(), arguments.seed, arguments.only)
        before = document["checkpoints"].get(name, {"seed": arguments.seed, "forms": {}})
        if before["seed"] != arguments.seed:
            parser.error(f"{name} was measured with seed {before['seed']}")
        found = {**before["forms"], **forms}
        document["checkpoints"][name] = {**before, "forms": {form: found[form] for form in FORMS if form in found}}
        document["environment"] = environment()
        write_text(path, json.dumps(document, indent=1) + "\n")
    text = render(document)
    write_text(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
