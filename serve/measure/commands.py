"""`halve bench --in-process`: dense beside sparse, in one process without an endpoint, with every sample kept."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.device import choose_device
from compress.files import seal
from compress.quiet import quiet_transformers
from serve.linear import Sparse24Linear, backends
from serve.loading import linear_bytes, load_model, require_language_model, weight_bytes
from serve.measure.environment import environment, peak_memory
from serve.measure.speed import measure_speed, ratio

Progress = Callable[[int, int, str], None]


def bench(
    directory: Path,
    *,
    against: Path | None = None,
    prompt: int = 128,
    output: int = 32,
    batch: int = 1,
    rounds: int = 8,
    device: str = "auto",
    progress: Progress = lambda done, total, text: None,
) -> dict[str, Any]:
    """Time to first token, time per output token and weight memory of a checkpoint, dense beside sparse, interleaved.

    Returns:
        A document with every sample, medians, the ratios with their spread, bytes on disk and in memory, and which
        backend multiplied the sparse layers, and why.

    Raises:
        SourceError: a checkpoint is no language model.
    """
    place, _ = choose_device(device)
    for path in filter(None, (directory, against)):
        require_language_model(path, "bench")
    paths = {"dense": against, "sparse": directory} if against else {"model": directory}
    models = {name: load_model(path, device=place) for name, path in paths.items() if path is not None}
    with quiet_transformers():
        speeds = measure_speed(models, prompt=prompt, output=output, batch=batch, rounds=rounds, progress=progress)
    last = list(models.values())[-1]
    sparse_layers = {name: module for name, module in last.named_modules() if isinstance(module, Sparse24Linear)}
    document: dict[str, Any] = {
        "kind": "bench",
        "through": "process",
        "load": {"prompt": prompt, "output": output, "batch": batch, "rounds": rounds},
        "environment": environment(place),
        "models": {},
    }
    for name, model in models.items():
        path = paths[name]
        assert path is not None
        speed = speeds[name]
        document["models"][name] = {
            "directory": str(path),
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights_sha256": seal(path),
            "ttft_seconds": {"median": statistics.median(speed.prefill), "samples": speed.prefill},
            "tpot_seconds": {"median": statistics.median(speed.decode), "samples": speed.decode},
            "bytes": {
                "disk": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                "weights": weight_bytes(model),
                "pruned_layers": linear_bytes(model, set(sparse_layers)),
            },
        }
    if against is not None:
        dense, sparse = speeds["dense"], speeds["sparse"]
        sizes = {name: document["models"][name]["bytes"] for name in paths}
        document["speedup"] = {"ttft": ratio(sparse.prefill, dense.prefill), "tpot": ratio(sparse.decode, dense.decode)}
        document["bytes_ratio"] = {
            key: sizes["sparse"][key] / sizes["dense"][key] for key in sizes["sparse"] if sizes["dense"][key]
        }
    document["peak_process_bytes"] = peak_memory()
    document["backends"] = backends(last, {"prefill": prompt * batch, "decode": batch})
    return document
