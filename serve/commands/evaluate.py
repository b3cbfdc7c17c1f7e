"""The command ``halve eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.cli import Directory
from compress.console import Json, emit, out, progress_bar
from compress.errors import UsageError
from serve.commands.shared import ALWAYS, Against, Device, dense_model, refuse_misplaced

_HERE, _SERVED, _URL, _TASKS = "measuring in this process", "measuring through an endpoint", "--url", "--tasks"
_PERPLEXITY, _AGREEMENT = "--perplexity", "--against in this process, with --perplexity"
_STARTED, _UNSERVED = "servers that halve starts", "what is not served at --url already"
_BELONGS = {
    "directory": ALWAYS, "against": ALWAYS, "perplexity": ALWAYS, "tasks": ALWAYS, "url": ALWAYS, "as_json": ALWAYS,
    "text": (_PERPLEXITY,), "length": (_PERPLEXITY,), "windows": (_PERPLEXITY,), "agreement": (_AGREEMENT,),
    "limit": (_TASKS,), "task_data": (_TASKS,), "concurrency": (_TASKS, _SERVED), "timeout": (_SERVED,),
    "model": (_URL,), "api_key": (_URL,), "device": (_HERE, _STARTED), "through": (_UNSERVED,),
}  # fmt: skip
"""What each option is for; an option that a call would ignore is refused."""


def evaluate(
    context: typer.Context,
    directory: Directory,
    against: Against = None,
    text: Annotated[str, typer.Option(help="wikitext2, c4, a .txt or .jsonl[.gz] file, or a data set")] = "wikitext2",
    length: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 2048,
    windows: Annotated[
        int | None, typer.Option(min=1, help="how many windows, from the start; left out: all", show_default=False)
    ] = None,
    perplexity: Annotated[bool, typer.Option(help="measure the perplexity of the text")] = True,
    agreement: Annotated[
        bool, typer.Option(help="with --against: how far both say the same; holds both models at once")
    ] = True,
    tasks: Annotated[
        str | None, typer.Option(help="tasks of lm-eval, such as lambada_openai,arc_easy", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples of each task", show_default=False)] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="directory with TASK.jsonl[.gz]; left out: the hub's data", show_default=False)
    ] = None,
    through: Annotated[
        Literal["process", "endpoint"], typer.Option(help="endpoint: serve it, and measure what is served")
    ] = "process",
    url: Annotated[
        str | None, typer.Option(help="measure the endpoint at this address (it serves DIRECTORY)", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="the model's name at --url; left out: its only one", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="HALVE_API_KEY", help="the key that --url asks for", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds that an endpoint has for one answer")] = 120.0,
    concurrency: Annotated[
        int, typer.Option(min=1, help="prompts of tasks at once; above 1, 16-bit scores vary in their last digits")
    ] = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, agreement with the dense model and lm-eval tasks, dense beside sparse, on the same text."""
    from serve.measure.tasks import split_names

    if url is not None and against is not None:
        raise UsageError(
            "--url measures one served model; measure each with --json, and `halve compare` puts them side by side"
        )
    names = [] if tasks is None else split_names(tasks)
    served = url is not None or through == "endpoint"
    agrees = against is not None and perplexity and not served
    told = {
        _URL: url, _TASKS: names, _PERPLEXITY: perplexity or not names, _AGREEMENT: agrees, _SERVED: served, _HERE: not served,
        _STARTED: served and url is None, _UNSERVED: url is None or through == "endpoint",
    }  # fmt: skip
    refuse_misplaced(context, _BELONGS, {what for what, there in told.items() if there})
    from serve.measure.evaluation import Endpoint
    from serve.measure.evaluation import evaluate as run

    with dense_model(against) as dense, progress_bar("evaluating") as progress:
        document = run(
            directory,
            against=dense,
            text=text,
            length=length,
            windows=windows,
            perplexity=perplexity,
            agreement=agreement,
            tasks=names,
            limit=limit,
            task_data=task_data,
            endpoint=Endpoint(url, model, api_key, timeout) if served else None,
            concurrency=concurrency,
            device=device,
            progress=progress,
        )

    def human() -> None:
        from serve.measure.tables import print_evaluation

        print_evaluation(document)
        for note in document.get("notes", ()):
            out.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        for what, why in document.get("not_measured", {}).items():
            out.print(f"not measured: {what}: {why}", highlight=False, soft_wrap=True)

    emit(document, as_json, human)
