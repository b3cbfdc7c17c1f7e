"""The command ``halve``: what makes checkpoints (from `compress.cli`) and what serves and measures them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

import compress.cli
from compress.cli import Directory
from compress.console import Json, emit, human_bytes, out, progress_bar, run_app
from compress.errors import UsageError
from compress.recipe import Recipe
from compress.version import version
from serve.tune import tune

app = typer.Typer(
    name="halve",
    help="Prune language models to 2:4, pack them into 9/16 of the bytes, serve them, and measure what it gained.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Against = Annotated[Path | None, typer.Option(help="the dense checkpoint to compare with", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")]


def _version(value: bool) -> None:
    if value:
        print(version())
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def _attention() -> str:
    """What `halve compress` attends with here."""
    from serve import attention  # torch takes seconds to import

    return attention.name()


def _savings(rows: int, dtype: Any, device: Any) -> Mapping[tuple[int, int, bool], float]:
    """What 2:4 saves on this machine, for `halve compress --allocate`."""
    from serve.measure import tuned

    return tuned.savings(rows, dtype, device)


compress.cli.register(app, _attention, _savings)


@app.command("eval")
def evaluate(
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
    from compress.errors import UsageError
    from serve.measure.tasks import split_names

    if url is not None and against is not None:
        raise UsageError(
            "--url measures one served model; measure each with --json, and `halve compare` puts them side by side"
        )
    if url is None and model is not None:
        raise UsageError("--model names a model at --url, and there is none")
    names = [] if tasks is None else split_names(tasks)
    if not names and (task_data is not None or limit is not None):
        raise UsageError("--limit and --task-data are for --tasks, and there are none")
    from serve.measure.evaluation import Endpoint
    from serve.measure.evaluation import evaluate as run

    served = url is not None or through == "endpoint"
    with progress_bar("evaluating") as progress:
        document = run(
            directory,
            against=against,
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

    emit(document, as_json, human)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="the candidate: a result of `halve eval|bench --json`, or a checkpoint")],
    b: Annotated[
        Path | None,
        typer.Argument(help="the baseline, of the same kind; left out: the dense model in A's own document"),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="'perplexity<=1.10x' (of the baseline), 'tpot.p50<=0.02' (absolute); may be repeated"),
    ] = None,
    confident: Annotated[bool, typer.Option(help="the whole 95 % interval has to clear a gate, not just the value")] = (
        False
    ),
    as_json: Json = False,
) -> None:
    """Two results or checkpoints side by side: ratios, intervals, what is a difference; gates give the exit code."""
    from serve.measure.compare import compare as run

    document = run(a, b, gates=gate or [], confident=confident)

    def human() -> None:
        from serve.measure.tables import print_comparison

        print_comparison(document)

    emit(document, as_json, human)
    if not document["ok"]:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True})
def bench(
    context: typer.Context,
    directory: Directory,
    against: Against = None,
    engine: Annotated[Literal["transformers", "vllm"], typer.Option(help="what serves the models")] = "transformers",
    url: Annotated[
        str | None, typer.Option(help="DIRECTORY is served at this address already", show_default=False)
    ] = None,
    against_url: Annotated[
        str | None, typer.Option(help="the dense model is served at this address already", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="the model's name at --url; left out: its only one", show_default=False)
    ] = None,
    against_model: Annotated[
        str | None, typer.Option(help="the dense model's name at --against-url", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="HALVE_API_KEY", help="the key that --url asks for", show_default=False)
    ] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="without an endpoint: model and loop only")] = False,
    prompt: Annotated[
        int | None, typer.Option(min=1, help="tokens in a prompt; 128, or what a trace says", show_default=False)
    ] = None,
    output: Annotated[
        int | None, typer.Option(min=1, help="tokens to decode; 32, or what a trace says", show_default=False)
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(help="requests under way at any time: 1, or several loads: 1,4,16", show_default=False),
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="arrivals at random, so many a second; may be repeated")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="a CSV of arrivals: TIMESTAMP, ContextTokens, GeneratedTokens", show_default=False),
    ] = None,
    trace_scale: Annotated[float, typer.Option(help="how many times as fast to replay the trace")] = 1.0,
    trace_requests: Annotated[int, typer.Option(min=1, help="only the first ones of the trace")] = 100,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="in a round of a load; left out: twice the concurrency, or 10 s of --rate", show_default=False
        ),
    ] = None,
    goodput: Annotated[
        list[str] | None, typer.Option(help="a limit that a good request keeps, in ms: ttft:500; may be repeated")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="sequences at once, with --in-process", show_default=False)
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="how often each model is measured, in turn; `compare` needs 7")
    ] = 8,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="each layer shape alone, by rows of x; no weights needed")
    ] = False,
    budget: Annotated[float, typer.Option(min=1, help="with --kernels: seconds to measure")] = 120.0,
    seed: Annotated[int, typer.Option(min=0, help="of the prompts and arrivals")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds that an endpoint has for one answer")] = 300.0,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="file for the document, written after each round", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Latency, throughput and memory through endpoints, dense against sparse, interleaved.

    Times to first token, per output token, between tokens and end to end. With --engine vllm, what follows -- goes to vLLM.
    """
    # Each kind of measurement has its own function and document.
    if kernels:
        _bench_kernels(directory, device, budget, as_json)
        return
    if in_process:
        served = {
            "--url": url, "--against-url": against_url, "--model": model, "--against-model": against_model,
            "--concurrency": concurrency, "--rate": rate, "--trace": trace, "--requests": requests, "--goodput": goodput,
            "--out": out, "--engine vllm": engine == "vllm" or None,
        }  # fmt: skip
        if given := [name for name, value in served.items() if value]:
            raise UsageError(f"{given[0]} is for measuring through an endpoint, and --in-process does without one")
        _refuse_extra(context)
        _bench_in_process(directory, against, prompt or 128, output or 32, batch or 1, rounds, device, as_json)
        return
    if batch is not None:
        raise UsageError("--batch is for --in-process; through an endpoint, --concurrency is what is done at once")
    if engine != "vllm" or url is not None:
        _refuse_extra(context)
    if url is None and model is not None:
        raise UsageError("--model names a model at --url, and there is none")
    if against_url is None and against_model is not None:
        raise UsageError("--against-model names a model at --against-url, and there is none")
    from serve.measure.latency import limits
    from serve.measure.loads import levels
    from serve.measure.served import Endpoint
    from serve.measure.served import bench as run

    wanted = levels(
        concurrency=concurrency, rates=rate or [], trace=trace, trace_scale=trace_scale, trace_requests=trace_requests,
        requests=requests, prompt=prompt, output=output,
    )  # fmt: skip
    with progress_bar("measuring") as progress:
        document = run(
            directory,
            wanted,
            against=against,
            endpoint=Endpoint(url, model, api_key),
            against_endpoint=Endpoint(against_url, against_model, api_key),
            engine=engine,
            extra=context.args,
            rounds=rounds,
            seed=seed,
            goodput=limits(goodput or []),
            timeout=timeout,
            device=device,
            out=out,
            progress=progress,
        )

    def human() -> None:
        from serve.measure.tables import print_bench

        print_bench(document)

    emit(document, as_json, human)
    if not document["complete"]:
        raise KeyboardInterrupt


