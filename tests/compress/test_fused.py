"""The fused kernels of pruning, in Triton's interpreter, against torch's operators and brute force; and what happens without them."""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import fused
from compress.columns import fitting, prune_columns
from compress.fused import Kernels, proof
from compress.linalg import inverse_factor
from compress.methods import Pruning
from compress.patterns import NMPattern, Pattern, UnstructuredPattern
from compress.reconstruction.sparsegpt import SparseGPTOptions, sparsegpt
from serve.kernels.proof import problem
from tests.compress.layers import gathered
from tests.interpreted import interpreted

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(1, 2)]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with interpreted("compress.fused.kernels") as module:
        yield Kernels(module)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(k: int) -> Tensor:
    """Of inputs that hang together, with channels of different sizes."""
    x = normal(4 * k, k, seed=1) @ (torch.eye(k) + 0.3 * normal(k, k, seed=2) / k**0.5)
    x[:, :3] *= 20
    return inverse_factor(x.T @ x, 0.01).upper


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """Grows with every call of that method of `Kernels`."""
    calls: list[object] = []
    method = getattr(Kernels, name)
    monkeypatch.setattr(Kernels, name, lambda self, *given: calls.append(name) or method(self, *given))
    return calls


class TestMasks:
    @pytest.mark.parametrize("pattern", PATTERNS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8], ids=str)
    def test_it_is_the_mask(self, kernels: Kernels, pattern: NMPattern, dtype: torch.dtype) -> None:
        """Ties included: few different numbers."""
        scores = normal(5, 3, 2 * pattern.m * 7).mul(2).round().abs().to(dtype)
        assert torch.equal(kernels.keep_largest(scores, pattern.keep_n, pattern.m), pattern.mask(scores))

    def test_more_groups_than_a_block_takes(self, kernels: Kernels) -> None:
        scores = normal(9, 1000)
        assert torch.equal(kernels.keep_largest(scores, 2, 4), NMPattern(2, 4).mask(scores))

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan")]), min_size=8, max_size=8
        )
    )
    def test_what_is_not_a_number_is_counted_once(self, kernels: Kernels, values: list[float]) -> None:
        scores = torch.tensor([values])
        found = kernels.keep_largest(scores, 2, 4)
        assert torch.equal(found, NMPattern(2, 4).mask(scores))
        if not scores.isnan().any():
            assert found.view(2, 4).sum(1).tolist() == [2, 2]

    def test_nothing_and_views(self, kernels: Kernels) -> None:
        assert kernels.keep_largest(torch.empty(0, 8), 2, 4).shape == (0, 8)
        scores = normal(8, 12).T
        assert torch.equal(kernels.keep_largest(scores, 2, 4), NMPattern(2, 4).mask(scores.contiguous()))

    def test_what_there_are_kernels_for(self, kernels: Kernels) -> None:
        assert [m for m in range(1, 40) if kernels.takes(m)] == [2, 4, 8]

    def test_a_width_that_is_no_multiple(self, kernels: Kernels) -> None:
        with pytest.raises(ValueError, match="6 columns are no multiple of 4"):
            kernels.keep_largest(normal(2, 6), 2, 4)

    @pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(3, 6)], ids=str)
    def test_a_pattern_uses_it_where_it_is(
        self, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, pattern: NMPattern
    ) -> None:
        scores, asked = normal(5, 24), []
        expected = pattern.mask(scores)
        monkeypatch.setattr(fused, "on", lambda device, kind: asked.append(kind) or kernels)
        counted = count_calls(monkeypatch, "keep_largest")
        assert torch.equal(pattern.mask(scores), expected)
        assert asked == ["masks"]
        assert len(counted) == (pattern.m == 4)
        calls = len(counted)
        pattern.mask(scores.bfloat16())  # of which it is not proven
        assert len(counted) == calls


