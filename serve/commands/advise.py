"""The command ``halve advise``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.console import Json, emit, progress_bar
from compress.recipe import Recipe
from serve.commands.shared import ALWAYS, refuse_misplaced

_NEW, _KEPT, _MEASURED, _AWAY = "a model", "an advice's file", "a measurement", "a GPU that is not here"
_BELONGS = {
    "model": ALWAYS, "as_json": ALWAYS, "check": (_KEPT,),
    **dict.fromkeys(("device", "batch", "prompt", "output", "measure", "file", "value_dtype", "activation_dtype"),
                    (_NEW,)),
    "budget": (_MEASURED,), "recipe": (_MEASURED, _AWAY),
}  # fmt: skip
"""What each option is for; an option that a call would ignore is refused."""


def advise(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="a model directory, a config.json, a hub id (no weights are read); or an advice's own file"
        ),
    ],
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N, or a GPU that is not here: h100, a100, rtx4090, l4 ...")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="sequences at once")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="tokens in a prompt")] = 512,
    output: Annotated[int, typer.Option(min=1, help="tokens in an answer")] = 128,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--estimate",
            help="left out: measured where the device is here; --estimate: from the kernel table or a roofline alone",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[float, typer.Option(min=1, help="seconds to measure; three rounds are made in any case")] = 90.0,
    file: Annotated[
        Path | None, typer.Option("--out", help="write the advice here, to check it afterwards", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="a recipe whose time and memory is estimated; left out: those of the presets", show_default=False
        ),
    ] = None,
    value_dtype: Annotated[
        Literal["auto", "int8", "float8_e4m3fn"],
        typer.Option(help="what kept values are stored as; auto: as the checkpoint has them"),
    ] = "auto",
    activation_dtype: Annotated[
        Literal["auto", "none", "int8", "float8_e4m3fn"],
        typer.Option(help="what the inputs of packed layers are rounded to; auto: as the checkpoint has them"),
    ] = "auto",
    check: Annotated[
        Path | None,
        typer.Option(
            help="a result of `halve bench --json`: how far the advice in the file MODEL was off", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Before pruning: what 2:4 would change in time and memory on a device, which layers are worth it, or don't."""
    from serve.measure import advice_text
    from serve.measure.advice_check import check as run_check
    from serve.measure.advice_check import is_advice, read_advice

    is_kept = check is not None or is_advice(Path(model))
    refuse_misplaced(context, _BELONGS, {_KEPT} if is_kept else _kinds(device, measure))
    if check is not None:
        checked = run_check(Path(model), check)
        emit(checked, as_json, lambda: advice_text.print_check(checked))
        return
    if is_kept:
        kept = read_advice(Path(model))
        emit(kept, as_json, lambda: advice_text.print_advice(kept))
        return
    from serve.measure.advise import advise as run
    from serve.measure.advise import write

    if file is not None:
        from compress.files import try_place

        try_place(file)  # not after a minute and a half of measuring

    with progress_bar("measuring") as progress:
        document = run(
            model,
            device=device,
            batch=batch,
            prompt=prompt,
            output=output,
            measure=measure,
            budget=budget,
            value_dtype=value_dtype,
            activation_dtype=activation_dtype,
            recipes=None if recipe is None else {recipe.name: Recipe.load(recipe)},
            progress=progress,
        )
    if file is not None:
        write(document, file)
    emit(document, as_json, lambda: advice_text.print_advice(document))


def _kinds(device: str, measure: bool | None) -> set[str]:
    """What a call for a model is of what options are for."""
    from serve.measure.advise import Place

    if Place.of(device).here is None:
        return {_NEW, _AWAY}
    return {_NEW} if measure is False else {_NEW, _MEASURED}
