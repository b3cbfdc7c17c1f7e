"""`halve bench` through endpoints: dense and sparse, each behind the server that it is served by, under the same loads.

Both servers run for the whole time, and one is idle while the other is measured. In each round, each load goes to both of
them, one right after the other, in an order that alternates: what slows the machine for a while slows both sides of a
round. So rounds are what is compared (`documents`): requests within a round share what disturbed it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.errors import SourceError, UsageError
from compress.files import replacing, seal
from compress.sources import read_config
from serve.engines.process import ServerProcess
from serve.loading import load_tokenizer, require_language_model
from serve.measure.endpoint import EndpointError, EndpointRunner
from serve.measure.environment import environment
from serve.measure.generator import Generator
from serve.measure.latency import failing, round_of, summary
from serve.measure.loads import Level, asks
from serve.measure.memory import PeakMemory, told_by
from serve.measure.outcomes import Load
from serve.measure.speed import ratio

Progress = Callable[[int, int, str], None]
Engine = Literal["transformers", "vllm"]
_ANY_LENGTH = 1_000_000_000


@dataclass(frozen=True)
class Endpoint:
    """Where one side is served: at ``url``, or, without one, by a server that is started for it."""

    url: str | None = None
    model: str | None = None
    api_key: str | None = None


@dataclass
class _Side:
    directory: Path | None
    base_url: str
    model: str
    api_key: str | None
    longest: int
    server: ServerProcess | None = None
    memory: PeakMemory | None = None
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def bench(
    directory: Path,
    levels: Sequence[Level],
    *,
    against: Path | None = None,
    endpoint: Endpoint = Endpoint(),
    against_endpoint: Endpoint = Endpoint(),
    engine: Engine = "transformers",
    extra: Sequence[str] = (),
    rounds: int = 8,
    seed: int = 0,
    goodput: Mapping[str, float] | None = None,
    timeout: float = 300.0,
    device: str = "auto",
    out: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Latency, throughput and memory of a checkpoint behind an endpoint, beside those of the dense model's.

    Args:
        levels: the loads; each is sent in each round. Before the first round, each is sent once, shorter, and discarded.
        against: the dense checkpoint; with ``against_endpoint.url`` it need not be here.
        extra: arguments for vLLM.
        goodput: limits in seconds by name ("ttft", "tpot", "e2e"): requests that keep them are counted apart.
        timeout: seconds for one answer.
        out: a file that holds the document as far as it is, whole rounds only, at any time.

    Returns:
        The document. ``complete`` is False if it was interrupted: then it has the rounds that were whole by then.

    Raises:
        UsageError: an endpoint is not there, refuses, or has no such model; the loads do not fit the model.
        EndpointError: an endpoint fails all requests of a load.
    """
    paths = {"dense": against, "sparse": directory} if against or against_endpoint.url else {"model": directory}
    for path in filter(None, paths.values()):
        require_language_model(path, "bench")
    if out is not None and not out.resolve().parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {out.resolve().parent}")
    longest = max(level.longest.prompt + level.longest.output for level in levels)
    tokens = ordinary_tokens([path for path in paths.values() if path is not None])
    at_once = max([level.concurrency or 0 for level in levels])
    places = {"dense": against_endpoint}
    run = _Bench(levels, rounds, seed, goodput or {}, timeout, tokens, out, progress)
    run.head = {
        "kind": "bench",
        "through": "endpoint",
        "load": _load(levels, engine if endpoint.url is None else None, rounds, seed, goodput or {}),
        "environment": environment(),
    }
    with ExitStack() as stack:
        try:
            for number, (name, path) in enumerate(paths.items()):
                progress(number, len(paths), f"waiting for the endpoint of {path or against_endpoint.url}")
                place = places.get(name, endpoint)
                server = None
                if place.url is None:
                    assert path is not None
                    start = _start_vllm if engine == "vllm" else _start_transformers
                    server = stack.enter_context(start(path, longest, at_once, len(paths), device, extra))
                run.sides[name] = _reach(path, place, server, timeout)
                if server is not None:
                    run.sides[name].memory = stack.enter_context(PeakMemory(server.processes))
            run.require_room(longest)
            run.measure(stack.enter_context(Generator()))
        except KeyboardInterrupt:
            if not run.rounds_done:
                raise
            return run.document(complete=False)
        return run.document(complete=True)


