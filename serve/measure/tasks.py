"""Tasks of lm-eval: which there are, on which data, and what a model scores.

The tasks, their prompts and their metrics are lm-eval's. Their data comes from the hub, or from files of the same
fields: ``--task-data DIR`` holds ``TASK.jsonl`` or ``TASK_anything.jsonl`` (``.gz`` too), one example a line.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.util
import json
import logging
import math
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from compress.errors import HalveError, UsageError, one_line
from compress.extras import how_to_install
from compress.quiet import quiet_transformers
from serve.measure.statistics import interval, value_of

SEED = 1234  # lm-eval's, for the examples that a prompt begins with


class TaskError(UsageError):
    """A task is not known, or its data cannot be used."""


def require_harness() -> None:
    """Raises TaskError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError(f"--tasks needs the package 'lm-eval': {how_to_install('eval')}")


def split_names(tasks: str) -> list[str]:
    """``"lambada_openai,arc_easy"`` as names. Raises TaskError where there is none."""
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise TaskError(f"--tasks {tasks!r}: names of tasks, with commas between them")
    return list(dict.fromkeys(names))


def prepare(names: Sequence[str], data: Path | None, limit: int | None) -> Prepared:
    """Finds the tasks and reads their data, which takes seconds, before any model does.

    Args:
        data: the directory of local data; None asks the hub.
        limit: examples of each task, from the start; None takes all.

    Raises:
        TaskError: a task is not known, or its data is missing or damaged.
    """
    require_harness()
    known = _manager().task_index
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise TaskError(
                f"--tasks: lm-eval has no task {name!r}{hint} (`lm-eval ls tasks` lists all {len(known):,})"
            )
    with _only_errors():
        tasks = _local(names, data) if data is not None else _from_hub(names)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return Prepared(tasks, limit, None if data is None else str(data))


