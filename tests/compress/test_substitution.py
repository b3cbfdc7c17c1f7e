"""Windows in which tokens stand for others: which change, how, and what a run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from compress import samples as module
from compress.calibration import load_windows
from compress.split import Split
from compress.substitution import exchangeable_tokens, substitute
from tests import tiny_models
from tests.runs import LENGTH, Halve, build_with_text, compress, flags, stored

TOKENS = 60
WINDOWS = st.integers(1, 7).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, TOKENS - 1), min_size=length, max_size=length), min_size=1, max_size=6
    )
)


@given(WINDOWS, st.floats(0, 1), st.sets(st.integers(0, TOKENS - 1)), st.integers(0, 5))
def test_what_changes_and_how(rows: list[list[int]], share: float, candidates: set[int], seed: int) -> None:
    windows = torch.tensor(rows)
    before = windows.clone()
    found = substitute(windows, share, torch.tensor(sorted(candidates), dtype=torch.int64), seed)
    assert torch.equal(windows, before), "the given ones are left alone"
    assert (found.shape, found.dtype) == (windows.shape, windows.dtype)
    for number, (old, new) in enumerate(zip(rows, found.tolist(), strict=True)):
        exchanged = dict(zip(old, new, strict=True))
        assert [exchanged[token] for token in old] == new, "each for the same one wherever it stands"
        changed = {token for token, other in exchanged.items() if token != other}
        assert changed <= candidates
        assert {exchanged[token] for token in changed} <= candidates
        most = round(share * len(set(old) & candidates)) if number % 2 == 0 else 0
        assert len(changed) <= most


def test_as_many_as_asked_for_and_all_others_before_one_comes_twice() -> None:
    windows = torch.arange(100).repeat(6, 1)
    candidates = torch.arange(1000)
    found = substitute(windows, 0.25, candidates, seed=3)
    changed = found != windows
    counts = changed.sum(dim=1).tolist()
    assert counts[1::2] == [0, 0, 0]
    assert all(22 <= count <= 25 for count in counts[::2]), "25 draws a window, of which one in a thousand draws itself"
    drawn = substitute(torch.arange(100, 200).repeat(199, 1), 0.1, candidates, seed=3)[::2]
    others = drawn[drawn != torch.arange(100, 200)]
    assert len(others) > 980
    assert len(others.unique()) == len(others), "1,000 draws of 1,000 tokens"
    places = changed[::2].nonzero()[:, 1].unique()
    assert len(places) > 45, "each window exchanges others"


def test_the_seed_alone_decides() -> None:
    windows, candidates = torch.arange(200).view(4, 50), torch.arange(1000)
    one, again, other = (substitute(windows, 0.5, candidates, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_tokens_that_are_no_text_neither_go_nor_come(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.build("llama", tmp_path / "m", layers=1))
    tokenizer.add_tokens(["<extra>"])
    whole = set(exchangeable_tokens(tokenizer, None).tolist())
    assert whole == set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder)
    assert not whole & {tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<extra>")}
    assert set(tokenizer("a text").input_ids) - {tokenizer.bos_token_id} <= whole
    assert set(exchangeable_tokens(tokenizer, 100).tolist()) == {token for token in whole if token < 100}


SETTINGS: dict[str, Any] = {
    "repair": "block",
    "samples": 4,
    "training_samples": 12,
    "length": LENGTH,
    "substitute": 0.5,
    "distill": 2 * LENGTH,
    "distill_options": {"windows": 18, "batch": 1},
}


def test_a_run_learns_from_them_and_holds_out_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_with_text("llama", tmp_path)
    chosen: list[tuple[torch.Tensor, Any, Split]] = []
    real = module.choose_samples

    def watched(*args: Any) -> Any:
        samples, recipe, split = real(*args)
        chosen.append((samples.samples, recipe, split))
        return samples, recipe, split

    monkeypatch.setattr("compress.pipeline.choose_samples", watched)
    compress(source, tmp_path / "one", **SETTINGS)
    compress(source, tmp_path / "two", **SETTINGS)
    compress(source, tmp_path / "plain", **SETTINGS | {"substitute": 0.0})
    [(windows, recipe, split), _, (plain, _, plain_split)] = chosen
    text = load_windows(
        recipe.calibration, AutoTokenizer.from_pretrained(source), samples=18, length=LENGTH, seed=recipe.seed
    )
    assert torch.equal(plain, text)
    assert split == plain_split
    assert recipe.windows == 12
    assert 0 < split.fitted < 12
    assert (windows != text).any(dim=1).nonzero().flatten().tolist() == list(range(0, split.fitted, 2)), (
        "neither what is held out nor what distillation alone sees"
    )
    one, two, without = (
        yaml.safe_load((tmp_path / name / "recipe.yaml").read_text()) for name in ("one", "two", "plain")
    )
    assert one["calibration"] == two["calibration"] != without["calibration"]
    assert one["recipe"]["substitute"] == 0.5
    weights = [stored(tmp_path / name) for name in ("one", "two", "plain")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("share", ["-0.1", "1.5", "a-lot"])
def test_a_share_that_is_none(share: str, halve: Halve, tmp_path: Path) -> None:
    source = build_with_text("llama", tmp_path)
    called = halve(*flags(source, tmp_path / "out", substitute=share))
    assert called.code == 2
    assert "substitute" in called.stderr
    assert "Traceback" not in called.stderr
    assert not (tmp_path / "out").exists()
