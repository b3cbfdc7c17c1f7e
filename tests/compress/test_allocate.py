"""Linears that stay dense by a budget: which, what they cost, and what is measured, computed again from whole models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress import allocate as allocation
from compress import calibration as texts
from compress import pipeline
from compress.allocate import Candidate, choose, reasons_of
from compress.architecture import find_blocks, linears_of
from compress.errors import NumericalError, RecipeError
from compress.pruner import BlockPruner
from compress.recipe import Recipe
from compress.repair import held_out_batches
from serve.measure import table_cache, tuned
from serve.measure.kernel_entries import Entry, Spread
from serve.measure.table_cache import Identity
from tests import tiny_models
from tests.runs import LENGTH, Halve, compress, flags, report, stored, tree
from tests.runs import build_with_text as build
from tests.runs import load as load_model

SAMPLES = 12
SETTINGS: dict[str, Any] = {"allocate": 0.3, "samples": SAMPLES}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window a batch, so that there are some to hold out."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH)


def candidates() -> st.SearchStrategy[list[Candidate]]:
    number = st.floats(0, 100, allow_nan=False)
    return st.lists(st.tuples(number, st.floats(-5, 100)), min_size=1, max_size=9).map(
        lambda pairs: [Candidate((f"layer{i}",), error, saves) for i, (error, saves) in enumerate(pairs)]
    )


@given(candidates(), st.floats(0, 0.99))
def test_the_budget_holds_and_half_of_the_best_is_avoided(units: list[Candidate], share: float) -> None:
    found = choose(units, share, "bytes")
    assert sorted(found.candidates, key=lambda c: c.names) == sorted(units, key=lambda c: c.names)
    total = sum(max(unit.saves, 0) for unit in units)
    assert found.spent <= share * total * (1 + 1e-12)
    free = sum(unit.error for unit in units if unit.saves <= 0)
    best = max(
        sum(unit.error for unit in some)
        for size in range(len(units) + 1)
        for some in itertools.combinations([unit for unit in units if unit.saves > 0], size)
        if sum(unit.saves for unit in some) <= share * total
    )
    avoided = sum(found.candidates[index].error for index in found.kept)
    assert avoided >= free + best / 2 - 1e-9
    assert all(found.candidates[index].error > 0 or found.candidates[index].saves <= 0 for index in found.kept)
    assert all(index in found.kept for index, unit in enumerate(found.candidates) if unit.saves <= 0)
    record = found.record()
    assert record["error_left"] == pytest.approx(sum(unit.error for unit in units) - avoided, abs=1e-6)
    assert set(reasons_of(json.loads(json.dumps(record)))) == {
        name for index in found.kept for name in found.candidates[index].names
    }


def test_a_large_error_beats_many_that_are_cheap() -> None:
    cheap = Candidate(("cheap",), 1.0, 0.5)
    dear = Candidate(("dear",), 10.0, 10.0)
    rest = Candidate(("rest",), 0.1, 9.5)
    found = choose([rest, dear, cheap], 0.5, "bytes")
    assert [candidate.names for candidate in found.candidates] == [("cheap",), ("dear",), ("rest",)]
    assert {name for index in found.kept for name in found.candidates[index].names} == {"dear"}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "gemma2", "mamba"])
def test_the_errors_are_those_of_the_dense_model_with_one_unit_pruned(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight that a trial had is put into transformers' own model, and the block's outputs are compared in float64."""
    drawn: list[torch.Tensor] = []
    load_windows = texts.load_windows
    monkeypatch.setattr(texts, "load_windows", lambda *a, **k: drawn.append(load_windows(*a, **k)) or drawn[-1])
    pruned: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    trials = BlockPruner.trials

    def watched(self: BlockPruner, index: int, block: torch.nn.Module, hidden: list[torch.Tensor]) -> Any:
        assert len(hidden) == SAMPLES - held_out_batches(SAMPLES)
        linears = self.model.linears(index)
        before = {name: module.weight.data.clone() for name, module in linears.items()}
        for names in trials(self, index, block, hidden):
            pruned[names] = {name: linears[name].weight.data.clone() for name in names}
            for name, module in linears.items():
                assert torch.equal(module.weight.data, before[name]) == (name not in names)
            yield names
        for name, module in linears.items():
            assert torch.equal(module.weight.data, before[name])

    monkeypatch.setattr(BlockPruner, "trials", watched)
    source = build(family, tmp_path)
    out = compress(source, tmp_path / "out", **SETTINGS).directory
    found = report(out)["allocation"]
    model = load_model(source).float()
    prefix, blocks = find_blocks(model)
    windows = drawn[0][-held_out_batches(SAMPLES) :]

    def outputs(block: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = blocks[block].register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            for window in windows:
                model(window[None])
        handle.remove()
        return torch.cat(seen).double()

    assert {tuple(candidate["names"]) for candidate in found["candidates"]} == set(pruned)
    assert sorted(name for names in pruned for name in names) == sorted(linears_of(blocks, prefix))
    for candidate in found["candidates"]:
        names = tuple(candidate["names"])
        index = int(names[0].removeprefix(f"{prefix}.").split(".")[0])
        dense = outputs(index)
        kept = {name: model.get_submodule(name).weight.data for name in names}
        for name in names:
            model.get_submodule(name).weight.data = pruned[names][name]
        error = ((outputs(index) - dense).square().sum(-1) / dense.square().sum(-1)).mean()
        for name in names:
            model.get_submodule(name).weight.data = kept[name]
        assert candidate["error"] == pytest.approx(float(error), rel=1e-3)


def test_layers_that_read_one_tensor_stay_together(tmp_path: Path) -> None:
    source = build("llama", tmp_path)
    found = report(compress(source, tmp_path / "out", **SETTINGS).directory)["allocation"]
    units = {tuple(name.rpartition(".")[2] for name in candidate["names"]) for candidate in found["candidates"]}
    assert units == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_what_is_kept_is_dense_to_the_bit_and_the_rest_is_pruned_as_without(format: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path, dtype=torch.bfloat16)
    settings = {**SETTINGS, "metric": "magnitude", "reconstruction": "none", "format": format}
    out = compress(source, tmp_path / "out", **settings).directory
    plain = compress(source, tmp_path / "plain", **{**settings, "allocate": 0.0}).directory
    found, layers = report(out)["allocation"], report(out)["layers"]
    kept = {name for candidate in found["candidates"] if candidate["kept_dense"] for name in candidate["names"]}
    assert kept
    assert {layer["name"]: layer["reason"] for layer in layers if layer["status"] == "dense"} == reasons_of(found)
    before, now, without = stored(source), stored(out), stored(plain)
    for name, tensor in now.items():
        layer = name.rpartition(".")[0]
        assert torch.equal(tensor, (before if layer in kept else without)[name]), name
    given_back = sum(before[f"{name}.weight"].nbytes for name in kept)
    given_back = given_back * 7 / 16 if format == "packed" else given_back / 2
    assert found["given_back"] == given_back <= 0.3 * found["saves_all"]
    saved = sum(t.nbytes for t in before.values()) - sum(t.nbytes for t in now.values())
    if format == "packed":
        assert saved == found["saves_all"] - found["given_back"]
    assert {layer["name"] for layer in report(plain)["layers"] if layer["status"] == "dense"} == set()
    assert "allocation" not in report(plain)


def test_by_latency_with_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build("llama", tmp_path)
    asked: list[tuple[int, torch.dtype, torch.device, torch.dtype, bool]] = []
    shapes: dict[tuple[int, int, bool], float] = {}
    for module in linears_of(find_blocks(load_model(source))[1], "").values():
        n, k = module.weight.shape
        shapes[n, k, False] = 2.0
    slow = (tiny_models.HIDDEN, tiny_models.INTERMEDIATE, False)
    shapes[slow] = -1.0

    def savings(
        rows: int, dtype: torch.dtype, device: torch.device, values: torch.dtype, quantizes_x: bool
    ) -> dict[tuple[int, int, bool], float]:
        asked.append((rows, dtype, device, values, quantizes_x))
        return shapes

    settings = {**SETTINGS, "allocate_options": {"by": "latency", "rows": 4}, "savings": savings}
    found = report(compress(source, tmp_path / "out", **settings).directory)["allocation"]
    assert asked == [(4, torch.float32, torch.device("cpu"), torch.float32, False)]
    assert found["unit"] == "us"
    assert found["saves_all"] == 2 * (4 + 2) * 2.0
    for candidate in found["candidates"]:
        if candidate["names"][0].endswith("down_proj"):
            assert candidate["kept_dense"]
            assert candidate["saves"] == -1.0
    compress(source, tmp_path / "eight", **settings, value_dtype="int8")
    compress(source, tmp_path / "both", **settings, value_dtype="int8", activation_dtype="int8")
    assert asked[1:] == [(4, torch.float32, torch.device("cpu"), torch.int8, rounded) for rounded in (False, True)]
    del shapes[slow]
    with pytest.raises(RecipeError, match=r"64 x 160.*does not know.*at 4 rows.*halve tune MODEL`"):
        compress(source, tmp_path / "other", **settings)
    with pytest.raises(RecipeError, match=r"halve tune MODEL --value-dtype int8"):
        compress(source, tmp_path / "other", **settings, value_dtype="int8")
    with pytest.raises(RecipeError, match=r"halve tune MODEL --value-dtype int8 --activation-dtype int8"):
        compress(source, tmp_path / "other", **settings, value_dtype="int8", activation_dtype="int8")
    assert not (tmp_path / "other.partial").exists()
    with pytest.raises(RecipeError, match=r"halve tune MODEL"):
        compress(source, tmp_path / "other", **{**settings, "savings": None})
    with pytest.raises(RecipeError, match="faster for no linear"):
        compress(
            source,
            tmp_path / "other",
            **{**settings, "savings": lambda *asked: dict.fromkeys([*shapes, slow], 0.0)},
        )
    assert not (tmp_path / "other.partial").exists()


@pytest.mark.parametrize("stop", ["before a block", "after a block"])
def test_a_run_that_is_resumed_measures_once_and_gives_the_same_bytes(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build("llama", tmp_path)
    whole = compress(source, tmp_path / "whole", **SETTINGS).directory
    prune, pruned = BlockPruner.prune, []

    def failing(self: BlockPruner, index: int, *args: Any, **more: Any) -> Any:
        if index == (0 if stop == "before a block" else 1):
            raise KeyboardInterrupt
        pruned.append(index)
        return prune(self, index, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(BlockPruner, "prune", failing)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "out", **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "measure_block", lambda *a: pytest.fail("it was measured already"))
        out = compress(source, tmp_path / "out", **SETTINGS, resume=True).directory
    assert tree(out) == tree(whole)


def test_more_is_kept_for_a_larger_share_and_less_is_lost(tmp_path: Path) -> None:
    """The block errors that are reported fall in what is left, and in the pruned model's own outputs."""
    source = build("llama", tmp_path, layers=3)
    found = [
        report(compress(source, tmp_path / f"{share}", **{**SETTINGS, "allocate": share}).directory)["allocation"]
        for share in (0.1, 0.3, 0.6)
    ]
    left = [record["error_left"] for record in found]
    assert left[0] > left[1] > left[2] > 0
    assert all(record["error_all"] == found[0]["error_all"] for record in found)


def test_a_single_batch_measures_what_it_is_fitted_to(tmp_path: Path) -> None:
    source = build("llama", tmp_path)
    found = report(compress(source, tmp_path / "out", **{**SETTINGS, "samples": 1}).directory)["allocation"]
    assert all(candidate["error"] > 0 for candidate in found["candidates"])


def test_with_the_other_stages(tmp_path: Path) -> None:
    """Reordered channels, dense targets, a repair and a distillation leave what is kept dense as it was, but for the order."""
    source = build("llama", tmp_path)
    settings = {
        "permutation": "fold",
        "targets": "dense",
        "repair": "block",
        "repair_options": {"passes": 1},
        "distill": 40,
    }
    out = compress(source, tmp_path / "out", **SETTINGS, **settings).directory
    found = report(out)
    kept = {name for c in found["allocation"]["candidates"] if c["kept_dense"] for name in c["names"]}
    assert {layer["name"] for layer in found["layers"] if layer["status"] == "dense"} == kept
    before, now = stored(source), stored(out)
    for name in kept:
        was, is_now = before[f"{name}.weight"], now[f"{name}.weight"]
        assert torch.equal(was.flatten().sort().values, is_now.flatten().sort().values)


def test_the_command_says_what_it_cost(tmp_path: Path, halve: Halve) -> None:
    source = build("llama", tmp_path)
    told = halve(*flags(source, tmp_path / "out", samples=SAMPLES, allocate=0.3))
    assert told.code == 0
    assert "kept dense by the allocation" in told.stdout
    assert "kept by the allocation: of all, it loses much" in " ".join(told.stdout.split())
    assert "--allocate" in halve("methods").stdout
    refused = halve(*flags(source, tmp_path / "other", allocate=1.5))
    assert refused.code
    assert "allocate" in refused.message
    refused = halve(*flags(source, tmp_path / "other", allocate_options="by=bytes"))
    assert "allocate is 0" in refused.message
    refused = halve(*flags(source, tmp_path / "other", allocate=0.1, allocate_options="by=weight"))
    assert "by" in refused.message


def test_units_that_save_nothing_together_leave_nothing_to_prune(tmp_path: Path) -> None:
    """One linear gains, the unit that it belongs to does not."""
    source = build("llama", tmp_path)

    def savings(*asked: Any) -> dict[tuple[int, int, bool], float]:
        found = {}
        for name, module in linears_of(find_blocks(load_model(source))[1], "").items():
            found[(*module.weight.shape, False)] = 1.0 if name.endswith("q_proj") else -5.0
        return found

    with pytest.raises(RecipeError, match="faster for no linear"):
        compress(source, tmp_path / "out", **SETTINGS, allocate_options={"by": "latency"}, savings=savings)
    assert not (tmp_path / "out.partial").exists()


def test_what_is_refused_is_refused_before_the_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline._Run, "_provide_gradients", lambda *a: pytest.fail("hours are spent for nothing"))
    with pytest.raises(RecipeError, match="halve tune MODEL"):
        compress(
            build("llama", tmp_path), tmp_path / "out", **SETTINGS, metric="gblm", allocate_options={"by": "latency"}
        )


def test_an_error_that_is_not_finite_names_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "relative_error", lambda output, target: torch.full(output.shape[:2], torch.inf))
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj: with it pruned.*not finite"):
        compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS)


