"""A 2:4 checkpoint becomes an ONNX graph with its zeros, by transformers' exporter; checked before it gets its name.

TensorRT, alone or within ONNX Runtime, finds the zeros and takes sparse kernels where they are faster; ONNX Runtime by itself multiplies them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from compress import artefact, packed
from compress.architecture import shape_of
from compress.attention import TORCH, set_attention
from compress.convert import can_pack
from compress.errors import CheckError, HalveError, OutputError, SourceError, UsageError, one_line
from compress.extras import how_to_install
from compress.files import explain_os_error, file_digest, seal, sibling, write_text
from compress.packed import PackedWeight
from compress.quiet import quiet_transformers
from compress.sources import read_config
from compress.version import version
from serve.engines.kv_cache import keys_and_values
from serve.kernels.cpu import library
from serve.linear import Sparse24Conv1D, Sparse24Linear
from serve.loading import read_model, require_language_model
from serve.onnx import graph
from serve.onnx.model import GRAPH_NAME, RECORD_NAME, OnnxModel

DTYPES = {"float32": torch.float32, "float16": torch.float16}
ALLOWED = {"float32": 1e-3, "float16": 0.05}
"""How far logits may be from torch's in float32, as a share of their size."""

ALLOWED_ROUNDED = 0.3
"""The same where each layer rounds its inputs to 8 bits, which the model in float32 that is compared with does not."""
WEIGHTS = ("zeros", "packed")

_ROWS, _LENGTH, _STEPS = 2, 12, 2
"""What the check runs: prompts, of which one is padded, and tokens after them."""


