"""New masks for trained blocks: exchanges that do what is predicted, and are undone where they help nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress import pipeline, remask, repair
from compress.course import relative_error
from compress.errors import RecipeError
from compress.recipe import Recipe
from compress.remask import Sensitivity, chosen, exchanged, exchanges, sensitivities
from compress.repair import held_out_batches
from compress.training import MaskedAdam
from tests.runs import LENGTH, compress, report, stored, tree
from tests.runs import build_with_text as build

SAMPLES = 36
OPTIONS = {"passes": 2, "rate": 0.02, "rounds": 2, "exchanged": 0.002}
SETTINGS: dict[str, Any] = {"repair": "block", "repair_options": OPTIONS, "samples": SAMPLES}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(n: int, k: int, keep_n: int, m: int, seed: int = 1) -> Tensor:
    """[n, k], keep_n of m."""
    order = draw(n, k // m, m, seed=seed).argsort(dim=-1)
    return (order < keep_n).flatten(1)


class TwoLinears(nn.Module):
    """x -> W1 -> W2, without anything between them: what Gauss and Newton say is exact in W1 alone."""

    def __init__(self, first: nn.Module, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def signs_of(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_and_curvature_are_those_of_the_loss(transposed: bool) -> None:
    """Against autograd's Hessian of the loss in float64: tokens of equal energy, where K-FAC's form is exact, and the mean
    over many draws of the signs."""
    n, k, hidden, tokens, m = 3, 8, 5, 11, 4
    first: Any = Conv1D(n, k) if transposed else nn.Linear(k, n, bias=False)
    model = TwoLinears(first, nn.Linear(n, hidden, bias=False)).double()
    xs = [draw(1, tokens, k, seed=seed) for seed in (2, 3)]
    targets = [nn.functional.normalize(draw(1, tokens, hidden, seed=seed), dim=-1) * 3 for seed in (4, 5)]

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().sum(-1) / target.square().sum(-1)

    def of(weight: Tensor) -> Tensor:
        outs = [torch.func.functional_call(model, {"first.weight": weight}, (x,)) for x in xs]
        return torch.stack([loss(out, target).mean() for out, target in zip(outs, targets, strict=True)]).mean()

    weight = model.first.weight.detach()
    gradient = torch.autograd.functional.jacobian(of, weight)
    hessian: Any = torch.autograd.functional.hessian(of, weight)  # [*shape, *shape]
    if transposed:
        gradient, hessian = gradient.T, hessian.permute(1, 0, 3, 2)
    rows = []
    for seed in range(400):
        found = sensitivities(
            {"first": model.first}, m, [0, 1], lambda b: model(xs[b]), lambda b: targets[b], loss, signs_of(seed)
        )["first"]
        rows.append(found.rows)
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-5, atol=1e-6)
    mean = torch.stack(rows).mean(0).double()
    spread = torch.stack(rows).double().std(0) / len(rows) ** 0.5
    x = torch.cat([x.flatten(0, 1) for x in xs])
    for row, group in itertools.product(range(n), range(k // m)):
        columns = slice(group * m, group * m + m)
        exact = hessian[row, columns, row, columns]
        moments = (x[:, columns].T @ x[:, columns]) / len(x)
        torch.testing.assert_close(found.moments[group].double(), moments, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean[row] * moments, exact, rtol=5 * float((spread / mean).max()), atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(1, 4, 2, 4), (3, 8, 2, 4), (2, 16, 4, 8), (3, 6, 1, 2), (2, 9, 2, 3), (2, 12, 3, 4)]),
    seed=st.integers(0, 10**6),
    dead=st.booleans(),
)
def test_an_exchange_is_the_best_of_all_pairs(shape: tuple[int, int, int, int], seed: int, dead: bool) -> None:
    """Brute force over the pairs, each quadratic minimised in float64."""
    n, k, keep_n, m = shape
    mask = masks(n, k, keep_n, m, seed)
    weight = (draw(n, k, seed=seed + 1) * mask).float()
    x = draw(7, k // m, m, seed=seed + 2)
    if dead:
        x[:, 0, 0] = 0
    moments = torch.einsum("tgi,tgj->gij", x, x) / 7
    sensitivity = Sensitivity(
        draw(n, k, seed=seed + 3).float(), draw(n, seed=seed + 4).square().float(), moments.float()
    )
    found = exchanges(weight, mask, sensitivity)
    for row, group in itertools.product(range(n), range(k // m)):
        at = slice(group * m, group * m + m)
        w, g, kept = weight[row, at].double(), sensitivity.gradient[row, at].double(), mask[row, at]
        h = sensitivity.rows[row].double() * sensitivity.moments[group].double()
        best = 0.0
        for a, c in itertools.product(range(m), range(m)):
            if not kept[a] or kept[c] or h[c, c] == 0:
                continue
            delta = torch.zeros(m, dtype=torch.float64)
            delta[a] = -w[a]
            delta[c] = -(g[c] + h[c] @ delta) / h[c, c]  # where the derivative with respect to c is zero
            best = min(best, float(g @ delta + delta @ h @ delta / 2))
        assert float(found.change[row, group]) == pytest.approx(best, rel=1e-4, abs=1e-5)
        if found.change[row, group] < 0:
            a, c = int(found.dropped[row, group]), int(found.grown[row, group])
            assert kept[a]
            assert not kept[c]
            delta = torch.zeros(m, dtype=torch.float64)
            delta[a], delta[c] = -w[a], float(found.value[row, group])
            assert float(g @ delta + delta @ h @ delta / 2) == pytest.approx(best, rel=1e-4, abs=1e-5)


def test_the_prediction_comes_true() -> None:
    """One linear as the whole block, tokens of equal energy: the model of second order is exact, so is every prediction."""
    n, k, m = 6, 16, 4
    mask = masks(n, k, 2, m)
    module = nn.Linear(k, n, bias=False)
    with torch.no_grad():
        module.weight.copy_(draw(n, k) * mask)
    x = draw(1, 50, k, seed=7).float()
    target = (nn.functional.normalize(draw(1, 50, n, seed=8), dim=-1) * 4).float()
    found = sensitivities({"y": module}, m, [0], lambda b: module(x), lambda b: target, relative_error, signs_of())
    best = exchanges(module.weight.detach(), mask, found["y"])
    before = float(relative_error(x @ module.weight.detach().T, target).mean())
    wanted = (best.change < 0).nonzero()
    assert len(wanted) > 5
    for row, group in wanted.tolist():
        one = torch.zeros_like(best.change, dtype=torch.bool)
        one[row, group] = True
        weight, new = exchanged(module.weight.detach(), mask, best, one)
        assert int((new != mask).sum()) == 2
        assert bool((new.unflatten(1, (-1, m)).sum(-1) == 2).all())
        assert not bool(weight[~new].any())
        change = float(relative_error(x @ weight.T, target).mean()) - before
        assert change == pytest.approx(float(best.change[row, group]), rel=1e-3, abs=1e-6)


def test_exchanges_are_judged_by_other_windows() -> None:
    """What `predicted` says of the windows that the exchanges were found on is what `exchanges` says; of others, what a
    quadratic says that is written out."""
    n, k, m = 5, 24, 8
    mask = masks(n, k, 4, m)
    weight = (draw(n, k) * mask).float()

    def sensitivity(seed: int) -> Sensitivity:
        x = draw(9, k // m, m, seed=seed)
        return Sensitivity(
            draw(n, k, seed=seed + 1).float(),
            draw(n, seed=seed + 2).square().float(),
            (torch.einsum("tgi,tgj->gij", x, x) / 9).float(),
        )

    one, other = sensitivity(10), sensitivity(20)
    found = exchanges(weight, mask, one)
    torch.testing.assert_close(remask.predicted(weight, found, one), found.change, rtol=1e-4, atol=1e-5)
    judged = remask.predicted(weight, found, other)
    for row, group in itertools.product(range(n), range(k // m)):
        delta = torch.zeros(m, dtype=torch.float64)
        if found.change[row, group] < 0:
            a, c = int(found.dropped[row, group]), int(found.grown[row, group])
            delta[a] = -weight[row, group * m + a]
            delta[c] = found.value[row, group]
        h = other.rows[row].double() * other.moments[group].double()
        expected = other.gradient[row, group * m : group * m + m].double() @ delta + delta @ h @ delta / 2
        assert float(judged[row, group]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_the_best_of_all_linears_within_the_share() -> None:
    found = {"a": torch.tensor([[-3.0, 0.0, -1.0, 4.0]]), "b": torch.tensor([[-2.0, 0.0, 0.0, -0.5]])}
    picked = {name: groups.tolist() for name, groups in chosen(found, 3 / 8).items()}
    assert picked == {"a": [[True, False, True, False]], "b": [[True, False, False, False]]}
    assert {name: int(groups.sum()) for name, groups in chosen(found, 1.0).items()} == {"a": 2, "b": 2}
    assert not any(bool(groups.any()) for groups in chosen(found, 0.1).values())


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One window a batch, so that there are some to hold out."""
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", LENGTH)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_rounds_in_a_run(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks change, stay 2:4 at every step, and a kept round is one with a lower error."""
    step = MaskedAdam.step

    def watched(self: MaskedAdam) -> None:
        step(self)
        for trainable in self.parameters.values():
            if trainable.mask is not None:
                assert not trainable.parameter.detach()[~trainable.mask].any()
                axis = 0 if family == "gpt2" else 1  # Conv1D keeps its inputs first
                assert bool((trainable.mask.movedim(axis, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all())

    monkeypatch.setattr(MaskedAdam, "step", watched)
    source = build(family, tmp_path)
    out = compress(source, tmp_path / "out", format="dense", **SETTINGS).directory
    without = SETTINGS | {"repair_options": OPTIONS | {"rounds": 0}}
    plain = compress(source, tmp_path / "plain", format="dense", **without).directory
    rounds = [record["rounds"] for record in report(out)["repairs"]]
    assert any(one["kept"] for of in rounds for one in of)
    for record in report(out)["repairs"]:
        fitted = SAMPLES - held_out_batches(SAMPLES)
        tried = record["rounds"]
        assert record["steps"] == (OPTIONS["passes"] + len(tried)) * fitted
        assert all(0 < one["exchanged"] <= OPTIONS["exchanged"] * one["groups"] for one in tried)
        kept = [one["held_out_error"] for one in tried if one["kept"]]
        assert record["held_out_error"] == (kept[-1] if kept else record["held_out_error"])
        assert kept == sorted(kept, reverse=True)
    first = report(out)["repairs"][0]
    alone = report(plain)["repairs"][0]
    assert first["held_out_error_before"] == alone["held_out_error_before"]
    if first["rounds"][0]["kept"]:
        assert first["held_out_error"] < alone["held_out_error"]
    layers = {layer["name"]: layer for layer in report(out)["layers"] if layer["status"] == "pruned"}
    before, after = stored(plain), stored(out)
    changed = 0
    for name in layers:
        key = next(key for key in after if key.endswith(f"{name}.weight"))
        zeros = after[key] == 0
        assert float(zeros.float().mean()) >= 0.5
        changed += int((zeros != (before[key] == 0)).sum())
    assert changed


@pytest.mark.usefixtures("small_batches")
def test_a_round_that_helps_nothing_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "REMASK_RATE", 1000.0)
    source = build("llama", tmp_path)
    out = compress(source, tmp_path / "out", **SETTINGS).directory
    without = SETTINGS | {"repair_options": OPTIONS | {"rounds": 0}}
    plain = compress(source, tmp_path / "plain", **without).directory
    for record in report(out)["repairs"]:
        assert [one["kept"] for one in record["rounds"]] == [False]
    mine, others = stored(out), stored(plain)
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.usefixtures("small_batches")
def test_a_run_killed_in_a_round_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def stop(done: int, total: int, text: str) -> None:
        if done == 1 and "masks 1 of 2" in text:
            raise Killed

    source = build("llama", tmp_path)
    expected = compress(source, tmp_path / "whole" / "out", **SETTINGS).directory
    out = tmp_path / "killed" / "out"
    with pytest.raises(Killed):
        compress(source, out, checkpoint_seconds=0, progress=stop, **SETTINGS)
    assert tree(compress(source, out, resume=True, **SETTINGS).directory) == tree(expected)


def test_rounds_want_groups() -> None:
    with pytest.raises(RecipeError, match="rounds"):
        Recipe.create(
            repair="block", repair_options={"rounds": 1}, pattern="unstructured", sparsity=0.5, format="dense"
        )


def test_a_layer_that_the_model_multiplies_by_hand_keeps_its_mask() -> None:
    """Its inputs are not seen, so nothing is known of it."""
    module, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    x = torch.randn(1, 3, 4)
    found = sensitivities(
        {"called": module, "by hand": other},
        4,
        [0],
        lambda b: module(x) @ other.weight.T,
        lambda b: torch.ones(1, 3, 4),
        relative_error,
        signs_of(),
    )
    assert found.keys() == {"called"}