class Prepared:
    """Tasks with their data, ready to be asked of any number of models."""

    def __init__(self, tasks: dict[str, Any], limit: int | None, data: str | None) -> None:
        self._tasks, self._limit, self.data = tasks, limit, data

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def run(self, lm: Any) -> dict[str, dict[str, Any]]:
        """Scores of ``lm`` (a `harness.HalveLM`) by task: examples, digest of what was asked, and metrics with
        samples.

        Raises:
            HalveError: the model could not answer; TaskError: the data does not fit the task.
        """
        import jinja2
        from lm_eval.evaluator import evaluate

        try:
            with _only_errors():
                results = evaluate(
                    lm,
                    {"tasks": self._tasks},
                    limit=self._limit,
                    bootstrap_iters=0,  # the intervals are ours, and of one kind everywhere
                )
        except HalveError:
            raise
        except (jinja2.UndefinedError, KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
            raise TaskError(f"the data does not fit the tasks {', '.join(self.names)}: {one_line(error)}") from None
        assert results is not None
        return {name: _summary(name, results) for name in self.names}


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks; to read it takes some seconds."""
    with _only_errors():
        from lm_eval.tasks import TaskManager

        return TaskManager()


@contextmanager
def _only_errors() -> Iterator[None]:
    """lm-eval and datasets tell what they do in warnings and bars; what matters of it is in the result."""
    from datasets.utils.logging import disable_progress_bar
    from lm_eval.api import task

    disable_progress_bar()
    logger = logging.getLogger("lm_eval")
    before, bar = logger.level, task.tqdm
    logger.setLevel(logging.ERROR)
    task.tqdm = partial(bar, disable=True)  # it has no switch for the bar of building prompts
    try:
        with quiet_transformers():
            yield
    finally:
        logger.setLevel(before)
        task.tqdm = bar


def _from_hub(names: Sequence[str]) -> dict[str, Any]:
    try:
        return _manager().load(list(names))["tasks"]
    except Exception as error:  # data sets fail in many ways: no network, no such set, a script that is refused
        raise TaskError(
            f"the data of {', '.join(names)} cannot be had from the hub: {one_line(error)}; "
            "--task-data DIR takes it from local files"
        ) from None


def _local(names: Sequence[str], directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise TaskError(f"--task-data: there is no directory {directory}")
    tasks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="halve-tasks-") as scratch:
        for name in names:
            entry = _manager().task_index[name]
            if entry.yaml_path is None or entry.kind.name != "TASK":
                raise TaskError(
                    f"--task-data: {name!r} is not one task with one data set in lm-eval, but a "
                    f"{entry.kind.name.lower()}; name its tasks one by one"
                )
            file = _data_file(name, directory)
            _check_rows(file)
            changed = {
                "include": str(entry.yaml_path),
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {
                    "data_files": {"test": str(file.resolve())},
                    "cache_dir": scratch,
                    "keep_in_memory": True,
                },
                "training_split": None,
                "validation_split": None,
                "test_split": "test",
                "fewshot_split": None,
            }
            config = Path(scratch) / f"{name}.yaml"
            config.write_text(yaml.safe_dump(changed))
            try:
                tasks |= _manager().load([str(config)])["tasks"]
            except Exception as error:  # templates and functions of the task meet the first example here
                raise TaskError(f"{file} does not fit the task {name!r}: {one_line(error)}") from None
    return tasks


def _data_file(name: str, directory: Path) -> Path:
    endings = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
    exact = [directory / (name + ending) for ending in endings]
    found = [file for file in exact if file.is_file()]
    if not found:
        found = sorted(file for ending in endings for file in directory.glob(f"{name}_*{ending}"))
    if not found:
        raise TaskError(f"--task-data: {directory} has no {name}.jsonl or {name}_*.jsonl (.gz) for the task {name!r}")
    if len(found) > 1:
        raise TaskError(
            f"--task-data: {directory} has more than one file for the task {name!r}: "
            f"{', '.join(file.name for file in found)}; name the right one {name}.jsonl"
        )
    return found[0]


def _check_rows(file: Path) -> None:
    """Raises TaskError unless a file holds JSON objects, one a line."""
    opener = gzip.open if file.suffix == ".gz" else open
    rows = 0
    try:
        with opener(file, "rt", encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    rows += 1
                    try:
                        is_object = isinstance(json.loads(line), dict)
                    except ValueError:
                        is_object = False
                    if not is_object:
                        raise TaskError(f"{file}, line {number}: each line must be a JSON object")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise TaskError(f"cannot read {file}: {error}") from None
    if not rows:
        raise TaskError(f"{file} has no examples")


def _summary(name: str, results: Any) -> dict[str, Any]:
    samples = results["samples"][name]
    asked = hashlib.sha256()
    first_filter = samples[0]["filter"]
    for sample in samples:
        if sample["filter"] == first_filter:
            asked.update((sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"]).encode())
    metrics = {}
    for key, value in results["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = metric if chosen == "none" else f"{metric}.{chosen}"
        per_example = [sample[metric] for sample in samples if sample["filter"] == chosen]
        metrics[label] = {
            "value": float(value),
            "better": "higher" if results["higher_is_better"][name].get(metric) else "lower",
            **_kept(per_example, float(value)),
        }
    return {
        "version": results["versions"].get(name),
        "few_shot": results["n-shot"].get(name, 0),
        "examples": results["n-samples"][name]["effective"],
        "sha256": asked.hexdigest(),
        "metrics": metrics,
    }


def _kept(samples: list[Any], value: float) -> dict[str, Any]:
    """The samples, if the value is a mean of them in one of the ways known here, with the way and the interval."""
    if not all(isinstance(sample, int | float) for sample in samples):
        return {}
    numbers = [float(sample) for sample in samples]
    for statistic in ("mean", "exp_minus_mean"):
        if math.isclose(value_of(numbers, statistic), value, rel_tol=1e-9, abs_tol=1e-12):
            return {"statistic": statistic, "interval": interval(numbers, statistic), "samples": numbers}
    return {}
