"""ONNX graphs of 2:4 models: their zeros, their logits, the engine over them, and what is refused."""

from __future__ import annotations

import builtins
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from compress.errors import CheckError, CorruptCheckpointError, HalveError, OutputError, SourceError, UsageError
from serve.engines.kv_cache import BatchCache
from serve.engines.onnx import OnnxEngine
from serve.engines.transformers import TransformersEngine
from serve.loading import load_model, read_model
from serve.onnx import export, graph
from serve.onnx.export import export_onnx
from serve.onnx.model import OnnxModel, is_exported, read_record
from serve.server import BackgroundServer
from tests import tiny_models
from tests.runs import Halve, compress
from tests.serve.helpers import collect, greedy, metrics, tokens_of

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnx_ir = pytest.importorskip("onnx_ir", reason="the extra onnx is not installed")
FAMILIES = ("llama", "gpt2", "gemma2")
"""Rotary positions, learned ones and Conv1D, caps and sliding windows. All of `tiny_models` are in the slow test."""
PROMPTS = ["the cat", "all the men and the dog ran to the river " * 3, "x", "and the river " * 5]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> (a packed checkpoint, its graph in float32); each is made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            source = tiny_models.build(family, directory / "source", layers=2, dtype=torch.float32)
            how = {"metric": "magnitude", "reconstruction": "none", "ignore": ("*.1.mlp.*",)}
            packed = compress(source, directory / "packed", **how).directory
            export_onnx(packed, directory / "graph")
            made[family] = packed, directory / "graph"
        return made[family]

    return get


def initializers(directory: Path) -> list[np.ndarray]:
    """Every matrix in the graph, read by onnx itself."""
    model = onnx.load(directory / "model.onnx")
    return [a for a in map(onnx.numpy_helper.to_array, model.graph.initializer) if a.ndim == 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_those_of_the_checkpoint(family: str, pair: Any) -> None:
    """To the bit, and 2:4 along the axis that is summed over: brute force."""
    packed, made = pair(family)
    weights = {name: w for name, w in export.expanded(read_model(packed)).state_dict().items() if w.ndim == 2}
    found = [array.tobytes() for array in initializers(made)]
    sparse = 0
    for name, weight in weights.items():
        if not name.startswith(("model.layers", "transformer.h")):
            continue
        as_stored = weight if family == "gpt2" else weight.T
        assert as_stored.contiguous().numpy().tobytes() in found, name
        sums_over = as_stored.T.reshape(-1, 4)
        sparse += int((sums_over != 0).sum(dim=1).max() <= 2)
    record = json.loads((made / "export.json").read_text())
    assert record["layers"]["sparse"] == sparse
    assert 0 < sparse < len(weights)
    assert record["error"] < 1e-5


def run(model: Any, ids: Tensor, cache: Any, **how: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **how).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model(family: str, pair: Any) -> None:
    """A long prompt, beyond sliding windows, in parts of uneven lengths; one row, and several with padding."""
    packed, made = pair(family)
    model, exported = load_model(packed), OnnxModel(made)
    generator = torch.Generator().manual_seed(0)
    for rows, parts in ((1, (70, 1, 1)), (3, (1, 33, 2, 1)), (2, (40, 5))):
        length = sum(parts)
        ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if rows == 3:
            mask[1, :1] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        caches, at = (DynamicCache(), DynamicCache()), 0
        for count in parts:
            part = slice(at, at + count)
            how = {"attention_mask": mask[:, : at + count], "position_ids": positions[:, part]}
            expected = run(model, ids[:, part], caches[0], **how)
            found = run(exported, ids[:, part], caches[1], **how)
            seen = mask[:, part].bool()
            torch.testing.assert_close(found[seen], expected[seen], rtol=1e-3, atol=1e-4)
            at += count
        assert caches[1].get_seq_length() == length
    last = run(exported, ids, DynamicCache(), logits_to_keep=1)
    torch.testing.assert_close(last, run(exported, ids, DynamicCache())[:, -1:], rtol=1e-4, atol=1e-5)


def test_values_of_8_bits_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1, dtype=torch.bfloat16)
    how = {"metric": "magnitude", "reconstruction": "none", "value_dtype": "int8"}
    packed = compress(source, tmp_path / "packed", **how).directory
    record = export_onnx(packed, tmp_path / "graph", "float16")
    assert record["layers"] == {"sparse": 7, "dense": 0}  # the head is tied
    tensors = load_file(packed / "model.safetensors")
    values = tensors["model.layers.0.mlp.up_proj.weight_packed"].double()
    exact = (values * tensors["model.layers.0.mlp.up_proj.weight_scale"].double()).sum()
    sums = [float(array.astype(np.float64).sum()) for array in initializers(tmp_path / "graph")]
    assert min(abs(float(exact) - one) for one in sums) < 1e-2
    assert all(array.dtype == np.float16 for array in initializers(tmp_path / "graph"))
    assert record["dtype"] == json.loads((tmp_path / "graph" / "config.json").read_text())["dtype"] == "float16"