def test_times_of_packed_weights_say_nothing_of_others() -> None:
    with pytest.raises(RecipeError, match="times of packed 2:4"):
        Recipe.create(allocate=0.1, allocate_options={"by": "latency"}, format="dense", pattern="4:8")


def test_the_table_knows_which_product_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path / "cache"))
    cpu = torch.device("cpu")
    here = tuned.backends_for(cpu, "bfloat16")[0]
    spread = Spread(median=2.0, p25=1.9, p75=2.1)

    def entry(conv1d: bool, rows: int, dense: float) -> Entry:
        return Entry(
            n=768, k=768, conv1d=conv1d, dtype="bfloat16", rows=rows, ratio=spread, sparse_seconds=1e-5, dense_seconds=dense,
            backend=here, reason="", baseline="", rounds=5, date="2026-01-01",
        )  # fmt: skip

    entries = [entry(False, 1, 2e-5), entry(True, 1, 9e-5), entry(False, 4, 1.0)]
    assert table_cache.save(Identity.of(cpu), entries) is None
    assert tuned.savings(1, torch.bfloat16, cpu) == {
        (768, 768, False): pytest.approx(10.0), (768, 768, True): pytest.approx(80.0),
    }  # fmt: skip
    assert tuned.savings(1, torch.float16, cpu) == {}
    assert tuned.savings(1, torch.bfloat16, cpu, torch.int8) == {}
    scaled = entry(False, 1, 3e-5).model_copy(update={"dtype": "int8/bfloat16"})
    assert table_cache.save(Identity.of(cpu), [scaled]) is None
    assert tuned.savings(1, torch.bfloat16, cpu, torch.int8) == {(768, 768, False): pytest.approx(20.0)}