def export_onnx(source: Path, out: Path, dtype: str = "float32", weights: str = "zeros") -> dict[str, Any]:
    """Writes a directory with ``model.onnx``, its data, the tokenizer and ``export.json``, what was made of what.

    Args:
        source: a checkpoint, packed or dense.
        dtype: of weights and arithmetic: float32, or float16 for GPUs.
        weights: ``zeros``: dense ones, for anything that runs ONNX; ``packed``: 2:4 layers are an operator of halve's, which multiplies packed
            weights within ONNX Runtime on processors, with x rounded to the dtype of the checkpoint.

    Returns:
        What ``export.json`` says.

    Raises:
        SourceError: it is no language model, or the exporter cannot make a graph of it; CheckError: the graph is not the model, or lost
            zeros, or there are none to pack; UsageError: a library is missing; OutputError: the directory is there already.
    """
    _require_libraries()
    _require_choices(out, dtype, weights)
    require_language_model(source, "export")
    read = read_model(source)
    kept = packed_layers(read) if weights == "packed" else {}
    if weights == "packed" and not kept:
        raise CheckError(f"no layer of {source} is 2:4; `halve compress` makes one that is")
    computes_in = read.dtype
    model = expanded(read)
    layers = linears(model)
    partial = sibling(out, f".{uuid.uuid4().hex[:8]}.exporting")
    try:
        partial.mkdir(parents=True)
        sparse = [(_dense(model, name), weight) for name, weight in kept.items()]
        _write_graph(model, partial / GRAPH_NAME, DTYPES[dtype], str(source), sparse, computes_in)
        allowed = ALLOWED[dtype]
        if sparse:
            allowed = ALLOWED_ROUNDED if any(weight.quantizes_x for _, weight in sparse) else ALLOWED["float16"]
        artefact.copy_companions(source, partial)
        config = read_config(source)
        config.pop("quantization_config", None)
        artefact.write_config(partial, {**config, "dtype": dtype})
        record = {
            "halve": version(),
            "source_sha256": seal(source),
            "dtype": dtype,
            "weights": weights,
            "layers": _require_zeros(partial / GRAPH_NAME, layers),
            "error": _require_model(partial, model, dtype, weights == "packed", allowed),
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                for path in sorted(partial.glob(f"{GRAPH_NAME}*"))
            },
        }
        write_text(partial / RECORD_NAME, json.dumps(record, indent=2) + "\n")
        partial.replace(out)
    except OSError as error:
        raise explain_os_error(error, out) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _require_choices(out: Path, dtype: str, weights: str) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise UsageError(f"--weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    if weights == "packed" and dtype != "float32":
        raise UsageError(
            f"--weights packed is for processors, where the rest of the graph computes in float32, not {dtype}"
        )
    if weights == "packed" and library.load() is None:
        raise UsageError(f"--weights packed needs halve's kernels: {library.status()}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there already and is not empty; choose another --out, or remove it")


def expanded(model: PreTrainedModel) -> PreTrainedModel:
    """The model with dense layers in place of packed ones, in float32, in which values times scales are exact or nearly; with attention
    that does what its code says (torch's own ignores a cap of logits, and a graph made of it would, too)."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Sparse24Linear):
            continue
        weight = packed.unpack(module.packed, torch.float32).float()
        n, k = weight.shape
        if isinstance(module, Sparse24Conv1D):
            dense: nn.Module = Conv1D(n, k)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(k, n, bias=module.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = cast(Any, module.bias)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, dense)
    if isinstance(quantizer := getattr(model, "hf_quantizer", None), HfQuantizer):
        quantizer.remove_quantization_config(model)
    set_attention(model, TORCH)
    return model.float()


def linears(model: nn.Module) -> Counter[tuple[int, int]]:
    """How many weights of a dense model are 2:4, by (N, K)."""
    found: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            if packed.is_two_of_four(weight):
                found[shape_of(module)] += 1
    return found


def packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model as it was read, by name of module; those that are dense with zeros are packed."""
    found: dict[str, PackedWeight] = {}
    for name, module in model.named_modules():
        if isinstance(module, Sparse24Linear):
            found[name] = module.packed
        elif isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            if can_pack(weight):
                found[name] = packed.pack(weight.detach().contiguous(), name)
    return found


def _dense(model: nn.Module, name: str) -> Tensor:
    """The weight [N, K] of a module."""
    module: Any = model.get_submodule(name)
    return module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()


def _write_graph(
    model: PreTrainedModel,
    path: Path,
    dtype: torch.dtype,
    source: str,
    sparse: Sequence[tuple[Tensor, PackedWeight]],
    io: torch.dtype,
) -> None:
    with _quiet():
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    before = model.dtype
    inputs = _example(model)
    try:
        with _quiet():
            inputs["past_key_values"] = _cast(inputs["past_key_values"], dtype)
            program: Any = OnnxExporter().export(
                cast(PreTrainedModel, nn.Module.to(model, dtype)), inputs, OnnxConfig(dynamic=True)
            )
            graph.name_all(program.model.graph)
            if sparse:
                graph.pack_products(program.model, sparse, io)
            graph.forget_traces(program.model.graph)
            program.save(path, external_data=True)
    except (OSError, HalveError):
        raise
    except Exception as error:  # torch, onnxscript and the exporter raise whatever they meet
        raise SourceError(
            f"transformers' exporter cannot make an ONNX graph of {source}: {type(error).__name__}: {one_line(error)}"
        ) from None
    finally:
        nn.Module.to(model, before)


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs that the exporter follows: no axis has the length of another, or 1."""
    rows, earlier, tokens = 2, 5, 3
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=_tokens(model, rows, earlier), past_key_values=cache, use_cache=True)
    return {
        "input_ids": _tokens(model, rows, tokens),
        "attention_mask": torch.ones(rows, earlier + tokens, dtype=torch.long),
        "position_ids": torch.arange(earlier, earlier + tokens).expand(rows, -1).contiguous(),
        "past_key_values": cache,
        "use_cache": True,
        graph.KEEP: torch.arange(2),
    }


def _cast(cache: DynamicCache, dtype: torch.dtype) -> DynamicCache:
    made = DynamicCache()
    for layer, (keys, values) in enumerate(keys_and_values(cache)):
        made.update(keys.to(dtype), values.to(dtype), layer)
    return made


def _tokens(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * length)
    return torch.randint(0, model.config.get_text_config().vocab_size, (rows, length), generator=generator)


def _require_zeros(path: Path, layers: Counter[tuple[int, int]]) -> dict[str, int]:
    """Raises CheckError unless all layers of the model that are 2:4 are so in the graph, along the axis that is summed over."""
    import onnx_ir

    found = graph.products(onnx_ir.load(path).graph)
    if lost := layers - found.sparse:
        (n, k), count = next(iter(lost.items()))
        raise CheckError(f"{count} weights [{n}, {k}] are 2:4 in the model and not in the graph; please report it")
    return {"sparse": found.sparse.total(), "dense": found.dense.total()}


@torch.inference_mode()
def _require_model(directory: Path, model: PreTrainedModel, dtype: str, is_packed: bool, allowed: float) -> float:
    """How far the graph's logits are from the model's, as a share of their size. Raises CheckError: too far."""
    made = OnnxModel(directory, is_packed=is_packed)
    ids = _tokens(model, _ROWS, _LENGTH + _STEPS)
    padding = 3
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for side in (model, made):
        cache, logits = DynamicCache(), []
        for begin, end in ((0, _LENGTH), *((at, at + 1) for at in range(_LENGTH, _LENGTH + _STEPS))):
            part = slice(begin, end)
            how = {"position_ids": positions[:, part], "attention_mask": mask[:, :end], "past_key_values": cache}
            logits.append(side(input_ids=ids[:, part], use_cache=True, **how).logits.double())
        found.append(torch.cat(logits, 1)[mask.bool()])
    ours, theirs = found
    error = float((ours - theirs).norm() / ours.norm())
    if not error <= allowed:
        raise CheckError(
            f"the graph's logits are {error:.2g} of their size off torch's, and {allowed} is allowed; "
            + (
                "float16 may be too narrow for this model: --dtype float32"
                if dtype == "float16"
                else "please report it"
            )
        )
    return error


def _require_libraries() -> None:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        try:
            with _quiet():  # onnxscript has torch warn of what it calls
                __import__(needed)
        except ImportError:
            raise UsageError(f"{needed} is not installed: {how_to_install('onnx')}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and the exporter print and warn of on the way."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet_transformers(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