def test_which_products_are_sparse() -> None:
    """Either operand of MatMul and Gemm, transposed or not, against zeros that were put where they are."""
    helper, numbers = onnx.helper, onnx.numpy_helper
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((16, 24), dtype=np.float32) + 3  # [N, K]
    weight[:, 1::4] = weight[:, 2::4] = 0
    cases = [
        ("MatMul", weight.T, 1, {}, True), ("MatMul", weight, 1, {}, False), ("MatMul", weight, 0, {}, True),
        ("MatMul", weight.T, 0, {}, False), ("Gemm", weight, 1, {"transB": 1}, True), ("Gemm", weight.T, 1, {}, True),
        ("Gemm", weight, 1, {}, False), ("Gemm", weight.T, 0, {"transA": 1}, True), ("Gemm", weight, 0, {}, True),
    ]  # fmt: skip
    for op, array, operand, attributes, is_sparse in cases:
        names = ["x", "x"]
        names[operand] = "w"
        node = helper.make_node(op, names, ["y"], **attributes)
        x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, None])
        y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, None])
        made = helper.make_graph([node], "g", [x], [y], [numbers.from_array(np.ascontiguousarray(array), "w")])
        found = graph.products(onnx_ir.from_proto(helper.make_model(made)).graph)
        shape = Counter({(16, 24) if is_sparse else (24, 16): 1})
        assert (found.sparse, found.dense) == ((shape, Counter()) if is_sparse else (Counter(), shape)), op


def test_nothing_of_this_machine_is_in_the_graph(pair: Any) -> None:
    _, made = pair("llama")
    raw = (made / "model.onnx").read_bytes()
    assert b"site-packages" not in raw
    assert str(Path.cwd()).encode() not in raw
    onnx.checker.check_model(made / "model.onnx")
    inputs = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(made / "model.onnx").graph.input}  # fmt: skip
    assert inputs["input_ids"] == ["batch", "sequence"]
    depth = tiny_models.HIDDEN // tiny_models.HEADS
    assert inputs["past_key_values.1.value"] == ["batch", tiny_models.KV_HEADS, "past", depth]