class _Bench:
    """What is the same for all rounds, and what they have brought so far."""

    def __init__(
        self,
        levels: Sequence[Level],
        rounds: int,
        seed: int,
        goodput: Mapping[str, float],
        timeout: float,
        tokens: np.ndarray,
        out: Path | None,
        progress: Progress,
    ) -> None:
        self._levels, self._rounds, self._seed, self._goodput = levels, rounds, seed, goodput
        self._timeout, self._tokens, self._out, self._progress = timeout, tokens, out, progress
        self.head: dict[str, Any] = {}
        self.sides: dict[str, _Side] = {}
        self.rounds_done = 0

    def require_room(self, longest: int) -> None:
        """Raises UsageError where a model cannot read the longest request."""
        for side in self.sides.values():
            if longest > side.longest:
                raise UsageError(
                    f"{side.base_url} reads at most {side.longest} tokens, and the longest request has {longest}; lower "
                    "--prompt or --output (with --trace they cut what is longer)"
                )

    def measure(self, generator: Generator) -> None:
        steps = (self._rounds + 1) * len(self._levels) * len(self.sides)
        step = 0
        for number in range(self._rounds + 1):
            names = list(self.sides) if number % 2 else list(reversed(self.sides))
            found: dict[tuple[str, str], dict[str, Any]] = {}
            for place, level in enumerate(self._levels):
                for name in names:
                    what = f"round {number}" if number else "warm-up"
                    self._progress(step, steps, f"{what}: {level.label}, {name}")
                    found[name, level.label] = self._once(generator, self.sides[name], level, number, place)
                    step += 1
            if number:  # the first one warms up
                for (name, label), one in found.items():
                    self.sides[name].rounds.setdefault(label, []).append(one)
                self.rounds_done = number
                if self._out is not None:
                    write(self._out, self.document(complete=number == self._rounds))
        self._progress(steps, steps, "")

    def _once(self, generator: Generator, side: _Side, level: Level, number: int, place: int) -> dict[str, Any]:
        """One load on one side. The random numbers depend on the round and the load, not on the side."""
        rng = np.random.default_rng([self._seed, number, place])
        shapes = list(level.shapes(rng))
        if not number:
            shapes = shapes[: max(2, level.concurrency or 2)]
        load = Load(
            f"{side.base_url}/completions",
            asks(shapes, self._tokens, side.model, rng),
            level.concurrency,
            side.api_key,
            self._timeout,
        )
        outcomes = generator(load)
        errors = [outcome.error for outcome in outcomes.requests if outcome.error is not None]
        if len(errors) == len(outcomes.requests):
            raise EndpointError(
                f"{side.base_url} failed all {len(errors)} requests of {level.label}"
                f"{f' in round {number}' if number else ''}; the first: {errors[0]}"
            )
        return round_of(outcomes, self._goodput)

    def document(self, *, complete: bool) -> dict[str, Any]:
        document: dict[str, Any] = {**self.head, "complete": complete, "rounds_done": self.rounds_done}
        document["models"] = {name: _model(side) for name, side in self.sides.items()}
        if len(self.sides) == 2 and self.rounds_done:
            dense, sparse = (self.sides[name] for name in ("dense", "sparse"))
            document["speedup"] = {
                level.label: _speedup(dense.rounds[level.label], sparse.rounds[level.label]) for level in self._levels
            }
            sizes = [document["models"][name]["bytes"] for name in ("dense", "sparse")]
            document["bytes_ratio"] = {key: sizes[1][key] / sizes[0][key] for key in sizes[1] if sizes[0].get(key)}
        return document


def _start_transformers(
    path: Path, longest: int, at_once: int, sides: int, device: str, extra: Sequence[str]
) -> ServerProcess:
    from serve.server import BackgroundServer

    return BackgroundServer(str(path), max_num_seqs=max(16, at_once), device=device, timeout=600.0)


