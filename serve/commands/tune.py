"""The command ``halve tune``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from compress.console import Json, emit, out, progress_bar


def tune(
    model: Annotated[
        str, typer.Argument(help="a model directory, a config.json or a hub id; no weights are read", metavar="MODEL")
    ],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    value_dtype: Annotated[
        Literal["auto", "int8", "float8_e4m3fn"],
        typer.Option(help="of the kept values; auto: as the checkpoint has them"),
    ] = "auto",
    activation_dtype: Annotated[
        Literal["auto", "none", "int8", "float8_e4m3fn"],
        typer.Option(help="of what packed layers multiply; auto: as the checkpoint has them"),
    ] = "auto",
    budget: Annotated[float, typer.Option(min=1, help="seconds to measure, for all shapes together")] = 120.0,
    again: Annotated[bool, typer.Option("--again", help="measure what the table knows already, too")] = False,
    as_json: Json = False,
) -> None:
    """Time 2:4 against dense for the layer shapes of a model on this device, and serve dense what 2:4 makes slower.

    The times go into a table of this machine, which `halve serve` and vLLM read when they load a model: of several kernels that run
    here the fastest is taken, and a layer whose shape is slower 2:4 at every number of sequences up to 64 is expanded. The layers that vLLM makes of several are
    measured, too. `halve serve --tune` does it before it loads a model.
    """
    from serve.measure import model_kernels
    from serve.measure.advice_text import print_kernels

    with progress_bar("measuring") as progress:
        document = model_kernels.document(
            model,
            device=device,
            value_dtype=value_dtype,
            activation_dtype=activation_dtype,
            budget=budget,
            fresh=again,
            fused=True,
            progress=progress,
        )

    def human() -> None:
        print_kernels(document)
        for shape, reason in document["served_dense"].items():
            out.print(f"{shape} is served dense: {reason}", highlight=False, markup=False)
        if not document["served_dense"]:
            out.print("no layer is served dense", highlight=False, markup=False)
        out.print(f"table: {document['table']}", highlight=False, markup=False, soft_wrap=True)

    emit(document, as_json, human)
