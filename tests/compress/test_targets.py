"""Layers that are fitted to the dense model: against float64 references, and by what is left of the error in whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Exaone4Config, FalconConfig, GraniteConfig, Olmo2Config, OlmoConfig

from compress import pipeline, pruner
from compress.architecture import find_blocks
from compress.blocks import BlockModel
from compress.calibration import text_set
from compress.errors import NumericalError, RecipeError
from compress.journal import Journal
from compress.layers import PrunedLayer
from compress.recipe import Recipe
from compress.sources import Source
from compress.stages import Stage, Tap
from compress.targets import DenseTensors, StageTargets, TargetOptions, aligned
from tests import tiny_models
from tests.compress.layers import gathered, layer
from tests.runs import LENGTH, compress, stored, tree
from tests.runs import load as load_model

N, K, T = 24, 32, 400
SETTINGS: dict[str, Any] = {"targets": "dense", "samples": 36, "format": "dense"}


def missing_outputs(x: Tensor, n: int) -> Tensor:
    """Something that depends on the inputs, and noise, and has a mean: [t, n]."""
    generator = torch.Generator().manual_seed(7)
    return 0.1 * x @ torch.randn(x.shape[1], n, generator=generator) + torch.randn(len(x), n, generator=generator) + 0.5


def solve(x: Tensor, missing: Tensor, damping: float, about_mean: bool) -> tuple[Tensor, Tensor]:
    """The change of the weights [N, K], and of the bias [N], by least squares on stacked rows, float64."""
    x, missing = x.double(), missing.double()
    mean_x, mean_m = x.mean(dim=0), missing.mean(dim=0)
    if about_mean:
        x, missing = x - mean_x, missing - mean_m
    ridge = damping * x.square().sum(dim=0).mean()
    rows = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    wanted = torch.cat([missing, torch.zeros(x.shape[1], missing.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
    return change, mean_m - change @ mean_x


@pytest.mark.parametrize("damping", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_weights_are_the_least_squares_solution(damping: float, has_bias: bool) -> None:
    weight, x = layer(N, K, T)
    missing = missing_outputs(x, N)
    bias = torch.linspace(-1, 1, N) if has_bias else None
    statistics = gathered(x, ("gram", "sum"), bias=bias)
    found = aligned(weight, missing.T @ x, missing.double().sum(dim=0), statistics, TargetOptions(damping=damping))
    change, shift = solve(x, missing, damping, has_bias)
    torch.testing.assert_close(found.weight.double(), weight.double() + change, rtol=2e-4, atol=2e-5)
    assert found.notes["moved_to_dense"] == pytest.approx(float(change.norm() / weight.double().norm()), rel=1e-3)
    if bias is None:
        assert found.bias is None
    else:
        assert found.bias is not None
        torch.testing.assert_close(found.bias.double(), bias.double() + shift, rtol=2e-4, atol=2e-4)


def test_nothing_missing_moves_nothing() -> None:
    weight, x = layer(N, K, T)
    statistics = gathered(x, ("gram", "sum"), bias=torch.ones(N))
    found = aligned(weight, torch.zeros(N, K), torch.zeros(N).double(), statistics, TargetOptions())
    assert torch.equal(found.weight, weight)
    assert found.bias is not None
    assert torch.equal(found.bias, torch.ones(N))


def test_inputs_that_were_always_zero_are_no_trouble() -> None:
    weight, x = layer(N, K, T)
    x[:, ::2] = 0
    missing = missing_outputs(x, N)
    found = aligned(weight, missing.T @ x, missing.double().sum(dim=0), gathered(x, ("gram", "sum")), TargetOptions())
    assert torch.equal(found.weight[:, ::2], weight[:, ::2])
    assert not torch.equal(found.weight, weight)
    silent = gathered(torch.zeros(T, K), ("gram", "sum"))
    still = aligned(weight, torch.zeros(N, K), missing.double().sum(dim=0), silent, TargetOptions())
    assert torch.equal(still.weight, weight)


@torch.no_grad()
def test_what_is_missing_at_a_shared_input_is_what_is_missing_of_the_output() -> None:
    """Through the input's differences with one matrix, or through those of the outputs: the same."""
    weight, x_dense = layer(N, K, 3 * T)
    x = x_dense + 0.2 * torch.randn(x_dense.shape, generator=torch.Generator().manual_seed(3))
    block = torch.nn.ModuleDict({"a": torch.nn.Linear(K, N, bias=False), "b": torch.nn.Linear(K, N, bias=False)})
    block["a"].weight.data = weight
    by_input, by_output = Tap("a", "input"), Tap("a", "output")
    stages = [Stage(("a", "b"), {"a": by_input, "b": by_input}), Stage(("a",), {"a": by_output})]
    dense = DenseTensors(block, stages, 3, Path())
    batches = [part.clone() for part in x_dense.split(T)]

    def advance(batch: int) -> None:
        output = block["a"](batches[batch])
        batches[batch].zero_()  # as the outputs are written over the inputs
        batches[batch][:, : output.shape[1]] = output

    dense.gather(batches, advance)
    found = []
    for stage in stages:
        targets = StageTargets(stage, dense)
        for batch, part in enumerate(x.split(T)):
            targets.update(batch, {by_input: part, by_output: part @ weight.T})
        found.append(targets.of("a", weight))
        assert targets.of("nobody", weight) is None
    reference = ((x_dense - x).double() @ weight.double().T).T @ x.double()
    total = ((x_dense - x).double() @ weight.double().T).sum(dim=0)
    for pair in found:
        assert pair is not None
        torch.testing.assert_close(pair[0].double(), reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
        torch.testing.assert_close(pair[1].double(), total, rtol=1e-3, atol=1e-3 * float(total.abs().max()))


def other_families() -> dict[str, Any]:
    """Without a norm before attention, with parallel branches, in-place sums and clipped queries, and multipliers."""
    settings = tiny_models._decoder_settings(2)
    return {
        "olmo2": lambda: tiny_models._model(Olmo2Config, **settings),
        "olmo": lambda: tiny_models._model(OlmoConfig, **settings, clip_qkv=2.0),
        "exaone4": lambda: tiny_models._model(Exaone4Config, **settings, sliding_window=16),
        "falcon": lambda: tiny_models._model(
            FalconConfig, num_hidden_layers=2, hidden_size=64, num_attention_heads=4, alibi=False, bias=False
        ),
        "granite": lambda: tiny_models._model(GraniteConfig, **settings, residual_multiplier=0.22),
        "opt, norms after": lambda: tiny_models.opt(2, do_layer_norm_before=False),
        **{
            name: lambda name=name: tiny_models.FAMILIES[name](2)
            for name in ("llama", "gemma2", "gpt2", "gpt_neox", "phi3", "mamba", "opt")
        },
    }


@pytest.mark.parametrize("family", list(other_families()))
def test_where_nothing_is_pruned_nothing_is_missing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every stage of every block, to the bit, whatever the block writes into and wherever its norms are."""
    other_families()[family]().save_pretrained(tmp_path / "source")
    model = BlockModel(Source(tmp_path / "source"), torch.float32, torch.device("cpu"))
    windows = torch.randint(5, tiny_models.VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
    seen: list[tuple[str, float]] = []

    def nothing_missing(self: StageTargets, name: str, weight: Tensor) -> None:
        if name in self._stage.shows:
            missing = self._missing[self._pair(name)]
            assert missing.products.shape[1] == weight.shape[1]
            seen.append((name, float(missing.products.abs().max() + missing.sum.abs().max())))

    monkeypatch.setattr(StageTargets, "of", nothing_missing)
    monkeypatch.setattr(
        pruner,
        "prune_layer",
        lambda name, weight, *rest: PrunedLayer(weight, torch.ones_like(weight, dtype=torch.bool), None, {}),
    )
    recipe = Recipe.create(targets="dense", format="dense", reconstruction="none")
    every = {name: None for index in range(len(model.blocks)) for name in model.linears(index)}
    prune = pruner.BlockPruner(model, recipe, every, None, tmp_path)
    with torch.no_grad():
        hidden = model.record_calls(text_set(windows).batches(2))
        dense = [states.clone() for states in hidden]
        for index in range(len(model.blocks)):
            block = model.load_block(index)
            prune.prune(
                index,
                block,
                hidden,
                dense,
                lambda batch, i=index: dense[batch].copy_(model.run_block(i, batch, dense[batch])),
            )
            for batch, states in enumerate(hidden):
                states.copy_(model.run_block(index, batch, states))
                assert torch.equal(states, dense[batch])
    assert len(seen) >= len(every) / 2
    assert [pair for pair in seen if pair[1] != 0] == []


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH * 4)


def build(family: str, directory: Path, **more: Any) -> Path:
    (directory / "calibration.txt").write_text(tiny_models.text(6))
    return tiny_models.build(family, directory / "source", **more)


def held_out_error(source: Path, pruned: Path) -> float:
    """Relative error of what leaves the last block, on text that no run saw, by transformers in whole models."""
    windows = torch.randint(5, tiny_models.VOCABULARY, (24, LENGTH), generator=torch.Generator().manual_seed(5))
    states = []
    for directory in (source, pruned):
        model = load_model(directory).float()
        prefix, blocks = find_blocks(model)
        seen: list[Tensor] = []
        last = model.get_submodule(f"{prefix}.{len(blocks) - 1}")
        last.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            model(windows)
        states.append(seen[0].double())
    return float((states[1] - states[0]).square().sum() / states[0].square().sum())


FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "gpt2", "gpt_neox", "phi3", "mistral", "mamba"]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_model_comes_closer_to_the_dense_one(family: str, tmp_path: Path) -> None:
    """Held out, and by the whole models: on random text, which no calibration has."""
    source = build(family, tmp_path, layers=3)
    own = compress(source, tmp_path / "own", **{**SETTINGS, "targets": "own"}).directory
    dense = compress(source, tmp_path / "dense", **SETTINGS)
    assert held_out_error(source, dense.directory) < held_out_error(source, own)
    moved = [layer["moved_to_dense"] for layer in dense.report["layers"] if "moved_to_dense" in layer]
    assert len(moved) >= len(dense.report["layers"]) / 2
    assert sum(share > 0 for share in moved) >= len(moved) / 2


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("reconstruction", ["none", "admm"])
@pytest.mark.parametrize("permutation", ["none", "fold"])
def test_with_other_parts_of_a_recipe(reconstruction: str, permutation: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path, layers=3)
    more = {"reconstruction": reconstruction, "permutation": permutation, **SETTINGS}
    own = compress(source, tmp_path / "own", **{**more, "targets": "own"}).directory
    dense = compress(source, tmp_path / "dense", **more).directory
    assert held_out_error(source, dense) < held_out_error(source, own)


@pytest.mark.usefixtures("small_batches")
def test_layers_with_nothing_pruned_before_them_are_pruned_as_by_themselves(tmp_path: Path) -> None:
    """The first layers of the first block, and whole runs where all else is ignored."""
    source = build("llama", tmp_path)
    settings = {**SETTINGS, "ignore": ("*.o_proj", "*.gate_proj", "*.up_proj", "*.down_proj", "*.1.*", "*.2.*")}
    own = compress(source, tmp_path / "own", **{**settings, "targets": "own"})
    dense = compress(source, tmp_path / "dense", **settings)
    before, after = stored(own.directory), stored(dense.directory)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("small_batches")
def test_a_bias_takes_over_what_is_missing(tmp_path: Path) -> None:
    """Also with a method that leaves biases alone."""
    source = build("opt", tmp_path)
    out = compress(source, tmp_path / "out", **SETTINGS).directory
    before, after = stored(source), stored(out)
    moved = [name for name in before if name.endswith("fc2.bias") and not torch.equal(before[name], after[name])]
    assert len(moved) == 3


@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_run_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build("llama", tmp_path)
    settings = {**SETTINGS, "permutation": "fold"}
    expected = compress(source, tmp_path / "expected", **settings).directory
    save, done = Journal.save_block, []

    def dies(self: Journal, index: int, *rest: Any) -> None:
        save(self, index, *rest)
        done.append(index)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "save_block", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", checkpoint_seconds=0, **settings)
    monkeypatch.setattr(Journal, "save_block", save)
    loaded: list[int] = []
    load = BlockModel.load_block
    monkeypatch.setattr(BlockModel, "load_block", lambda self, index: loaded.append(index) or load(self, index))
    assert tree(compress(source, tmp_path / "out", resume=True, **settings).directory) == tree(expected)
    assert done == [0, 1]
    assert loaded == [0, 1, 2], "block 0 only for what comes before it; it was done"


@pytest.mark.usefixtures("small_batches")
def test_large_tensors_lie_in_files_and_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress import activations

    source = build("llama", tmp_path)
    expected = compress(source, tmp_path / "expected", **SETTINGS).directory
    files: list[Path] = []
    from_file = torch.from_file
    monkeypatch.setattr(activations, "SHARE", 0)
    monkeypatch.setattr(torch, "from_file", lambda file, **more: files.append(Path(file)) or from_file(file, **more))
    assert tree(compress(source, tmp_path / "out", **SETTINGS).directory) == tree(expected)
    assert {file.suffix for file in files} == {".targets", ".activations"}
    assert all(file.parent == tmp_path / "out.partial" for file in files)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("small_batches")
def test_with_the_repair_of_blocks(tmp_path: Path) -> None:
    source = build("llama", tmp_path)
    more = {"repair": "block", "repair_options": {"passes": 2}}
    own = compress(source, tmp_path / "own", **{**SETTINGS, **more, "targets": "own"})
    dense = compress(source, tmp_path / "dense", **SETTINGS, **more)
    errors = [[repair["held_out_error_before"] for repair in run.report["repairs"]] for run in (own, dense)]
    assert sum(errors[1]) < sum(errors[0])


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("targets", ["own", "dense"])
def test_report_and_card_say_so(targets: str, tmp_path: Path) -> None:
    done = compress(build("llama", tmp_path), tmp_path / "out", **{**SETTINGS, "targets": targets})
    assert done.report["summary"]["targets"] == targets
    assert ("layers fitted to" in (done.directory / "README.md").read_text()) == (targets == "dense")


@pytest.mark.usefixtures("small_batches")
def test_a_singular_matrix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise NumericalError("the Gram matrix is broken")

    monkeypatch.setattr(pruner, "aligned", broken)
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj: the Gram matrix is broken"):
        compress(build("llama", tmp_path), tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets_options": {"damping": 0.1}}, "targets_options were given, but no targets"),
        ({"targets": "dense", "targets_options": {"dampin": 0.1}}, "has no option 'dampin'.*damping"),
        ({"targets": "dense", "targets_options": {"damping": 0}}, "damping"),
        ({"targets": "other"}, "targets"),
    ],
)
def test_wrong_fields_are_explained(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.create(**fields)