def _refuse_extra(context: typer.Context) -> None:
    if context.args:
        raise UsageError(f"{context.args[0]!r} is not known; arguments after the directory are for --engine vllm")


def _bench_in_process(
    directory: Path, against: Path | None, prompt: int, output: int, batch: int, rounds: int, device: str, as_json: bool
) -> None:
    from serve.measure.commands import bench

    with progress_bar("measuring") as progress:
        document = bench(
            directory,
            against=against,
            prompt=prompt,
            output=output,
            batch=batch,
            rounds=rounds,
            device=device,
            progress=progress,
        )

    def human() -> None:
        from serve.measure.tables import print_bench_in_process

        print_bench_in_process(document)

    emit(document, as_json, human)


def _bench_kernels(directory: Path, device: str, budget: float, as_json: bool) -> None:
    from serve.measure.advice_text import print_kernels
    from serve.measure.advise import kernels_document

    with progress_bar("measuring") as progress:
        document = kernels_document(directory, device=device, budget=budget, progress=progress)
    emit(document, as_json, lambda: print_kernels(document))


@app.command()
def advise(
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

    if check is not None:
        checked = run_check(Path(model), check)
        emit(checked, as_json, lambda: advice_text.print_check(checked))
        return
    if is_advice(Path(model)):
        kept = read_advice(Path(model))
        emit(kept, as_json, lambda: advice_text.print_advice(kept))
        return
    from serve.measure.advise import advise as run
    from serve.measure.advise import write

    with progress_bar("measuring") as progress:
        document = run(
            model,
            device=device,
            batch=batch,
            prompt=prompt,
            output=output,
            measure=measure,
            budget=budget,
            recipes=None if recipe is None else {recipe.name: Recipe.load(recipe)},
            progress=progress,
        )
    if file is not None:
        write(document, file)
    emit(document, as_json, lambda: advice_text.print_advice(document))


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    directory: Directory,
    engine: Annotated[
        Literal["auto", "transformers", "vllm"], typer.Option(help="what runs the model; auto: transformers")
    ] = "auto",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="the model's name in requests; left out: the directory's", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HALVE_API_KEY", help="clients must send it as a bearer token", show_default=False),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="longest prompt and answer together, in tokens", show_default=False)
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="requests that are decoded at once; others wait; left out: 16, or vLLM's own",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    tune: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="seconds to measure layer shapes that `halve tune` does not know on this device, before the model is loaded; "
            "left out: 30 on a GPU, none on a processor",
            show_default=False,
        ),
    ] = None,
) -> None:
    """An OpenAI-compatible endpoint. With --engine vllm, what follows -- goes to vLLM as it is."""
    shared: dict[str, Any] = {
        "host": host,
        "port": port,
        "served_model_name": served_model_name,
        "api_key": api_key,
        "max_model_len": max_model_len,
    }
    if engine == "vllm":
        from serve.engines import vllm

        if device != "auto":
            raise UsageError(
                "vLLM runs on the device that it was built for; leave --device out (CUDA_VISIBLE_DEVICES chooses a GPU)"
            )
        vllm.run(str(directory), tune=tune, max_num_seqs=max_num_seqs, extra=context.args, **shared)
    _refuse_extra(context)
    from serve.server import run_to_the_end

    shared |= {"max_num_seqs": 16 if max_num_seqs is None else max_num_seqs, "device": device}
    run_to_the_end(str(directory), tune=tune, **shared)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What works on this machine, what does not, why, and what to do about it."""
    from serve.doctor import SECTIONS, examine

    document = examine()

    def human() -> None:
        out.print(f"halve {document['halve']}, Python {document['python']}", highlight=False)
        for section in SECTIONS:
            lines = Table.grid(padding=(0, 2))
            for check in document[section]:
                failed = "red" if check["required"] else "yellow"
                mark = Text("works", "green") if check["works"] else Text("no", failed)
                lines.add_row("", mark, check["name"], Text(check["detail"]))
                if check["remedy"]:
                    lines.add_row("", "", "", Text(f"to do: {check['remedy']}", "bold"))
            out.print(f"\n[bold]{section}[/]")
            out.print(lines)
        out.print("\n[bold]what runs where[/]")
        lines = Table.grid(padding=(0, 2))
        for wraps in (False, False, False, False, True, False, False, True):
            lines.add_column(no_wrap=not wraps)
        for row in document["matrix"]:
            mark = Text("here", "green") if row["here"] else Text("no", "yellow")
            dtypes = " ".join(row["dtypes"]).replace("float", "f")
            by = f"by {row['kernel']}" if row["kernel"] else ""
            reason = row["why_not"] or row["status"].replace("works", "")
            lines.add_row("", mark, row["engine"], row["device"], ", ".join(row["formats"]), dtypes, by, reason)
        out.print(lines)

    emit(document, as_json, human)
    if not document["ok"]:
        raise typer.Exit(1)


@app.command()
def report(
    directory: Directory,
    out_file: Annotated[Path, typer.Option("--out", help="the HTML file to make", show_default=False)],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="a file of `halve eval|bench --json`; may be repeated", show_default=False),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="another checkpoint to show beside this one; may be repeated", show_default=False),
    ] = None,
    card: Annotated[bool, typer.Option(help="put the measured figures into the checkpoint's README.md, too")] = True,
    as_json: Json = False,
) -> None:
    """What was pruned and what was measured, as one HTML file that needs no network, and in the model card."""
    from serve.measure.report import report as run

    document = run(directory, out_file, results=results or [], beside=beside or [], card=card)

    def human() -> None:
        out.print(f"{document['out']}: {human_bytes(document['bytes'])}", highlight=False, markup=False)
        if document["card"]:
            out.print(f"{document['card']}: {len(document['figures'])} figures", highlight=False, markup=False)
        for note in document["notes"]:
            out.print(f"note: {note}", highlight=False, markup=False)
        for what, command in document["not_measured"].items():
            out.print(f"not measured: {what}; run {command}", highlight=False, markup=False, soft_wrap=True)

    emit(document, as_json, human)


app.command()(tune)


def main() -> None:
    """Entry point of the command."""
    run_app(app)