class TestSparseGPT:
    def both(
        self, kernels: Kernels, n: int, k: int, pattern: Pattern, given: Tensor | None = None, block: int = 128
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        columns, upper = normal(k, n, seed=3), factor(k)
        return tuple(
            prune_columns(
                columns.clone(), upper, pattern, "block", None if given is None else given.clone(), block, how
            )
            for how in (None, kernels)
        )  # type: ignore[return-value]

    @pytest.mark.parametrize("pattern", [*PATTERNS, UnstructuredPattern(0.5)], ids=str)
    @pytest.mark.parametrize(("n", "k"), [(1, 16), (33, 144)])
    def test_it_is_the_loop_over_columns(self, kernels: Kernels, pattern: Pattern, n: int, k: int) -> None:
        (pruned, mask), (by_kernel, kernel_mask) = self.both(kernels, n, k, pattern)
        assert torch.equal(mask, kernel_mask)
        assert torch.allclose(pruned, by_kernel, rtol=1e-4, atol=1e-5)
        assert not by_kernel[~kernel_mask].any()

    @pytest.mark.parametrize("block", [1, 8, 24, 128])
    def test_blocks_of_any_size(self, kernels: Kernels, block: int) -> None:
        (pruned, mask), (by_kernel, kernel_mask) = self.both(kernels, 20, 88, NMPattern(2, 4), block=block)
        assert torch.equal(mask, kernel_mask)
        assert torch.allclose(pruned, by_kernel, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("k", [13, 100, 131])
    @pytest.mark.parametrize("pattern", [UnstructuredPattern(0.3), NMPattern(2, 4)], ids=str)
    def test_a_given_mask_and_odd_widths(self, kernels: Kernels, pattern: Pattern, k: int) -> None:
        given_mask = normal(k, 37, seed=5) > -0.3
        (pruned, mask), (by_kernel, kernel_mask) = self.both(kernels, 37, k, pattern, given_mask)
        assert torch.equal(mask, given_mask)
        assert torch.equal(kernel_mask, given_mask)
        assert torch.allclose(pruned, by_kernel, rtol=1e-4, atol=1e-5)

    def test_it_is_the_papers_algorithm(self, kernels: Kernels) -> None:
        """In float64, column by column as algorithm 1 writes it."""
        k, n = 40, 9
        columns, upper = normal(k, n, seed=3), factor(k)
        weight, u = columns.double().clone(), upper.double()
        mask = torch.zeros(k, n, dtype=torch.bool)
        for j in range(k):
            if j % 4 == 0:
                scores = (weight[j : j + 4] / u.diagonal()[j : j + 4, None]).square()
                mask[j : j + 4] = NMPattern(2, 4).mask(scores.T).T
            error = torch.where(mask[j], 0, weight[j] / u[j, j])
            weight[j + 1 :] -= u[j, j + 1 :, None] * error
        weight[~mask] = 0
        pruned, found = prune_columns(columns.clone(), upper, NMPattern(2, 4), "block", None, 128, kernels)
        assert torch.equal(found, mask)
        assert torch.allclose(pruned.double(), weight, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:invalid value")
    def test_what_is_not_finite_spreads_as_in_torch(self, kernels: Kernels) -> None:
        """To the columns behind it, and not to those before."""
        columns, upper = normal(24, 3), factor(24)
        columns[9, 1] = torch.inf
        given_mask = torch.ones(24, 3, dtype=torch.bool)
        given_mask[9] = False
        pruned, _ = prune_columns(columns.clone(), upper, NMPattern(2, 4), "block", given_mask, 128, None)
        by_kernel, _ = prune_columns(columns.clone(), upper, NMPattern(2, 4), "block", given_mask, 128, kernels)
        assert torch.equal(pruned.isfinite(), by_kernel.isfinite())
        assert by_kernel[:9].isfinite().all()

    def test_the_method_uses_it_and_says_so(self, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = normal(12, 40)
        statistics = gathered(normal(400, 40, seed=7))
        pruning, options = Pruning(NMPattern(2, 4), "block", None), SparseGPTOptions()
        expected = sparsegpt(weight, pruning, statistics, options)
        assert "columns_by" not in expected.notes
        monkeypatch.setattr(fused, "on", lambda device, kind: kernels if kind == "columns" else None)
        counted = count_calls(monkeypatch, "prune_block")
        found = sparsegpt(weight, pruning, statistics, options)
        assert counted
        assert found.notes["columns_by"] == "triton"
        assert torch.equal(found.mask, expected.mask)
        assert torch.allclose(found.weight, expected.weight, rtol=1e-4, atol=1e-5)

    def test_what_is_no_row_of_floats_is_refused(self, kernels: Kernels) -> None:
        columns, mask, errors = normal(8, 4), torch.ones(8, 4, dtype=torch.bool), torch.empty(8, 4)
        upper, diagonal = torch.eye(8), torch.ones(8)
        for wrong in ((columns.double(), upper), (columns, normal(8, 8).T), (columns.T.contiguous().T, upper)):
            with pytest.raises(AssertionError):
                kernels.prune_block(*wrong, diagonal, mask, errors, 0, 2, 4)

    def test_what_it_does_not_take_goes_to_torch(self, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
        """And the notes do not say otherwise."""
        given_mask = torch.ones(4, 4, dtype=torch.bool)
        assert fitting(kernels, NMPattern(2, 4), None, 128) is kernels
        assert fitting(kernels, NMPattern(8, 32), given_mask, 128) is kernels
        assert fitting(None, NMPattern(2, 4), None, 128) is None
        for pattern, block in ((NMPattern(3, 6), 126), (NMPattern(2, 4), 256), (NMPattern(8, 32), 128)):
            assert fitting(kernels, pattern, None, block) is None
        monkeypatch.setattr(fused, "on", lambda device, kind: kernels if kind == "columns" else None)
        counted = count_calls(monkeypatch, "prune_block")
        statistics = gathered(normal(400, 48, seed=7))
        found = sparsegpt(normal(5, 48), Pruning(NMPattern(3, 6), "block", None), statistics, SparseGPTOptions())
        assert not counted
        assert "columns_by" not in found.notes


def test_it_proves_itself(kernels: Kernels) -> None:
    assert proof.wrong_masks(kernels, torch.device("cpu")) is None
    assert proof.wrong_columns(kernels, torch.device("cpu")) is None


def test_the_problem_is_the_same_under_another_default_dtype() -> None:
    """vLLM loads models under theirs."""
    expected, before = proof._normal(3, 5), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = proof._normal(3, 5)
        small = problem(2, 3, 8, torch.float16)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(small.x, problem(2, 3, 8, torch.float16).x)


@dataclasses.dataclass(frozen=True)
class WrongMasks(Kernels):
    def keep_largest(self, scores: Tensor, keep_n: int, m: int) -> Tensor:
        mask = super().keep_largest(scores, keep_n, m)
        mask[-1, -1] ^= True
        return mask


@dataclasses.dataclass(frozen=True)
class WrongErrors(Kernels):
    def prune_block(
        self, columns: Tensor, upper: Tensor, inverse_diagonal: Tensor, mask: Tensor, errors: Tensor, *rest: Any
    ) -> None:
        super().prune_block(columns, upper, inverse_diagonal, mask, errors, *rest)
        errors[-1] *= 1.1


def test_wrong_ones_are_found(kernels: Kernels) -> None:
    cpu = torch.device("cpu")
    assert "for masks is wrong" in str(proof.wrong_masks(WrongMasks(kernels.module), cpu))
    assert "for SparseGPT is wrong" in str(proof.wrong_columns(WrongErrors(kernels.module), cpu))


class TestWhereTheyCannotBeHad:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        fused._on_gpu.cache_clear()
        yield
        fused._on_gpu.cache_clear()

    def test_it_runs_where_the_tensors_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton launches on the current device, and `--device cuda:1` does not make it that."""
        monkeypatch.setattr(torch.cuda, "device", lambda device: ("context of", device))
        assert fused._guard(torch.device("cuda", 1)) == ("context of", torch.device("cuda", 1))
        assert fused._guard(torch.device("cpu")) == ("context of", -1)

    def test_a_processor_has_none(self) -> None:
        assert fused.on(torch.device("cpu"), "masks") is None

    def test_no_triton(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        def missing(name: str) -> types.ModuleType:
            raise ImportError("No module named 'triton'")

        monkeypatch.setattr(fused.importlib, "import_module", missing)
        with caplog.at_level(logging.WARNING):
            assert fused.on(torch.device("cuda"), "masks") is None
            assert fused.on(torch.device("cuda", 0), "masks") is None
        [line] = [record.getMessage() for record in caplog.records]
        assert (
            line
            == "pruning goes on without fused kernels for masks, more slowly: ImportError: No module named 'triton'"
        )

    def test_wrong_ones(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(
            proof, "wrong_masks", lambda found, device: "the kernel for masks is wrong for 2:4 on this device"
        )
        assert fused.on(torch.device("cuda"), "masks") is None
        assert "the kernel for masks is wrong for 2:4" in caplog.text

    def test_right_ones_are_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(proof, "wrong_columns", lambda found, device: None)
        assert isinstance(fused.on(torch.device("cuda"), "columns"), Kernels)
