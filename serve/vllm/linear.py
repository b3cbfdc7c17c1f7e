"""How vLLM holds and multiplies the weight of one linear layer, fused and split as vLLM has it.

Until the checkpoint is read, a layer has the checkpoint's tensors as parameters, filled with what no checkpoint holds;
vLLM's own loaders cut and join them, because rows concatenate and columns slice in the packed format. Then the weight is
validated and prepared for the backend, as ``weight_packed`` (vLLM's LoRA code looks for that name), or expanded where no
backend is faster than dense, or `halve tune` measured that none is for the shape. Whichever it is, it stays: vLLM copies
weights that are read anew into the tensors of the first ones, and compiled graphs hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from compress import packed
from compress.errors import CorruptCheckpointError, UsageError
from compress.packed import PackedWeight
from serve.kernels import Backend, choose, ops, plain
from serve.measure import tuned
from serve.vllm.shards import Loads, Shard, part_numbers, shards_of
from serve.vllm.stored import Stored

_TWO_LOWEST = 0x33
"""The mask of weights that vLLM makes up (``--load-format dummy``): the two lowest columns of each group."""


_FUSED = (
    "halve: some 2:4 layers are served dense, because vLLM fuses them with layers that are not 2:4: prune q, k and v of a block "
    "alike, and gate and up, or leave all of them dense"
)


@dataclass(frozen=True)
class Form:
    """How a layer is multiplied, decided when it is first read.

    Attributes:
        backend: what its weight is prepared for; None: it is dense.
        how: by what, or why it is dense.
        warning: see `Outcome`.
    """

    backend: Backend | None
    how: str
    warning: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a layer.

    Attributes:
        sparse: whether it is multiplied 2:4.
        how: on what, or why not.
        bytes: held by the weight; ``dense_bytes``: by its dense form.
        warning: what the user should know, once for all layers.
    """

    sparse: bool
    how: str
    bytes: int
    dense_bytes: int
    warning: str | None = None


