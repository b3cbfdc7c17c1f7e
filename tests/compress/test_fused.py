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
from compress.columns import prune_columns
from compress.fused import Kernels
from compress.linalg import inverse_factor
from compress.patterns import NMPattern, Pattern, UnstructuredPattern
from tests.interpreted import interpreted

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(1, 2), NMPattern(3, 16)]


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
        assert [m for m in range(1, 40) if kernels.keeps(1, m)] == [1, 2, 4, 8, 16]


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
    @pytest.mark.parametrize(("n", "k"), [(1, 16), (33, 144), (70, 272)])
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

    def test_what_it_does_not_take_goes_to_torch(self, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
        def never(*arguments: object) -> None:
            raise AssertionError("the kernel was called")

        monkeypatch.setattr(Kernels, "prune_block", never)
        for pattern, block in ((NMPattern(3, 6), 126), (NMPattern(2, 4), 256), (NMPattern(8, 32), 128)):
            (pruned, _), (same, _) = self.both(kernels, 5, 192, pattern, block=block)
            assert torch.equal(pruned, same)


def test_it_proves_itself(kernels: Kernels) -> None:
    assert fused.wrong(kernels, torch.device("cpu")) is None


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


@pytest.mark.parametrize(
    ("kind", "said"), [(WrongMasks, "for masks is wrong"), (WrongErrors, "for SparseGPT is wrong")]
)
def test_wrong_ones_are_found(kernels: Kernels, kind: type[Kernels], said: str) -> None:
    assert said in str(fused.wrong(kind(kernels.module), torch.device("cpu")))


class TestWhereTheyCannotBeHad:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda index: torch.device("cpu"))  # a context that does nothing here
        fused._on_gpu.cache_clear()
        yield
        fused._on_gpu.cache_clear()

    def test_a_processor_has_none(self) -> None:
        assert fused.on(torch.device("cpu")) is None

    def test_no_triton(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        def missing(name: str) -> types.ModuleType:
            raise ImportError("No module named 'triton'")

        monkeypatch.setattr(fused.importlib, "import_module", missing)
        with caplog.at_level(logging.WARNING):
            assert fused.on(torch.device("cuda")) is None
            assert fused.on(torch.device("cuda", 0)) is None
        [line] = [record.getMessage() for record in caplog.records]
        assert line == "pruning goes on without fused kernels, more slowly: ImportError: No module named 'triton'"

    def test_wrong_ones(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(
            fused, "wrong", lambda found, device: "the kernel for masks is wrong for 2:4 on this device"
        )
        assert fused.on(torch.device("cuda")) is None
        assert "the kernel for masks is wrong for 2:4" in caplog.text

    def test_right_ones_are_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused, "wrong", lambda found, device: None)
        assert isinstance(fused.on(torch.device("cuda")), Kernels)
