"""What of a model decides its speed and its memory, from its configuration alone: no weight is read.

Layers and parameters are those of the model that transformers builds on the meta device; the bytes that a token takes in the
key/value cache are those that it keeps there when it runs on one token. So nothing here knows families: grouped queries, latent
attention and tied heads count as they are.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from compress import packed
from compress.architecture import auto_class, find_blocks, load_config, reads_images, skeleton
from compress.checkpoint import parse_config
from compress.errors import SourceError, UsageError, one_line
from compress.layout import Layout, LinearInfo
from compress.own_code import NEVER
from compress.packed import FLOAT_DTYPES, VALUE_DTYPES
from compress.quiet import quiet_transformers
from serve.measure.kernel_entries import Shape, kind_name
from serve.vllm.shards import FUSED


@dataclass(frozen=True)
class Layers:
    """Linear layers of one place in the blocks and one shape. ``why_dense``: why they cannot be pruned, or None."""

    name: str
    shape: Shape
    count: int
    why_dense: str | None = None


@dataclass(frozen=True)
class Experts:
    """Weights of experts, which transformers holds as one tensor [experts, ., .] a block, and halve leaves dense."""

    parameters: int
    experts: int
    chosen: int


@dataclass(frozen=True)
class ModelShape:
    """A causal language model without its weights.

    Attributes:
        name: as it was given.
        kinds: for each block what tells it from others: two of the same kind take the same time.
        layers: the linears of the blocks.
        fused: what vLLM multiplies as one layer, out of several of ``layers`` (without tensor parallelism).
        head: the output layer, which stays dense.
        value_dtype: of the kept values when packed; ``quantizes_x``: whether x is rounded to these, too.
        weights: bytes of all parameters, tied ones once, when dense.
        kv_bytes_per_token: of keys and values of one token, in all layers; None where it keeps none (a state instead).
        attention_width: heads times the width of a head, summed over the layers; for the operations of attention.
    """

    name: str
    config: Any
    dtype: torch.dtype
    value_dtype: torch.dtype
    kinds: tuple[Hashable, ...]
    layers: tuple[Layers, ...]
    head: Shape | None
    experts: tuple[Experts, ...]
    weights: int
    kv_bytes_per_token: int | None
    attention_width: int
    ignored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())
    fused: tuple[Layers, ...] = ()
    quantizes_x: bool = False

    @property
    def kind(self) -> str:
        """What its layers are looked up by in tables of kernels."""
        return kind_name(self.dtype, self.value_dtype, self.quantizes_x)

    @property
    def prunable(self) -> tuple[Layers, ...]:
        return tuple(layers for layers in self.layers if layers.why_dense is None)

    @property
    def dense_bytes(self) -> int:
        """Of the weights that can be pruned."""
        return sum(g.count * g.shape.n * g.shape.k for g in self.prunable) * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Of the same weights, packed."""
        return sum(g.count * packed.bytes_of(g.shape.n, g.shape.k, self.value_dtype) for g in self.prunable)

    @property
    def sparse_weights(self) -> int:
        """Bytes of all parameters when what can be pruned is packed."""
        return self.weights - self.dense_bytes + self.packed_bytes

    @property
    def block_bytes(self) -> int:
        """Of a block, dense; the mean."""
        outside = 0 if self.head is None else self.head.n * self.head.k * self.dtype.itemsize
        return max(1, (self.weights - outside) // len(self.kinds))

    def is_pruned(self, linear: LinearInfo) -> bool:
        return _why_dense(linear, self.ignored) is None and linear.in_block


def read(model: str, value_dtype: str = "auto", activation_dtype: str = "auto") -> ModelShape:
    """The shape of a model directory, a ``config.json``, or a model on the hub, of which only ``config.json`` is fetched.

    Args:
        value_dtype: of the kept values; ``auto``: what a packed checkpoint says, of a dense one its own.
        activation_dtype: what x is rounded to; ``auto``: what a packed checkpoint says; ``none``.

    Raises:
        SourceError: there is none, transformers does not know it, or it is no unquantized or packed causal language model.
        CorruptCheckpointError: ``config.json`` contradicts the model.
        UsageError: x would be rounded to another dtype than the values.
    """
    path = _local(model)
    with quiet_transformers():
        config = load_config(path)
        if reads_images(config):
            raise SourceError(f"{model} is an image classifier, and `halve advise` is for causal language models")
        if getattr(config, "is_encoder_decoder", False):
            raise SourceError(f"{model} is an encoder-decoder model; halve prunes decoder-only causal language models")
        ignored, stored, activations = _packed_as(config, model)
        values = stored if value_dtype == "auto" else value_dtype
        activations = activations if activation_dtype == "auto" else activation_dtype
        if activations not in ("none", values):
            raise UsageError(
                f"x in {activations} goes with kept values of the same dtype, and they are {values or 'not of 8 bits'}; add "
                f"--value-dtype {activations}, or --activation-dtype none"
            )
        return _shape_of(model, config, ignored, VALUE_DTYPES.get(values), activations != "none")


def _local(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError(f"{path} has no config.json, which is all that is needed of a model here")
        return path
    if path.is_file():
        if path.suffix != ".json":
            raise SourceError(f"{path} is neither a model directory nor a config.json")
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or path.suffix == ".json":
        raise SourceError(f"there is no model directory or config.json {path}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except LocalEntryNotFoundError as error:
        raise SourceError(
            f"{model!r} is not a directory here, and the hub cannot be reached: {one_line(error)}; a config.json is enough"
        ) from None
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise SourceError(
            f"{model!r} is neither here nor a model on the hub that can be read: {one_line(error)}"
        ) from None


def _packed_as(config: Any, model: str) -> tuple[frozenset[str], str, str]:
    """The linears that a packed checkpoint keeps dense, the dtype of its values, and of activations; none of a dense model, "" and "none"."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return frozenset(), "", "none"
    found = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if found.get("quant_method") != "halve":
        raise SourceError(
            f"{model} is quantized ({found.get('quant_method', 'an unknown method')}); halve prunes and serves unquantized models"
        )
    del config.quantization_config  # what is built here are the layers, and they are filled afterwards
    parsed = parse_config(found)
    return frozenset(parsed.ignore), parsed.value_dtype, parsed.activation_dtype or "none"


def _shape_of(
    name: str, config: Any, ignored: frozenset[str], value_dtype: torch.dtype | None, quantizes_x: bool
) -> ModelShape:
    dtype = config.get_text_config().dtype
    dtype = dtype if isinstance(dtype, torch.dtype) and dtype in FLOAT_DTYPES.values() else torch.float32
    model = skeleton(config, dtype)
    layout = Layout(model)
    layout.packed(ignored)  # raises where it names layers that the model does not have
    head = model.get_output_embeddings()
    blocks_name, blocks = find_blocks(model)
    kv, notes = _kv_bytes(model, dtype)
    experts = tuple(_experts(blocks, config.get_text_config()))
    if experts:
        share = sum(e.parameters for e in experts) * dtype.itemsize
        notes += [f"its experts ({share / 1e9:.2f} GB) stay dense: transformers holds them as one tensor a block"]
    return ModelShape(
        name=name,
        config=config,
        dtype=dtype,
        value_dtype=value_dtype if value_dtype in packed.LARGEST else dtype,
        kinds=kinds_of(model),
        layers=_grouped(layout, blocks_name, ignored),
        head=Shape(head.weight.shape[0], head.weight.shape[1]) if isinstance(head, nn.Linear) else None,
        experts=experts,
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        kv_bytes_per_token=kv,
        attention_width=_attention_width(config.get_text_config(), len(blocks)),
        ignored=ignored,
        quantizes_x=quantizes_x,
        notes=tuple(notes),
        fused=_fused(layout, blocks_name, ignored),
    )


def kinds_of(model: PreTrainedModel) -> tuple[Hashable, ...]:
    """For each block: the names and shapes of its parameters, and the kind of its layer as the configuration has it."""
    _, blocks = find_blocks(model)
    declared = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(blocks)
    return tuple(
        (kind, *((name, tuple(p.shape)) for name, p in block.named_parameters()))
        for kind, block in zip(declared, blocks, strict=False)
    )


def _why_dense(linear: LinearInfo, ignored: frozenset[str]) -> str | None:
    if linear.name in ignored:
        return "config.json keeps it dense"
    return packed.why_not(linear.k)


def _grouped(layout: Layout, blocks: str, ignored: frozenset[str]) -> tuple[Layers, ...]:
    counts: dict[tuple[str, Shape, str | None], int] = {}
    for linear in layout.block_linears:
        place = re.sub(r"^\d+\.", "", linear.name.removeprefix(f"{blocks}."))
        key = (place, Shape(linear.n, linear.k, linear.transposed), _why_dense(linear, ignored))
        counts[key] = counts.get(key, 0) + 1
    return tuple(Layers(name, shape, count, why) for (name, shape, why), count in counts.items())


def _fused(layout: Layout, blocks: str, ignored: frozenset[str]) -> tuple[Layers, ...]:
    parents: dict[str, dict[str, LinearInfo]] = {}
    for linear in layout.block_linears:
        parent, _, own = linear.name.rpartition(".")
        parents.setdefault(parent, {})[own] = linear
    counts: dict[tuple[str, Shape], int] = {}
    for parent, own in parents.items():
        place = re.sub(r"^\d+\.", "", parent.removeprefix(f"{blocks}."))
        for name, names in FUSED.items():
            parts = [own[part] for part in names if part in own]
            widths = {part.k for part in parts}
            if (
                len(parts) == len(names)
                and len(widths) == 1
                and all(_why_dense(part, ignored) is None for part in parts)
            ):
                key = (f"{place}.{name}", Shape(sum(part.n for part in parts), widths.pop()))
                counts[key] = counts.get(key, 0) + 1
    return tuple(Layers(name, shape, count) for (name, shape), count in counts.items())


def _experts(blocks: nn.ModuleList, config: Any) -> list[Experts]:
    found: dict[int, int] = {}
    for parameter in blocks.parameters():
        if parameter.ndim == 3:
            found[parameter.shape[0]] = found.get(parameter.shape[0], 0) + parameter.numel()
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    return [Experts(size, experts, min(chosen or experts, experts)) for experts, size in found.items() if experts > 1]


@torch.inference_mode()
def _kv_bytes(model: PreTrainedModel, dtype: torch.dtype) -> tuple[int | None, list[str]]:
    """Bytes of keys and values of one token, as the transformers engine holds them: all layers keep all tokens."""
    cache = DynamicCache()
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache, use_cache=True)
        kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        sizes = [t.nbytes for pair in kept for t in pair if isinstance(t, torch.Tensor)]
        if sizes:
            return sum(sizes), []
    except Exception as error:  # model code that looks at values, which are not there
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        width = _head_width(config)
        if heads and width:
            _, blocks = find_blocks(model)
            return 2 * len(blocks) * heads * width * dtype.itemsize, []
        return None, [f"how much a token takes in the cache is not known: {one_line(error)}"]
    return None, ["it keeps no keys and values, so a longer context takes no more memory"]


def _head_width(config: Any) -> int | None:
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    width = getattr(config, "head_dim", None)
    if isinstance(width, int):
        return width
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None


def _attention_width(config: Any, blocks: int) -> int:
    heads, width = getattr(config, "num_attention_heads", None), _head_width(config)
    return blocks * heads * width if isinstance(heads, int) and width else 0


def build(model: ModelShape, blocks: int, device: torch.device) -> PreTrainedModel:
    """The model with so many blocks; its weights are what was in the memory, its buffers are real.

    Raises:
        SourceError: the configuration cannot be shortened so that the first blocks stay the same.
    """
    from transformers.initialization import no_init_weights

    config = shortened(model.config, blocks)
    try:
        with quiet_transformers(), no_init_weights():
            built = cast(PreTrainedModel, auto_class(config).from_config(config, dtype=model.dtype, **NEVER))
    except Exception as error:  # configurations check what they hold in ways of their own
        raise SourceError(f"transformers cannot build {model.name} with {blocks} blocks: {one_line(error)}") from None
    built.tie_weights()
    if kinds_of(built) != model.kinds[:blocks]:
        raise SourceError(f"with {blocks} blocks, {model.name} has other blocks than at the beginning of the whole")
    return built.eval().requires_grad_(False).to(device)  # pyright: ignore[reportArgumentType]


def shortened(config: Any, blocks: int) -> Any:
    """The configuration of the first blocks; lists with an entry for each block are cut."""
    short = type(config).from_dict(config.to_dict())
    text = short.get_text_config()
    whole = text.num_hidden_layers
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == whole:
            setattr(text, key, value[:blocks])
    text.num_hidden_layers = blocks
    return short
