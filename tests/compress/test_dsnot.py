"""DSnoT against its description, written down again for one row at a time with plain Python numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import RecipeError
from compress.layer_statistics import LayerStatistics
from compress.methods import Pruning, Reconstructed, Reconstruction, parse_options
from compress.metrics.wanda import wanda
from compress.patterns import Group, NMPattern, Pattern, UnstructuredPattern, parse_pattern
from compress.reconstruction import DSNOT, R2_DSNOT
from compress.reconstruction.dsnot import DSnoTOptions, dsnot
from compress.reconstruction.r2_dsnot import R2DSnoTOptions, r2_dsnot
from tests import tiny_models
from tests.compress.layers import gathered, layer
from tests.runs import compress

CASES = [("2:4", "row"), ("4:8", "row"), ("1:4", "row"), ("0.5", "row"), ("0.7", "layer"), ("0.5", "block")]


pytestmark = pytest.mark.usefixtures("one_thread")


def parse(pattern: str) -> Pattern:
    return parse_pattern(pattern) if ":" in pattern else UnstructuredPattern(float(pattern))


def one_row(
    d: list[float],
    growing: list[float],
    staying: list[float],
    kept: list[bool],
    m: int | None,
    cycles: int,
    threshold: float,
    overshoot: bool,
) -> tuple[list[bool], int]:
    """Section 3 of arXiv 2310.08915 as in the head of `compress.reconstruction.dsnot`, for one row: the new mask, swaps."""
    columns = range(len(d))
    mask = list(kept)
    tried, spent = set(), set()
    error = sum(d[j] for j in columns if not kept[j])
    first_sign = (error > 0) - (error < 0)
    swaps = 0
    for _ in range(cycles):
        if abs(error) <= threshold:
            break
        side = 1 if error > 0 else -1
        grown = None
        for j in columns:
            allowed = not kept[j] and j not in tried and side * d[j] > 0
            if allowed and (grown is None or growing[j] > growing[grown]):
                grown = j
        if grown is None:
            break
        candidates = [j for j in columns if kept[j] and j not in spent]
        if m is None:
            candidates = [j for j in candidates if side * d[j] < 0]
            if not candidates:
                break
        else:
            candidates = [j for j in candidates if j // m == grown // m]
        tried.add(grown)
        if not candidates:
            continue
        pruned = candidates[0]
        for j in candidates:
            if staying[j] < staying[pruned]:
                pruned = j
        after = error + d[pruned] - d[grown]
        if (m is not None or not overshoot) and (after > 0) - (after < 0) != first_sign:
            break
        spent.add(pruned)
        mask[grown], mask[pruned] = True, False
        error = after
        swaps += 1
    return mask, swaps


def plain(weight: Tensor, x: Tensor, windows: int, pruning: Pruning, options: DSnoTOptions) -> tuple[Tensor, int]:
    """The criteria written with float64 numbers, then the rows one by one."""
    w, x = weight.double(), x.double()
    s = x.sum(dim=0) / windows
    variance = ((x - x.mean(dim=0)) ** 2).sum(dim=0) / max(len(x) - 1, 1)
    largest = variance.max()
    variance = variance.clamp(min=1e-12 * largest) if largest > 0 else torch.ones_like(variance)
    assert pruning.mask is not None
    assert pruning.scores is not None
    growing, staying = w, pruning.scores.double()
    penalty_grow = penalty_prune = torch.zeros_like(w)
    if isinstance(options, R2DSnoTOptions):
        share = torch.zeros_like(w)
        for i in range(w.shape[0]):
            for j in range(w.shape[1]):
                if w[i, j] != 0:
                    share[i, j] = w[i, j].abs() / w[:, j].abs().sum() + w[i, j].abs() / w[i].abs().sum()
        if options.relative == "grow":
            growing = share
        else:
            staying = share * (x**2).sum(dim=0) ** (options.alpha / 2)
        penalty_grow = options.gamma_grow * w.abs() ** options.p
        penalty_prune = options.gamma_prune * w.abs() ** options.p
    growing = (growing * s / variance**options.variance_power).abs() + penalty_grow
    staying = staying + penalty_prune
    rows, swaps = [], 0
    for i in range(w.shape[0]):
        mask, done = one_row(
            (w[i] * s).tolist(),
            growing[i].tolist(),
            staying[i].tolist(),
            pruning.mask[i].tolist(),
            pruning.pattern.m if isinstance(pruning.pattern, NMPattern) else None,
            options.max_cycles,
            options.threshold,
            options.overshoot,
        )
        rows.append(mask)
        swaps += done
    return torch.tensor(rows), swaps


def start(weight: Tensor, x: Tensor, windows: int, pattern: Pattern, group: Group) -> tuple[LayerStatistics, Pruning]:
    statistics = gathered(x, {"moments", "sum_of_squares"}, windows=windows)
    scores = wanda(weight, statistics)
    return statistics, Pruning(pattern, group, pattern.mask(scores, group), scores)


def check(
    weight: Tensor, x: Tensor, windows: int, pattern: Pattern, group: Group, options: DSnoTOptions
) -> Reconstructed:
    """Runs the method of the options, compares with the plain one, and returns the result."""
    statistics, pruning = start(weight, x, windows, pattern, group)
    assert pruning.mask is not None
    before = pruning.mask.clone()
    method = R2_DSNOT if isinstance(options, R2DSnoTOptions) else DSNOT
    result = method.run(weight, pruning, statistics, options)
    mask, swaps = plain(weight, x, windows, pruning, options)
    assert torch.equal(result.mask, mask)
    assert torch.equal(result.weight, weight * mask)
    assert result.notes == {"swaps": swaps, "rows_changed": int((before != mask).any(dim=1).sum())}
    assert torch.equal(pruning.mask, before)
    assert torch.equal(mask.sum(dim=1), before.sum(dim=1))
    if isinstance(pattern, NMPattern):
        assert mask.unflatten(1, (-1, pattern.m)).sum(dim=2).eq(pattern.keep_n).all()
    return result


@pytest.mark.parametrize(("pattern", "group"), CASES)
@pytest.mark.parametrize(("n", "k", "t"), [(1, 16, 60), (9, 72, 300), (5, 264, 900)])
@pytest.mark.parametrize("overshoot", [True, False])
def test_equals_the_description(pattern: str, group: Group, n: int, k: int, t: int, overshoot: bool) -> None:
    weight, x = layer(n, k, t)
    check(weight, x, 4, parse(pattern), group, DSnoTOptions(overshoot=overshoot))


@pytest.mark.parametrize(
    "options", [{"max_cycles": 0}, {"max_cycles": 3}, {"threshold": 60.0}, {"variance_power": 0.0}]
)
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_options(options: dict[str, float], pattern: str) -> None:
    weight, x = layer(12, 136, 500)
    statistics, pruning = start(weight, x, 4, parse(pattern), "row")
    assert pruning.mask is not None
    usual = dsnot(weight, pruning, statistics, DSnoTOptions())
    result = check(weight, x, 4, parse(pattern), "row", DSnoTOptions.model_validate(options))
    assert not torch.equal(result.mask, usual.mask)
    if options == {"max_cycles": 0}:
        assert torch.equal(result.mask, pruning.mask)
    if "max_cycles" in options:
        assert int((result.mask & ~pruning.mask).sum(dim=1).max()) <= options["max_cycles"]


@pytest.mark.parametrize("relative", ["grow", "prune"])
@pytest.mark.parametrize("gammas", [(0.0, 0.0), (1e-3, 1e-3), (10.0, 0.0), (0.0, 10.0)])
@pytest.mark.parametrize(("pattern", "group"), CASES)
def test_r2_equals_its_formula(relative: str, gammas: tuple[float, float], pattern: str, group: Group) -> None:
    weight, x = layer(9, 72, 300)
    options = R2DSnoTOptions.model_validate(
        {"relative": relative, "gamma_grow": gammas[0], "gamma_prune": gammas[1], "p": 2.0, "alpha": 0.7}
    )
    check(weight, x, 4, parse(pattern), group, options)


def test_r2_options_make_a_difference() -> None:
    weight, x = layer(16, 264, 900)
    statistics, pruning = start(weight, x, 4, UnstructuredPattern(0.6), "row")
    masks = [dsnot(weight, pruning, statistics, DSnoTOptions()).mask]
    for options in ({}, {"relative": "grow"}, {"alpha": 0.0}, {"gamma_grow": 10.0}, {"gamma_prune": 10.0}):
        masks.append(r2_dsnot(weight, pruning, statistics, R2DSnoTOptions.model_validate(options)).mask)
    for i, one in enumerate(masks):
        assert not any(torch.equal(one, other) for other in masks[:i])


def test_zero_rows_of_r2_have_no_share() -> None:
    weight, x = layer(6, 32, 100)
    weight[2] = 0
    weight[:, 5] = 0
    for relative in ("grow", "prune"):
        check(weight, x, 4, NMPattern(2, 4), "row", R2DSnoTOptions.model_validate({"relative": relative}))


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_the_mean_output_comes_closer(pattern: str) -> None:
    """What it is for: the expected error over all rows falls to a fraction, and no row that stops keeps its sign away."""
    weight, x = layer(40, 264, 900)
    statistics, pruning = start(weight, x, 4, parse(pattern), "row")
    assert pruning.mask is not None
    result = dsnot(weight, pruning, statistics, DSnoTOptions())
    s = x.double().sum(dim=0) / 4

    def error(mask: Tensor) -> Tensor:
        return ((weight.double() * s) * ~mask).sum(dim=1)

    assert float(error(result.mask).abs().sum()) < 0.5 * float(error(pruning.mask).abs().sum())
    if pattern == "2:4":
        assert torch.equal(error(result.mask).sign(), error(pruning.mask).sign())


def test_the_threshold_is_that_of_a_sample() -> None:
    """Twice as many samples of half the length: the same inputs, half the error."""
    weight, x = layer(12, 136, 512)
    for pattern in (NMPattern(2, 4), UnstructuredPattern(0.5)):
        four, eight = (
            check(weight, x, windows, pattern, "row", DSnoTOptions(threshold=threshold))
            for windows, threshold in ((4, 2.0), (8, 1.0))
        )
        assert torch.equal(four.mask, eight.mask)


def test_dead_and_constant_inputs() -> None:
    """Neither an infinity nor a NaN decides: a dead input is never exchanged for, a constant one comes first."""
    weight, x = layer(8, 64, 200)
    x[:, [0, 1, 17, 40]] = 0
    x[:, 9] = 0.5
    weight[3] = 0
    for pattern in ("2:4", "1:4", "0.5"):
        result = check(weight, x, 4, parse(pattern), "row", DSnoTOptions(variance_power=2.0))
        _, pruning = start(weight, x, 4, parse(pattern), "row")
        assert pruning.mask is not None
        grown = result.mask & ~pruning.mask
        assert not grown[:, [0, 1, 17, 40]].any()
        assert not grown[3].any()


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_one_token(pattern: str) -> None:
    weight, x = layer(8, 64, 1)
    result = check(weight, x * 5, 1, parse(pattern), "row", DSnoTOptions())
    assert result.notes["swaps"] > 0


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "0.5"])
def test_ties(pattern: str) -> None:
    """All numbers are small integers over powers of two: the order of equals is all there is."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-2, 3, (10, 48), generator=generator).float()
    x = torch.randint(0, 2, (8, 48), generator=generator).float()
    x = torch.cat([x, 1 - x, x + 0.5, x])  # 32 tokens: the mean is exact
    check(weight, x, 1, parse(pattern), "row", DSnoTOptions(variance_power=0.0))


