"""What can be reordered for free: found in every family, proved, refused where it is wrong, and saved whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import folding, pipeline
from compress.architecture import LinearModule, make_of, oriented
from compress.blocks import BlockModel
from compress.calibration import load_windows, text_set
from compress.errors import NumericalError, RecipeError
from compress.folding import Fold, Trial, find_folds, fold_block, proposals, reorder_columns, reorder_rows, spread
from compress.observe import InputObserver
from compress.packed import VALUE_DTYPES
from compress.patterns import NMPattern
from compress.permutation import retained
from compress.recipe import Recipe
from compress.sources import Source
from compress.statistics import ACCUMULATORS
from compress.verify import verify
from tests import tiny_models
from tests.compress.test_pipeline import assert_same_model, both, stem
from tests.compress.test_resume import Killed, interrupted, stop_after
from tests.runs import LENGTH, SAMPLES, calibration, compress, identical, load, prompt, stored, tree

P24 = NMPattern(2, 4)

LLAMA = {
    "model.layers.{}.self_attn.o_proj": ["model.layers.{}.self_attn.v_proj"],
    "model.layers.{}.mlp.down_proj": ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
}
FOLDS: dict[str, dict[str, list[str]]] = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"], LLAMA),
    "opt": {
        "model.decoder.layers.{}.self_attn.out_proj": ["model.decoder.layers.{}.self_attn.v_proj"],
        "model.decoder.layers.{}.fc2": ["model.decoder.layers.{}.fc1"],
    },
    "gpt2": {
        "transformer.h.{}.attn.c_proj": ["transformer.h.{}.attn.c_attn"],
        "transformer.h.{}.mlp.c_proj": ["transformer.h.{}.mlp.c_fc"],
    },
    "gpt_neox": {
        "gpt_neox.layers.{}.attention.dense": ["gpt_neox.layers.{}.attention.query_key_value"],
        "gpt_neox.layers.{}.mlp.dense_4h_to_h": ["gpt_neox.layers.{}.mlp.dense_h_to_4h"],
    },
    "phi3": {
        "model.layers.{}.self_attn.o_proj": ["model.layers.{}.self_attn.qkv_proj"],
        "model.layers.{}.mlp.down_proj": ["model.layers.{}.mlp.gate_up_proj"],
    },
    "mamba": {},  # the state space mixes what its channels read, and more than linears would have to move
}
"""Consumer -> producers, by family."""


def is_attention(consumer: str) -> bool:
    return "attn" in consumer or "attention" in consumer


def folds_of(family: str, index: int) -> dict[str, list[str]]:
    return {
        consumer.format(index): [producer.format(index) for producer in producers]
        for consumer, producers in FOLDS[family].items()
    }


class Loaded:
    """A model's block, loaded and observed, as the pipeline has it before it prunes."""

    def __init__(self, source: Path, dtype: str = "float32", block: int = 1, needs: Any = ("sum_of_squares",)) -> None:
        self.model = BlockModel(Source(source), VALUE_DTYPES[dtype], torch.device("cpu"))
        tokenizer = tiny_models.tokenizer()
        windows = load_windows(str(calibration(source.parent)), tokenizer, samples=SAMPLES, length=LENGTH, seed=0)
        self.hidden = self.model.record_calls(text_set(windows).batches(3))
        self.index = block
        self.needs = needs
        self.model.load_block(block)
        self.linears = self.model.linears(block)
        self.observer = self.observed()

    def observed(self) -> InputObserver:
        observer = InputObserver(self.linears, self.needs, SAMPLES * LENGTH, self.model.blocks[self.index], SAMPLES)
        observer.run(self.model, self.index, self.hidden)
        return observer

    def output(self) -> torch.Tensor:
        return self.model.run_block(self.index, 0, self.hidden[0])

    def trial(self) -> Trial:
        return Trial(self.model, self.index, self.hidden[0])

    def found(self, pattern: NMPattern = P24) -> dict[str, Fold]:
        alone = [name for name in self.linears if self.observer.sharing(name) == [name]]
        return {fold.consumer: fold for fold in find_folds(self.model, self.index, self.hidden[0], alone, pattern)}

    def name(self, end: str) -> str:
        (name,) = [name for name in self.linears if name.endswith(end)]
        return name


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_orders(fold: Fold, seed: int) -> torch.Tensor:
    parts, _, channels = fold.columns.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(channels, generator=generator) for _ in range(parts)])


