"""Tiny real models and real servers, built once for all tests of `serve`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from serve.engines.transformers import TransformersEngine
from serve.server import BackgroundServer
from tests.serve.report_documents import Measured, measured

CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["the cat sat on the mat and the dog ran to the river", "all the world's a stage, and all the men"] * 5


def build_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any byte is a token, so tokens may be parts of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]})
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model_dir(path: Path, *, chat: bool = True) -> Path:
    """A Llama of two layers with random weights, large enough ones to make its choices clear."""
    tokenizer = build_tokenizer(chat=chat)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def chatless_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_dir(tmp_path_factory.mktemp("models") / "tiny-base", chat=False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> LlamaForCausalLM:
    """The same model, read by transformers alone."""
    return LlamaForCausalLM.from_pretrained(model_dir).eval()


@pytest.fixture
def engine(model_dir: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(model_dir), max_num_seqs=8, device="cpu")
    engine.load()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[BackgroundServer]:
    with BackgroundServer(str(model_dir), served_model_name="tiny", max_num_seqs=8, device="cpu") as running:
        yield running


@pytest.fixture
def client(server: BackgroundServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A small pruned model and real results of it, for the tests of `halve report`."""
    return measured(tmp_path_factory.mktemp("report"))
