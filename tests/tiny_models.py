"""Small random models of the families that halve must handle, as Hugging Face directories: causal language models, and
an image classifier.

Each is a real transformers model of its family with the traits that make the family different: grouped
queries, tied embeddings, sliding windows shorter than the test texts, attention biases, heads wider than
hidden / heads, Conv1D, fused projections, parallel residuals. Every linear width is a multiple of 8.

Random weights as transformers draws them give flat logits, so everything is drawn again: linears keep the
scale of their input, norms differ from channel to channel (so that Wanda and magnitude disagree, as they do
on real models), biases are not zero. Each tensor has its own random stream, seeded by its name: two models
that differ only in depth share the layers they both have.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
)
from transformers.pytorch_utils import Conv1D

VOCABULARY = 384
HIDDEN = 64
INTERMEDIATE = 160
HEADS = 4
KV_HEADS = 2
SLIDING_WINDOW = 16
MAX_POSITIONS = 1024
IMAGE_SIZE = 32
CLASSES = ["cat", "Dog", "tench, Tinca tinca", "snow leopard"]

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PAD, BOS, EOS = 0, 1, 2
TOKEN_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = """\
The miller had three sons, and when he died he left them nothing but the mill, the donkey and the cat. The
eldest took the mill, the second took the donkey, and the youngest was left with the cat. "What shall I do
with a cat?" he said. "My brothers can work together and earn their bread, but I shall have eaten the cat
before the winter is over, and after that I shall have to go hungry." The cat, who had heard every word of
this, answered him: "Do not be troubled, master. Give me a bag, and have a pair of boots made for me, so that
I can walk through the thorns, and you will see that your share is not as small as you think it is."

Rain fell on the river for seven days. On the eighth day the water stood at the door of the mill, and the
wheel turned so fast that nobody could stop it. In 1848 there were 12 mills along this part of the river; by
1905 there were only 4, and today there is 1. The others were sold, taken apart or left to the weather. What
remains are the walls, the channels that carried the water, and the names of the fields: Upper Mill, Lower
Mill, Miller's End. People still walk there on Sundays, when the weather is fine and the path is dry.

A sparse matrix is a matrix in which most of the elements are zero. When two of every four elements are zero,
the other two can be stored next to each other together with their positions, and the matrix needs little more
than half of the memory. The sum of the products is the same; only the work that has no effect is left out.
"""


def text(repeats: int = 1) -> str:
    """Some English, about 2,000 characters (690 tokens) a repeat; the repeats are numbered."""
    return "\n".join(f"Part {part}.\n{TEXT}" for part in range(1, repeats + 1))


def alternating(layers: int) -> list[str]:
    return ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]


def _model(config_class: type[PreTrainedConfig], **settings: Any) -> PreTrainedModel:
    config = config_class(**{"vocab_size": VOCABULARY, **TOKEN_IDS, **settings})
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    redraw_weights(model, seed=0)
    return model.eval()


def _decoder_settings(layers: int) -> dict[str, Any]:
    """The settings that the families since Llama name alike."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
    }


