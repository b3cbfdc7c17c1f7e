"""`halve bench` through endpoints: dense and sparse, each behind the server that it is served by, under the same loads.

Both servers run for the whole time, and one is idle while the other is measured. In each round, each load goes to both of
them, one right after the other, in an order that alternates: what slows the machine for a while slows both sides of a
round. So rounds are what is compared (`documents`): requests within a round share what disturbed it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import HalveError, OutputError, SourceError, UsageError
from compress.files import replacing, try_place
from compress.sources import read_config
from serve.loading import load_tokenizer, require_language_model
from serve.measure.endpoint import EndpointError
from serve.measure.generator import Generator
from serve.measure.latency import failing, round_of
from serve.measure.loads import Level, asks
from serve.measure.outcomes import Load
from serve.measure.sides import Endpoint, Engine, Servers, Side, environment_of, open_side
from serve.measure.speed import ratio

Progress = Callable[[int, int, str], None]


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
        The document. ``complete`` is False if it was interrupted: then it has the rounds that were whole by then. So it is where
        something failed after the first round, and then ``error`` says what.

    Raises:
        UsageError: an endpoint is not there, refuses, or has no such model; the loads do not fit the model.
        OutputError: ``out`` cannot be written.
        EndpointError: an endpoint fails all requests of a load before a round is whole.
    """
    paths = {"dense": against, "sparse": directory} if against or against_endpoint.url else {"model": directory}
    for path in filter(None, paths.values()):
        require_language_model(path, "bench")
    if out is not None:
        try_place(out)
    places = {name: against_endpoint if name == "dense" else endpoint for name in paths}
    started = [name for name, place in places.items() if place.url is None]
    longest = max(level.longest.prompt + level.longest.output for level in levels)
    at_once = max(level.most_at_once for level in levels)
    servers = Servers(engine, device, longest, at_once, len(started), extra)
    tokens = ordinary_tokens([path for path in paths.values() if path is not None])
    run = _Bench(levels, rounds, seed, goodput or {}, timeout, tokens, out, progress)
    run.head = {
        "kind": "bench",
        "through": "endpoint",
        "load": _load(levels, servers if started else None, rounds, seed, goodput or {}),
        "environment": environment_of(list(places.values()), servers),
    }
    if traces := [level.source.name for level in levels if level.source is not None]:
        run.head["trace"] = traces[0]
    with ExitStack() as stack:
        try:
            for number, (name, path) in enumerate(paths.items()):
                progress(number, len(paths), f"waiting for the endpoint of {path or against_endpoint.url}")
                run.sides[name] = open_side(path, places[name], servers, timeout, stack)
            run.require_room(longest)
            run.measure(stack.enter_context(Generator()))
        except KeyboardInterrupt:
            if not run.rounds_done:
                raise
            return run.document(complete=False)
        except (HalveError, OSError) as error:
            if not run.rounds_done:
                raise
            return run.failed(error)
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
        self.sides: dict[str, Side] = {}
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

    def _once(self, generator: Generator, side: Side, level: Level, number: int, place: int) -> dict[str, Any]:
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
        return round_of(outcomes, self._goodput, level.ramp_up if number else 0)

    def failed(self, error: Exception) -> dict[str, Any]:
        """What was measured before something failed; in the file, too, if that can still be written."""
        document = {**self.document(complete=False), "error": str(error)}
        if self._out is not None:
            with suppress(OutputError, OSError):
                write(self._out, document)
        return document

    def document(self, *, complete: bool) -> dict[str, Any]:
        document: dict[str, Any] = {**self.head, "complete": complete, "rounds_done": self.rounds_done}
        document["models"] = {name: side.document() for name, side in self.sides.items()}
        if len(self.sides) == 2 and self.rounds_done:
            dense, sparse = (self.sides[name] for name in ("dense", "sparse"))
            document["speedup"] = {
                level.label: _speedup(dense.rounds[level.label], sparse.rounds[level.label]) for level in self._levels
            }
            sizes = [document["models"][name]["bytes"] for name in ("dense", "sparse")]
            document["bytes_ratio"] = {key: sizes[1][key] / sizes[0][key] for key in sizes[1] if sizes[0].get(key)}
        return document


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
    levels: Sequence[Level], servers: Servers | None, rounds: int, seed: int, goodput: Mapping[str, float]
) -> dict[str, Any]:
    """What has to be equal in two documents that are compared. ``servers``: those that were started for it."""
    return {
        "engine": servers and servers.engine,
        **({"max_num_seqs": servers.max_num_seqs} if servers else {}),
        "rounds": rounds,
        "seed": seed,
        "levels": [level.label for level in levels],
        "shapes": {level.label: level.about for level in levels},
        **({"goodput_seconds": dict(goodput)} if goodput else {}),
    }


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
