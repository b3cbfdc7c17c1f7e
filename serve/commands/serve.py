"""The command ``halve serve``."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from compress.cli import Directory
from compress.errors import UsageError, did_you_mean
from serve.commands.shared import Device, refuse_extra
from serve.engines.access import KEY_VARIABLE

ENGINES = ("auto", "transformers", "vllm", "onnx")
NOT_BUILT = ("tensorrt",)


def serve(
    context: typer.Context,
    directory: Directory,
    engine: Annotated[
        str,
        typer.Option(
            help=f"what runs the model: {', '.join(ENGINES)}; auto is onnx for what `halve export` made, else transformers"
        ),
    ] = "auto",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 takes a free one")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="the model's name in requests; left out: the directory's", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=KEY_VARIABLE, help="clients must send it as a bearer token", show_default=False),
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
    if api_key is None:  # an empty variable is for the parser as good as none, and for us a mistake
        api_key = os.environ.get(KEY_VARIABLE)
    if engine in NOT_BUILT:
        raise UsageError(
            f"--engine {engine} is not built yet; --engine transformers or vllm serves this checkpoint, and TensorRT reads what `halve export` makes"
        )
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine!r} is not known{did_you_mean(engine, ENGINES)}")
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
    refuse_extra(context)
    from serve.server import run_to_the_end

    shared |= {"max_num_seqs": 16 if max_num_seqs is None else max_num_seqs, "device": device, "engine": engine}
    run_to_the_end(str(directory), tune=tune, **shared)