def test_negative_scores_are_ordered() -> None:
    """A metric's scores may be anything finite; −0.0 and 0.0 are equal."""
    weight, x = layer(8, 64, 200)
    statistics = gathered(x, {"moments", "sum_of_squares"}, windows=4)
    scores = (torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * 2).round() / 2
    for pattern in (NMPattern(2, 4), UnstructuredPattern(0.5)):
        pruning = Pruning(pattern, "row", pattern.mask(scores), scores)
        result = dsnot(weight, pruning, statistics, DSnoTOptions())
        mask, swaps = plain(weight, x, 4, pruning, DSnoTOptions())
        assert torch.equal(result.mask, mask)
        assert result.notes["swaps"] == swaps > 0


def test_rows_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["compress.reconstruction.dsnot"]
    weight, x = layer(11, 64, 200)
    whole = check(weight, x, 4, NMPattern(2, 4), "row", DSnoTOptions())
    monkeypatch.setattr(module, "AT_ONCE", 3 * 64)
    assert torch.equal(check(weight, x, 4, NMPattern(2, 4), "row", DSnoTOptions()).mask, whole.mask)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 6),
    groups=st.integers(1, 20),
    tokens=st.integers(1, 60),
    case=st.sampled_from(CASES),
    overshoot=st.booleans(),
    power=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_any_layer(
    n: int, groups: int, tokens: int, case: tuple[str, Group], overshoot: bool, power: float, seed: int
) -> None:
    weight, x = layer(n, 8 * groups, tokens, seed)
    if tokens % 3 == 0:
        x[:, ::5] = 0
    options = DSnoTOptions(overshoot=overshoot, variance_power=power)
    result = check(weight, x, 1, parse(case[0]), case[1], options)
    assert math.isfinite(float(result.weight.abs().max()))


