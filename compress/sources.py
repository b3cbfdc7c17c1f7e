"""Where the dense model comes from: a local Hugging Face directory, a hub id, or a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress import stranded
from compress.artefact import companions
from compress.errors import CorruptCheckpointError, OutputError, SourceError, one_line
from compress.files import TensorFiles, explain_os_error
from compress.own_code import NEVER, explain

_HUB_PATTERNS = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "additional_chat_templates/*",
]
_HUB_DUPLICATES = ["consolidated*", "original/*"]  # the same weights again, in their makers' own layout


class Source:
    """A dense Hugging Face checkpoint on disk.

    Raises:
        SourceError: nothing usable is there, or it is packed already.
        CorruptCheckpointError: a file is truncated or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory)
        stranded.require_none(directory, self.config)
        quantization = self.config.get("quantization_config")
        if isinstance(quantization, dict):
            method = quantization.get("quant_method", "an unknown method")
            if method == "halve":
                raise SourceError(
                    f"{directory} is packed by halve already; `halve unpack` makes a dense checkpoint of it"
                )
            raise SourceError(f"{directory} is quantized ({method}); pruning needs the unquantized model")
        if self.config.get("is_encoder_decoder"):
            raise SourceError(
                f"{directory} is an encoder-decoder model; halve prunes decoder-only causal language models"
            )
        self.tensors = TensorFiles(directory)

    @property
    def dtype(self) -> Any:
        """See `dtype_of`."""
        return dtype_of(self.config, self.tensors)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the checkpoint without reading it all: the names, sizes and times of its files."""
        return fingerprint([self.directory / "config.json", *self.tensors.files, *companions(self.directory)])


def said_dtype(config: Mapping[str, Any]) -> Any:
    """The dtype that a ``config.json`` names, of the model or of its text model; None where it names none."""
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    return next((said for place in places if (said := place.get("dtype") or place.get("torch_dtype"))), None)


def dtype_of(config: Mapping[str, Any], tensors: TensorFiles) -> Any:
    """The name of a checkpoint's dtype: what ``config.json`` says, else what most of its bytes are stored in, as transformers reads it."""
    if said := said_dtype(config):
        return said
    bytes_of: Counter[str] = Counter()
    for info in tensors.info.values():
        if info.dtype.is_floating_point:
            bytes_of[str(info.dtype).removeprefix("torch.")] += info.nbytes
    return bytes_of.most_common(1)[0][0] if bytes_of else "float32"


def fingerprint(files: Iterable[Path]) -> dict[str, Any]:
    """File name -> [bytes, time of the last change in nanoseconds]."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def resolve(model: str, scratch: Path) -> Path:
    """The local directory of a model given as a directory, a ``.gguf`` file or a hub id.

    Args:
        scratch: where a GGUF file is converted to.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"there is no file {path}")
        if not (scratch / "config.json").is_file():
            from_gguf(path, scratch)
        return scratch
    if path.exists():
        raise SourceError(f"{path} is a file; a model is a directory with config.json and safetensors, or a .gguf file")
    if not is_hub_id(model):
        raise SourceError(f"there is no model directory {path}")
    return _download(model)


def is_hub_id(model: str) -> bool:
    """Whether a model is one of the hub, as the user called it: what is here comes first."""
    return not (model.startswith((".", "/", "~")) or model.count("/") != 1 or Path(model).exists())


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_DUPLICATES))
    except RepositoryNotFoundError:
        raise SourceError(
            f"{repository!r} is neither a directory here nor a model on the hub (is it private? see `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"{repository!r} is not a directory here, and the hub cannot be reached: {one_line(error)}"
        ) from None


def from_gguf(gguf: Path, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Dequantizes a GGUF file into a Hugging Face directory with its tokenizer. Needs the ``gguf`` package.

    Raises:
        SourceError: the file cannot be read, or its architecture is unknown to transformers.
        OutputError: there is no space for what is made of it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils import quantization_config

    if not gguf.is_file():
        raise SourceError(f"there is no file {gguf}")
    partial = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **NEVER)
        options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": dtype, **NEVER}
        if hasattr(quantization_config, "GgufConfig"):  # newer versions keep the weights quantized unless told not to
            options["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
        if isinstance(quantizer := getattr(model, "hf_quantizer", None), HfQuantizer):
            quantizer.remove_quantization_config(model)
    except Exception as error:  # anything can come out of a damaged file
        shutil.rmtree(partial, ignore_errors=True)
        raise SourceError(
            f"cannot read {gguf} as a GGUF model: {explain(error)} ({gguf.stat().st_size:,} bytes; a download may be cut off)"
        ) from None
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(directory, ignore_errors=True)
        partial.replace(directory)
    except SafetensorError as error:
        raise OutputError(f"cannot write {directory}: {one_line(error)}") from None
    except OSError as error:
        raise explain_os_error(error, directory) from None
    except Exception as error:  # what transformers refuses to save
        raise SourceError(f"cannot make a Hugging Face directory of {gguf}: {explain(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        SourceError: there is none; CorruptCheckpointError: it is not JSON.
    """
    if not directory.is_dir():
        raise SourceError(f"there is no model directory {directory}")
    path = directory / "config.json"
    if not path.is_file():
        content = "is empty" if not any(directory.iterdir()) else "has no config.json"
        raise SourceError(f"{directory} {content}; a model is a directory with config.json and safetensors files")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CorruptCheckpointError(f"{path} is not a JSON object")
    if not isinstance(config.get("quantization_config"), dict | None):
        raise CorruptCheckpointError(f"{path}: quantization_config is not a JSON object")
    return config


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        SourceError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **NEVER)
    except Exception as error:  # anything can come out of a damaged tokenizer file
        raise SourceError(f"{directory} has no usable tokenizer: {explain(error)}") from None
    if not tokenizer("the", add_special_tokens=False)["input_ids"]:  # what transformers makes where files are missing
        raise SourceError(
            f"{directory} has no usable tokenizer: it has no vocabulary; copy the model's tokenizer files"
        )
    return tokenizer
