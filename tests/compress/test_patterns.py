"""Masks against a reference that sorts each group in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import RecipeError
from compress.patterns import BLOCK_COLUMNS, Group, NMPattern, Pattern, UnstructuredPattern, has_pattern, parse_pattern

# Few distinct values, so that ties are the rule; −0.0 and 0.0 are a tie as well.
tied = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 1.0, 3.5])
distinct = st.floats(allow_nan=False, width=32)


def kept_of(scores: list[float], count: int) -> list[bool]:
    """The ``count`` largest are kept; of equals the first (sorted() is stable)."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [i in order[:count] for i in range(len(scores))]


@st.composite
def groups(draw: st.DrawFn) -> tuple[NMPattern, Tensor]:
    m = draw(st.integers(2, 17))
    keep_n = draw(st.integers(1, m - 1))
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    values = draw(
        st.lists(draw(st.sampled_from([tied, distinct])), min_size=rows * count * m, max_size=rows * count * m)
    )
    return NMPattern(keep_n, m), torch.tensor(values).view(rows, count * m)


@given(groups())
def test_nm_mask_keeps_the_largest_of_every_group(case: tuple[NMPattern, Tensor]) -> None:
    pattern, scores = case
    expected = [
        [
            kept
            for start in range(0, len(row), pattern.m)
            for kept in kept_of(row[start : start + pattern.m], pattern.keep_n)
        ]
        for row in scores.tolist()
    ]
    assert pattern.mask(scores).tolist() == expected


