"""The command ``halve export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.cli import Directory
from compress.console import Json, emit, out, say


def export(
    directory: Directory,
    out_directory: Annotated[Path, typer.Option("--out", help="the directory to make", show_default=False)],
    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="of weights and arithmetic: float32 for processors, float16 for GPUs"),
    ] = "float32",
    weights: Annotated[
        Literal["zeros", "packed"],
        typer.Option(
            help="zeros: dense weights, for anything that runs ONNX; packed: 2:4 weights in 9/16 of their bytes or less, "
            "multiplied by an operator of halve's within ONNX Runtime on processors"
        ),
    ] = "zeros",
    as_json: Json = False,
) -> None:
    """Make an ONNX graph of a checkpoint, for ONNX Runtime and TensorRT; checked against torch.

    `halve serve` serves it, too.
    """
    from serve.onnx.export import export_onnx

    if not as_json:
        say(f"making a graph of {directory}; of a model of 30 layers that takes a minute or two")
    record = export_onnx(directory, out_directory, dtype, weights)
    layers = record["layers"]

    def human() -> None:
        out.print(
            f"{out_directory}: {layers['sparse']} products with 2:4 weights, {layers['dense']} with others; "
            f"logits are {record['error']:.1e} of their size off torch's",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    emit({"out": str(out_directory), **record}, as_json, human)
