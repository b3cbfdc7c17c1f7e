"""The modules that multiply: packed weights, and dense ones that are read once a token."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.architecture import LinearModule, shape_of
from compress.packed import LARGEST, PackedWeight, validate
from compress.wide import WideLinear, widen
from serve import attention
from serve.kernels import Backend, choose, ops, plain
from serve.kernels.cpu import backend as cpu

WHY_DENSE = "halve_why_dense"
"""The attribute of a dense layer that was packed, and was expanded for serving: why."""


class Sparse24Linear(nn.Module):
    """A linear layer with a packed 2:4 weight: ``weight_packed`` [N, K/2], ``weight_mask`` [N, K/8], ``bias`` [N], and of 8-bit values
    ``weight_scale`` [N, 1].

    The parameters have the names and layout of the checkpoint, so state dicts go in and out unchanged. `prepare` puts
    the weight into the form of the backend that is best for it (``weight_prepared``) and lets go of the packed one;
    state dicts, `packed` and moves to another device or dtype make it anew.

    Attributes:
        dtype: that it computes in.
        value_dtype: of the kept values, see `compress.packed`; the same, or of 8 bits.
        quantizes_x: whether x is rounded to these, too.
        preferred: the backend to prepare for, where it can run; None: the best by what is known without a measurement.
    """

    weight_prepared: Tensor | None
    weight_packed: nn.Parameter
    weight_mask: nn.Parameter
    weight_scale: nn.Parameter | None
    preferred: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        value_dtype: torch.dtype | None = None,
        quantizes_x: bool = False,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype, self.value_dtype, self.quantizes_x = dtype, value_dtype or dtype, quantizes_x
        values = torch.empty(out_features, in_features // 2, dtype=self.value_dtype, device=device)
        mask = torch.zeros(out_features, in_features // 8, dtype=torch.uint8, device=device)
        scale = torch.ones(out_features, 1, dtype=torch.float32, device=device) if self.value_dtype in LARGEST else None
        self._hold(PackedWeight(values, mask, scale))
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self.register_buffer("weight_prepared", None, persistent=False)
        self._backend: Backend | None = None

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight_packed.device if self.weight_prepared is None else self.weight_prepared.device

    @property
    def prepared_for(self) -> str | None:
        """The name of the backend that the weight is prepared for."""
        return None if self._backend is None else self._backend.name

    @property
    def packed(self) -> PackedWeight:
        """The packed weight; made anew on each access where it is prepared."""
        if self._backend is not None:
            assert self._backend.restore is not None
            assert self.weight_prepared is not None
            return replace(self._backend.restore(self.weight_prepared), quantizes_x=self.quantizes_x)
        return PackedWeight(self.weight_packed, self.weight_mask, self.weight_scale, self.quantizes_x)

    @property
    def weight(self) -> Tensor:
        """The dense weight, expanded anew on each access: model code asks for its dtype or device, and writes are lost."""
        return plain.expand(self.packed, self.dtype)

    def _hold(self, packed: PackedWeight) -> None:
        """Makes the tensors of a packed weight the parameters."""
        self.weight_packed = nn.Parameter(packed.values, requires_grad=False)
        self.weight_mask = nn.Parameter(packed.mask, requires_grad=False)
        scale = None if packed.scale is None else nn.Parameter(packed.scale, requires_grad=False)
        self.register_parameter("weight_scale", scale)

    def prepare(self, name: str = "weight") -> None:
        """Chooses the backend, and gives it the weight in its own form.

        Raises:
            CorruptCheckpointError: the mask is not two of four; names the layer.
        """
        values = self.weight_packed
        if self._backend is not None or values.device.type == "meta":
            return
        shape = (self.out_features, self.in_features)
        backend = choose(values.device, values.dtype, 1, *shape, self.preferred, self.dtype).backend
        if backend.prepare is None:
            return
        packed = self.packed
        self.weight_prepared = backend.prepare(packed, name)
        self._backend = backend
        self._hold(
            PackedWeight(
                packed.values.new_empty(0),
                packed.mask.new_empty(0),
                None if packed.scale is None else packed.scale.new_empty(0),
            )
        )

    def prefer(self, backend: str | None) -> None:
        """Names the backend to prepare for. A weight that is prepared for another is released, for `prepare` to do it again."""
        if backend != self.preferred:
            self.release()
            self.preferred = backend

    def release(self) -> bool:
        """Back to the packed form. Returns whether it was prepared."""
        if self._backend is None:
            return False
        packed = self.packed
        self._backend, self.weight_prepared = None, None
        self._hold(packed)
        return True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.weight_prepared is not None:
            return ops.sparse24_linear(x, self.weight_prepared, self.bias, self.out_features, self.quantizes_x)
        return plain.linear(x, self.packed, self.bias)

    def validate(self, name: str) -> None:
        """Raises CorruptCheckpointError, naming the layer, unless the weight is whole, finite and 2:4."""
        validate(self.packed, name)

    def extra_repr(self) -> str:
        values = "" if self.value_dtype == self.dtype else f" in {self.value_dtype}"
        values += ", as x" if self.quantizes_x else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 2:4{values}"

    # What torch does with a module's tensors, it does with the packed ones.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        prepared = self.release()
        if self.weight_scale is None:
            result = super()._apply(fn, recurse)
            self.dtype = self.value_dtype = self.weight_packed.dtype
        else:
            result = self._apply_scaled(fn, recurse)
        if prepared:
            self.prepare()
        return result

    def _apply_scaled(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
        """A cast is of what the layer computes in: values and scales are bits to it."""
        packed = self.packed
        assert packed.scale is not None
        self._hold(PackedWeight(packed.values.view(torch.uint8), packed.mask, packed.scale.view(torch.int32)))
        try:
            result = super()._apply(fn, recurse)
        finally:
            moved = self.packed
            assert moved.scale is not None
            self._hold(PackedWeight(moved.values.view(self.value_dtype), moved.mask, moved.scale.view(torch.float32)))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=packed.values.device)).dtype
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._backend is not None:
            packed = self.packed
            destination[prefix + "weight_packed"] = packed.values
            destination[prefix + "weight_mask"] = packed.mask
            if packed.scale is not None:
                destination[prefix + "weight_scale"] = packed.scale

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        prepared = self.release()
        super()._load_from_state_dict(*args, **kwargs)
        if prepared:
            self.prepare()


class Sparse24Conv1D(Sparse24Linear):
    """The same in the place of transformers' Conv1D, with its order of operations where the backend is the plain one."""

    @property
    def weight(self) -> Tensor:
        return plain.expand(self.packed, self.dtype).T

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None, "Conv1D always has a bias"
        if self.weight_prepared is not None:
            return ops.sparse24_linear(x, self.weight_prepared, self.bias, self.out_features, self.quantizes_x)
        return plain.linear_conv1d(x, self.packed, self.bias)


