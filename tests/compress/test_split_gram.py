"""The Gram matrix in two parts: which windows are held out, and that nothing is lost or counted twice."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import NumericalError
from compress.gram import HELD_OUT_WINDOWS, Part, held_out_period
from compress.statistics import InputStatistics


def plain(t: int, k: int, seed: int = 0) -> Tensor:
    """Inputs [t, k] that hang together, with a mean, and no token far louder than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return x.clamp(-1, 1) + torch.rand(t, k, generator=generator) + 0.5


def split(x: Tensor, windows: int, cuts: list[int] | None = None, tokens: int | None = None) -> InputStatistics:
    statistics = InputStatistics({"split_gram"}, x.shape[1], tokens=tokens or len(x), windows=windows)
    for a, b in itertools.pairwise([0, *sorted(cuts or []), len(x)]):
        statistics.update(x[a:b])
    return statistics


def assert_part(part: Part, rows: Tensor) -> None:
    """The sums over some rows [t, k]."""
    assert part.tokens == len(rows)
    sums = rows.double().sum(dim=0)
    torch.testing.assert_close(part.sum, sums, rtol=0, atol=1e-5 * float(rows.double().abs().sum(dim=0).max()))
    exact = rows.double()
    scale = exact.square().sum(dim=0).sqrt().clamp_min(1e-300)
    assert float(((part.gram.double() - exact.T @ exact) / scale / scale[:, None]).abs().max()) < 1e-5


def held_out_rows(windows: int, length: int) -> Tensor:
    """Which tokens are held out, [windows · length] bool: the middle one of each period."""
    period = held_out_period(windows)
    return (torch.arange(windows) % period == period // 2).repeat_interleave(length)


@given(
    windows=st.integers(2, 40),
    length=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 360), max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_windows_go_whole_into_one_part_however_the_calls_cut_them(
    windows: int, length: int, cuts: list[int], dtype: torch.dtype
) -> None:
    x = plain(windows * length, 6, seed=windows).to(dtype)
    statistics = split(x, windows, [min(cut, len(x)) for cut in cuts])
    held_out = held_out_rows(windows, length)
    assert_part(statistics.split_gram.held_out, x[held_out])
    assert_part(statistics.split_gram.fit, x[~held_out])


@pytest.mark.parametrize("windows", [2, 3, 16, 31, 32, 33, 64, 100, 127, 128, 129, 1000])
def test_an_eighth_is_held_out_but_not_less_than_sixteen_windows_nor_more_than_half(windows: int) -> None:
    held_out = int(held_out_rows(windows, 1).sum())
    assert held_out >= min(HELD_OUT_WINDOWS, windows // 2)
    assert held_out >= windows // 8
    assert held_out <= (windows + 1) // 2
    assert windows < 128 or held_out <= windows // 8 + 1


def test_of_a_single_window_nothing_is_held_out() -> None:
    x = plain(20, 8)
    parts = split(x, 1).split_gram
    assert_part(parts.fit, x)
    assert_part(parts.held_out, x[:0])
    assert not parts.held_out.mean.any()


def test_it_stands_for_the_gram_matrix() -> None:
    x = plain(64, 12)
    both = InputStatistics({"gram", "split_gram"}, 12, tokens=64, windows=8)
    both.update(x[:30])
    assert_part(Part(both.gram, x[:30].double().sum(dim=0), 30), x[:30])
    both.update(x[30:])  # what was read before is out of date
    assert_part(Part(both.gram, x.double().sum(dim=0), 64), x)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    both.permute(order)
    assert_part(Part(both.gram, x[:, order].double().sum(dim=0), 64), x[:, order])
    held_out = held_out_rows(8, 8)
    assert_part(both.split_gram.held_out, x[held_out][:, order])
    with pytest.raises(KeyError, match=r"split_gram.* was not gathered"):
        _ = InputStatistics({"gram"}, 12, tokens=64, windows=8).split_gram


def test_a_stream_that_is_shorter_than_announced() -> None:
    """An expert gets a part of the tokens; its windows are as long as the calibration's."""
    x = plain(30, 8)
    parts = split(x, windows=32, tokens=320, cuts=[3, 17]).split_gram
    assert_part(parts.held_out, x[10:20])
    assert_part(parts.fit, torch.cat([x[:10], x[20:]]))


def test_about_a_mean() -> None:
    """Also about that of other tokens, and where the mean is far larger than the spread; never indefinite."""
    for offset in (0.0, 0.5, 30.0):
        x = plain(300, 16, seed=3) + offset
        parts = split(x, 6).split_gram
        mean = parts.fit.mean
        for part, rows in ((parts.fit, x[~held_out_rows(6, 50)]), (parts.held_out, x[held_out_rows(6, 50)])):
            exact = rows.double() - mean
            size = rows.double().square().sum(dim=0).sqrt()
            off = (part.about(mean).double() - exact.T @ exact) / size / size[:, None]
            assert float(off.abs().max()) < 1e-5
            assert float(torch.linalg.eigvalsh(part.about(mean).double())[0]) > 0
    constant = split(torch.full((64, 4), 7.3), 8).split_gram.fit
    assert float(torch.linalg.eigvalsh(constant.about(constant.mean).double())[0]) > -1e-4
    assert float(constant.about(constant.mean).abs().max()) < 1e-4 * float(constant.gram.max())


@pytest.mark.parametrize("where", [0, 17])
def test_a_value_that_is_not_finite_is_found_in_either_part(where: int) -> None:
    x = plain(32, 8)
    x[where, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"up_proj: .*NaN or infinity.*'split_gram'"):
        split(x, 2).require_finite("up_proj")