@pytest.mark.parametrize("mistake", ["a weight", "zeros"])
def test_a_graph_that_is_not_the_model_is_refused(
    mistake: str, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = pair("llama")
    write = export._write_graph

    def wrongly(model: nn.Module, *how: Any) -> None:
        layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
        right = layer.weight.data.clone()
        if mistake == "zeros":
            layer.weight.data[3, 0:4] = 1e-9  # no logit tells
        else:
            layer.weight.data[:, 0:2] += 0.5 * (right[:, 0:2] != 0)
        write(model, *how)  # type: ignore[arg-type]
        layer.weight.data = right

    monkeypatch.setattr(export, "_write_graph", wrongly)
    says = "are 2:4 in the model and not in the graph" if mistake == "zeros" else "of their size off torch's"
    with pytest.raises(CheckError, match=says):
        export_onnx(packed, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_cannot(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.exporters.exporter_onnx import OnnxExporter

    def fails(*given: Any, **how: Any) -> None:
        raise AssertionError("no translation\nfor aten.nonesuch")

    monkeypatch.setattr(OnnxExporter, "export", fails)
    with pytest.raises(SourceError, match=r"cannot make an ONNX graph of .*: AssertionError: no translation for aten"):
        export_onnx(pair("llama")[0], tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_libraries(library: str, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *how: Any) -> Any:
        if name == library:
            raise ImportError(name)
        return real(name, *how)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=rf"{library} is not installed: pip install -e '\.\[onnx\]'"):
        export_onnx(pair("llama")[0], tmp_path / "graph")


def test_places(pair: Any, tmp_path: Path) -> None:
    packed, made = pair("llama")
    with pytest.raises(OutputError, match="is there already and is not empty"):
        export_onnx(packed, made)
    with pytest.raises(UsageError, match="--dtype 'bfloat16'"):
        export_onnx(packed, tmp_path / "graph", "bfloat16")
    assert is_exported(made)
    assert not is_exported(packed)


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data"])
def test_damage_is_found(file: str, pair: Any, tmp_path: Path) -> None:
    made = shutil.copytree(pair("llama")[1], tmp_path / "graph")
    read_record(made)
    raw = bytearray((made / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (made / file).write_bytes(raw)
    with pytest.raises(CorruptCheckpointError, match=f"{file} is not what"):
        read_record(made)
    (made / file).unlink()
    with pytest.raises(HalveError, match=r"is not what|holds no model.onnx"):
        read_record(made)
    shutil.copy(pair("llama")[1] / file, made / file)
    (made / "export.json").write_text("{}")
    with pytest.raises(SourceError, match="is no record of `halve export`"):
        read_record(made)


def test_a_graph_of_others(pair: Any, tmp_path: Path) -> None:
    made = shutil.copytree(pair("llama")[1], tmp_path / "graph")
    model = onnx.load(made / "model.onnx")
    for output in model.graph.output:
        if output.name == "logits":
            output.name = "scores"
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    onnx.save(model, made / "model.onnx")
    with pytest.raises(SourceError, match="no graph that `halve export` made"):
        OnnxModel(made)
    (made / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(SourceError, match="ONNX Runtime cannot read"):
        OnnxModel(made)
    with pytest.raises(UsageError, match="no CUDAExecutionProvider"):
        OnnxModel(made, "cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_says_what_the_other_one_says(family: str, pair: Any) -> None:
    """Greedy tokens, and log-probabilities of a prompt, in a batch that changes while it decodes."""
    packed, made = pair(family)
    results = []
    for kind, directory in ((TransformersEngine, packed), (OnnxEngine, made)):
        engine = kind(str(directory), device="cpu", max_num_seqs=3)
        engine.load()
        try:
            prompts = [engine.tokenizer(text).input_ids for text in PROMPTS]
            jobs = [(ids, greedy(count, logprobs=1)) for ids, count in zip(prompts, (40, 7, 60, 25), strict=True)]
            batched = [tokens_of(deltas) for deltas in collect(engine, jobs)]
            assert [tokens_of(collect(engine, [job])[0]) for job in jobs] == batched
            [scored] = collect(engine, [(prompts[1], greedy(0, prompt_logprobs=2))])
            results.append((batched, [entry.logprob for delta in scored for entry in delta.prompt_logprobs]))
            assert isinstance(engine.model, OnnxModel) == (kind is OnnxEngine)
            assert engine.vocab_size == engine.model.config.vocab_size
        finally:
            engine.close()
    assert results[0][0] == results[1][0]
    assert results[1][1] == pytest.approx(results[0][1], abs=1e-3)
    assert len(results[0][1]) > 50


def test_a_cache_of_a_batch_gives_what_it_holds() -> None:
    cache = BatchCache(4, 4096)
    lengths, states = (5, 3, 7), []
    for length in lengths:
        one = DynamicCache()
        one.update(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4), 0)
        states.append((one.layers[0].keys, one.layers[0].values))
        cache.insert(one, length)
    for kind, found in enumerate(cache.layers[0].in_use()):
        assert found.shape == (3, 2, 7, 4)
        for row, length in enumerate(lengths):
            assert torch.equal(found[row, :, 7 - length :], states[row][kind][0])
            assert not found[row, :, : 7 - length].any()


def test_the_endpoint(pair: Any) -> None:
    """It takes the engine for the directory, and says what multiplies."""
    import openai

    _, made = pair("llama")
    with BackgroundServer(str(made), device="cpu") as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="unused")
        answer = client.completions.create(
            model=server.model, prompt="the cat", max_tokens=8, temperature=0, logprobs=1
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        found = metrics(server.base_url)
    assert found["halve:weight_bytes"] == sum(path.stat().st_size for path in made.glob("model.onnx*"))


def test_the_command(halve: Halve, pair: Any, tmp_path: Path) -> None:
    packed, _ = pair("llama")
    called = halve("export", packed, "--out", tmp_path / "graph", "--json")
    assert called.code == 0
    assert called.document["layers"]["sparse"] == read_record(tmp_path / "graph")["layers"]["sparse"] > 0
    called = halve("serve", packed, "--engine", "onnx", "--port", "0")
    assert (called.code, "`halve export" in called.stderr) == (2, True)
    called = halve("export", tmp_path / "absent", "--out", tmp_path / "other")
    assert (called.code, "no model directory" in called.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "opt", "gpt2", "gpt_neox", "phi3"]
)
def test_every_family(family: str, tmp_path: Path) -> None:
    source = tiny_models.build(family, tmp_path / "source", layers=3)
    packed = compress(source, tmp_path / "packed", metric="magnitude", reconstruction="none").directory
    assert export_onnx(packed, tmp_path / "graph")["error"] < 1e-5
    assert export_onnx(packed, tmp_path / "half", "float16")["layers"]["sparse"] >= 12
