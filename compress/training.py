"""Training of some parameters of a module with Adam, pruned weights held at zero.

What the stages that train share (`compress.repair`, `compress.distill`): which parameters, how far a step goes, and
that a pruned weight never comes back.

A step of Adam has about the size of the learning rate, whatever the gradient. So that one setting serves models whose
weights are of different sizes (0.02 in an 8B Llama, 0.2 in SmolLM2), the rate is given as a share of the root mean
square of each parameter's own kept values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.device import has_known_instructions
from compress.errors import NumericalError
from compress.wide import is_emulated

BETAS = (0.9, 0.95)
EPSILON = 1e-12
"""Far below the gradients of relative errors, which are small; Adam's usual 1e-8 would shorten their steps."""
WARM_UP = 0.05
"""Share of the steps over which the rate rises."""
FLOOR = 0.02
"""Of the rate, at the end of the cosine."""


@dataclass(frozen=True)
class Trainable:
    """One parameter, float32. ``mask`` has its shape, True where a weight is kept; None where all are."""

    parameter: nn.Parameter
    mask: Tensor | None = None


class MaskedAdam:
    """Adam (Kingma & Ba 2014, arXiv 1412.6980) over ``steps`` steps, with a short rise and a cosine decay.

    Args:
        parameters: by name.
        rate: the length of a step as a share of the root mean square of each parameter's kept values.
        steps: how many there will be.
        clip: the gradient's norm, over all parameters, is cut to this.
    """

    def __init__(self, parameters: Mapping[str, Trainable], *, rate: float, steps: int, clip: float) -> None:
        self.parameters = dict(parameters)
        self._clip = clip
        self._steps = steps
        self._taken = 0
        self._rates = [rate * _size(trainable) for trainable in self.parameters.values()]
        groups = [
            {"params": [trainable.parameter], "lr": rate}
            for trainable, rate in zip(self.parameters.values(), self._rates, strict=True)
        ]
        self._adam = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)

    def step(self) -> None:
        """One step down the gradients that the parameters hold; they are gone afterwards.

        A pruned weight has a gradient of zero at every step, so both of its moments are zero, and so is its change.

        Raises:
            NumericalError: a gradient is not finite.
        """
        trained = [trainable for trainable in self.parameters.values() if trainable.parameter.grad is not None]
        for trainable in trained:
            if trainable.mask is not None:
                assert trainable.parameter.grad is not None
                # (As bytes: torch takes four times as long to multiply by a bool.)
                trainable.parameter.grad.mul_(trainable.mask.view(torch.uint8))
        norm = nn.utils.clip_grad_norm_([trainable.parameter for trainable in trained], self._clip)
        if not bool(torch.isfinite(norm)):
            raise NumericalError("a gradient is not finite; try --dtype float32, or a smaller rate")
        share = _schedule(self._taken, self._steps)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._taken += 1

    def snapshot(self, into: list[Tensor] | None = None) -> list[Tensor]:
        """A copy of all values; into an older one, if that is given, so that there are never two."""
        if into is None:
            return [trainable.parameter.detach().clone() for trainable in self.parameters.values()]
        for kept, trainable in zip(into, self.parameters.values(), strict=True):
            kept.copy_(trainable.parameter.detach())
        return into

    def restore(self, snapshot: list[Tensor]) -> None:
        """Sets all values."""
        with torch.no_grad():
            for trainable, value in zip(self.parameters.values(), snapshot, strict=True):
                trainable.parameter.copy_(value)

    def require_masks(self) -> None:
        """Asserts that every pruned weight is zero."""
        for name, trainable in self.parameters.items():
            if trainable.mask is not None and bool(trainable.parameter.detach().masked_fill(trainable.mask, 0).any()):
                raise AssertionError(f"{name}: training moved a weight that was pruned")


def _size(trainable: Trainable) -> float:
    """The root mean square of the kept values; 1 where all are zero (a bias that was added)."""
    values = trainable.parameter.detach()
    kept = values.numel() if trainable.mask is None else int(trainable.mask.sum())
    size = math.sqrt(float(values.square().sum(dtype=torch.float64)) / max(kept, 1))
    return size or 1.0


def _schedule(step: int, steps: int) -> float:
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1))) / 2


def precision(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype of the matrix products while a model of ``dtype`` is trained in float32; None for float32 itself.

    Bfloat16 where the model is a 16-bit one and the device multiplies bfloat16 at full speed. Float16 never: the
    gradients of small errors vanish in it.
    """
    if dtype == torch.float32:
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    fast = has_known_instructions() and not is_emulated(torch.bfloat16, device)
    return torch.bfloat16 if fast else None


@contextlib.contextmanager
def autocast(device: torch.device, low: torch.dtype | None) -> Iterator[None]:
    """Matrix products in ``low`` inside; None changes nothing."""
    with torch.autocast(device.type, dtype=low, enabled=low is not None):
        yield