def _start_vllm(path: Path, longest: int, at_once: int, sides: int, device: str, extra: Sequence[str]) -> ServerProcess:
    from serve.engines.vllm import VllmServer, installed

    arguments = list(extra)
    shares = any(argument.startswith("--gpu-memory-utilization") for argument in arguments)
    if sides == 2 and not shares and (installed() or ("",))[0] == "vllm":
        arguments += ["--gpu-memory-utilization", "0.45"]  # each takes nine tenths by itself
    return VllmServer(str(path), max_model_len=longest, max_num_seqs=max(16, at_once), extra=arguments, timeout=1200.0)


def _reach(path: Path | None, place: Endpoint, server: ServerProcess | None, timeout: float) -> _Side:
    """Asks an endpoint for its model. Raises UsageError where nobody answers, or the model is not there."""
    url = place.url if server is None else server.base_url
    assert url is not None
    with EndpointRunner(
        url,
        model=place.model if server is None else server.model,
        api_key=place.api_key,
        max_length=_ANY_LENGTH,
        timeout=min(timeout, 60.0),
    ) as reached:
        return _Side(path, reached.url, reached.model, place.api_key, reached.max_length + 1, server)


def ordinary_tokens(paths: Sequence[Path]) -> np.ndarray:
    """The ids [n] that stand for text in all of the models: prompts are made of them.

    Raises SourceError where a checkpoint has no tokenizer.
    """
    vocabularies = []
    for path in paths:
        tokenizer = load_tokenizer(path)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        config = read_config(path)
        rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or len(tokenizer)
        vocabularies.append({id for id in tokenizer.get_vocab().values() if id < rows} - special)
    shared = sorted(set.intersection(*vocabularies))
    if not shared:
        raise SourceError(f"{' and '.join(map(str, paths))} have no tokens in common")
    return np.asarray(shared)


def _load(
    levels: Sequence[Level], engine: str | None, rounds: int, seed: int, goodput: Mapping[str, float]
) -> dict[str, Any]:
    """What has to be equal in two documents that are compared."""
    lengths = {name: max(getattr(level.longest, name) for level in levels) for name in ("prompt", "output")}
    return {
        "engine": engine,
        **lengths,
        "rounds": rounds,
        "seed": seed,
        "levels": [level.label for level in levels],
        "shapes": {level.label: level.about for level in levels},
        **({"goodput_seconds": dict(goodput)} if goodput else {}),
    }


def _model(side: _Side) -> dict[str, Any]:
    told: dict[str, Any] = {"url": side.base_url} if side.server is None else {}
    if side.directory is not None:
        told["directory"] = str(side.directory)
        config = read_config(side.directory)
        told["dtype"] = config.get("dtype") or config.get("torch_dtype")
        told["weights_sha256"] = seal(side.directory)
    sizes = told_by(side.base_url, side.server.log if side.server is not None else "")
    if side.directory is not None:
        sizes = {"disk": sum(f.stat().st_size for f in side.directory.rglob("*") if f.is_file()), **sizes}
    told["bytes"] = sizes
    if side.memory is not None:
        told["peak_process_bytes"] = side.memory.resident
        if side.memory.gpu is not None:
            told["peak_gpu_bytes"] = side.memory.gpu
    told["loads"] = {label: summary(rounds) for label, rounds in side.rounds.items()}
    return told


def _speedup(dense: Sequence[Mapping[str, Any]], sparse: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many times better the sparse side was within each round: the median, and the quartiles as its spread.

    Nothing of a load of which too many requests failed on a side: what was answered is not what was asked for.
    """
    found: dict[str, Any] = {}
    if failing(dense) or failing(sparse):
        return found
    for name in ("ttft", "tpot", "e2e"):
        # Tokens that arrive together are 0 s apart, and 0 has no ratio.
        if all(one["figures"].get(name, {}).get("p50") for one in (*dense, *sparse)):
            found[name] = ratio(*([one["figures"][name]["p50"] for one in side] for side in (sparse, dense)))
    for name in ("requests_per_second", "output_tokens_per_second"):
        found[name] = ratio(*([one["figures"][name] for one in side] for side in (dense, sparse)))
    return found


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a document so that the file is whole at any time."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document) + "\n")
