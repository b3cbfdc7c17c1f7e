"""Linears that a model multiplies by hand are observed like those that it calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress import calibration as texts
from compress import pipeline, pruner
from compress.architecture import find_blocks
from compress.blocks import BlockModel
from compress.layer_statistics import LayerStatistics
from compress.observe import InputObserver
from compress.products import Products
from compress.sources import Source
from tests import tiny_models
from tests.runs import LENGTH, compress, load

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

WAYS = {
    "linear": lambda x, w: functional.linear(x, w),
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "operator": lambda x, w: x @ w.t(),
    "weight first": lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2),
    "weight first, method": lambda x, w: w.matmul(x.transpose(1, 2)).transpose(1, 2),
    "vector": lambda x, w: (w @ x[0, 0])[None, None],
}


@pytest.mark.parametrize("way", WAYS)
def test_ways(way: str) -> None:
    layer = nn.Linear(16, 24, bias=False)
    seen: list[tuple[str, Tensor, Tensor]] = []
    with torch.no_grad(), Products({"layer": layer}, set(), lambda *product: seen.append(product)):
        output = WAYS[way](X, layer.weight)
    ((name, x, y),) = seen
    assert name == "layer"
    expected = X if way != "vector" else X[0, 0]
    assert torch.equal(x, expected)
    assert torch.equal(y.flatten(), output.flatten())
    torch.testing.assert_close(y, expected @ layer.weight.T)


def test_what_is_not_reported() -> None:
    layer, other = nn.Linear(16, 16), nn.Linear(16, 16)
    seen: list[Any] = []
    with torch.no_grad(), Products({"layer": layer}, {"layer"}, lambda *product: seen.append(product)):
        functional.linear(X, layer.weight)  # its module was called before
    with torch.no_grad(), Products({"layer": layer}, set(), lambda *product: seen.append(product)):
        functional.linear(X, other.weight)
        X @ layer.weight.clone()
        X @ layer.weight[:8].T  # a part of it
        X @ layer.weight  # [K, N] would be another layer
        torch.einsum("btk,nk->btn", X, other.weight)
    assert seen == []


@pytest.mark.parametrize("batch", [1, 4])
def test_mamba_time_step(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of dt_proj, whose module is never called, is the first columns of what x_proj gives."""
    source = tiny_models.build("mamba", tmp_path / "source", dtype=torch.float32)
    seen: dict[str, LayerStatistics] = {}
    drawn: list[Tensor] = []
    prune, load_windows = pruner.prune_layer, texts.load_windows

    def recording(name: str, weight: Tensor, statistics: LayerStatistics, *rest: Any) -> Any:
        seen[name] = statistics
        return prune(name, weight, statistics, *rest)

    def windows(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(load_windows(*args, **kwargs))
        return drawn[0]

    monkeypatch.setattr(pruner, "prune_layer", recording)
    monkeypatch.setattr(texts, "load_windows", windows)
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", batch * LENGTH)
    done = compress(source, tmp_path / "out", samples=8)
    for layer in done.report["layers"]:
        assert layer["status"] == "pruned"
        assert 0 < layer["relative_output_error"] < 0.5

    model = load(source)
    inputs: list[Tensor] = []
    called: list[str] = []
    mixer = find_blocks(model)[1][0].mixer
    mixer.x_proj.register_forward_hook(lambda module, args, output: inputs.append(output[..., :8]))
    mixer.dt_proj.register_forward_hook(lambda *_: called.append("dt_proj"))
    with torch.no_grad():
        for window in drawn[0]:
            model(window[None], use_cache=False)
    assert not called
    x = torch.cat(inputs).flatten(0, 1).double()
    statistics = seen["backbone.layers.0.mixer.dt_proj"]
    assert statistics.count == len(x) == 8 * LENGTH
    torch.testing.assert_close(statistics.gram.double(), x.T @ x, rtol=1e-3, atol=1e-3)
    assert len({id(statistics.inputs) for name, statistics in seen.items() if ".0." in name}) == 4


def test_output_of_a_product(tmp_path: Path) -> None:
    source = tiny_models.build("mamba", tmp_path / "source", dtype=torch.float32, layers=1)
    model = BlockModel(Source(source), torch.float32, torch.device("cpu"))
    batches = [{"input_ids": torch.randint(5, 300, (2, 12)), "use_cache": False} for _ in range(3)]
    with torch.no_grad():
        hidden = model.record_calls(batches)
        block = model.load_block(0)
        observer = InputObserver(model.linears(0), {"gram", "output_sum_of_squares"}, 72, block)
        observer.run(model, 0, hidden)
    name = "backbone.layers.0.mixer.dt_proj"
    gram, weight = observer.statistics(name).gram.double(), model.linears(0)[name].weight.double()  # type: ignore[union-attr]
    expected = torch.einsum("nk,kl,nl->n", weight, gram, weight)
    torch.testing.assert_close(observer.outputs[name].value, expected, rtol=1e-4, atol=1e-5)
