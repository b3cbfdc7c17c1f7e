"""What `halve advise` says, against figures worked out by hand, and against what `bench` finds."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from benchmarks.llama_shape import write_sparse
from compress.errors import SourceError, UsageError
from compress.packed import pack
from compress.patterns import NMPattern
from serve.kernels.cpu import library
from serve.linear import Sparse24Linear
from serve.loading import weight_bytes
from serve.measure import gpus, kernel_table, shallow, shapes, speed
from serve.measure.advice_check import check
from serve.measure.advise import advise
from serve.measure.documents import DocumentError
from serve.measure.gpus import GPUS, Roofline
from serve.measure.kernel_entries import Shape
from serve.measure.shallow import Depths, Load, choose_depths, period
from tests import tiny_models
from tests.runs import Halve

CPU = torch.device("cpu")
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

needs_kernels = pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_table, "last_cache_bytes", lambda device: 1 << 16)


def saved(config: PreTrainedConfig, directory: Path, dtype: str = "bfloat16") -> str:
    config.dtype = dtype
    config.save_pretrained(directory)
    return str(directory / "config.json")


def llama(directory: Path, **changes: Any) -> str:
    return saved(LlamaConfig(**{**LLAMA_8B, **changes}), directory)


def deepseek() -> PreTrainedConfig:
    return DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, first_k_dense_replace=1, n_routed_experts=8, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip


# Memory.


@pytest.mark.parametrize(("kv_heads", "expected"), [(8, 131072), (1, 16384), (32, 524288)])
def test_keys_and_values_of_grouped_and_single_heads(tmp_path: Path, kv_heads: int, expected: int) -> None:
    """2 (keys, values) x 32 layers x heads x 128 x 2 bytes."""
    assert shapes.read(llama(tmp_path, num_key_value_heads=kv_heads)).kv_bytes_per_token == expected


def test_latent_attention_keeps_what_transformers_keeps(tmp_path: Path) -> None:
    """3 layers x (16 latent + 8 rotated) x 2 bytes."""
    assert shapes.read(saved(deepseek(), tmp_path)).kv_bytes_per_token == 3 * (16 + 8) * 2


def test_a_state_is_not_a_cache(tmp_path: Path) -> None:
    model = shapes.read(saved(tiny_models.mamba().config, tmp_path))
    assert model.kv_bytes_per_token is None
    assert any("keeps no keys and values" in note for note in model.notes)


@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name != "mamba"])
def test_keys_and_values_are_those_of_a_real_run(family: str, tmp_path: Path) -> None:
    model = tiny_models.FAMILIES[family]().bfloat16()
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    read = shapes.read(saved(model.config, tmp_path))
    assert read.kv_bytes_per_token == kept // 5
    assert read.weights == sum(parameter.nbytes for parameter in model.parameters())  # tied ones count once


def test_the_8b_llama_by_hand(tmp_path: Path) -> None:
    """As published: 8,030,261,248 parameters. Packed: 9/16 of the seven linears of a block, and all the rest as it was."""
    model = shapes.read(llama(tmp_path))
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert model.weights == 2 * 8_030_261_248
    assert model.dense_bytes == 2 * linears
    assert model.packed_bytes == 2 * linears * 9 // 16
    memory = advise(llama(tmp_path), device="h100", batch=2)["memory"]
    freed = 2 * linears * 7 // 16
    assert memory["freed_bytes"] == freed
    assert memory["freed_tokens"] == freed // 131072 == 46592
    assert memory["usable_bytes"] == 72e9
    assert memory["kv_tokens"]["dense"] == (72_000_000_000 - 16_060_522_496) // 131072
    assert memory["kv_tokens"]["sparse"] - memory["kv_tokens"]["dense"] == 46592


def test_packed_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    model = shapes.read(saved(LlamaConfig(**SMALL), tmp_path))
    pattern = NMPattern(2, 4)
    packed = 0
    for layers in model.prunable:
        weight = torch.randn(layers.shape.n, layers.shape.k)
        packed += layers.count * pack((weight * pattern.mask(weight.abs())).bfloat16()).nbytes
    assert model.packed_bytes == packed


def test_tied_heads_count_once(tmp_path: Path) -> None:
    tied, apart = (shapes.read(llama(tmp_path / str(tie), tie_word_embeddings=tie)).weights for tie in (True, False))
    assert apart - tied == 128256 * 4096 * 2


def test_does_not_fit_dense_and_fits_packed(tmp_path: Path) -> None:
    big = llama(tmp_path, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    document = advise(big, device="h200")
    assert document["memory"]["fits"] == {"dense": False, "sparse": True}
    assert document["verdict"]["prune"]
    assert "does not fit dense, fits 2:4" in document["verdict"]["headline"]
    neither = advise(big, device="l4")["verdict"]
    assert not neither["prune"]
    assert "neither" in neither["headline"]


# The roofline.


def test_a_layer_on_the_roofline_by_hand() -> None:
    roofline, shape = Roofline(GPUS["h100"]), Shape(4096, 4096)
    dense, moved = 33_554_432, 16_384  # bytes: the weight; x and y of one row
    rate = 3350e9 * 0.85
    assert roofline.layer(shape, 1, 2, packed=False) == pytest.approx((dense + moved) / rate)
    assert roofline.layer(shape, 1, 2, packed=True) == pytest.approx((dense * 9 / 16 + moved) / rate)
    # 129 rows: the packed weight is read three times.
    sparse = 3 * dense * 9 / 16 + 129 * moved
    assert roofline.layer(shape, 129, 2, packed=True) == pytest.approx(sparse / rate)
    # 4,096 rows: 137.4 GFLOP at 0.7 of 989.5 TFLOP/s; packed, the weight is read and written once before.
    product = 2 * 4096**3 / (989.5e12 * 0.7)
    assert roofline.layer(shape, 4096, 2, packed=False) == pytest.approx(product)
    assert roofline.layer(shape, 4096, 2, packed=True) == pytest.approx(product + dense * 25 / 16 / rate)


def test_a_layer_of_8_bits_on_the_roofline_by_hand() -> None:
    """Few rows move its bytes; many, where x is rounded, too, are multiplied as bytes, which float8 is not before Ada."""
    shape, numbers = Shape(4096, 4096), 4096 * 4096
    int8 = Roofline(GPUS["h100"], values=torch.int8, quantizes_x=True)
    rate, product = 3350e9 * 0.85, 2 * 4096**3 / (989.5e12 * 0.7)
    assert int8.layer(shape, 1, 2, packed=True) == pytest.approx((numbers * 5 / 8 + 16_384) / rate)
    moved = numbers * (5 / 8 + 1 + 3 + 6)  # weight read and written, x, sums
    assert int8.layer(shape, 4096, 2, packed=True) == pytest.approx(product / 2 + moved / rate)
    assert int8.layer(shape, 4096, 2, packed=False) == pytest.approx(product)
    as_it_is = Roofline(GPUS["h100"], values=torch.int8)
    in_16_bits = product + numbers * (5 / 8 + 2) / rate
    assert as_it_is.layer(shape, 4096, 2, packed=True) == pytest.approx(in_16_bits)
    float8 = {"values": torch.float8_e4m3fn, "quantizes_x": True}
    assert [Roofline(GPUS[name], **float8).multiplies_bytes for name in ("a100", "l4", "h100")] == [False, True, True]
    rest = {"values": torch.int8, "quantizes_x": True}
    assert [Roofline(GPUS[name], **rest).multiplies_bytes for name in ("v100", "a100", "b200")] == [False, True, False]


def test_decoding_on_the_roofline_by_hand(tmp_path: Path) -> None:
    """All weights but the embedding, keys and values of the context; activations are under a hundredth of that."""
    document = advise(llama(tmp_path), device="h200", prompt=1024, output=256)
    read = 2 * (8_030_261_248 - 128256 * 4096) + (1024 + 128) * 131072
    tpot = document["times"]["dense"]["tpot_seconds"]["median"]
    assert tpot == pytest.approx(read / (4800e9 * 0.85), rel=0.01)
    assert document["basis"] == "estimate"
    ttft = document["times"]["dense"]["ttft_seconds"]["median"]
    request = document["times"]["dense"]["request_seconds"]["median"]
    assert request == pytest.approx(ttft + 255 * tpot)
    assert document["times"]["dense"]["output_tokens_per_second"] == pytest.approx(256 / request)


def test_experts_that_are_not_chosen_are_not_read(tmp_path: Path) -> None:
    config = MixtralConfig(
        **{**SMALL, "hidden_size": 1024, "intermediate_size": 4096}, num_local_experts=8, num_experts_per_tok=2
    )
    model = shapes.read(saved(config, tmp_path))
    (experts,) = model.experts
    assert (experts.parameters, experts.experts, experts.chosen) == (3 * 8 * 3 * 1024 * 4096, 8, 2)
    assert any("experts" in note and "stay dense" in note for note in model.notes)
    assert {layers.name.split(".")[0] for layers in model.prunable} == {"self_attn"}
    from serve.measure.estimate import pass_seconds

    def decoding(batch: int) -> float:
        return pass_seconds(model, Load(8, 8, batch), Roofline(GPUS["h100"]), packed=False, prefill=False)

    of_one = experts.parameters * 2 / 4 / (3350e9 * 0.85)  # two of eight
    rest = decoding(1) - of_one
    assert rest > 0
    assert decoding(2) - of_one * 4 * (1 - 0.75**2) == pytest.approx(rest, rel=0.05)


@pytest.mark.parametrize(("wish", "name"), [("H100", "h100"), ("NVIDIA A100", "a100"), ("rtx-4090", "rtx4090"), ("GeForce RTX 3090", "rtx3090"), ("a100 40GB", "a100-40gb")])  # fmt: skip
def test_names_of_gpus(wish: str, name: str) -> None:
    assert gpus.find(wish).name == name


# The two depths.


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [("aaaa", (0, 1)), ("daaa", (1, 1)), ("abab", (0, 2)), ("ababa", (0, 2)), ("dabab", (1, 2)), ("aaabaaab", (0, 4)), ("a", (0, 1))],
)  # fmt: skip
def test_period(kinds: str, expected: tuple[int, int]) -> None:
    assert period(kinds) == expected


@given(
    prefix=st.lists(st.sampled_from("xy"), max_size=2),
    unit=st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
    blocks=st.integers(1, 60),
    cached=st.integers(0, 20),
    times=st.fixed_dictionaries({kind: st.floats(0.1, 10) for kind in "xyabc"}),
)
@settings(deadline=None, max_examples=300)
def test_two_depths_give_the_time_of_the_whole(
    prefix: list[str], unit: list[str], blocks: int, cached: int, times: dict[str, float]
) -> None:
    """Where each kind of block takes its own time, the prediction is exact, whatever repeats."""
    kinds = (prefix + unit * blocks)[:blocks]

    def seconds(depth: int) -> float:
        return 3.0 + sum(times[kind] for kind in kinds[:depth])

    depths = choose_depths(kinds, cached=cached, most=len(kinds))
    assert 0 < depths.shallow <= depths.deep <= depths.whole == len(kinds)
    assert depths.predict(seconds(depths.shallow), seconds(depths.deep)) == pytest.approx(seconds(len(kinds)))


def test_blocks_for_which_there_is_no_memory() -> None:
    assert choose_depths("a" * 80, cached=0, most=5) == Depths(1, 5, 80)
    with pytest.raises(SourceError, match="memory for 1 of the 80 blocks"):
        choose_depths("a" * 80, cached=0, most=1)


@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_shortened_models_begin_as_the_whole(family: str, tmp_path: Path) -> None:
    model = shapes.read(saved(tiny_models.FAMILIES[family](layers=4).config, tmp_path))
    for blocks in (1, 2, 4):
        assert shapes.kinds_of(shapes.build(model, blocks, CPU)) == model.kinds[:blocks]


def test_dense_first_blocks(tmp_path: Path) -> None:
    model = shapes.read(saved(deepseek(), tmp_path))
    assert period(model.kinds) == (1, 1)
    assert shapes.kinds_of(shapes.build(model, 2, CPU)) == model.kinds[:2]


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_models_that_are_timed(family: str, tmp_path: Path) -> None:
    """Dense and packed; what both depths have in common is held once; logits are finite."""
    model = shapes.read(saved(tiny_models.FAMILIES[family](layers=4).config, tmp_path))
    models = shallow._models(model, Depths(2, 4, 4), CPU)
    assert models.keys() == {(form, depth) for form in ("dense", "sparse") for depth in (2, 4)}
    for (form, depth), one in models.items():
        packed = {name for name, module in one.named_modules() if isinstance(module, Sparse24Linear)}
        assert len(packed) == (0 if form == "dense" else sum(g.count for g in model.prunable) * depth // 4)
        logits = one(input_ids=torch.randint(384, (2, 9)), use_cache=True).logits
        assert torch.isfinite(logits).all()
    both = torch.nn.ModuleList([models["dense", 2], models["dense", 4]])
    assert weight_bytes(both) == pytest.approx(weight_bytes(models["dense", 4]), rel=0.01)


# The verdict, and what cannot be used.


def test_a_gpu_without_sparse_tensor_cores(tmp_path: Path) -> None:
    document = advise(llama(tmp_path), device="t4")
    assert not document["verdict"]["prune"]
    assert "no sparse tensor cores" in document["verdict"]["headline"]
    assert document["times"] is None
    assert any("packed it would fit" in reason for reason in document["verdict"]["reasons"])


def test_prompts_alone_gain_nothing_on_a_gpu_and_that_is_said(tmp_path: Path) -> None:
    verdict = advise(llama(tmp_path), device="h100", prompt=2048, output=1)["verdict"]
    assert not verdict["prune"]
    assert verdict["headline"].startswith("don't prune for speed")


def test_nothing_to_prune(tmp_path: Path, halve: Halve) -> None:
    config = LlamaConfig(
        **{**SMALL, "hidden_size": 36, "intermediate_size": 44, "head_dim": 18, "num_attention_heads": 2}
    )
    called = halve("advise", saved(config, tmp_path), "--json")
    assert called.code == 0
    document = json.loads(called.stdout)
    assert document["verdict"]["headline"].startswith("don't prune: no layer can be pruned")
    assert "36 input features are not a multiple of 8" in document["verdict"]["headline"]
    assert document["memory"]["freed_bytes"] == 0
    assert all(layer["worth"] is False for layer in document["layers"])


def test_a_device_without_sparse_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALVE_BACKEND", "plain")
    verdict = advise(saved(LlamaConfig(**SMALL), tmp_path), device="cpu", prompt=8, output=4)["verdict"]
    assert not verdict["prune"]
    assert "no sparse kernel" in verdict["headline"]


def test_a_packed_checkpoint_keeps_its_dense_layers(tmp_path: Path) -> None:
    file = Path(saved(LlamaConfig(**SMALL), tmp_path))
    config = json.loads(file.read_text())
    ignored = "model.layers.1.mlp.down_proj"
    config["quantization_config"] = {
        "quant_method": "halve", "format_version": 1, "sparsity": "2:4", "value_dtype": "bfloat16",
        "ignore": ["lm_head", ignored],
    }  # fmt: skip
    file.write_text(json.dumps(config))
    down = [(g.count, g.why_dense) for g in shapes.read(str(file)).layers if g.name == "mlp.down_proj"]
    assert sorted(down, key=str) == [(1, "config.json keeps it dense"), (2, None)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "config.json"),
        ("[1]", "config.json"),
        ('{"model_type": "no-such-model"}', "no-such-model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}', "config.json"),
        ('{"model_type": "vit", "architectures": ["ViTForImageClassification"]}', "image classifier"),
        ('{"model_type": "t5", "is_encoder_decoder": true}', "encoder-decoder"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}', "gptq"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, halve: Halve, content: str, says: str) -> None:
    (tmp_path / "config.json").write_text(content)
    for model in (tmp_path / "config.json", tmp_path):
        called = halve("advise", str(model), "--device", "h100")
        assert called.code in (1, 2), called.stdout
        assert says in called.stderr
        assert "Traceback" not in called.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "h10"), "did you mean 'h100'"),
        (("--device", "h100", "--measure"), "is not here"),
        (("--device", "h100", "--prompt", "9000"), "at most 8192 tokens"),
        (("--device", "cpu", "--estimate"), "kernel table"),
        (("--check", "bench.json"), "advice"),
        (("--device", "h100", "--out", "no/such/place.json"), "--out"),
        (("--device", "h100", "--budget", "9"), "--budget is for a measurement, and would do nothing here"),
        (("--device", "cpu", "--estimate", "--budget", "9"), "--budget is for a measurement"),
        (
            ("--device", "cpu", "--estimate", "--recipe", "r.yaml"),
            "--recipe is for a measurement or a GPU that is not here",
        ),
    ],
)
def test_calls_that_are_wrong(tmp_path: Path, halve: Halve, arguments: tuple[str, ...], says: str) -> None:
    called = halve("advise", llama(tmp_path), *arguments)
    assert called.code == 2
    assert says in called.stderr
    assert called.stdout == ""


def test_models_that_are_nowhere(tmp_path: Path, halve: Halve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable is read once, at import
    (tmp_path / "weights.bin").write_bytes(b"0")
    for model in (
        "nobody/no-such-model",
        str(tmp_path / "none"),
        str(tmp_path),
        str(tmp_path / "weights.bin"),
        "none.json",
    ):
        called = halve("advise", model, "--device", "h100")
        assert called.code == 2
        assert model in called.stderr


def test_no_network_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert advise(llama(tmp_path), device="h100")["verdict"]["prune"]


def test_float32_has_no_kernel_on_gpus(tmp_path: Path) -> None:
    """A packed float32 model would be served by expanding it for each product."""
    document = advise(saved(LlamaConfig(**LLAMA_8B), tmp_path, dtype="float32"), device="h100")
    assert document["verdict"]["prune"] is False
    assert "no sparse kernel of GPUs for float32" in document["verdict"]["headline"]


@pytest.mark.parametrize("output", [1, 2, 8, 9, 20])
def test_no_position_beyond_the_context_is_used(output: int) -> None:
    """Of a model with as many positions as the prompt and the answer have."""
    prompt = 12
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=prompt + output, vocab_size=64)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        seconds = shallow._generate(model, torch.zeros(1, prompt, dtype=torch.int64), output)
    assert min(seconds) > 0


# The command, and the prediction beside the measurement.


def test_text_file_and_json(tmp_path: Path, halve: Halve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    kept = tmp_path / "advice.json"
    called = halve("advise", llama(tmp_path), "--device", "h100", "--out", str(kept))
    assert called.code == 0
    for said in (
        "prune: a request would be",
        "(estimate)",
        "time per output token",
        "46,592 more",
        "mlp.down_proj",
        "note: ",
    ):
        assert said in called.stdout
    assert halve("advise", str(kept)).stdout == called.stdout
    again = halve("advise", str(kept), "--json")
    assert json.loads(again.stdout) == json.loads(kept.read_text())
    for ignored in (("--device", "h100"), ("--batch", "2"), ("--out", "x.json"), ("--estimate",)):
        refused = halve("advise", str(kept), *ignored)
        assert refused.code == 2
        assert f"{ignored[0].replace('estimate', 'measure')} is for a model" in refused.stderr
    kept.write_text(json.dumps({"kind": "advice", "basis": "estimate"}))
    assert "damaged" in halve("advise", str(kept)).stderr


def advice_document(ttft: float, tpot: float, load: dict[str, int]) -> dict[str, Any]:
    def times(first: float, token: float) -> dict[str, Any]:
        return {"ttft_seconds": {"median": first}, "tpot_seconds": {"median": token}}

    return {
        "kind": "advice", "basis": "measured", "load": load, "device": {"name": "here"},
        "times": {"dense": times(2.0 * ttft, 0.2 * tpot), "sparse": times(2.0, 0.2)},
        "speedup": {"ttft": {"median": ttft}, "tpot": {"median": tpot}},
    }  # fmt: skip


def bench_document(load: dict[str, Any]) -> dict[str, Any]:
    def sampled(*samples: float) -> dict[str, Any]:
        return {"samples": list(samples)}

    return {
        "kind": "bench", "load": load, "environment": {"machine": "here"},
        "models": {
            "dense": {"ttft_seconds": sampled(3.0, 6.0, 3.0), "tpot_seconds": sampled(0.30, 0.32, 0.64)},
            "sparse": {"ttft_seconds": sampled(2.0, 4.0, 2.0), "tpot_seconds": sampled(0.20, 0.20, 0.40)},
        },
    }  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "advice.json", tmp_path / "bench.json"


LOAD = {"prompt": 128, "output": 32, "batch": 1}


def test_the_error_is_of_the_ratios_within_rounds(files: tuple[Path, Path], halve: Halve) -> None:
    """Measured by hand: TTFT 1.5, TPOT the median of 1.5, 1.6, 1.6."""
    files[0].write_text(json.dumps(advice_document(1.5, 1.2, LOAD)))
    files[1].write_text(json.dumps(bench_document(LOAD)))
    document = check(*files)
    assert document["speedup"]["ttft"]["error"] == pytest.approx(0.0)
    assert document["speedup"]["tpot"]["measured"] == pytest.approx(1.6)
    assert document["speedup"]["tpot"]["error"] == pytest.approx(-0.25)
    assert document["speedup"]["tpot"]["seconds"]["sparse"] == pytest.approx(
        {"predicted": 0.2, "measured": 0.2, "error": 0.0}
    )
    assert not document["holds"]
    called = halve("advise", str(files[0]), "--check", str(files[1]))
    assert called.code == 0
    assert "-25.0%" in called.stdout
    assert "off by more: tpot" in called.stdout
    assert halve("advise", str(files[0]), "--check", str(files[1]), "--prompt", "3").code == 2


def test_the_load_of_an_endpoint_is_looked_for(files: tuple[Path, Path]) -> None:
    files[0].write_text(json.dumps(advice_document(1.5, 1.6, LOAD)))
    labels = ["rate=4", "concurrency=8", "concurrency=1"]
    bench = bench_document({"prompt": 128, "output": 32, "levels": labels})
    for form, model in bench["models"].items():
        slower = {key: {"samples": [9.0] * 3} for key in model}
        bench["models"][form] = {"loads": {**dict.fromkeys(labels, slower), "concurrency=1": model}}
    bench["speedup"] = {"concurrency=1": {"tpot": {"median": 1.55}}}
    files[1].write_text(json.dumps({**bench, "through": "endpoint"}))
    document = check(*files)
    assert document["holds"]
    assert document["speedup"]["tpot"]["measured"] == 1.55  # within rounds, as the bench says it
    assert document["speedup"]["ttft"]["measured"] == pytest.approx(1.5)  # of the medians
    assert any("endpoint" in note for note in document["notes"])


def test_what_cannot_be_checked(files: tuple[Path, Path]) -> None:
    files[0].write_text(json.dumps(advice_document(1.5, 1.6, LOAD)))
    files[1].write_text(json.dumps(bench_document({**LOAD, "prompt": 64})))
    with pytest.raises(UsageError, match="prompt 64, output 32, batch 1"):
        check(*files)
    alone = bench_document(LOAD)
    del alone["models"]["dense"]
    for document, error in (
        (alone, "--against"),
        ({"kind": "eval"}, "kind 'bench'"),
        ({**bench_document(LOAD), "models": {"dense": {}, "sparse": {}}}, "no samples"),
    ):
        files[1].write_text(json.dumps(document))
        with pytest.raises(UsageError, match=error):
            check(*files)
    failing = bench_document({"prompt": 128, "output": 32, "levels": ["concurrency=1"]})
    for form, model in failing["models"].items():
        counts = {"requests": 64, "errors": 48 if form == "sparse" else 0}
        failing["models"][form] = {"loads": {"concurrency=1": {**model, **counts}}}
    files[1].write_text(json.dumps({**failing, "through": "endpoint"}))
    with pytest.raises(UsageError, match="48 of 64 requests of concurrency=1 failed on the sparse side"):
        check(*files)
    files[1].write_text("{")
    with pytest.raises(DocumentError, match="not whole"):
        check(*files)
    files[1].unlink()
    with pytest.raises(DocumentError, match="cannot read"):
        check(*files)
    files[0].write_text(json.dumps({**advice_document(1.5, 1.6, LOAD), "times": None}))
    files[1].write_text(json.dumps(bench_document(LOAD)))
    with pytest.raises(UsageError, match="predicts no times"):
        check(*files)


def product_seconds(is_sparse: bool, rows: int) -> float:
    """What a product takes by the clock of `planted_times`: three times as long dense for one row, less for many."""
    return 1e-3 * (1 + 0.2 * rows if is_sparse else 3 * (1 + 0.1 * rows))


@pytest.fixture
def planted_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock that goes on by what each linear layer is said to take, and stands still otherwise."""
    now = [0.0]

    def go_on(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, Sparse24Linear | torch.nn.Linear):
            rows = inputs[0].numel() // module.in_features
            now[0] += product_seconds(isinstance(module, Sparse24Linear), rows)

    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    for module in (shallow, speed, kernel_table):
        monkeypatch.setattr(module, "time", clock)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(go_on)
    yield
    hook.remove()


