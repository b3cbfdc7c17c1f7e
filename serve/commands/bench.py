"""The command ``halve bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from compress.cli import Directory
from compress.console import Json, emit, progress_bar
from compress.errors import HalveError
from serve.commands.shared import ALWAYS, Against, Device, dense_model, refuse_extra, refuse_misplaced

_ENDPOINT, _IN_PROCESS, _KERNELS = "measuring through an endpoint", "--in-process", "--kernels"
_URL, _AGAINST_URL, _TRACE, _CHOSEN = "--url", "--against-url", "--trace", "--concurrency and --rate"
_STARTED, _OWN_ENGINE = "servers that halve starts", "servers that halve starts with its own engine"
_WHOLE = "measuring whole models"
_BELONGS = {
    "directory": ALWAYS, "as_json": ALWAYS, "kernels": ALWAYS,
    "against": (_ENDPOINT, _IN_PROCESS), "rounds": (_ENDPOINT, _IN_PROCESS),
    "prompt": (_ENDPOINT, _IN_PROCESS), "output": (_ENDPOINT, _IN_PROCESS),
    "device": (_OWN_ENGINE, _IN_PROCESS, _KERNELS),
    "budget": (_KERNELS,), "batch": (_IN_PROCESS,), "in_process": (_WHOLE,),
    "url": (_ENDPOINT,), "against_url": (_ENDPOINT,), "goodput": (_ENDPOINT,), "seed": (_ENDPOINT,), "timeout": (_ENDPOINT,),
    "out": (_ENDPOINT,), "concurrency": (_ENDPOINT,), "rate": (_ENDPOINT,), "trace": (_ENDPOINT,), "requests": (_CHOSEN,),
    "engine": (_STARTED,), "model": (_URL,), "api_key": (_URL,),
    "against_model": (_AGAINST_URL,), "against_api_key": (_AGAINST_URL,),
    "trace_scale": (_TRACE,), "trace_requests": (_TRACE,),
}  # fmt: skip
"""What each option is for; an option that a call would ignore is refused."""


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
    against_api_key: Annotated[
        str | None,
        typer.Option(envvar="HALVE_AGAINST_API_KEY", help="the key that --against-url asks for", show_default=False),
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
    trace_requests: Annotated[int, typer.Option(min=1, help="only the first ones of the trace's file")] = 100,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="in a round of a load, after those that bring it up to its concurrency; left out: twice the concurrency, or "
            "10 s of --rate",
            show_default=False,
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

    Times to first token, per output token, between tokens and end to end. The exit code is 1 where more than 5 % of the
    requests of a load failed. With --engine vllm, what follows -- goes to vLLM.
    """
    given = {_KERNELS} if kernels else {_WHOLE, _IN_PROCESS if in_process else _ENDPOINT}
    if _ENDPOINT in given:
        is_started = url is None or (against is not None and against_url is None)
        told = {
            _URL: url, _AGAINST_URL: against_url, _TRACE: trace, _CHOSEN: concurrency or rate or trace is None,
            _STARTED: is_started, _OWN_ENGINE: is_started and engine == "transformers",
        }  # fmt: skip
        given |= {what for what, there in told.items() if there}
    refuse_misplaced(context, _BELONGS, given)
    if _STARTED not in given or engine != "vllm":
        refuse_extra(context)
    # Each kind of measurement has its own function and document.
    if kernels:
        _bench_kernels(directory, device, budget, as_json)
        return
    if in_process:
        with dense_model(against) as dense:
            _bench_in_process(directory, dense, prompt or 128, output or 32, batch or 1, rounds, device, as_json)
        return
    from serve.measure.endpoint import EndpointError
    from serve.measure.latency import failures, limits
    from serve.measure.loads import levels
    from serve.measure.served import Endpoint
    from serve.measure.served import bench as run

    wanted = levels(
        concurrency=concurrency, rates=rate or [], trace=trace, trace_scale=trace_scale, trace_requests=trace_requests,
        requests=requests, prompt=prompt, output=output,
    )  # fmt: skip
    with dense_model(against) as dense, progress_bar("measuring") as progress:
        document = run(
            directory,
            wanted,
            against=dense,
            endpoint=Endpoint(url, model, api_key),
            against_endpoint=Endpoint(against_url, against_model, against_api_key),
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
    if "error" in document:
        raise HalveError(f"{document['error']}; what {document['rounds_done']} of {rounds} rounds brought is kept")
    if not document["complete"]:
        raise KeyboardInterrupt
    if failed := failures(document):
        raise EndpointError(f"too many requests failed for the figures to be compared: {'; '.join(failed)}")


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
    from serve.measure import model_kernels
    from serve.measure.advice_text import print_kernels

    with progress_bar("measuring") as progress:
        document = model_kernels.document(directory, device=device, budget=budget, progress=progress)
    emit(document, as_json, lambda: print_kernels(document))