# What is found, and that it is right


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_found(family: str, dtype: str, tmp_path: Path) -> None:
    source = tiny_models.build(family, tmp_path / "source", layers=2, dtype=VALUE_DTYPES[dtype])
    for index in (0, 1):
        loaded = Loaded(source, dtype, block=index)
        before = {name: module.weight.clone() for name, module in loaded.linears.items()}
        found = loaded.found()
        assert {consumer: list(fold.producers) for consumer, fold in found.items()} == folds_of(family, index)
        for consumer, fold in found.items():
            assert fold.within_heads is is_attention(consumer)
            grouped = family not in ("opt", "gpt2", "gpt_neox")
            kv_heads = tiny_models.KV_HEADS if grouped else tiny_models.HEADS
            assert fold.columns.shape[0] == (kv_heads if fold.within_heads else 1)
            assert fold.columns.shape[1] == (tiny_models.HEADS // kv_heads if fold.within_heads else 1)
        assert all(torch.equal(module.weight, before[name]) for name, module in loaded.linears.items())


@pytest.mark.parametrize("family", [family for family, folds in FOLDS.items() if folds])
def test_the_model_stays_the_same(family: str, tmp_path: Path) -> None:
    """Random reorderings in all blocks, in float64; the consumers alone give another model."""
    source = tiny_models.build(family, tmp_path / "source", layers=2, dtype=torch.float32)
    model = load(source).double()
    before = model(prompt()).logits
    consumers: list[tuple[LinearModule, torch.Tensor, Fold]] = []
    for index in (0, 1):
        for fold in Loaded(source, block=index).found().values():
            orders = random_orders(fold, seed=index)
            consumers.append((model.get_submodule(fold.consumer), orders, fold))
            for name, rows in fold.producers.items():
                module = model.get_submodule(name)
                bias = None if module.bias is None else module.bias.clone()
                reorder_rows(module, orders, rows)
                assert bias is None or not torch.equal(bias, module.bias)
    assert len(consumers) == 4
    producers_alone = model(prompt()).logits
    for module, orders, fold in consumers:
        reorder_columns(module, orders, fold.columns)
    after = model(prompt()).logits
    assert float((after - before).norm() / before.norm()) < 1e-10
    assert float((producers_alone - before).norm() / before.norm()) > 0.1


def test_spread() -> None:
    index = torch.tensor([[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]])  # two parts, two copies each
    orders = torch.tensor([[2, 0, 1], [0, 2, 1]])
    assert spread(orders, index, 13).tolist() == [2, 0, 1, 5, 3, 4, 6, 8, 7, 9, 11, 10, 12]


def test_one_query_head_for_each_value_head(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2, num_key_value_heads=tiny_models.HEADS)
    found = Loaded(source).found()
    assert {consumer: list(fold.producers) for consumer, fold in found.items()} == folds_of("llama", 1)
    assert found["model.layers.1.self_attn.o_proj"].columns.shape == (4, 1, 16)


def test_all_query_heads_share_the_values(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2, num_key_value_heads=1)
    found = Loaded(source).found()
    assert {consumer: list(fold.producers) for consumer, fold in found.items()} == folds_of("llama", 1)
    assert found["model.layers.1.self_attn.o_proj"].columns.shape == (1, 4, 16)


def test_groups_do_not_lie_across_heads(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)  # heads of 16
    assert list(Loaded(source).found(NMPattern(8, 16))) == list(folds_of("llama", 1))
    assert list(Loaded(source).found(NMPattern(16, 32))) == ["model.layers.1.mlp.down_proj"]


# What is wrong is refused


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_wrong_folds_are_refused(kv_heads: int, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2, num_key_value_heads=kv_heads)
    loaded = Loaded(source)
    trial = loaded.trial()
    q, k, v, o, gate, up, down = (loaded.name(f"{end}_proj") for end in ("q", "k", "v", "o", "gate", "up", "down"))
    heads, head_dim = tiny_models.HEADS, 16
    columns = torch.arange(heads * head_dim).view(kv_heads, -1, head_dim)
    rows = torch.arange(kv_heads * head_dim).view(kv_heads, 1, head_dim)
    whole = torch.arange(heads * head_dim).view(1, 1, -1)
    assert trial.proves(Fold(o, columns, {v: rows}, True))
    wrong = {
        "keys": Fold(o, columns, {k: rows}, True),
        "values and keys": Fold(o, columns, {v: rows, k: rows}, True),
        "the other heads' values": Fold(o, columns, {v: rows.roll(1, 0)}, True),
        "queries": Fold(o, whole.view(heads, 1, head_dim), {q: whole.view(heads, 1, head_dim)}, True),
        "the values' copies by turns": Fold(
            o, torch.arange(heads * head_dim).view(-1, kv_heads, head_dim).transpose(0, 1), {v: rows}, True
        ),
        "across heads": Fold(
            o,
            torch.cat(list(columns), dim=-1)[None],
            {v: torch.cat(list(rows), dim=-1)[None]},
            False,
        ),
        "everything, elementwise": Fold(o, whole, dict.fromkeys([q, k, v], whole), False),
    }
    if kv_heads == heads:  # one value head for each query head: no copies that could be in another order
        del wrong["the values' copies by turns"]
    else:  # q and k have different shapes
        del wrong["everything, elementwise"]
    for case, fold in wrong.items():
        assert not trial.proves(fold), case

    channels = torch.arange(tiny_models.INTERMEDIATE).view(1, 1, -1)
    assert trial.proves(Fold(down, channels, {gate: channels, up: channels}, False))
    assert not trial.proves(Fold(down, channels, {gate: channels}, False))
    assert not trial.proves(Fold(down, channels, {up: channels}, False))
    assert not trial.proves(Fold(down, channels, {gate: channels, up: channels.flip(2)}, False))
    hidden = torch.arange(tiny_models.HIDDEN).view(1, 1, -1)
    assert not trial.proves(Fold(q, hidden, {o: hidden}, False))  # the residual stream
    # After all of that the copy is what it was.
    assert trial.proves(Fold(o, columns, {v: rows}, True))


def test_the_probe_sees_who_makes_a_channel(tmp_path: Path) -> None:
    loaded = Loaded(tiny_models.build("llama", tmp_path / "source", layers=2, num_key_value_heads=4))
    trial = loaded.trial()
    one = torch.tensor([21])
    o, down = loaded.name("o_proj"), loaded.name("down_proj")
    makes = {
        (consumer, name): trial.makes(name, one, consumer, one)
        for consumer in (o, down)
        for name in loaded.linears
        if name != consumer
    }
    assert {pair for pair, true in makes.items() if true} == {
        (o, loaded.name("v_proj")),
        (down, loaded.name("gate_proj")),
        (down, loaded.name("up_proj")),
    }
    assert not trial.makes(loaded.name("v_proj"), one, o, torch.tensor([22]))
    # So queries and keys are in no proposal at all.
    proposed = {name for fold in proposals(trial, o, loaded.model.config, P24) for name in fold.producers}
    assert proposed == {loaded.name("v_proj")}


def test_another_reader_of_the_channels_is_noticed(tmp_path: Path) -> None:
    """No linear, so only the block's output can show that it reads what goes into down_proj."""
    loaded = Loaded(tiny_models.build("llama", tmp_path / "source", layers=2))
    mlp, down = loaded.name("down_proj").removesuffix(".down_proj"), loaded.name("down_proj")
    assert set(loaded.found()) == set(folds_of("llama", 1))
    seen: list[torch.Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = [args[0]]

    def read(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * seen[0][..., : tiny_models.HIDDEN]

    loaded.linears[down].register_forward_pre_hook(see)
    loaded.model.model.get_submodule(mlp).register_forward_hook(read)
    assert set(loaded.found()) == {loaded.name("o_proj")}


def test_no_proof_without_power(tmp_path: Path) -> None:
    """Where even a wrong reordering changes nothing, a right one proves nothing."""
    loaded = Loaded(tiny_models.build("llama", tmp_path / "source", layers=2))
    fold = loaded.found()[loaded.name("o_proj")]
    assert loaded.trial().proves(fold)
    loaded.linears[loaded.name("o_proj")].weight.data.zero_()
    assert not loaded.trial().proves(fold)
    assert set(loaded.found()) == {loaded.name("down_proj")}


def test_no_proof_without_tokens(tmp_path: Path) -> None:
    """With one token attention is the same for all heads: values would pass across them."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    short = compress(source, tmp_path / "short", permutation="fold", length=4, samples=20)
    assert short.report["summary"]["layers_permuted"] == 0
    long = compress(source, tmp_path / "long", permutation="fold", length=8, samples=20)
    assert long.report["summary"]["layers_permuted"] == 2


# What is reordered with the weights


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gpt_neox", "phi3", "opt"])
def test_statistics_and_gradients_move_along(family: str, tmp_path: Path) -> None:
    """They are what an observer of the reordered block sees; gradients are moved as the weights are."""
    source = tiny_models.build(family, tmp_path / "source", layers=2, dtype=torch.float32)
    loaded = Loaded(source, needs=(*ACCUMULATORS, "output_sum_of_squares"))
    before = loaded.output()
    weights = {name: oriented(module.weight, module).clone() for name, module in loaded.linears.items()}
    gradients = {
        name: {"gradient_l1": weight.clone(), "regional_gradient": -weight} for name, weight in weights.items()
    }
    kept: dict[str, float] = {}

    def score(name: str, module: LinearModule) -> torch.Tensor:
        scores = oriented(module.weight, module).abs() * loaded.observer.statistics(name).sum_of_squares.sqrt()
        kept[name] = retained(scores, 2, 4)
        return scores

    records = fold_block(loaded.model, loaded.index, loaded.hidden[0], loaded.observer, gradients, P24, score)
    assert {name: record["folded_into"] for name, record in records.items()} == folds_of(family, 1)
    changed = {*records, *(name for record in records.values() for name in record["folded_into"])}
    for name, module in loaded.linears.items():
        weight = oriented(module.weight, module)
        assert torch.equal(weight, weights[name]) is (name not in changed)
        assert torch.equal(gradients[name]["gradient_l1"], weight)
        assert torch.equal(gradients[name]["regional_gradient"], -weight)
    torch.testing.assert_close(loaded.output(), before, rtol=1e-4, atol=1e-4)
    again = loaded.observed()
    for name in loaded.linears:
        ours, expected = loaded.observer.statistics(name), again.statistics(name)
        assert ours is not None
        assert expected is not None
        for kind in ACCUMULATORS.keys() - {"count", "moments", "split_gram"}:
            close = {"rtol": 1e-4, "atol": 1e-4 * float(getattr(expected, kind).abs().max())}
            torch.testing.assert_close(getattr(ours, kind), getattr(expected, kind), **close)
        for part, other in zip(ours.split_gram, expected.split_gram, strict=True):
            assert part.tokens == other.tokens > 0
            torch.testing.assert_close(part.gram, other.gram, rtol=1e-4, atol=1e-4 * float(other.gram.abs().max()))
            torch.testing.assert_close(part.sum, other.sum, rtol=1e-4, atol=1e-4 * float(other.sum.abs().max()))
        torch.testing.assert_close(ours.moments, expected.moments, rtol=1e-4, atol=1e-4)
        assert ours.count == expected.count
        torch.testing.assert_close(loaded.observer.outputs[name].value, again.outputs[name].value, rtol=1e-4, atol=1e-4)
    for name, record in records.items():
        before_folding = kept[name]
        score(name, loaded.linears[name])
        assert record["kept_score_gain"] == pytest.approx(kept[name] / before_folding - 1, abs=1e-5)
        assert record["kept_score_gain"] > 0.003


def test_scores_that_are_not_finite_are_named(tmp_path: Path) -> None:
    loaded = Loaded(tiny_models.build("llama", tmp_path / "source", layers=2))

    def score(name: str, module: LinearModule) -> torch.Tensor:
        return module.weight / 0

    with pytest.raises(NumericalError, match=r"model\.layers\.1\.self_attn\.o_proj: its scores contain NaN"):
        fold_block(loaded.model, 1, loaded.hidden[0], loaded.observer, {}, P24, score)


# From end to end


def orders_in(original: torch.Tensor, now: torch.Tensor) -> list[int]:
    """Which row of ``original`` each row of ``now`` is, to the bit."""
    places = {row.contiguous().view(torch.uint8).numpy().tobytes(): i for i, row in enumerate(original)}
    assert len(places) == len(original)
    return [places[row.contiguous().view(torch.uint8).numpy().tobytes()] for row in now]


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "phi3", "gpt_neox"])
def test_family(family: str, tmp_path: Path) -> None:
    source = tiny_models.build(family, tmp_path / "source")
    packed, dense = both(source, tmp_path, permutation="fold")
    original, packed_tensors, dense_tensors = stored(source), stored(packed), stored(dense)
    assert dense_tensors.keys() == original.keys() == {stem(name) for name in packed_tensors}
    expected = {consumer: producers for index in range(3) for consumer, producers in folds_of(family, index).items()}
    biases = {f"{name}.bias" for producers in expected.values() for name in producers} & original.keys()
    assert bool(biases) is (family not in ("llama", "phi3"))
    pruned = {stem(name) for name in packed_tensors if name.endswith("_packed")}
    for name, tensor in original.items():
        if name not in pruned:
            assert identical(packed_tensors[name], dense_tensors[name]), name
            if name in biases:
                assert not identical(tensor, dense_tensors[name]), name
                assert identical(tensor.sort().values, dense_tensors[name].sort().values), name
            else:
                assert identical(tensor, dense_tensors[name]), name
    for directory in (packed, dense):
        verdict = verify(directory)
        assert len(verdict.sparse) == len(verdict.layers) == len(pruned)
        assert not verdict.notes
    assert_same_model(packed, dense)

    report = json.loads((packed / "report.json").read_text())
    assert report["summary"]["layers_permuted"] == len(expected)
    recorded = {layer["name"]: layer["permutation"] for layer in report["layers"] if "permutation" in layer}
    assert {name: record["folded_into"] for name, record in recorded.items()} == expected
    for name, record in recorded.items():
        assert record["within_heads"] is is_attention(name)
        assert 0 < record["kept_score_gain"] < 0.1
    plain = compress(source, tmp_path / "plain").report
    assert plain["summary"]["layers_permuted"] == 0
    assert f"folded into neighbouring layers | in {len(expected)} layers" in (packed / "README.md").read_text()
    assert "folded into" not in (tmp_path / "plain" / "README.md").read_text()
    assert not any("permutation" in layer for layer in plain["layers"])
    # What is kept more is lost less.
    error = "relative_output_error"
    without = {layer["name"]: layer[error] for layer in plain["layers"]}
    first = {
        layer["name"]: layer[error]
        for layer in report["layers"]
        if ".0." in layer["name"] and layer["name"] in expected
    }
    assert len(first) == 2
    assert sum(first.values()) < sum(without[name] for name in first)


@pytest.mark.parametrize("format", ["packed", "dense"])
@pytest.mark.parametrize(
    ("family", "kv_heads"), [("qwen2", 2), ("llama", 1), ("opt", 4), ("gpt2", 4), ("phi3", 2), ("gpt_neox", 4)]
)
def test_ignored_producers_are_saved(family: str, kv_heads: int, format: str, tmp_path: Path) -> None:
    """They show which order was taken, and all other tensors must have taken it, too."""
    settings = {} if family in ("opt", "gpt2", "gpt_neox") else {"num_key_value_heads": kv_heads}
    source = tiny_models.build(family, tmp_path / "source", layers=2, **settings)
    producers = sorted({name.format("*") for names in FOLDS[family].values() for name in names})
    done = compress(
        source, tmp_path / "out", permutation="fold", ignore=tuple(producers), metric="wanda", reconstruction="none",
        format=format,
    )  # fmt: skip
    assert done.report["summary"]["layers_permuted"] == 4
    compress(source, tmp_path / "plain", ignore=tuple(producers), metric="wanda", reconstruction="none", format=format)
    before, now, plain = load(source), load(done.directory), load(tmp_path / "plain")

    def weight(model: Any, name: str) -> torch.Tensor:
        module = model.get_submodule(name)
        return module.weight.T if family == "gpt2" else module.weight

    heads, head_dim = tiny_models.HEADS, 16
    for consumer, (first, *others) in {**folds_of(family, 0), **folds_of(family, 1)}.items():
        order = orders_in(weight(before, first), weight(now, first))
        assert order != sorted(order)
        for name in (first, *others):
            assert identical(weight(now, name), weight(before, name)[order])
            if (bias := before.get_submodule(name).bias) is not None:
                assert identical(now.get_submodule(name).bias, bias[order])
        columns, rows = weight(before, consumer).shape[1], len(order)
        if not is_attention(consumer):
            of_channels = [row % columns for row in order[:columns]]
            assert order == [c + start for start in range(0, rows, columns) for c in of_channels]
        else:
            every = torch.arange(rows)
            if family == "gpt_neox":
                values = every.view(heads, 3, head_dim)[:, 2]
            else:  # the last rows of a fused projection, or all
                values = every[-kv_heads * head_dim :].view(kv_heads, head_dim)
            moved = torch.tensor(order)[values] - values[:, :1]  # [kv heads, head_dim], within each head
            assert moved.sort(dim=1).values.tolist() == [list(range(head_dim))] * kv_heads
            assert set((torch.tensor(order) != every).nonzero()[:, 0].tolist()) <= set(values.flatten().tolist())
            copies = heads // kv_heads
            of_channels = [head * head_dim + c for head in range(heads) for c in moved[head // copies].tolist()]
        pruned = weight(now, consumer)
        survivors = pruned != 0
        assert int(survivors.unflatten(1, (-1, 4)).sum(dim=2).max()) == 2
        assert torch.equal(pruned, weight(before, consumer)[:, of_channels] * survivors)
        if consumer in folds_of(family, 0):
            assert not torch.equal(survivors, (weight(plain, consumer) != 0)[:, of_channels])


def test_ignored_consumers_stay_as_they_are(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    settings: dict[str, Any] = {
        "ignore": ("*.down_proj",),
        "metric": "wanda",
        "reconstruction": "none",
        "format": "dense",
    }
    done = compress(source, tmp_path / "out", permutation="fold", **settings)
    compress(source, tmp_path / "plain", **settings)
    names = [layer["name"] for layer in done.report["layers"] if "permutation" in layer]
    assert names == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    original, now, plain = stored(source), stored(tmp_path / "out"), stored(tmp_path / "plain")
    for index in (0, 1):
        down = f"model.layers.{index}.mlp.down_proj.weight"
        assert identical(now[down], original[down])
    for name in ("q_proj", "k_proj"):
        key = f"model.layers.0.self_attn.{name}.weight"
        assert identical(now[key], plain[key])


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
@pytest.mark.parametrize("metric", [None, "magnitude"])
def test_other_patterns_and_metrics(pattern: str, metric: str | None, tmp_path: Path) -> None:
    source = tiny_models.build("qwen3", tmp_path / "source", layers=1)
    settings: dict[str, Any] = {"pattern": pattern, "metric": metric, "format": "dense"}
    done = compress(source, tmp_path / "out", permutation="fold", **settings)
    gains = [layer["permutation"]["kept_score_gain"] for layer in done.report["layers"] if "permutation" in layer]
    assert len(gains) == 2
    assert min(gains) > 0.001
    assert verify(done.directory).kind == "dense"


def test_added_biases_are_reordered_and_saved(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    packed, dense = both(source, tmp_path, permutation="fold", add_bias=True, metric="stade", reconstruction="none")
    assert_same_model(packed, dense)
    assert {name for name in stored(packed) if name.endswith(".bias")} == {
        f"model.layers.0.{name}_proj.bias"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }


@pytest.mark.parametrize("blocks", [1, 2])
def test_resume(blocks: int, tmp_path: Path) -> None:
    source = tiny_models.build("qwen2", tmp_path / "source")
    expected = compress(source, tmp_path / "expected", permutation="fold").directory
    interrupted(source, tmp_path / "out", blocks=blocks, permutation="fold")
    steps: list[tuple[int, str]] = []
    compress(
        source, tmp_path / "out", permutation="fold", resume=True, progress=lambda n, _, text: steps.append((n, text))
    )
    assert [done for done, text in steps if "error" in text] == list(range(blocks, 4))
    assert tree(tmp_path / "out") == tree(expected)


def test_resume_does_not_change_the_permutation(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    with pytest.raises(Killed):
        compress(source, tmp_path / "out", permutation="fold", progress=stop_after(1))
    with pytest.raises(pipeline.OutputError, match=r"recipe\.permutation: 'none' instead of 'fold'"):
        compress(source, tmp_path / "out", resume=True)


def test_unstructured_patterns_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"permutation='fold' moves columns between the groups of an N:M pattern"):
        Recipe.create(permutation="fold", pattern="unstructured", sparsity=0.5, format="dense")
    assert "sum_of_squares" in Recipe.create(permutation="fold").needs


def test_blocks_that_are_made_alike_are_proved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folds of the others are those that a search of their own finds."""
    model, hidden = blocks_of("llama", tmp_path, layers=3)
    searched: list[int] = []
    search = folding.find_folds
    monkeypatch.setattr(
        folding,
        "find_folds",
        lambda model, index, *rest, **more: searched.append(index) or search(model, index, *rest, **more),
    )
    known = folding.FoldsOfAlike()
    for index in range(3):
        model.load_block(index)
        alone = [name for name in model.linears(index) if name.endswith(("o_proj", "down_proj"))]
        found = known.of(model, index, hidden, alone, P24)
        own = list(search(model, index, hidden, alone, P24))
        assert [fold.consumer for fold in found] == alone
        for mine, its in zip(found, own, strict=True):
            assert (mine.consumer, mine.within_heads) == (its.consumer, its.within_heads)
            assert torch.equal(mine.columns, its.columns)
            assert mine.producers.keys() == its.producers.keys()
            assert all(torch.equal(mine.producers[name], its.producers[name]) for name in mine.producers)
    assert searched == [0]


@pytest.mark.parametrize("silent", ["self_attn.o_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_what_is_zero_has_no_fold_whatever_was_proved_before(silent: str, tmp_path: Path) -> None:
    """So that a run that begins at such a block, because it was interrupted, does the same to it."""
    model, hidden = blocks_of("llama", tmp_path, layers=2)
    found = []
    for known, blocks in ((folding.FoldsOfAlike(), (0, 1)), (folding.FoldsOfAlike(), (1,))):
        for index in blocks:
            model.load_block(index)
            if index == 1:
                model.linears(1)[f"model.layers.1.{silent}"].weight.data.zero_()
            alone = [name for name in model.linears(index) if name.endswith(("o_proj", "down_proj"))]
            folds = [fold.consumer for fold in known.of(model, index, hidden, alone, P24)]
        found.append(folds)
    other = "mlp.down_proj" if "attn" in silent else "self_attn.o_proj"
    assert found == [[f"model.layers.1.{other}"]] * 2


def test_blocks_that_are_made_otherwise_are_searched_again(tmp_path: Path) -> None:
    model, _ = blocks_of("llama", tmp_path, layers=3)
    other, _ = blocks_of("qwen3", tmp_path / "other", layers=1)
    first, second, third = model.blocks
    assert make_of(first) == make_of(second) == make_of(third)
    assert make_of(first) != make_of(other.blocks[0])
    second.self_attn.o_proj = torch.nn.Linear(8, 8, device="meta")
    third.mlp.some_setting = "another"  # type: ignore[assignment]
    assert len({make_of(block) for block in model.blocks}) == 3


def blocks_of(family: str, directory: Path, layers: int) -> tuple[BlockModel, torch.Tensor]:
    directory.mkdir(exist_ok=True)
    source = tiny_models.build(family, directory / "source", layers=layers)
    model = BlockModel(Source(source), torch.float32, torch.device("cpu"))
    windows = torch.randint(5, tiny_models.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model, model.record_calls(text_set(windows).batches(2))[0]