def llama(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Grouped queries, tied embeddings (as the small Llamas and SmolLM2 have them)."""
    return _model(LlamaConfig, **{**_decoder_settings(layers), "tie_word_embeddings": True, **overrides})


def qwen2(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Biases on q, k, v; tied; the first layer attends to everything, the others to a sliding window."""
    settings = {
        **_decoder_settings(layers),
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": SLIDING_WINDOW,
        "max_window_layers": 1,
    }
    return _model(Qwen2Config, **{**settings, **overrides})


def qwen3(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Norms on q and k; heads wider than hidden / heads, so q_proj and o_proj are not square; tied."""
    settings = {**_decoder_settings(layers), "head_dim": 32, "tie_word_embeddings": True}
    return _model(Qwen3Config, **{**settings, **overrides})


def mistral(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """A sliding window in every layer; embeddings not tied."""
    settings = {**_decoder_settings(layers), "sliding_window": SLIDING_WINDOW, "tie_word_embeddings": False}
    return _model(MistralConfig, **{**settings, **overrides})


def gemma2(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Sliding and full layers in turn, norms after as well as before, soft-capped logits; tied."""
    settings = {
        **_decoder_settings(layers),
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": alternating(layers),
        "tie_word_embeddings": True,
    }
    return _model(Gemma2Config, **{**settings, **overrides})


def gemma3(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """As Gemma 2, with q and k norms, and other position embeddings in sliding than in full layers."""
    settings = {
        **_decoder_settings(layers),
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": alternating(layers),
        "tie_word_embeddings": True,
    }
    return _model(Gemma3TextConfig, **{**settings, **overrides})


def opt(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Learned positions, biases everywhere, ReLU; tied."""
    settings = {
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
    }
    return _model(OPTConfig, **{**settings, **overrides})


def gpt2(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Conv1D (weights are [in, out]), fused c_attn, biases everywhere; tied."""
    settings = {
        "n_layer": layers,
        "n_embd": HIDDEN,
        "n_inner": INTERMEDIATE,
        "n_head": HEADS,
        "n_positions": MAX_POSITIONS,
        "tie_word_embeddings": True,
    }
    return _model(GPT2Config, **{**settings, **overrides})


def gpt_neox(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Fused query_key_value (interleaved by head), parallel residual, biases; not tied."""
    settings = {
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
    }
    return _model(GPTNeoXConfig, **{**settings, **overrides})


def phi3(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """Fused qkv_proj and gate_up_proj, a sliding window in every layer; not tied."""
    settings = {
        **_decoder_settings(layers),
        "original_max_position_embeddings": MAX_POSITIONS,
        "sliding_window": SLIDING_WINDOW,
        "tie_word_embeddings": False,
    }
    return _model(Phi3Config, **{**settings, **overrides})


def mamba(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """A state instead of attention; dt_proj is multiplied by hand, its module is never called; residuals in float32; tied."""
    settings = {
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "state_size": 16,
        "time_step_rank": 8,
        "tie_word_embeddings": True,
    }
    return _model(MambaConfig, **{**settings, **overrides})


def vit(layers: int = 3, **overrides: Any) -> PreTrainedModel:
    """An image classifier: 16 patches and a class token, biases everywhere, no mask."""
    settings = {
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {label: index for index, label in enumerate(CLASSES)},
    }
    config = ViTConfig(**{**settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    redraw_weights(model, seed=0)
    return model.eval()


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "opt": opt,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "phi3": phi3,
    "mamba": mamba,
}
"""Family -> (layers, **settings of its config) -> model in fp32, in eval mode, the same at every call."""

IMAGE_FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"vit": vit}
"""The same for models that read images."""


@torch.no_grad()
def redraw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter again, so that logits have a spread of about 2 and depend on all the context."""

    def normal(name: str, parameter: nn.Parameter) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        return torch.randn(parameter.shape, generator=generator)

    drawn: set[int] = set()  # a tied output layer is its embedding: drawn once, under the embedding's name
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in drawn:
                continue
            drawn.add(id(parameter))
            noise = normal(f"{module_name}.{parameter_name}", parameter)
            if isinstance(module, nn.Embedding):
                parameter.copy_(noise * (2 / math.sqrt(parameter.shape[1])))
            elif parameter_name == "A_log":
                # As Mamba starts: the n-th state of a channel decays n times as fast as the first.
                decay = torch.arange(1, parameter.shape[1] + 1, dtype=torch.float32)
                parameter.copy_(decay.log() + 0.2 * noise)
            elif module_name.endswith("dt_proj"):
                # Steps about a tenth of what the first state takes to decay, so that the context is remembered.
                parameter.copy_(0.4 * noise if parameter.ndim == 2 else 0.5 * noise - 2.0)
            elif parameter_name.endswith(("_token", "position_embeddings")):
                parameter.copy_(noise)
            elif isinstance(module, nn.Conv1d | nn.Conv2d) and parameter_name == "weight":
                parameter.copy_(noise * (1.5 / math.sqrt(parameter[0].numel())))
            elif parameter.ndim == 2:
                contracted = parameter.shape[0 if isinstance(module, Conv1D) else 1]
                gain = 2.0 if module is model.get_output_embeddings() else 1.5
                parameter.copy_(noise * (gain / math.sqrt(contracted)))
            elif parameter_name == "bias":
                parameter.copy_(noise * 0.1)
            elif "post_" in module_name and "gemma" in model.config.model_type:
                # Gemma scales its embeddings up by sqrt(hidden); were the blocks not louder than that, it
                # would repeat its last token for ever.
                parameter.copy_(5 * torch.exp(0.3 * noise) - 1)
            elif parameter.ndim == 1:
                # A norm: around one, or around zero where the family computes 1 + weight.
                parameter.copy_(parameter.mean().round() + torch.exp(0.5 * noise) - 1)
            else:
                raise AssertionError(f"tiny_models does not know how to draw {module_name}.{parameter_name}")


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens with pad, bos, eos and a chat template; adds no bos by itself."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build(
    family: str,
    directory: Path,
    *,
    layers: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    hub_gpt2_keys: bool = False,
    **overrides: Any,
) -> Path:
    """Save a small model of `family` with its tokenizer and generation config, and return `directory`.

    An image model gets an image processor instead. `max_shard_size` as in `save_pretrained` ("100KB" makes several shards of any family). `hub_gpt2_keys`
    saves GPT-2 as the hub's own checkpoint is: no `transformer.` prefix, and the causal masks as buffers
    (`h.0.attn.bias`). `overrides` are settings of the family's config (`hidden_size=512`).
    """
    if hub_gpt2_keys and family != "gpt2":
        raise ValueError("hub_gpt2_keys is about gpt2")
    model = {**FAMILIES, **IMAGE_FAMILIES}[family](layers, **overrides)
    if seed:
        redraw_weights(model, seed)
    model = model.to(dtype)
    if family in IMAGE_FAMILIES:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        _save_image_processor(directory)
        return directory
    model.generation_config = GenerationConfig(**TOKEN_IDS, max_new_tokens=32, do_sample=False)
    directory = Path(directory)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(directory)
    if hub_gpt2_keys:
        _to_hub_gpt2_keys(directory, layers)
    return directory


def _save_image_processor(directory: Path) -> None:
    """As the hub's ViTs have it; halves of the pixels' range are -1 and 1."""
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _to_hub_gpt2_keys(directory: Path, layers: int) -> None:
    shards = sorted(directory.glob("*.safetensors"))
    weight_map: dict[str, str] = {}
    total_size = 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names = list(file.keys())
            tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in names}
        if shard == shards[0]:
            mask = torch.tril(torch.ones(MAX_POSITIONS, MAX_POSITIONS))[None, None]
            tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(layers)}
        save_file(tensors, shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