@given(groups())
def test_keep_is_mask_in_another_layout(case: tuple[NMPattern, Tensor]) -> None:
    pattern, scores = case
    members = scores.unflatten(-1, (-1, pattern.m)).unbind(-1)
    kept = torch.stack(pattern.keep(members), dim=-1).flatten(-2)
    assert torch.equal(kept, pattern.mask(scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_all_equal_keeps_the_lowest_columns(dtype: torch.dtype) -> None:
    mask = NMPattern(2, 4).mask(torch.ones(3, 8, dtype=dtype))
    assert mask.tolist() == [[True, True, False, False] * 2] * 3


@pytest.mark.parametrize(("keep_n", "m"), [(1, 128), (127, 128), (1, 129), (128, 129), (100, 300)])
def test_long_groups(keep_n: int, m: int) -> None:
    """Ranks reach m - 1, which does not fit a signed byte from 129 on."""
    scores = torch.arange(float(m)).repeat(2)[None]
    expected = ([False] * (m - keep_n) + [True] * keep_n) * 2
    assert NMPattern(keep_n, m).mask(scores)[0].tolist() == expected
    assert NMPattern(keep_n, m).mask(-scores)[0].tolist() == expected[::-1]


def test_infinite_scores_are_ordered() -> None:
    inf = float("inf")
    assert NMPattern(2, 4).mask(torch.tensor([[1.0, inf, -inf, inf]])).tolist() == [[False, True, False, True]]


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 3 * BLOCK_COLUMNS // 2),
    sparsity=st.floats(0.01, 0.99),
    group=st.sampled_from(["row", "block", "layer"]),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_unstructured_counts_are_exact(
    rows: int, columns: int, sparsity: float, group: str, ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator)
    if ties:
        scores = scores.round()
    mask = UnstructuredPattern(sparsity).mask(scores, group)  # type: ignore[arg-type]
    assert mask.shape == scores.shape
    widths = [columns] if group != "block" else [len(block) for block in torch.arange(columns).split(BLOCK_COLUMNS)]
    for kept, score in zip(mask.split(widths, dim=1), scores.split(widths, dim=1), strict=True):
        competitions = zip(kept, score, strict=True) if group == "row" else [(kept.flatten(), score.flatten())]
        for k, s in competitions:
            pruned = round(sparsity * len(s))
            assert k.tolist() == kept_of(s.tolist(), len(s) - pruned)


def test_groups_compare_what_they_say() -> None:
    """One large row, then one large block: which of them survives is the difference between the groups."""
    scores = torch.ones(2, 2 * BLOCK_COLUMNS)
    scores[0] = 2
    scores[:, BLOCK_COLUMNS:] += 10
    half = UnstructuredPattern(0.5)
    by_row, by_block, by_layer = (half.mask(scores, group) for group in ("row", "block", "layer"))
    assert by_row.sum(dim=1).tolist() == [BLOCK_COLUMNS, BLOCK_COLUMNS]
    assert by_block.sum(dim=1).tolist() == [2 * BLOCK_COLUMNS, 0]
    assert by_layer[:, BLOCK_COLUMNS:].all()
    assert not by_layer[:, :BLOCK_COLUMNS].any()


def test_transposed_scores_give_the_same_mask() -> None:
    """SparseGPT hands over views."""
    scores = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    for group in ("row", "block", "layer"):
        pattern = UnstructuredPattern(0.4)
        assert torch.equal(pattern.mask(scores.T.contiguous().T, group), pattern.mask(scores, group))


def test_why_not() -> None:
    assert NMPattern(2, 4).why_not(12) is None
    assert NMPattern(2, 4).why_not(10) == "10 input features are not a multiple of 4"
    assert UnstructuredPattern(0.5).why_not(7) is None


@pytest.mark.parametrize(
    ("text", "sparsity", "expected"),
    [
        ("2:4", None, NMPattern(2, 4)),
        (" 4:8 ", None, NMPattern(4, 8)),
        ("1:4", 0.75, NMPattern(1, 4)),
        ("unstructured", 0.6, UnstructuredPattern(0.6)),
    ],
)
def test_parse(text: str, sparsity: float | None, expected: object) -> None:
    assert parse_pattern(text, sparsity) == expected


@given(m=st.integers(2, 64), data=st.data())
def test_parse_reads_what_str_writes(m: int, data: st.DataObject) -> None:
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(str(pattern), pattern.sparsity) == pattern


@pytest.mark.parametrize(
    ("text", "sparsity", "message"),
    [
        ("4:4", None, "0 < N < M"),
        ("0:4", None, "0 < N < M"),
        ("4:2", None, "0 < N < M"),
        ("0:0", None, "0 < N < M"),
        ("2:4", 0.6, "has a sparsity of 0.5, but sparsity=0.6"),
        ("2:4", float("nan"), "has a sparsity of 0.5"),
        ("unstructured", None, "needs a sparsity"),
        ("unstructured", 0.0, "between 0 and 1"),
        ("unstructured", 1.0, "between 0 and 1"),
        ("unstructured", float("nan"), "between 0 and 1"),
        ("2of4", None, "did you mean '2:4'"),
        ("2/4", None, "did you mean '2:4'"),
        ("Unstructured", None, "did you mean 'unstructured'"),
        ("-2:4", None, "unknown pattern '-2:4'"),
        ("2:4:8", None, "unknown pattern"),
        ("", None, "known: '2:4'"),
    ],
)
def test_parse_errors(text: str, sparsity: float | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        parse_pattern(text, sparsity)


@pytest.mark.parametrize("group", ["row", "block", "layer"])
@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(4, 8), NMPattern(1, 3), UnstructuredPattern(0.55)])
def test_what_a_mask_leaves_has_the_pattern(pattern: Pattern, group: Group) -> None:
    """Whatever competed with what; and a weight that was never pruned, or has too few zeros, has it not."""
    torch.manual_seed(0)
    weight = torch.randn(21, 312)
    assert not has_pattern(weight, pattern)
    pruned = weight * pattern.mask(weight.abs(), group)
    assert has_pattern(pruned, pattern)
    assert has_pattern(torch.zeros_like(weight), pattern)
    filled = pruned.clone()
    filled[:, :24] = 1
    assert not has_pattern(filled, pattern)


@pytest.mark.parametrize("shape", [(1, 2048), (2, 2048), (3, 64), (2048, 1)])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_a_flat_weight_that_was_not_pruned_has_no_pattern(shape: tuple[int, int], sparsity: float) -> None:
    pattern = UnstructuredPattern(sparsity)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs() + 1
    for group in ("row", "layer", "block"):
        assert has_pattern(weight * pattern.mask(weight, group), pattern)
    if shape[1] > 1:
        assert not has_pattern(weight, pattern)


def test_a_width_that_groups_do_not_divide_has_no_pattern() -> None:
    assert not has_pattern(torch.zeros(2, 6), NMPattern(2, 4))
