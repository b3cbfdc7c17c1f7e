"""The factor of the inverse Gram matrix against the inverse itself, and what happens when there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.linalg import MAX_DAMPING, inverse_factor


def gram_of(t: int, k: int, *, seed: int = 0) -> Tensor:
    """XᵀX in float64 of correlated inputs with a mean and large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, k, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5 + 0.5
    x[:, :: max(k // 4, 1)] *= 30
    return x.T @ x


def indefinite(k: int, lowest: float, *, seed: int = 0) -> Tensor:
    """A symmetric matrix with mean diagonal 1 whose lowest eigenvalue is negative: no Gram matrix of anything."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(lowest, 2 - lowest, k, dtype=torch.float64)
    return (basis * values) @ basis.T


@pytest.mark.parametrize("damping", [1e-4, 0.01, 0.1, 1.0])
@pytest.mark.parametrize(("t", "k"), [(400, 40), (30, 64), (5, 1)])
def test_is_a_factor_of_the_damped_inverse(damping: float, t: int, k: int) -> None:
    gram = gram_of(t, k)
    inverse = torch.linalg.inv(gram + damping * gram.diagonal().mean() * torch.eye(k, dtype=torch.float64))
    for dtype, tolerance in [(torch.float64, 1e-10), (torch.float32, 2e-3 if damping < 0.01 else 1e-4)]:
        factor = inverse_factor(gram.to(dtype), damping)
        upper = factor.upper
        assert upper.dtype == dtype
        assert torch.equal(upper, upper.triu())
        assert bool((upper.diagonal() > 0).all())
        error = (upper.double().T @ upper.double() - inverse).norm() / inverse.norm()
        assert float(error) < tolerance
        assert (factor.damping, factor.raised_from) == (damping, None)
        assert not factor.dead.any()


def test_trailing_blocks_of_the_factor_are_factors_of_the_trailing_inverses() -> None:
    """What SparseGPT lives on: U[j:, j:] belongs to the matrix without its first j rows and columns."""
    gram = gram_of(300, 24)
    upper = inverse_factor(gram, 0.01).upper
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    for j in (1, 7, 23):
        torch.testing.assert_close(
            upper[j:, j:].T @ upper[j:, j:], torch.linalg.inv(damped[j:, j:]), rtol=1e-8, atol=1e-12
        )


def test_dead_inputs_stand_alone() -> None:
    """Their diagonal becomes 1 before the ridge, so they are coupled with nothing."""
    gram = gram_of(200, 16)
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[0, 6, 15]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    factor = inverse_factor(gram, 0.01)
    assert torch.equal(factor.dead, dead)
    filled = gram + torch.diag(dead.double()) + 0.01 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(filled), rtol=1e-8, atol=1e-12)


def test_no_input_at_all() -> None:
    factor = inverse_factor(torch.zeros(8, 8), 0.01)
    assert bool(factor.dead.all())
    assert bool(torch.isfinite(factor.upper).all())


def test_the_gram_matrix_is_left_alone() -> None:
    gram = gram_of(100, 12).float()
    before = gram.clone()
    inverse_factor(gram, 0.01)
    assert torch.equal(gram, before)


@pytest.mark.parametrize(("lowest", "raised_to"), [(-0.05, 0.1), (-0.5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_indefinite_matrix_raises_the_damping(lowest: float, raised_to: float, dtype: torch.dtype) -> None:
    gram = indefinite(32, lowest)
    factor = inverse_factor(gram.to(dtype), 0.01)
    assert factor.damping == pytest.approx(raised_to)
    assert factor.raised_from == 0.01
    inverse = torch.linalg.inv(gram + raised_to * torch.eye(32, dtype=torch.float64))
    error = (factor.upper.double().T @ factor.upper.double() - inverse).norm() / inverse.norm()
    assert float(error) < (1e-9 if dtype == torch.float64 else 1e-3)


def test_float64_is_tried_before_the_damping_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    cholesky, seen = torch.linalg.cholesky_ex, []

    def refuses_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(matrix.dtype)
        lower, info = cholesky(matrix)
        return (lower * float("nan"), torch.ones_like(info)) if matrix.dtype == torch.float32 else (lower, info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", refuses_float32)
    gram = gram_of(300, 20)
    factor = inverse_factor(gram.float(), 0.01)
    assert seen == [torch.float32, torch.float64]
    assert (factor.damping, factor.raised_from) == (0.01, None)
    assert factor.upper.dtype == torch.float32
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64))
    assert float((factor.upper.double().T @ factor.upper.double() - inverse).norm() / inverse.norm()) < 1e-4


@pytest.mark.parametrize("damping", [0.01, 0.5, MAX_DAMPING])
@pytest.mark.parametrize("kind", ["nan", "one nan", "infinite", "negative"])
def test_an_impossible_matrix_is_an_error(kind: str, damping: float) -> None:
    gram = gram_of(100, 12).float()
    match kind:
        case "nan":
            gram[:] = float("nan")
        case "one nan":
            gram[3, 5] = gram[5, 3] = float("nan")
        case "infinite":
            gram[4, 4] = float("inf")
        case "negative":
            gram = -gram
    with pytest.raises(NumericalError, match="cannot be factored even with a damping of 1 "):
        inverse_factor(gram, damping)