class SparseLinearMethod(LinearMethodBase):
    """The method of one layer. What is stored packed, or is dense and 2:4, runs on halve's kernels."""

    def __init__(
        self,
        stored: Stored,
        prefix: str,
        modules: Sequence[str],
        is_packed: Sequence[bool],
        processed: Callable[[str, Outcome], None],
    ) -> None:
        self.stored = stored
        self.prefix = prefix
        self.modules = modules
        self.is_packed = is_packed
        self._processed = processed
        self._form: Form | None = None
        self._dense: UnquantizedLinearMethod | None = None

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers the tensors of the checkpoint: values and mask, or the dense weight, or all where a fused layer has
        parts of both kinds."""
        loader = extra_weight_attrs["weight_loader"]
        n, k = sum(output_partition_sizes), input_size_per_partition
        self.n, self.k, self.dtype = n, k, params_dtype
        self.shards = shards_of(self.modules, output_partition_sizes)
        self.loads = Loads(self.modules, len(output_partition_sizes))
        if len(self.shards) != len(self.is_packed):
            self.is_packed = [all(self.is_packed)] * len(self.shards)

        def register(name: str, tensor: Tensor, columns: int, is_mask: bool = False) -> None:
            def check(read: Tensor) -> None:
                _check(f"{self.prefix}.{name}", read, columns, is_mask)

            parameter = ModelWeightParameter(
                data=tensor, input_dim=1, output_dim=0, weight_loader=self.loads.recording(name, loader, check)
            )
            if is_mask:
                set_weight_attrs(parameter, {"dummy_weight_value": _TWO_LOWEST})
            layer.register_parameter(name, parameter)

        if any(self.is_packed):
            if k % packed.COLUMN_MULTIPLE:
                raise UsageError(
                    f"{self.prefix} has {input_size} input features, of which each of {input_size // k} ranks gets {k}, and the "
                    f"packed format needs a multiple of {packed.COLUMN_MULTIPLE}: use a smaller --tensor-parallel-size"
                )
            values = torch.full((n, k // 2), float("nan"), dtype=params_dtype)
            register(self.stored.values, values, input_size // 2)
            register(self.stored.mask, torch.zeros(n, k // 8, dtype=torch.uint8), input_size // 8, is_mask=True)
            if self.stored.kind == "bitmask":
                _register_shape(layer, self.prefix, len(output_partition_sizes), input_size)
        if not all(self.is_packed):
            register("weight", torch.full((n, k), float("nan"), dtype=params_dtype), input_size)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """From the tensors of the checkpoint to the form that is multiplied.

        Raises:
            CorruptCheckpointError: a tensor is missing or damaged, or weights that are read anew are no longer 2:4; names it.
        """
        weight = self._weight(layer)
        if self._form is None:
            self._form = weight if isinstance(weight, Form) else _form_of(weight)
        form, dense_bytes = self._form, self.n * self.k * self.dtype.itemsize
        if form.backend is None:
            if isinstance(weight, PackedWeight):
                layer.weight = nn.Parameter(plain.expand(weight), requires_grad=False)
            self._dense = self._dense or UnquantizedLinearMethod()
            self._dense.process_weights_after_loading(layer)
            self._processed(self.prefix, Outcome(False, form.how, dense_bytes, dense_bytes, form.warning))
            return
        if isinstance(weight, Form):
            raise CorruptCheckpointError(
                f"{self.prefix} was 2:4 when it was first read, and the weights that are read anew are not ({weight.how}); vLLM "
                "cannot make it dense while it runs: prune the new weights, too, or start it with them"
            )
        assert form.backend.prepare is not None
        stream = form.backend.prepare(weight, self.prefix)
        layer.weight_packed = nn.Parameter(stream, requires_grad=False)
        self._processed(self.prefix, Outcome(True, form.how, stream.nbytes, dense_bytes))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self._dense is not None:
            return self._dense.apply(layer, x, bias)
        return ops.sparse24_linear(x, layer.weight_packed, bias, self.n)

    def _weight(self, layer: nn.Module) -> PackedWeight | Form:
        """The packed weight, taken off the layer; or why there is none, with the dense one on the layer."""
        parts = range(self.loads.parts)
        packed_parts = [part for part in parts if self.is_packed[min(part, len(self.is_packed) - 1)]]
        self.loads.require(
            {
                self.stored.values: packed_parts,
                self.stored.mask: packed_parts,
                "weight": [part for part in parts if part not in packed_parts],
            }
        )
        if all(self.is_packed):
            return self._take_packed(layer)
        if any(self.is_packed):
            both = self._take_packed(layer)
            for shard, is_packed in zip(self.shards, self.is_packed, strict=True):
                if is_packed:
                    part = PackedWeight(both.values[shard.rows], both.mask[shard.rows])
                    _tensor(layer, "weight")[shard.rows] = plain.expand(part)
            return _fused_with([m for m, is_packed in zip(self.modules, self.is_packed, strict=True) if not is_packed])
        weight = _tensor(layer, "weight")
        for shard in self.shards:
            if bool(weight[shard.rows].isnan().all()):
                raise CorruptCheckpointError(
                    f"the checkpoint has no tensor {shard.module}.weight; it is damaged, get it again"
                )
        if reason := packed.why_not(self.k):
            return Form(None, reason)
        if not packed.is_two_of_four(weight):
            others = [shard.module for shard in self.shards if not packed.is_two_of_four(weight[shard.rows])]
            return _fused_with(others) if len(others) < len(self.shards) else Form(None, "not 2:4")
        result = packed.pack(weight, f"{self.prefix}.weight")
        del layer.weight
        return result

    def _take_packed(self, layer: nn.Module) -> PackedWeight:
        """Values and mask off the layer, each part validated under the name that it has in the checkpoint."""
        names = (self.stored.values, self.stored.mask)
        values, mask = (_tensor(layer, name) for name in names)
        for name in [*names, *(["shape"] if self.stored.kind == "bitmask" else [])]:
            delattr(layer, name)
        for shard, is_packed in zip(self.shards, self.is_packed, strict=True):
            if is_packed:
                _validate(PackedWeight(values[shard.rows], mask[shard.rows]), shard, names)
        return PackedWeight(packed.canonical(values), mask)


def _form_of(weight: PackedWeight) -> Form:
    """What multiplies a 2:4 weight best here."""
    device, dtype = weight.values.device, weight.values.dtype
    measured = tuned.decision(device, dtype, *weight.shape)
    if measured is not None and measured.why_dense is not None:
        return Form(None, measured.why_dense, "halve: some 2:4 layers are served dense, as `halve tune` measured")
    choice = choose(device, dtype, 1, *weight.shape, None if measured is None else measured.backend)
    if choice.backend.prepare is None:
        return Form(
            None,
            "no kernel here is faster than dense, so the weights were expanded",
            f"halve: 2:4 weights are expanded to dense ones, once, which saves no memory and no time here: {choice.reason}",
        )
    return Form(choice.backend, f"{choice.backend.name}: {choice.reason}")


def _fused_with(others: Sequence[str]) -> Form:
    """Some of the modules of a fused layer are 2:4, and these are not."""
    names = ", ".join(module.rpartition(".")[2] for module in others)
    return Form(None, f"vLLM fuses them with {names}, which is not 2:4", _FUSED)


def _tensor(layer: nn.Module, name: str) -> Tensor:
    return getattr(layer, name).data


def _validate(weight: PackedWeight, shard: Shard, names: tuple[str, str]) -> None:
    """Names what was never read; then looks at every group and every value."""
    values, mask = names
    if bool((weight.mask == 0).all()):
        raise CorruptCheckpointError(f"the checkpoint has no tensor {shard.module}.{mask}; it is damaged, get it again")
    if bool(weight.values.isnan().all()):
        raise CorruptCheckpointError(
            f"the checkpoint has no tensor {shard.module}.{values}; it is damaged, get it again"
        )
    packed.validate(weight, shard.module)


def _check(name: str, read: Tensor, columns: int, is_mask: bool) -> None:
    """Refuses what vLLM's loaders would cast or cut without a word."""
    fits = read.dtype == torch.uint8 if is_mask else read.dtype in packed.VALUE_DTYPES.values()
    if not fits or read.ndim != 2 or read.shape[1] != columns:
        kind = "uint8" if is_mask else "floating-point"
        raise CorruptCheckpointError(
            f"a tensor of the checkpoint for {name} is {read.dtype} {list(read.shape)}, and {kind} [rows, {columns}] belongs "
            "there; config.json and the weights do not belong together"
        )


def _register_shape(layer: nn.Module, prefix: str, parts: int, input_size: int) -> None:
    """compressed-tensors stores the shape of each weight beside it. config.json says the same, so it is compared and not
    kept; it has a row for each part, because vLLM counts what it reads to know when a layer is complete."""

    def load(param: Any, loaded_weight: Tensor, *shard: Any) -> None:
        if loaded_weight.numel() != 2 or int(loaded_weight.flatten()[1]) != input_size:
            raise CorruptCheckpointError(
                f"a tensor of the checkpoint for {prefix}.shape says {loaded_weight.flatten().tolist()}, and config.json says "
                f"[rows, {input_size}]; they do not belong together"
            )
        read = loaded_weight.flatten().expand(parts, 2)
        for part in part_numbers(shard):
            rows = slice(None) if part is None else slice(part, part + 1)
            param.data[rows].copy_(read[rows])

    shape = nn.Parameter(torch.zeros(parts, 2, dtype=torch.int64), requires_grad=False)
    shape.weight_loader = load  # pyright: ignore[reportAttributeAccessIssue]
    layer.register_parameter("shape", shape)