class StreamedLinear(WideLinear):
    """A dense layer whose weight is read once, as it lies in memory, for few rows of x; torch's product above.

    torch's bfloat16 product on a CPU reorders the weight at every call, which takes several times as long as to read it.
    """

    MOST_ROWS = 16

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        if 0 < input.numel() <= self.MOST_ROWS * self.in_features:
            return ops.dense_linear(input, self.weight, self.bias)
        return super().forward(input)


def prepare_for_serving(model: nn.Module) -> None:
    """Puts every packed weight into the form of its backend, and lets dense linears and attention take the faster path there is;
    ``HALVE_BACKEND=plain`` leaves these to torch."""
    if isinstance(model, PreTrainedModel):
        attention.use(model)
    plain_only = os.environ.get("HALVE_BACKEND") == "plain"
    for name, module in model.named_modules():
        if isinstance(module, Sparse24Linear):
            module.prepare(name)
        elif plain_only:
            continue
        elif type(module) is nn.Linear and streams(module.weight):
            cpu.gather_into_huge_pages(module.weight)
            module.__class__ = StreamedLinear
        elif isinstance(module, nn.Linear | Conv1D):
            widen(module, module.weight.dtype, module.weight.device)


def backends(model: nn.Module, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """Which backend multiplies how many of a model's 2:4 layers, and why.

    Args:
        rows: for each phase ("prefill", "decode") how many rows of x it has.

    Returns:
        ``phase``, ``backend``, ``reason`` and number of ``layers`` of each kind; the backend "dense" are layers that were packed
        and are `WHY_DENSE`.
    """
    counted: Counter[tuple[str, str, str]] = Counter()
    for module in model.modules():
        for phase, count in rows.items():
            if isinstance(module, Sparse24Linear):
                shape = (module.out_features, module.in_features)
                liked = module.prepared_for or module.preferred
                choice = choose(
                    module.device, module.value_dtype, count, *shape, liked, module.dtype, module.quantizes_x
                )
                counted[phase, choice.backend.name, choice.reason] += 1
            elif (reason := getattr(module, WHY_DENSE, None)) is not None:
                counted[phase, "dense", reason] += 1
    return [
        {"phase": phase, "backend": name, "reason": reason, "layers": n} for (phase, name, reason), n in counted.items()
    ]


def streams(weight: Tensor) -> bool:
    """Whether dense weights of that kind have a kernel for few rows that is faster than torch's."""
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    return is_half and cpu.why_not(weight.device, weight.dtype) is None and cpu.path() != "portable"


def replacement(
    module: LinearModule, dtype: torch.dtype, value_dtype: torch.dtype | None = None, quantizes_x: bool = False
) -> Sparse24Linear:
    """An empty packed module in the place of an nn.Linear or a Conv1D, on its device.

    Args:
        dtype: that it computes in; ``value_dtype``: of the kept values, left out: the same; ``quantizes_x``: see `Sparse24Linear`.
    """
    made = Sparse24Conv1D if isinstance(module, Conv1D) else Sparse24Linear
    n, k = shape_of(module)
    bias = made is Sparse24Conv1D or module.bias is not None
    kind = {"dtype": dtype, "value_dtype": value_dtype, "quantizes_x": quantizes_x}
    return made(k, n, bias=bias, **kind, device=module.weight.device)
