"""How vLLM holds and multiplies the weight of one linear layer, fused and split as vLLM has it.

Until the checkpoint is read, a layer has the checkpoint's tensors as parameters, filled with what no checkpoint holds;
vLLM's own loaders cut and join them, because rows concatenate and columns slice in the packed format, and a scale belongs to a
row. Then the weight is validated and prepared for the backend, as ``weight_packed`` (vLLM's LoRA code looks for that name), or
expanded where no backend is faster than dense, or `halve tune` measured that none is for the shape. Whichever it is, it stays:
vLLM copies weights that are read anew into the tensors of the first ones, and compiled graphs hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter
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
_MADE_UP_SCALE = 1e-3
"""The scale of such weights, whose values of 8 bits are all one: vLLM's own random ones go up to this."""
_NOT_A_VALUE = {torch.uint8: 0, torch.int8: -128}
"""What a tensor is filled with until it is read, which none of a checkpoint holds: masks, values. NaN of every other dtype."""
_FLOATS = tuple(packed.FLOAT_DTYPES.values())


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
        value_dtype: of the kept values that are multiplied; None where it is dense.
        quantizes_x: whether x is rounded to these, too.
    """

    sparse: bool
    how: str
    bytes: int
    dense_bytes: int
    warning: str | None = None
    value_dtype: torch.dtype | None = None
    quantizes_x: bool = False


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
        """Registers the tensors of the checkpoint: values, mask and scales, or the dense weight, or all where a fused layer has
        parts of both kinds. Values without scales, and dense weights, are cast to ``params_dtype`` as they are read."""
        loader = extra_weight_attrs["weight_loader"]
        n, k = sum(output_partition_sizes), input_size_per_partition
        self.n, self.k, self.dtype = n, k, params_dtype
        self.shards = shards_of(self.modules, output_partition_sizes)
        self.loads = Loads(self.modules, len(output_partition_sizes))
        if len(self.shards) != len(self.is_packed):
            self.is_packed = [all(self.is_packed)] * len(self.shards)

        def register(
            name: str,
            features: int,
            dtype: torch.dtype,
            fitting: Sequence[torch.dtype] = (),
            made_up: float | None = None,
        ) -> None:
            """``features``: of the input, in a column, 0: one column for all; ``fitting``: dtypes that may be cast as they are read."""
            columns, here = (input_size // features, k // features) if features else (1, 1)

            def check(read: Tensor) -> None:
                _check(f"{self.prefix}.{name}", read, columns, fitting or (dtype,))

            unread = torch.full((n, here), _NOT_A_VALUE.get(dtype, float("nan")), dtype=dtype)
            load = self.loads.recording(name, loader, check)
            if features:
                parameter = ModelWeightParameter(data=unread, input_dim=1, output_dim=0, weight_loader=load)
            else:
                parameter = ChannelQuantScaleParameter(data=unread, output_dim=0, weight_loader=load)
            if made_up is not None:
                set_weight_attrs(parameter, {"dummy_weight_value": made_up})
            layer.register_parameter(name, parameter)

        if any(self.is_packed):
            if k % packed.COLUMN_MULTIPLE:
                raise UsageError(
                    f"{self.prefix} has {input_size} input features, of which each of {input_size // k} ranks gets {k}, and the "
                    f"packed format needs a multiple of {packed.COLUMN_MULTIPLE}: use a smaller --tensor-parallel-size"
                )
            if self.stored.scale is None:
                register(self.stored.values, 2, params_dtype, _FLOATS)
            else:
                assert self.stored.value_dtype is not None
                register(self.stored.values, 2, self.stored.value_dtype, made_up=1)
                register(self.stored.scale, 0, torch.float32, made_up=_MADE_UP_SCALE)
            register(self.stored.mask, 8, torch.uint8, made_up=_TWO_LOWEST)
            if self.stored.kind == "bitmask":
                _register_shape(layer, self.prefix, len(output_partition_sizes), input_size)
        if not all(self.is_packed):
            register("weight", 1, params_dtype, _FLOATS)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """From the tensors of the checkpoint to the form that is multiplied.

        Raises:
            CorruptCheckpointError: a tensor is missing or damaged, or weights that are read anew are no longer 2:4; names it.
        """
        weight = self._weight(layer)
        if self._form is None:
            self._form = weight if isinstance(weight, Form) else _form_of(weight, self.dtype)
        form, dense_bytes = self._form, self.n * self.k * self.dtype.itemsize
        if form.backend is None:
            if isinstance(weight, PackedWeight):
                layer.weight = nn.Parameter(plain.expand(weight, self.dtype), requires_grad=False)
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
        kind = {"value_dtype": weight.values.dtype, "quantizes_x": weight.quantizes_x}
        outcome = Outcome(True, form.how, stream.nbytes, dense_bytes, **kind)
        self._processed(self.prefix, outcome)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self._dense is not None:
            return self._dense.apply(layer, x, bias)
        return ops.sparse24_linear(x, layer.weight_packed, bias, self.n, self.stored.quantizes_x)

    def _weight(self, layer: nn.Module) -> PackedWeight | Form:
        """The packed weight, taken off the layer; or why there is none, with the dense one on the layer."""
        parts = range(self.loads.parts)
        packed_parts = [part for part in parts if self.is_packed[min(part, len(self.is_packed) - 1)]]
        self.loads.require(
            {
                **dict.fromkeys(self.stored.tensors, packed_parts),
                "weight": [part for part in parts if part not in packed_parts],
            }
        )
        if all(self.is_packed):
            return self._take_packed(layer)
        if any(self.is_packed):
            both = self._take_packed(layer)
            for shard, is_packed in zip(self.shards, self.is_packed, strict=True):
                if is_packed:
                    _tensor(layer, "weight")[shard.rows] = plain.expand(both.rows(shard.rows), self.dtype)
            return _fused_with([m for m, is_packed in zip(self.modules, self.is_packed, strict=True) if not is_packed])
        weight = _tensor(layer, "weight")
        for shard in self.shards:
            if _is_unread(weight[shard.rows]):
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
        """Values, mask and scales off the layer, each part validated under the name that it has in the checkpoint."""
        names = self.stored.tensors
        tensors = [_tensor(layer, name) for name in names]
        for name in [*names, *(["shape"] if self.stored.kind == "bitmask" else [])]:
            delattr(layer, name)
        for shard, is_packed in zip(self.shards, self.is_packed, strict=True):
            if is_packed:
                _validate([tensor[shard.rows] for tensor in tensors], shard, names)
        values, mask, *scale = tensors
        weight = PackedWeight(values, mask, scale[0] if scale else None, self.stored.quantizes_x)
        return weight if weight.scale is not None else PackedWeight(packed.canonical(weight.values), weight.mask)


def _form_of(weight: PackedWeight, computes_in: torch.dtype) -> Form:
    """What multiplies a 2:4 weight best here."""
    device, dtype = weight.values.device, weight.values.dtype
    measured = tuned.decision(device, computes_in, *weight.shape, dtype, weight.quantizes_x)
    if measured is not None and measured.why_dense is not None:
        return Form(None, measured.why_dense, "halve: some 2:4 layers are served dense, as `halve tune` measured")
    liked = None if measured is None else measured.backend
    choice = choose(device, dtype, 1, *weight.shape, liked, computes_in, weight.quantizes_x)
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


def _is_unread(tensor: Tensor) -> bool:
    """Whether it holds nothing but what it was filled with."""
    filler = _NOT_A_VALUE.get(tensor.dtype)
    return bool((tensor.isnan() if filler is None else tensor == filler).all())


def _validate(tensors: Sequence[Tensor], shard: Shard, names: Sequence[str]) -> None:
    """Names what was never read; then looks at every group, value and scale. ``tensors``: as `PackedWeight` takes them."""
    for name, tensor in zip(names, tensors, strict=True):
        if _is_unread(tensor):
            raise CorruptCheckpointError(
                f"the checkpoint has no tensor {shard.module}.{name}; it is damaged, get it again"
            )
    values, mask, *scale = tensors
    packed.validate(PackedWeight(values, mask, scale[0] if scale else None), shard.module)


def _check(name: str, read: Tensor, columns: int, dtypes: Sequence[torch.dtype]) -> None:
    """Refuses what vLLM's loaders would cast or cut without a word."""
    if read.dtype not in dtypes or read.ndim != 2 or read.shape[1] != columns:
        kind = "floating-point" if dtypes is _FLOATS else str(dtypes[0]).removeprefix("torch.")
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
