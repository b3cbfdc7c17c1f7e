"""Starts the endpoint: in this process (`run`), or as a process of its own (`BackgroundServer`)."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from compress.errors import HalveError, UsageError
from serve.api import create_app
from serve.engines.access import KEY_VARIABLE, check_access
from serve.engines.directory import require_checkpoint
from serve.engines.process import Address, ServerProcess

if TYPE_CHECKING:
    from serve.engines.transformers import TransformersEngine

READY = "halve is ready: "
BACKLOG = 2048  # connections that wait to be accepted; uvicorn's own number
GRACE_SECONDS = 10  # how long running requests may go on once the server is told to stop


def run(
    model_dir: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    api_key: str | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    tune: float | None = 0,
    engine: str = "auto",
) -> None:
    """Serves a checkpoint until SIGINT or SIGTERM, and prints one line when it is ready.

    ``port`` 0 takes a free one. The model goes by ``served_model_name``, or else by the directory's name. ``tune``: seconds to
    measure what `halve tune` does not know, see `serve.measure.first_load`. ``engine``: transformers or onnx; auto: what the directory is for.
    Raises a `HalveError` where the model cannot be loaded or the address not be used.
    """
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
    # What is quickly checked comes first: to load a model only to learn that the port is taken wastes
    # minutes, to import the engine, seconds.
    require_checkpoint(model_dir)
    check_access(host, api_key)
    listener = _bind(host, port)
    try:
        serving = _load(
            engine,
            model_dir,
            tune=tune,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            device=device,
            dtype=dtype,
        )
    except BaseException:
        listener.close()
        raise
    name = served_model_name or Path(model_dir).resolve().name
    app = create_app(serving, name, root=model_dir, api_key=api_key)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)
    # uvicorn raises the signal that stopped it once more when it is done; a stop that was asked for is no
    # failure of this process, so by then nobody listens.
    before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(_serve(uvicorn.Server(config), listener, name))
    finally:
        serving.close()
        listener.close()
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _load(kind: str, model_dir: str, *, tune: float | None, device: str, **options: Any) -> TransformersEngine:
    """The engine of that kind, which runs."""
    from serve.engines.onnx import OnnxEngine, is_exported
    from serve.engines.transformers import TransformersEngine
    from serve.measure.first_load import measure_unknown

    if kind == "onnx" or (kind == "auto" and is_exported(Path(model_dir))):
        made: TransformersEngine = OnnxEngine(model_dir, device=device, **options)
    else:
        made = TransformersEngine(model_dir, device=device, **options)
        measure_unknown(Path(model_dir), device=device, seconds=tune, fused=False)
    made.load()
    return made


def run_to_the_end(model_dir: str, **options: Any) -> None:
    """`run` for a process that ends afterwards: a second SIGTERM while it does is no failure, either."""
    run(model_dir, **options)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


async def _serve(server: uvicorn.Server, listener: socket.socket, name: str) -> None:
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        print(f"{READY}{_url(listener)}  model {name}", flush=True)
    await serving


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:  # the resolver would wrap it around
        raise UsageError(f"--port {port} is not a port; they go from 0 (a free one) to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # (the latter where a part of a name is empty or too long to be asked for)
        raise UsageError(f"--host {host!r} is not an address: {error}.") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Two sockets may be bound to one port until one listens. Who connects while the model is loaded has to wait.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"Port {port} of {host} cannot be used: {error.strerror}. Stop what listens there, or choose "
            "another with --port (0 takes a free one)."
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class BackgroundServer(ServerProcess):
    """Runs this server as a process of its own, for as long as a ``with`` block lasts.

    ``options`` are those of `run`. It is ready when the block begins; `base_url` is what the openai client
    takes. A server that does not start raises `HalveError` with what it said. It also stops when this process
    dies without saying so.
    """

    def __init__(self, model_dir: str, *, timeout: float = 120.0, **options: str | int | None) -> None:
        flags = {"port": 0, **options}
        key = flags.pop("api_key", None)
        # -P: else what lies in the user's directory would be imported in place of halve's modules, if it is called alike.
        command = [sys.executable, "-P", "-m", "serve.server", str(model_dir), "--stop-on-eof"]
        for name, value in flags.items():
            if value is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment.pop(KEY_VARIABLE, None)  # the user's, of another server: who starts this one would be locked out
        if key is not None:
            environment[KEY_VARIABLE] = str(key)
        super().__init__(command, environment, name="The server", timeout=timeout)

    def _find(self) -> Address | None:
        for line in self.log.splitlines(keepends=True):
            if line.startswith(READY) and line.endswith("\n"):
                url, _, model = line.removeprefix(READY).strip().partition("  model ")
                return Address(url, model)
        return None


def _stop_on_eof() -> None:
    """Stops this process when its standard input closes, which it does when the parent dies."""

    def watch() -> None:
        # Not through sys.stdin: a thread that waits in it blocks the end of the interpreter.
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    """`python -m serve.server DIR`: what `BackgroundServer` starts. People use `halve serve`."""
    parser = argparse.ArgumentParser(prog="serve.server")
    parser.add_argument("model_dir")
    parser.add_argument("--stop-on-eof", action="store_true")
    for flag, kind in {
        "host": str, "port": int, "served-model-name": str, "max-model-len": int,
        "max-num-seqs": int, "device": str, "dtype": str, "engine": str,
    }.items():  # fmt: skip
        parser.add_argument(f"--{flag}", type=kind, default=argparse.SUPPRESS)
    options = vars(parser.parse_args(argv))
    if options.pop("stop_on_eof"):
        _stop_on_eof()
    try:
        run_to_the_end(options.pop("model_dir"), api_key=os.environ.get(KEY_VARIABLE), **options)
    except HalveError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
