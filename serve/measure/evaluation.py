"""`halve eval`: what a checkpoint lost, measured on the same windows and tasks as the dense one beside it.

Perplexity and agreement come from one pass over the text: each window goes through both models, and only the
logits of that window are held. Tasks, and everything where an endpoint is to be measured, go through a
`scoring.Runner`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from compress import artefact, calibration
from compress.architecture import load_config
from compress.device import choose_device
from compress.errors import SourceError, UsageError
from compress.files import seal
from compress.quiet import quiet_transformers
from compress.sources import read_config
from serve.loading import load_model, load_tokenizer, require_language_model
from serve.measure import tasks as harness_tasks
from serve.measure.agreement import Agreement
from serve.measure.environment import elsewhere, environment
from serve.measure.perplexity import Perplexity, require_finite, require_room, window_logits, window_loss
from serve.measure.scoring import EngineRunner, Runner
from serve.measure.statistics import interval, ratio_interval, value_of

Progress = Callable[[int, int, str], None]
Through = Literal["process", "endpoint"]


@dataclass(frozen=True)
class Endpoint:
    """How to reach what is served: a running endpoint, or (``url`` None) one that is started for the measurement."""

    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    timeout: float = 120.0


def evaluate(
    directory: Path,
    *,
    against: Path | None = None,
    text: str = "wikitext2",
    length: int = 2048,
    windows: int | None = None,
    perplexity: bool = True,
    agreement: bool = True,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    task_data: Path | None = None,
    endpoint: Endpoint | None = None,
    concurrency: int = 1,
    device: str = "auto",
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Perplexity, agreement and task scores of a checkpoint, and of another beside it on the same text and examples.

    Args:
        agreement: with ``against``, in process: how far the two say the same; holds both models at once.
        tasks: names of lm-eval's tasks.
        limit: examples of each task, from the start.
        task_data: directory of local examples; None takes the hub's.
        endpoint: measure through an endpoint; None in this process.
        concurrency: prompts of tasks that are scored at once.

    Returns:
        A document with the protocol, and for each model (the dense one first) the figures with their intervals and
        the samples they are made of.

    Raises:
        SourceError: the two have tokenizers that cut the text differently, so that their figures cannot be compared;
            or they are no language models.
        TaskError: a task or its data.
        EndpointError: an endpoint did not answer as it has to.
    """
    place, _ = choose_device(device)
    if not perplexity and not tasks:
        raise UsageError("--no-perplexity without --tasks leaves nothing to measure")
    paths = [path for path in (against, directory) if path is not None]
    for path in paths:
        require_language_model(path, "eval")
    ready = harness_tasks.prepare(tasks, task_data, limit) if tasks else None
    document: dict[str, Any] = {"kind": "eval", "through": "endpoint" if endpoint else "process"}
    models = [_about(path) for path in paths]
    tokens: Tensor | None = None
    if perplexity:
        tokens = _same_windows(paths, text, length, windows)
        if seen := [str(path) for path in paths if _was_calibrated_on(path, text)]:
            document["notes"] = [
                f"{' and '.join(seen)} was calibrated on {text!r}, so its perplexity there says less than that on another --text"
            ]
        document["protocol"] = {
            "text": text,
            "length": length,
            "windows": len(tokens),
            "tokens_sha256": calibration.digest(tokens),
            "loss": "float32",
        }
    found: Agreement | None = None
    if tokens is not None and endpoint is None:
        found = _in_process(paths, models, tokens, agreement and len(paths) == 2, place, progress)
    if endpoint is not None or ready is not None:
        for path, model in zip(paths, models, strict=True):
            with ExitStack() as stack:
                runner = _runner(path, endpoint, concurrency, device, stack)
                if tokens is not None and endpoint is not None:
                    _through(runner, path, model, tokens, progress)
                if ready is not None:
                    model["tasks"] = _tasks(runner, ready, path, progress)
    if perplexity:
        document |= {name: models[-1][name] for name in ("perplexity", "interval")}
    document["models"] = models
    if perplexity and against is not None:
        dense, sparse = (model["losses"] for model in models)
        document["ratio"] = models[-1]["perplexity"] / models[0]["perplexity"]
        document["ratio_interval"] = ratio_interval(sparse, dense, "exp_mean", paired=True)
    if found is not None:
        document["agreement"] = {
            name: {"value": value_of(samples, "mean"), "interval": interval(samples, "mean"), "samples": samples}
            for name, samples in (("top1", found.top1), ("kl", found.kl))
        }
    elif agreement and perplexity and len(paths) == 2:
        document["not_measured"] = {"agreement": "it takes both models in one process, which an endpoint is not"}
    if ready is not None:
        document["task_protocol"] = {"limit": limit, "data": ready.data or "hub"}
    document["environment"] = environment(place) if endpoint is None or endpoint.url is None else elsewhere()
    return document


def _about(path: Path) -> dict[str, Any]:
    dtype = getattr(load_config(path), "dtype", None)
    name = str(dtype or "float32").removeprefix("torch.")
    return {"directory": str(path), "dtype": name, "weights_sha256": seal(path)}


