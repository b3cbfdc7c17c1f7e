"""What `halve advise` predicted beside what `halve bench` measured, and the error."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import UsageError
from serve.measure.documents import DocumentError

WITHIN = 0.15
"""The error of a ratio that a prediction on a device that is here is held to."""

_FIGURES = ("ttft", "tpot")
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Sampled(BaseModel):
    median: _Positive


class _Times(BaseModel):
    ttft_seconds: _Sampled
    tpot_seconds: _Sampled


class _Load(BaseModel):
    model_config = ConfigDict(extra="ignore")

    prompt: int
    output: int
    batch: int


class _Advice(BaseModel):
    kind: Literal["advice"]
    basis: str
    load: _Load
    device: dict[str, Any]
    times: dict[Literal["dense", "sparse"], _Times] | None
    speedup: dict[str, _Sampled] | None


def is_advice(path: Path) -> bool:
    """Whether a file holds what `halve advise` wrote."""
    if not path.is_file():
        return False
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("kind") == "advice"


def read_advice(path: Path) -> dict[str, Any]:
    """What `halve advise` wrote.

    Raises:
        DocumentError: it is damaged.
    """
    _advice(path)
    return _object(path, "advice")


def check(advice_file: Path, bench_file: Path) -> dict[str, Any]:
    """Predicted and measured times and ratios of TTFT and TPOT, and the errors (predicted / measured - 1).

    Raises:
        DocumentError: a file is damaged or of another kind; UsageError: they are of different loads, or one has no times.
    """
    advice = _advice(advice_file)
    bench = _object(bench_file, "bench")
    if advice.times is None or advice.speedup is None:
        raise UsageError(
            f"{advice_file} predicts no times, because nothing can be pruned there; there is nothing to check"
        )
    models = bench.get("models")
    if not isinstance(models, dict) or not {"dense", "sparse"} <= models.keys():
        raise UsageError(
            f"{bench_file} has no dense model beside the sparse one; measure with `halve bench DIR --against DENSE`"
        )
    measured = {form: _times_of(models[form], bench, advice.load, bench_file) for form in ("dense", "sparse")}
    figures = {}
    for name in _FIGURES:
        faster = statistics.median(_ratios(measured["dense"][name], measured["sparse"][name]))
        predicted = advice.speedup[name].median
        figures[name] = {
            "predicted": predicted,
            "measured": faster,
            "error": predicted / faster - 1,
            "seconds": {
                form: {
                    "predicted": (seconds := getattr(advice.times[form], f"{name}_seconds").median),
                    "measured": (found := statistics.median(measured[form][name])),
                    "error": seconds / found - 1,
                }
                for form in ("dense", "sparse")
            },
        }
    machines = [advice.device.get("name"), bench.get("environment", {}).get("machine")]
    notes = [] if machines[0] == machines[1] else [f"predicted for {machines[0]}, measured on {machines[1]}"]
    if bench.get("through") == "endpoint":
        notes.append("measured through the endpoint, whose HTTP and scheduling are not in the prediction")
    return {
        "kind": "advice-check",
        "advice": str(advice_file),
        "bench": str(bench_file),
        "basis": advice.basis,
        "load": advice.load.model_dump(),
        "speedup": figures,
        "within": WITHIN,
        "holds": all(abs(figure["error"]) <= WITHIN for figure in figures.values()),
        "notes": notes,
    }


def _advice(path: Path) -> _Advice:
    try:
        return _Advice.model_validate(_object(path, "advice"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DocumentError(f"{path} is damaged: {place}: {first['msg']}; make the advice again") from None


def _object(path: Path, kind: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{path} is not whole, or not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise DocumentError(
            f"{path} is no document of kind {kind!r}; give what `halve {'advise' if kind == 'advice' else kind} --json` prints"
        )
    return document


def _times_of(model: Any, bench: Mapping[str, Any], load: _Load, path: Path) -> dict[str, list[float]]:
    """Samples of TTFT and TPOT of the load that was predicted for: of one in process, or of one of several at an endpoint."""
    candidates = [(bench.get("load"), model)]
    levels = model.get("loads") if isinstance(model, dict) else None
    if isinstance(levels, dict):
        described = _mapping(bench.get("loads"))
        candidates = [
            ({**_mapping(bench.get("load")), **_mapping(described.get(name)), **_mapping(level)}, level)
            for name, level in levels.items()
        ]
    seen = []
    for described, entry in candidates:
        found = _mapping(described)
        batch = found.get("batch", found.get("concurrency"))
        this = (found.get("prompt"), found.get("output"), batch)
        if this == (load.prompt, load.output, load.batch):
            return {name: _samples(entry, f"{name}_seconds", path) for name in _FIGURES}
        seen.append("prompt {}, output {}, batch {}".format(*this))
    raise UsageError(
        f"the advice is for prompt {load.prompt}, output {load.output}, batch {load.batch}, and {path} was measured with "
        f"{'; '.join(seen)}; advise again with these, or measure again"
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _samples(entry: Any, name: str, path: Path) -> list[float]:
    samples = _mapping(_mapping(entry).get(name)).get("samples")
    if not isinstance(samples, list) or not samples or not all(isinstance(s, int | float) and s > 0 for s in samples):
        raise DocumentError(f"{path} has no samples of {name}; measure again")
    return [float(sample) for sample in samples]


def _ratios(dense: list[float], sparse: list[float]) -> list[float]:
    """Within rounds where samples are of rounds; else of the medians."""
    if len(dense) == len(sparse):
        return [slow / fast for slow, fast in zip(dense, sparse, strict=True)]
    return [statistics.median(dense) / statistics.median(sparse)]
