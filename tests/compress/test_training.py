"""Adam on some parameters, pruned weights at zero: against the formulas in float64, and what must never move."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import NumericalError
from compress.training import BETAS, EPSILON, FLOOR, WARM_UP, MaskedAdam, Trainable, precision

STEPS, RATE, CLIP = 12, 0.05, 0.3


def target(parameters: list[torch.Tensor], step: int) -> torch.Tensor:
    """A loss whose gradient changes from step to step: Σ (p − sin(step + index))² / 2, index over all entries."""
    total = torch.zeros((), dtype=parameters[0].dtype)
    offset = 0
    for parameter in parameters:
        wanted = torch.sin(torch.arange(parameter.numel()) + float(step + offset)).to(parameter.dtype)
        total = total + (parameter.flatten() - wanted).square().sum() / 2
        offset += parameter.numel()
    return total


def test_steps_are_those_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(6, 8, generator=generator), torch.rand(5, generator=generator)
    mask = torch.rand(6, 8, generator=generator) > 0.5
    ours = [nn.Parameter(weight * mask), nn.Parameter(norm.clone())]
    adam = MaskedAdam(
        {"weight": Trainable(ours[0], mask), "norm": Trainable(ours[1])}, rate=RATE, steps=STEPS, clip=CLIP
    )
    theirs = [(weight * mask).double().numpy().ravel(), norm.double().numpy()]
    kept = [mask.numpy().ravel(), np.ones(5, bool)]
    rates = [RATE * math.sqrt(np.mean(value[k] ** 2)) for value, k in zip(theirs, kept, strict=True)]
    first, second = [np.zeros_like(v) for v in theirs], [np.zeros_like(v) for v in theirs]
    rise = max(1, round(WARM_UP * STEPS))
    for step in range(STEPS):
        (target(list(ours), step)).backward()
        adam.step()
        index = np.cumsum([0, theirs[0].size])
        gradients = [
            (value - np.sin(np.arange(value.size) + step + start)) * k
            for value, k, start in zip(theirs, kept, index, strict=True)
        ]
        norm_of_all = math.sqrt(sum(float(np.sum(g**2)) for g in gradients))
        cut = min(1.0, CLIP / norm_of_all)
        if step < rise:
            share = (step + 1) / rise
        else:
            share = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - rise) / (STEPS - rise))) / 2
        for i, gradient in enumerate(gradients):
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * cut * gradient
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * (cut * gradient) ** 2
            mean, square = first[i] / (1 - BETAS[0] ** (step + 1)), second[i] / (1 - BETAS[1] ** (step + 1))
            theirs[i] = theirs[i] - rates[i] * share * mean / (np.sqrt(square) + EPSILON)
        for parameter, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy().ravel(), expected, rtol=2e-4, atol=2e-6)
        assert not ours[0].detach()[~mask].any()
    adam.require_masks()


def test_a_pruned_weight_that_came_back_is_found() -> None:
    mask = torch.tensor([[True, False]])
    parameter = nn.Parameter(torch.tensor([[1.0, 0.0]]))
    adam = MaskedAdam({"a": Trainable(parameter, mask)}, rate=0.1, steps=1, clip=1)
    with torch.no_grad():
        parameter[0, 1] = 1e-30
    with pytest.raises(AssertionError, match="a: training moved a weight that was pruned"):
        adam.require_masks()


def test_a_snapshot_is_a_copy_and_can_be_set_again() -> None:
    parameter = nn.Parameter(torch.ones(3))
    adam = MaskedAdam({"a": Trainable(parameter)}, rate=0.1, steps=3, clip=1)
    before = adam.snapshot()
    (parameter.square().sum()).backward()
    adam.step()
    assert not torch.equal(parameter.detach(), torch.ones(3))
    adam.restore(before)
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_a_step_is_as_long_as_the_parameter_is_large() -> None:
    """The same problem in other units takes the same relative steps."""
    moved = []
    for unit in (1.0, 1e-3):
        parameter = nn.Parameter(unit * torch.tensor([1.0, -2.0, 0.5]))
        adam = MaskedAdam({"a": Trainable(parameter)}, rate=0.1, steps=4, clip=math.inf)
        for _ in range(4):
            ((parameter / unit - 3).square().sum()).backward()
            adam.step()
        moved.append(parameter.detach() / unit)
    torch.testing.assert_close(moved[0], moved[1])


def test_a_gradient_that_is_not_finite_stops() -> None:
    parameter = nn.Parameter(torch.ones(2))
    adam = MaskedAdam({"a": Trainable(parameter)}, rate=0.1, steps=1, clip=1)
    (parameter * math.inf).sum().backward()
    with pytest.raises(NumericalError, match="not finite"):
        adam.step()


def test_float32_models_are_multiplied_in_float32() -> None:
    assert precision(torch.float32, torch.device("cpu")) is None
    assert precision(torch.float16, torch.device("cpu")) in (None, torch.bfloat16)