def _was_calibrated_on(path: Path, text: str) -> bool:
    recipe = artefact.read_recipe(path)
    return recipe is not None and recipe["recipe"].get("calibration") == text


def _same_windows(paths: list[Path], text: str, length: int, windows: int | None) -> Tensor:
    """The windows [n, length] that all the tokenizers agree on."""
    cut = [calibration.evaluation_windows(text, load_tokenizer(path), length=length, windows=windows) for path in paths]
    if any(not cut[0].equal(other) for other in cut[1:]):
        raise SourceError(
            f"{paths[-1]} and {paths[0]} tokenize {text!r} differently; their perplexities cannot be compared"
        )
    return cut[0]


def _in_process(
    paths: list[Path], models: list[dict[str, Any]], tokens: Tensor, agreement: bool, place: Any, progress: Progress
) -> Agreement | None:
    """Fills in the perplexities; with ``agreement``, both models read each window in turn."""
    if agreement:
        found = Agreement()
        _read(paths, models, tokens, found, place, progress)
        return found
    for path, model in zip(paths, models, strict=True):  # one is gone before the next is loaded
        _read([path], [model], tokens, None, place, progress)
    return None


def _read(
    paths: list[Path],
    models: list[dict[str, Any]],
    tokens: Tensor,
    found: Agreement | None,
    place: Any,
    progress: Progress,
) -> None:
    """One pass of the models over the text, window by window; with ``found``, of the dense one and the sparse one."""
    loaded = [load_model(path, device=place) for path in paths]
    losses: list[list[float]] = [[] for _ in loaded]
    seconds = [0.0 for _ in loaded]
    for model in loaded:
        require_room(model, tokens)
    with quiet_transformers():
        for done, window in enumerate(tokens, 1):
            logits = []
            for index, model in enumerate(loaded):
                started = time.perf_counter()
                logits.append(window_logits(model, window))
                losses[index].append(window_loss(logits[index], window))
                require_finite(losses[index], str(model.dtype))
                seconds[index] += time.perf_counter() - started
            if found is not None:
                found.add(*logits)
            del logits  # before the next window's are made
            shown = [
                f"{path}: perplexity {value_of(own, 'exp_mean'):.2f}" for path, own in zip(paths, losses, strict=True)
            ]
            progress(done, len(tokens), ", ".join(shown))
    for index, model in enumerate(loaded):
        models[index] |= _perplexity(losses[index], tokens.shape[1], seconds[index])
        models[index]["dtype"] = str(model.dtype).removeprefix("torch.")


def _perplexity(losses: list[float], length: int, seconds: float) -> dict[str, Any]:
    return {
        "perplexity": Perplexity(losses, length).value,
        "interval": interval(losses, "exp_mean"),
        "seconds": round(seconds, 3),
        "losses": losses,
    }


def _runner(path: Path, endpoint: Endpoint | None, concurrency: int, device: str, stack: ExitStack) -> Runner:
    """What scores the prompts of one checkpoint; ``stack`` ends it."""
    if endpoint is None:
        return stack.enter_context(EngineRunner(path, device=device, concurrency=concurrency))
    from serve.measure.endpoint import EndpointRunner
    from serve.server import BackgroundServer

    server = (
        nullcontext()
        if endpoint.url
        else BackgroundServer(str(path), device=device, max_num_seqs=concurrency, timeout=600.0)
    )
    started = stack.enter_context(server)
    return stack.enter_context(
        EndpointRunner(
            endpoint.url or started.base_url,  # type: ignore[union-attr]
            model=endpoint.model,
            api_key=endpoint.api_key,
            max_length=_positions(path),
            timeout=endpoint.timeout,
            concurrency=concurrency,
        )
    )


def _tasks(runner: Runner, ready: harness_tasks.Prepared, path: Path, progress: Progress) -> dict[str, Any]:
    from serve.measure.harness import HalveLM  # lm-eval is optional

    def named(done: int, total: int, what: str) -> None:
        progress(done, total, f"{path}: {what}")

    return ready.run(HalveLM(runner, load_tokenizer(path), named))


def _positions(path: Path) -> int:
    """The tokens that a model can read by its configuration; a million where it does not say."""
    config = read_config(path)
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(inner, dict)
    found = inner.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 1 else 2**20


def _through(runner: Runner, path: Path, model: dict[str, Any], tokens: Tensor, progress: Progress) -> None:
    """Fills in the perplexity of what a runner serves."""
    if tokens.shape[1] > runner.max_length + 1:
        raise UsageError(
            f"the endpoint reads at most {runner.max_length + 1} tokens, and the windows have {tokens.shape[1]}; choose a "
            "smaller --length"
        )
    started = time.perf_counter()
    scores = runner.score(
        [window.tolist() for window in tokens], lambda done: progress(done, len(tokens), f"{path}: perplexity")
    )
    losses = [-sum(scored.logprobs) / len(scored.logprobs) for scored in scores]
    for at in range(len(losses)):
        require_finite(losses[: at + 1], "what the endpoint computes in")
    model |= _perplexity(losses, tokens.shape[1], time.perf_counter() - started)
