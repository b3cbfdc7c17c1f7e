"""A graph that `serve.onnx.export` made, run by ONNX Runtime behind the interface of a transformers model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from compress.architecture import load_config
from compress.errors import CorruptCheckpointError, SourceError, UsageError, one_line
from compress.extras import how_to_install
from compress.files import file_digest
from compress.own_code import NEVER
from serve.engines.kv_cache import BatchCache, keys_and_values
from serve.kernels.cpu import backend, library
from serve.onnx import graph

GRAPH_NAME = "model.onnx"
RECORD_NAME = "export.json"
_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_ELEMENTS = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


def is_exported(directory: Path) -> bool:
    """Whether it holds a graph."""
    return (directory / GRAPH_NAME).is_file()


class OnnxModel(nn.Module):
    """A causal language model on one device. Keys and values are in a cache of transformers, or one that is like it.

    Attributes:
        config, generation_config: as the checkpoint has them.
        dtype: of logits, keys and values.
        vocab_size: of the logits.
        weight_bytes: of the file of weights.
        provider: ONNX Runtime's name of what multiplies.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu", *, is_packed: bool = False) -> None:
        """
        Args:
            is_packed: whether the graph has halve's operator.

        Raises:
            SourceError: there is no graph, or it is none of halve's;
            UsageError: ONNX Runtime is not installed, or cannot use the device.
        """
        super().__init__()
        self.device = torch.device(device)
        self.config = load_config(directory)
        self.generation_config = _generation(directory)
        self._session = _session(directory / GRAPH_NAME, self.device, is_packed)
        self.provider: str = self._session.get_providers()[0]
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        self._takes = frozenset(inputs)
        self._layers = sum(name.startswith("present.") for name in outputs) // 2
        needed = {"input_ids", graph.KEEP, *(graph.past(layer, kind) for layer, kind in self._parts())}
        if not self._layers or graph.LOGITS not in outputs or not needed <= self._takes:
            raise SourceError(f"{directory / GRAPH_NAME} is no graph that `halve export` made")
        first = inputs[graph.past(0, "key")]
        self.dtype = _DTYPES[first.type]
        self.vocab_size = int(outputs[graph.LOGITS].shape[-1])
        # (the outputs have their lengths as numbers, the inputs may not)
        self._heads = {
            (layer, kind): (outputs[name].shape[1], outputs[name].shape[3])
            for layer, kind in self._parts()
            for name in [graph.present(layer, kind)]
        }
        self.weight_bytes = sum(file.stat().st_size for file in directory.glob(f"{GRAPH_NAME}*"))

    def _parts(self) -> Iterable[tuple[int, str]]:
        return ((layer, kind) for layer in range(self._layers) for kind in ("key", "value"))

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Cache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, kept, vocabulary], of the last ``logits_to_keep`` tokens or, if that is 0, of all; the cache grows by the tokens.

        Args:
            input_ids: [batch, sequence].
            attention_mask: [batch, total], 0 at padding; left out: there is none.
            position_ids: [batch, sequence].
        """
        rows, tokens = input_ids.shape
        states = _states(past_key_values)
        length = states[0][0].shape[2] if states else 0
        total = length + tokens
        if attention_mask is None:
            attention_mask = input_ids.new_ones(rows, total)
        if position_ids is None:
            position_ids = torch.arange(length, total, device=self.device).expand(rows, -1)
        feeds = {
            "input_ids": input_ids,
            "attention_mask": attention_mask.long(),
            "position_ids": position_ids,
            graph.KEEP: torch.arange(tokens - logits_to_keep if logits_to_keep else 0, tokens, device=self.device),
        }
        kept = len(feeds[graph.KEEP])
        results = {graph.LOGITS: self._empty(rows, kept, self.vocab_size)}
        for layer, kind in self._parts():
            heads, depth = self._heads[layer, kind]
            before = states[layer][kind == "value"] if states else self._empty(rows, heads, 0, depth)
            feeds[graph.past(layer, kind)] = before
            results[graph.present(layer, kind)] = self._empty(rows, heads, total, depth)
        self._run(feeds, results)
        for layer in range(self._layers):
            key, value = (results[graph.present(layer, kind)][:, :, length:] for kind in ("key", "value"))
            past_key_values.update(key, value, layer)
        return CausalLMOutputWithPast(logits=cast(Any, results[graph.LOGITS]), past_key_values=past_key_values)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _run(self, feeds: dict[str, Tensor], results: dict[str, Tensor]) -> None:
        """Reads and writes the tensors where they lie."""
        binding = self._session.io_binding()
        alive = {name: tensor.contiguous() for name, tensor in feeds.items() if name in self._takes}
        for bind, tensors in ((binding.bind_input, alive), (binding.bind_output, results)):
            for name, tensor in tensors.items():
                place = {"device_type": self.device.type, "device_id": self.device.index or 0}
                bind(
                    name,
                    **place,
                    element_type=_ELEMENTS[tensor.dtype],
                    shape=tuple(tensor.shape),
                    buffer_ptr=tensor.data_ptr(),
                )
        if self.device.type == "cuda":  # ONNX Runtime has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()


def _states(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer [batch, heads, past, head_dim], none where nothing was run."""
    if isinstance(cache, BatchCache):
        return [layer.in_use() for layer in cache.layers]
    return keys_and_values(cast(DynamicCache, cache))


def read_record(directory: Path) -> dict[str, Any]:
    """What `export` says of the graph of a directory, whose files are compared with it.

    Raises:
        SourceError: there is none; CorruptCheckpointError: a file is damaged.
    """
    path = directory / RECORD_NAME
    if not is_exported(directory):
        raise SourceError(f"{directory} holds no {GRAPH_NAME}; `halve export {directory} --out DIR` makes one")
    try:
        record = json.loads(path.read_text())
        for name, entry in record["files"].items():
            file = directory / name
            if not file.is_file() or (file.stat().st_size, file_digest(file)) != (entry["bytes"], entry["sha256"]):
                raise CorruptCheckpointError(f"{file} is not what {path} says; export it again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is no record of `halve export`: {one_line(error)}") from None
    return record


def _generation(directory: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(directory, **NEVER)
    except OSError:  # there is none
        return GenerationConfig()


def _session(path: Path, device: torch.device, is_packed: bool) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(f"onnxruntime is not installed: {how_to_install('onnx')}") from None
    wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise UsageError(
            f"this ONNX Runtime has no {wanted}: install onnxruntime-gpu in place of onnxruntime, or use --device cpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if is_packed:
        _register(options, device)
    provider = (wanted, {"device_id": device.index or 0}) if device.type == "cuda" else wanted
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # its errors have no common class
        raise SourceError(f"ONNX Runtime cannot read {path}: {one_line(error)}") from None


def _register(options: Any, device: torch.device) -> None:
    """Tells a session of halve's operator."""
    found = library.find()
    if device.type != "cpu":
        raise UsageError(
            "the graph has packed weights, which are for processors; export it with --weights zeros, or use --device cpu"
        )
    if found.library is None:
        raise UsageError(
            f"the graph has packed weights, and halve's kernels are not there: {found.problem}; {found.remedy}"
        )
    found.library.halve_onnx_configure(torch.get_num_threads(), backend.path_number())
    try:
        options.register_custom_ops_library(str(found.path))
    except Exception as error:  # its errors have no common class
        raise UsageError(f"ONNX Runtime does not take halve's operator: {one_line(error)}") from None