@needs_kernels
@pytest.mark.usefixtures("planted_times")
def test_predicts_what_bench_then_finds(tmp_path: Path, halve: Halve) -> None:
    """From models of fewer blocks to the whole one, which a clock of the test times: so both are known beforehand."""
    dense = tiny_models.build("llama", tmp_path / "dense", layers=4, hidden_size=256, intermediate_size=512)
    write_sparse(dense, tmp_path / "sparse")
    flags = ("--prompt", "24", "--output", "8")
    called = halve("advise", str(dense / "config.json"), *flags, "--device", "cpu", "--budget", "4", "--out", str(tmp_path / "advice.json"))  # fmt: skip
    assert called.code == 0, called.stderr
    advice = json.loads((tmp_path / "advice.json").read_text())
    assert advice["basis"] == "measured"
    assert len(advice["times"]["dense"]["tpot_seconds"]["samples"]) >= shallow.ROUNDS[0]
    benched = halve("bench", str(tmp_path / "sparse"), "--against", str(dense), *flags, "--in-process", "--rounds", "5", "--json")  # fmt: skip
    assert benched.code == 0, benched.stderr
    (tmp_path / "bench.json").write_text(benched.stdout.splitlines()[-1])
    document = check(tmp_path / "advice.json", tmp_path / "bench.json")
    assert document["holds"]
    for name, rows in (("tpot", 1), ("ttft", 24)):
        # 4 blocks of 7 linears, and the output layer, which is dense in both and reads one row.
        head = product_seconds(False, 1)
        dense_seconds, sparse_seconds = (28 * product_seconds(is_sparse, rows) + head for is_sparse in (False, True))
        figure = document["speedup"][name]
        assert figure["predicted"] == pytest.approx(dense_seconds / sparse_seconds, rel=1e-3)
        assert figure["measured"] == pytest.approx(dense_seconds / sparse_seconds, rel=1e-6)
        assert figure["seconds"]["dense"]["predicted"] == pytest.approx(dense_seconds, rel=1e-3)
    measured = json.loads((tmp_path / "bench.json").read_text())["models"]
    for form in ("dense", "sparse"):
        assert advice["memory"]["weights_bytes"][form] == pytest.approx(measured[form]["bytes"]["weights"], rel=0.02)
    # With the table that this left behind, an estimate takes no time at all.
    estimated = advise(str(dense), device="cpu", prompt=24, output=8, measure=False)
    assert estimated["basis"] == "estimate"
    assert any("kernel times of" in note for note in estimated["notes"])


def test_the_models_reference_is_transformers_own(tmp_path: Path) -> None:
    """Names and shapes are those of the real model, which is built once here."""
    config = LlamaConfig(**SMALL)
    real = AutoModelForCausalLM.from_config(config)
    linears = {
        name: tuple(m.weight.shape)
        for name, m in real.model.layers[0].named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert {g.name: (g.shape.n, g.shape.k) for g in shapes.read(saved(config, tmp_path)).layers} == linears
