"""The module that holds a packed weight in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.architecture import LinearModule, shape_of
from compress.packed import PackedWeight, validate
from serve.kernels import plain, sparse24_linear


class Sparse24Linear(nn.Module):
    """A linear layer with a packed 2:4 weight: ``weight_packed`` [N, K/2], ``weight_mask`` [N, K/8], ``bias`` [N].

    The parameters have the names and layout of the checkpoint, so state dicts go in and out unchanged.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        values = torch.empty(out_features, in_features // 2, dtype=dtype, device=device)
        mask = torch.zeros(out_features, in_features // 8, dtype=torch.uint8, device=device)
        self.weight_packed = nn.Parameter(values, requires_grad=False)
        self.weight_mask = nn.Parameter(mask, requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.weight_packed, self.weight_mask)

    @property
    def weight(self) -> Tensor:
        """The dense weight, expanded anew on each access: model code asks for its dtype or device, and writes are lost."""
        return plain.expand(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return sparse24_linear(x, self.packed, self.bias)

    def validate(self, name: str) -> None:
        """Raises CorruptCheckpointError, naming the layer, unless the weight is whole, finite and 2:4."""
        validate(self.packed, name)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 2:4"


class Sparse24Conv1D(Sparse24Linear):
    """The same in the place of transformers' Conv1D, with its order of operations."""

    @property
    def weight(self) -> Tensor:
        return plain.expand(self.packed).T

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None, "Conv1D always has a bias"
        return plain.linear_conv1d(x, self.packed, self.bias)


def replacement(module: LinearModule, dtype: torch.dtype) -> Sparse24Linear:
    """An empty packed module in the place of an nn.Linear or a Conv1D, on its device."""
    device = module.weight.device
    n, k = shape_of(module)
    if isinstance(module, Conv1D):
        return Sparse24Conv1D(k, n, bias=True, dtype=dtype, device=device)
    return Sparse24Linear(k, n, bias=module.bias is not None, dtype=dtype, device=device)
