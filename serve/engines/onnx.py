"""The embedded engine over a graph that `halve export` made: the same batching, cache and sampling, and ONNX Runtime for the model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from compress.device import choose_device
from compress.errors import SourceError, UsageError
from serve.engines.directory import require_checkpoint
from serve.engines.loading import DTYPES, check_layers, read_tokenizer
from serve.engines.transformers import TransformersEngine
from serve.onnx.model import OnnxModel, is_exported, read_record

WHY = "2:4 weights are multiplied with their zeros: ONNX Runtime by itself has no sparse kernels"

WHY_PACKED = "halve's operator multiplies packed weights within ONNX Runtime"


class OnnxEngine(TransformersEngine):
    """Serves a directory of `halve export`. See `base.Engine` for the contract."""

    model: OnnxModel  # pyright: ignore[reportIncompatibleVariableOverride]

    def _read(self) -> tuple[Any, Tokenizer, list[str]]:
        path = require_checkpoint(self._model_dir)
        if not is_exported(path):
            raise SourceError(
                f"{self._model_dir!r} is no ONNX graph; `halve export {self._model_dir} --out DIR` makes one of a checkpoint"
            )
        record = read_record(path)
        self._layers, self._is_packed = int(record["layers"]["sparse"]), record["weights"] == "packed"
        device, why = choose_device(self._device_wish)
        if device.type == "cuda" and self._device_wish == "auto" and (self._is_packed or not _has_cuda()):
            reason = (
                "packed weights are for processors" if self._is_packed else "this ONNX Runtime is built without CUDA"
            )
            device, why = choose_device("cpu")[0], reason
        model = OnnxModel(path, device, is_packed=self._is_packed)
        if self._dtype_wish not in ("auto", str(model.dtype).removeprefix("torch.")):
            raise UsageError(
                f"--dtype {self._dtype_wish}: the graph computes in {model.dtype}; `halve export --dtype {self._dtype_wish}` makes another"
                if self._dtype_wish in DTYPES
                else f"--dtype {self._dtype_wish!r} is not known."
            )
        check_layers(model.config.get_text_config(), self._model_dir)
        return model, read_tokenizer(path), [f"device {device}: {why}", f"ONNX Runtime, {model.provider}"]

    def _describe(self) -> None:
        self.vocab_size = self.model.vocab_size
        self._weight_bytes = self.model.weight_bytes
        backend, reason = ("cpu", WHY_PACKED) if self._is_packed else ("onnxruntime", WHY)
        how = {"backend": backend, "reason": reason, "layers": self._layers}
        self._backends = [{"phase": phase, **how} for phase in ("prefill", "decode") if self._layers]


def _has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
