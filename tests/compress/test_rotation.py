"""Rotations within heads: what they are judged by, that they only gain, where they are proved and refused, and saved whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import NumericalError, RecipeError
from compress.folding import Fold, FoldsOfAlike, find_folds
from compress.observe import InputObserver
from compress.patterns import NMPattern
from compress.recipe import Recipe
from compress.rotating import rotate_block
from compress.rotation import (
    HeadProblem,
    RotationOptions,
    best_rotations,
    record_of,
    rotate_columns,
    rotate_rows,
)
from compress.verify import verify
from tests import tiny_models
from tests.compress.test_folding import FOLDS, P24, Loaded, folds_of, is_attention
from tests.compress.test_pipeline import assert_same_model, both, stem
from tests.compress.test_resume import interrupted
from tests.runs import compress, identical, load, prompt, stored, tree

FAMILIES = [family for family, folds in FOLDS.items() if folds]
QUICK = {"steps": 20, "rate": 0.05}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def drawn(parts: int, channels: int, seed: int) -> Tensor:
    """Orthogonal matrices [P, C, C], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(parts, channels, channels, generator=generator, dtype=torch.float64)).Q


def problem(
    *,
    parts: int = 2,
    copies: int = 2,
    rows: int = 24,
    channels: int = 8,
    inputs: int = 16,
    pattern: NMPattern = P24,
    seed: int = 0,
) -> tuple[HeadProblem, Tensor, Tensor]:
    """Random weights, with the inputs that its moments are of: of the consumer [T, P, R, C], and of the producer [T, K]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(50, parts, copies, channels) * normal(channels).exp() @ normal(channels, channels)
    z = normal(50, inputs) * normal(inputs).exp()
    moments = torch.einsum("tprc,tprd->prcd", x, x)
    return (
        HeadProblem(
            normal(parts, copies, rows, channels), moments, normal(parts, channels, inputs), z.square().sum(0), pattern
        ),
        x,
        z,
    )


def share_dropped(scores: Tensor, pattern: NMPattern) -> float:
    """By sorting each group; float64."""
    ordered = scores.double().unflatten(-1, (-1, pattern.m)).sort(dim=-1).values
    return float(ordered[..., : pattern.m - pattern.keep_n].sum() / scores.double().sum())


# What rotations are judged by


@pytest.mark.parametrize("pattern", [P24, NMPattern(1, 4), NMPattern(4, 8)])
def test_the_share_that_is_dropped(pattern: NMPattern) -> None:
    """From the rotated weights and the rotated inputs themselves, head by head in float64."""
    of, x, z = problem(pattern=pattern)
    assert of.producer is not None
    rotations = drawn(2, 8, seed=1)
    found = of.dropped(rotations.float())
    for part, rotation in enumerate(rotations):
        turned = x[:, part].double() @ rotation  # [T, R, C]
        weights = of.consumer[part].double() @ rotation  # [R, N, C]
        output = weights.square() * turned.square().sum(0)[:, None, :]
        values = (rotation.T @ of.producer[part].double()).square() * z.double().square().sum(0)
        expected = share_dropped(output, pattern) + share_dropped(values, pattern)
        assert float(found[part]) == pytest.approx(expected, rel=1e-4)


def test_the_record_tells_of_both_matrices() -> None:
    of, x, z = problem()
    assert of.producer is not None
    rotations = drawn(2, 8, seed=1)
    output, values = [], []
    for part, rotation in enumerate(rotations):
        turned = x[:, part].double() @ rotation
        output.append((of.consumer[part].double() @ rotation).square() * turned.square().sum(0)[:, None, :])
        values.append((rotation.T @ of.producer[part].double()).square() * z.double().square().sum(0))
    record = record_of(of, rotations.float())
    assert record["output_dropped_after"] == pytest.approx(share_dropped(torch.stack(output), P24), rel=1e-4)
    assert record["values_dropped_after"] == pytest.approx(share_dropped(torch.stack(values), P24), rel=1e-4)
    output_alone = HeadProblem(of.consumer, of.moments, None, None, P24)
    assert record_of(output_alone, rotations.float()).keys() == {"output_dropped_before", "output_dropped_after"}


def test_entropy_of_even_and_of_single_weights() -> None:
    """log C where all of a row weigh alike, 0 where one weighs all."""
    eye = torch.eye(4).expand(1, 4, 4)
    even = HeadProblem(torch.ones(1, 1, 3, 4), torch.eye(4)[None, None], None, None, P24)
    assert float(even.entropy(eye)) == pytest.approx(torch.tensor(4.0).log().item())
    single = HeadProblem(torch.eye(4)[None, None], torch.eye(4)[None, None], None, None, P24)
    assert float(single.entropy(eye)) == pytest.approx(0, abs=1e-6)


# What is found


@settings(max_examples=25, deadline=None)
@given(
    parts=st.integers(1, 3), copies=st.integers(1, 3), channels=st.sampled_from([4, 8, 16]), inputs=st.sampled_from([4, 12]),
    keep=st.sampled_from([1, 2, 3]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_it_is_orthogonal_and_never_drops_more(
    parts: int, copies: int, channels: int, inputs: int, keep: int, seed: int
) -> None:
    of, _, _ = problem(
        parts=parts, copies=copies, channels=channels, inputs=inputs, pattern=NMPattern(keep, 4), seed=seed
    )
    rotations = best_rotations(of, RotationOptions(**QUICK))
    eye = torch.eye(channels).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.mT, eye, rtol=0, atol=1e-5)
    assert bool((of.dropped(rotations) <= of.dropped(eye)).all())
    assert torch.equal(rotations, best_rotations(of, RotationOptions(**QUICK)))


def test_it_gains_what_orders_alone_do_not() -> None:
    """Of random weights, on rows and inputs alike: a third of what is dropped, at least."""
    of, _, _ = problem(parts=2, copies=3, rows=96, channels=32, inputs=96)
    eye = torch.eye(32).expand(2, 32, 32)
    before, after = of.dropped(eye), of.dropped(best_rotations(of, RotationOptions()))
    assert bool((after < 0.67 * before).all()), (before, after)


def test_a_hidden_pattern_is_found_again() -> None:
    """Weights that have the pattern in another basis, each row's mask another one: there, nothing has to be dropped. The
    descent ends in other minima for about half of such heads."""
    dropped = []
    for seed in range(4):
        of, _, _ = problem(rows=64, channels=8, seed=seed)
        eye = torch.eye(8).expand(2, 8, 8)
        sparse = of.consumer * P24.mask(of.consumer.abs())
        hidden = drawn(2, 8, seed=seed + 2).float()
        turned = HeadProblem(sparse @ hidden.mT[:, None], torch.eye(8).expand(2, 2, 8, 8), None, None, P24)
        assert float(turned.dropped(eye).min()) > 0.1
        dropped += turned.dropped(best_rotations(turned, RotationOptions(steps=400))).tolist()
    assert max(dropped[:2]) < 0.001, dropped
    assert max(dropped) < 0.07
    assert sum(share < 0.001 for share in dropped) >= 3, dropped


def test_what_has_the_pattern_stays() -> None:
    of, _, _ = problem()
    assert of.producer is not None
    sparse = HeadProblem(
        of.consumer * P24.mask(of.consumer.abs()),
        of.moments,
        of.producer * P24.mask(of.producer.abs()),
        of.squares,
        P24,
    )
    assert torch.equal(best_rotations(sparse, RotationOptions(**QUICK)), torch.eye(8).expand(2, 8, 8))


def test_heads_do_not_influence_each_other() -> None:
    of, _, _ = problem(parts=3)
    assert of.producer is not None
    together = best_rotations(of, RotationOptions(**QUICK))
    for part in range(3):
        one = slice(part, part + 1)
        alone = HeadProblem(of.consumer[one], of.moments[one], of.producer[one], of.squares, P24)
        torch.testing.assert_close(best_rotations(alone, RotationOptions(**QUICK)), together[one], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zero", ["consumer", "moments", "producer", "squares"])
def test_nothing_but_zeros(zero: str) -> None:
    """A head that is never used, or an input that is always zero."""
    of, _, _ = problem()
    parts = {**vars(of), zero: torch.zeros_like(getattr(of, zero))}
    rotations = best_rotations(HeadProblem(**parts), RotationOptions(**QUICK))
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(8).expand(2, 8, 8), rtol=0, atol=1e-5)


def test_large_layers_are_judged_by_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    of, _, _ = problem(rows=40, inputs=64)
    monkeypatch.setattr("compress.rotation.ROWS", 20)
    monkeypatch.setattr("compress.rotation.COLUMNS", 16)
    part = of.sampled()
    assert part.producer is not None
    assert of.producer is not None
    assert torch.equal(part.consumer, of.consumer[:, :, ::4])  # of 2 * 40 rows at most 20
    columns = [c for group in range(0, 16, 4) for c in range(4 * group, 4 * group + 4)]  # whole groups
    assert torch.equal(part.producer, of.producer[:, :, columns])
    rotations = best_rotations(of, RotationOptions(**QUICK))
    assert bool((of.dropped(rotations) <= of.dropped(torch.eye(8).expand(2, 8, 8))).all())


# Where it is proved


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_found(family: str, tmp_path: Path) -> None:
    """In attention, and nowhere else."""
    source = tiny_models.build(family, tmp_path / "source", layers=2)
    loaded = Loaded(source)
    alone = [name for name in loaded.linears if loaded.observer.sharing(name) == [name]]
    found = find_folds(loaded.model, 1, loaded.hidden[0], alone, P24, rotations=True)
    expected = {name: producers for name, producers in folds_of(family, 1).items() if is_attention(name)}
    assert {fold.consumer: list(fold.producers) for fold in found} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_the_same(family: str, tmp_path: Path) -> None:
    """Random rotations in all blocks, in float64; the producers alone give another model."""
    source = tiny_models.build(family, tmp_path / "source", layers=2, dtype=torch.float32)
    model = load(source).double()
    before = model(prompt()).logits
    consumers: list[tuple[Any, Tensor, Fold]] = []
    for index in (0, 1):
        for fold in Loaded(source, block=index).found().values():
            if not fold.within_heads:
                continue
            rotations = drawn(fold.columns.shape[0], fold.columns.shape[2], seed=index)
            consumers.append((model.get_submodule(fold.consumer), rotations, fold))
            for name, rows in fold.producers.items():
                module = model.get_submodule(name)
                bias = None if module.bias is None else module.bias.clone()
                rotate_rows(module, rotations, rows)
                assert bias is None or not torch.equal(bias, module.bias)
    assert len(consumers) == 2
    producers_alone = model(prompt()).logits
    for module, rotations, fold in consumers:
        rotate_columns(module, rotations, fold.columns)
    after = model(prompt()).logits
    assert float((after - before).norm() / before.norm()) < 1e-10
    assert float((producers_alone - before).norm() / before.norm()) > 0.05


def test_what_can_be_reordered_is_not_always_rotated(tmp_path: Path) -> None:
    """Something that treats each channel alone, but not linearly, lies between attention and its output projection."""
    loaded = Loaded(tiny_models.build("llama", tmp_path / "source", layers=2))
    o = loaded.name("o_proj")
    alone = [o, loaded.name("down_proj")]

    def search(rotations: bool) -> list[str]:
        found = find_folds(loaded.model, 1, loaded.hidden[0], alone, P24, rotations=rotations)
        return [fold.consumer for fold in found]

    assert search(rotations=False) == alone
    assert search(rotations=True) == [o]
    loaded.linears[o].register_forward_pre_hook(lambda module, args: (args[0].sigmoid(),))
    assert search(rotations=False) == alone
    assert search(rotations=True) == []


def rotated(loaded: Loaded, known: FoldsOfAlike | None = None, **options: Any) -> dict[str, dict[str, Any]]:
    """The loaded block as the pipeline rotates it."""

    def observe(linears: Any, hidden: list[Tensor], needs: frozenset[str]) -> InputObserver:
        tokens = sum(states.shape[:-1].numel() for states in hidden)
        observer = InputObserver(linears, needs, tokens, loaded.model.blocks[loaded.index])
        observer.run(loaded.model, loaded.index, hidden)
        return observer

    known, chosen = known or FoldsOfAlike(rotations=True), RotationOptions(**{**QUICK, **options})
    return rotate_block(loaded.model, loaded.index, loaded.hidden, loaded.linears, observe, P24, chosen, known)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_stays_the_same_and_loses_less(family: str, tmp_path: Path) -> None:
    loaded = Loaded(tiny_models.build(family, tmp_path / "source", layers=2, dtype=torch.float32))
    before = loaded.output()
    weights = {name: module.weight.clone() for name, module in loaded.linears.items()}
    records = rotated(loaded)
    expected = {name: producers for name, producers in folds_of(family, 1).items() if is_attention(name)}
    assert {name: record["with"] for name, record in records.items()} == expected
    torch.testing.assert_close(loaded.output(), before, rtol=1e-4, atol=1e-4)
    changed = {*records, *(name for record in records.values() for name in record["with"])}
    for name, module in loaded.linears.items():
        assert torch.equal(module.weight, weights[name]) is (name not in changed)
    for record in records.values():
        assert 0 < record["output_dropped_after"] < record["output_dropped_before"] < 0.5
        assert 0 < record["values_dropped_after"] < 0.5


def test_it_goes_by_as_many_tokens_as_are_asked_for(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2, dtype=torch.float32)
    few, all_of_them, first = Loaded(source), Loaded(source), Loaded(source)
    first.hidden = first.hidden[:1]
    tokens = first.hidden[0].shape[:-1].numel()
    assert rotated(few, tokens=tokens) == rotated(first)
    assert rotated(all_of_them) != rotated(first)


@pytest.mark.parametrize("bad", ["o_proj", "v_proj"])
def test_weights_that_are_not_finite_are_named(bad: str, tmp_path: Path) -> None:
    loaded = Loaded(tiny_models.build("llama", tmp_path / "source", layers=2))
    known = FoldsOfAlike(rotations=True)
    known.of(loaded.model, 1, loaded.hidden[0], [loaded.name("o_proj")], P24)  # proved of another block that is sound
    loaded.linears[loaded.name(bad)].weight.data[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=rf"{bad if bad == 'o_proj' else '[ov]_proj'}"):
        rotated(loaded, known)


# From end to end


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "phi3", "gpt_neox", "gemma3"])
def test_family(family: str, tmp_path: Path) -> None:
    source = tiny_models.build(family, tmp_path / "source", layers=2)
    packed, dense = both(source, tmp_path, rotation="heads", rotation_options=QUICK)
    original, packed_tensors, dense_tensors = stored(source), stored(packed), stored(dense)
    assert dense_tensors.keys() == original.keys() == {stem(name) for name in packed_tensors}
    for directory in (packed, dense):
        assert not verify(directory).notes
    assert_same_model(packed, dense)

    report = json.loads((packed / "report.json").read_text())
    expected = {
        consumer: producers
        for index in (0, 1)
        for consumer, producers in folds_of(family, index).items()
        if is_attention(consumer)
    }
    recorded = {layer["name"]: layer["rotation"] for layer in report["layers"] if "rotation" in layer}
    assert {name: record["with"] for name, record in recorded.items()} == expected
    assert report["summary"]["layers_rotated"] == 2
    biases = {f"{name}.bias" for producers in expected.values() for name in producers} & original.keys()
    assert bool(biases) is (family not in ("llama", "phi3", "gemma3"))
    assert not any(identical(original[name], dense_tensors[name]) for name in biases)
    assert "heads mixed for it, and mixed back in the next layer | for 2 layers" in (packed / "README.md").read_text()

    plain = compress(source, tmp_path / "plain")
    assert plain.report["summary"]["layers_rotated"] == 0
    assert "mixed" not in (plain.directory / "README.md").read_text()
    error = {layer["name"]: layer["relative_output_error"] for layer in plain.report["layers"]}
    first = next(name for name in expected if ".0." in name)
    now = next(layer for layer in report["layers"] if layer["name"] == first)
    assert now["relative_output_error"] < error[first]


@pytest.mark.parametrize("format", ["packed", "dense"])
@pytest.mark.parametrize(("family", "ignored"), [("qwen2", "*.v_proj"), ("gpt2", "*.c_attn")])
def test_ignored_producers_are_saved(family: str, ignored: str, format: str, tmp_path: Path) -> None:
    """They show which rotation was taken; the output projection must have taken it, too."""
    source = tiny_models.build(family, tmp_path / "source", layers=2, dtype=torch.float32)
    settings: dict[str, Any] = {"ignore": (ignored,), "metric": "wanda", "reconstruction": "none", "format": format}
    done = compress(source, tmp_path / "out", rotation="heads", rotation_options=QUICK, **settings)
    before, now = load(source), load(done.directory)
    consumer, (producer,) = next((c, p) for c, p in folds_of(family, 0).items() if is_attention(c))
    kv_heads = tiny_models.HEADS if family == "gpt2" else tiny_models.KV_HEADS

    def weight(model: Any, name: str) -> Tensor:
        module = model.get_submodule(name)
        return (module.weight.T if family == "gpt2" else module.weight).double()

    def by_heads(rows: Tensor) -> Tensor:
        """[P, C, ...] of a projection's weight or bias; a fused one has the values last."""
        return rows[-kv_heads * 16 :].unflatten(0, (kv_heads, 16))

    old, new = weight(before, producer), weight(now, producer)
    rotations = torch.linalg.lstsq(by_heads(old).mT, by_heads(new).mT).solution  # new = Rᵀ old
    eye = torch.eye(16, dtype=torch.float64).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.mT, eye, rtol=0, atol=1e-4)
    assert float((rotations - eye).abs().amax()) > 0.1
    assert torch.equal(old[: -kv_heads * 16], new[: -kv_heads * 16])
    bias, moved = (model.get_submodule(producer).bias.double() for model in (before, now))
    torch.testing.assert_close(
        by_heads(moved), torch.einsum("pc,pcd->pd", by_heads(bias), rotations), rtol=1e-3, atol=1e-4
    )
    pruned = weight(now, consumer)
    parts = weight(before, consumer).view(-1, kv_heads, tiny_models.HEADS // kv_heads, 16)  # [N, P, R, C]
    expected = torch.einsum("nprc,pcd->nprd", parts, rotations).flatten(1)
    torch.testing.assert_close(pruned, expected * (pruned != 0), rtol=1e-3, atol=1e-4)
    assert int((pruned != 0).sum()) == pruned.numel() // 2


@pytest.mark.parametrize(
    "more",
    [
        {"permutation": "fold"},
        {"reconstruction": "admm", "targets": "dense"},
        {"repair": "block", "repair_options": {"passes": 1}},
        {"metric": "wanda++", "reconstruction": "none"},
        {"pattern": "4:8", "format": "dense"},
    ],
)
def test_with_other_parts_of_a_recipe(more: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    done = compress(source, tmp_path / "out", rotation="heads", rotation_options=QUICK, **more)
    assert done.report["summary"]["layers_rotated"] == 2
    assert done.report["summary"]["layers_permuted"] == (4 if "permutation" in more else 0)
    assert not verify(done.directory).notes


def test_resume(tmp_path: Path) -> None:
    source = tiny_models.build("qwen2", tmp_path / "source")
    recipe: dict[str, Any] = {"rotation": "heads", "rotation_options": QUICK, "permutation": "fold"}
    expected = compress(source, tmp_path / "expected", **recipe).directory
    interrupted(source, tmp_path / "out", blocks=1, **recipe)
    compress(source, tmp_path / "out", resume=True, **recipe)
    assert tree(tmp_path / "out") == tree(expected)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"pattern": "unstructured", "sparsity": 0.5, "format": "dense"}, "goes by the groups of an N:M pattern"),
        ({"metric": "gblm", "reconstruction": "none"}, "metric 'gblm' weighs each weight by a gradient"),
        ({"metric": "pruner-zero", "reconstruction": "none"}, "metric 'pruner-zero' weighs each weight by a gradient"),
        ({"rotation": "none", "rotation_options": {"steps": 5}}, "rotation_options were given, but no rotation"),
        ({"rotation_options": {"angle": 5}}, "angle"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.create(**{"rotation": "heads", **recipe})