def test_registered_with_what_they_need() -> None:
    assert DSNOT.needs == {"moments"}
    assert R2_DSNOT.needs == {"moments", "sum_of_squares"}
    assert not DSNOT.own_metric
    assert not R2_DSNOT.own_metric


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (DSNOT, {"threshold": float("inf")}),
        (R2_DSNOT, {"gamma_prune": float("inf")}),
        (R2_DSNOT, {"gamma_grow": float("nan")}),
        (R2_DSNOT, {"p": float("inf")}),
    ],
)
def test_numbers_that_leave_nothing_to_compare_are_refused(method: Reconstruction, options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"option '{next(iter(options))}' of {method.name}"):
        parse_options(method, options)


@pytest.mark.parametrize("method", [DSNOT, R2_DSNOT])
def test_layers_that_are_skipped_keep_their_mask(method: Reconstruction) -> None:
    weight, x = layer(16, 72, 300)
    statistics, pruning = start(weight, x, 4, NMPattern(2, 4), "row")
    options = parse_options(method, {"skip": "mlp"})
    for name, skipped in (
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0.self_attn.q_proj", False),
        ("", False),
    ):
        statistics.name = name
        result = method.run(weight, pruning, statistics, options)
        assert torch.equal(result.mask, pruning.mask) is skipped  # type: ignore[arg-type]
        assert torch.equal(result.weight, weight * result.mask)
        assert ("skipped" in result.notes) is skipped
        usual = method.run(weight, pruning, statistics, parse_options(method, {}))
        assert torch.equal(usual.mask, result.mask) is not skipped


def test_skipped_layers_of_a_run(tmp_path: Path) -> None:
    """As the published code does it by default: attention is altered, the MLP is not."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    settings: dict[str, Any] = {"metric": "wanda", "reconstruction": "dsnot"}
    done = compress(source, tmp_path / "out", **settings, reconstruction_options={"skip": "mlp", "threshold": 0})
    for record in done.report["layers"]:
        assert ("skipped" in record) is (".mlp." in record["name"])
        assert ("swaps" in record) is (".self_attn." in record["name"])
    with pytest.raises(
        RecipeError, match=r"option skip=fc: no linear layer has that in its name; they are model\.layers"
    ):
        compress(source, tmp_path / "other", **settings, reconstruction_options={"skip": "fc"})
    assert not (tmp_path / "other.partial").exists()
