"""ONNX graphs of 2:4 models: their zeros, their logits, the engine over them, and what is refused."""

from __future__ import annotations

import builtins
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache

from compress.convert import unpack_checkpoint
from compress.errors import CheckError, CorruptCheckpointError, HalveError, OutputError, SourceError, UsageError
from compress.packed import LARGEST, PATTERN, PackedWeight, pack, quantize, quantize_rows, unpack
from serve.engines.kv_cache import BatchCache
from serve.engines.onnx import OnnxEngine
from serve.engines.transformers import TransformersEngine
from serve.kernels.cpu import library
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
needs_kernels = pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built")
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


def session(weight: PackedWeight, in_dtype: torch.dtype, threads: int = 2, path: int = -1, **changes: int) -> Any:
    """A graph of one operator, that rounds x to a dtype; ``changes``: of its attributes."""
    n, k = weight.shape
    parts = {name: value.numpy() for name, value in graph._parts(weight).items()}
    numbers = {
        "n": n, "k": k, "dtype": graph.CODES[weight.values.dtype], "io": graph.CODES[in_dtype],
        "quantizes_x": int(weight.quantizes_x), **changes,
    }  # fmt: skip
    node = onnx.helper.make_node("Sparse24Linear", ["x", *parts], ["y"], domain="ai.halve", **numbers)
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 2 + [width])
        for name, width in (("x", None), ("y", n))
    )
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in parts.items()]
    made = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [x], [y], constants),
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("ai.halve", 1)],
        ir_version=10,
    )
    return opened(made.SerializeToString(), threads, path)


def opened(raw: bytes, threads: int, path: int = -1) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    found = library.find()
    assert found.library is not None
    found.library.halve_onnx_configure(threads, path)
    options.register_custom_ops_library(str(found.path))
    return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def some_weight(n: int, k: int, values: torch.dtype, quantizes_x: bool = False) -> PackedWeight:
    generator = torch.Generator().manual_seed(n * k)
    dense = torch.randn(n, k, generator=generator) * PATTERN.mask(torch.rand(n, k, generator=generator))
    if values in LARGEST:
        return replace(quantize(pack(dense), values), quantizes_x=quantizes_x)
    return pack(dense.to(values))


KINDS = [
    (torch.float32, torch.float32, False), (torch.bfloat16, torch.bfloat16, False), (torch.float16, torch.float16, False),
    *((values, io, rounds) for values in LARGEST for io in (torch.float32, torch.bfloat16) for rounds in (False, True)),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize(("values", "io", "rounds"), KINDS)
def test_the_operator_multiplies(values: torch.dtype, io: torch.dtype, rounds: bool) -> None:
    """Against float64, any number of rows in any shape; the same on every run and for any number of threads."""
    for n, k in ((16, 8), (33, 72), (256, 320)):
        weight = some_weight(n, k, values, rounds)
        sessions = [session(weight, io, threads) for threads in (1, 2, 3)]
        dense = unpack(weight, torch.float64) if weight.scale is None else unpack(weight, torch.float32)
        for shape in ((1, 1), (1, 5), (3, 7), (2, 40), (1, 128), (0, 4)):
            x = torch.randn(*shape, k, generator=torch.Generator().manual_seed(k)).to(io)
            exact = x.double()
            if rounds:
                rounded, scales = quantize_rows(x, values)
                exact = rounded.double() * scales.double()
            expected = exact @ dense.double().T
            found = [torch.from_numpy(one.run(None, {"x": x.float().numpy()})[0]) for one in sessions]
            assert found[0].shape == (*shape, n)
            size = exact.abs() @ dense.double().T.abs()
            step = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[io]
            assert bool(((found[0].double() - expected).abs() <= step * (size + expected.abs()) + 1e-6).all())
            assert all(torch.equal(found[0], other) for other in found[1:])
            assert torch.equal(found[0].to(io).float(), found[0])


@needs_kernels
def test_every_path_multiplies() -> None:
    """What ``HALVE_CPU_PATH`` chooses holds here, too."""
    weight, x = some_weight(48, 72, torch.bfloat16), torch.randn(1, 9, 72).bfloat16()
    exact = x.double() @ unpack(weight).double().T
    numbers = {"portable": 0, "avx2": 1, "avx512": 2, "avx512bf16": 3}
    found = []
    for name in library.paths():
        made = session(weight, torch.bfloat16, path=numbers[name])
        found.append(torch.from_numpy(made.run(None, {"x": x.float().numpy()})[0]))
        assert torch.allclose(found[-1].double(), exact, rtol=1e-2, atol=1e-2), name
    assert found


@needs_kernels
def test_two_threads_may_run_one_session() -> None:
    weight = some_weight(512, 1024, torch.bfloat16)
    made = session(weight, torch.bfloat16)
    inputs = [np.random.default_rng(i).standard_normal((1, 1 + 9 * i, 1024), dtype=np.float32) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: made.run(None, {"x": x})[0], inputs * 4))
    alone = [session(weight, torch.bfloat16).run(None, {"x": x})[0] for x in inputs]
    assert all(np.array_equal(one, alone[i % 8]) for i, one in enumerate(found))


@needs_kernels
def test_what_the_operator_refuses() -> None:
    """With a reason, and without a crash."""
    weight = some_weight(32, 64, torch.bfloat16)
    x = np.ones((1, 2, 64), np.float32)
    scaled = some_weight(32, 64, torch.int8)
    for changes in ({"n": 0}, {"k": 60}, {"dtype": 9}, {"io": 2}, {"io": -1}, {"quantizes_x": 1}, {"n": 1 << 40}):
        with pytest.raises(Exception, match="its attributes are of no packed weight"):
            session(weight, torch.bfloat16, **changes)
    for one, changes in (
        (weight, {"n": 64}),
        (weight, {"k": 72}),
        (weight, {"dtype": 3}),
        (scaled, {"dtype": 4, "n": 16}),
    ):
        with pytest.raises(Exception, match=r"values, mask and scales are not those of a weight"):
            session(one, torch.bfloat16, **changes).run(None, {"x": x})
    with pytest.raises(Exception, match=r"x is not \[.., k\]"):
        session(weight, torch.bfloat16).run(None, {"x": np.ones((1, 2, 56), np.float32)})
    broken = replace(weight, mask=weight.mask.clone())
    broken.mask[3, 2] = 0x37
    with pytest.raises(Exception, match="two bits in every group of four"):
        session(broken, torch.bfloat16).run(None, {"x": x})


@needs_kernels
@pytest.mark.parametrize(("family", "dtype", "how"), [
    ("llama", torch.bfloat16, {}), ("gpt2", torch.float16, {}), ("qwen2", torch.float32, {}),
    ("llama", torch.bfloat16, {"value_dtype": "int8", "activation_dtype": "int8"}),
    ("gemma2", torch.bfloat16, {"value_dtype": "float8_e4m3fn"}),
])  # fmt: skip
def test_packed_weights_in_a_graph(family: str, dtype: torch.dtype, how: dict[str, str], tmp_path: Path) -> None:
    """The bytes of the checkpoint, one operator for each 2:4 layer, and what halve's own engine says; also of a checkpoint with zeros."""
    source = tiny_models.build(family, tmp_path / "source", layers=2, dtype=dtype)
    settings = {"metric": "magnitude", "reconstruction": "none", "ignore": ("*.1.mlp.*",)}
    packed = compress(source, tmp_path / "packed", **settings, **how).directory
    record = export_onnx(packed, tmp_path / "graph", weights="packed")
    tensors = load_file(packed / "model.safetensors")
    kept = {name.removesuffix(".weight_packed"): w for name, w in tensors.items() if name.endswith(".weight_packed")}
    made = onnx.load(tmp_path / "graph" / "model.onnx")
    operators = [node for node in made.graph.node if node.op_type == "Sparse24Linear"]
    assert record["layers"]["sparse"] == len(operators) == len(kept) > 0
    found = [onnx.numpy_helper.to_array(one).tobytes() for one in made.graph.initializer]
    for name, values in kept.items():
        assert values.view(torch.uint8).numpy().tobytes() in found
        assert tensors[f"{name}.weight_mask"].numpy().tobytes() in found
    model, exported = load_model(packed), OnnxModel(tmp_path / "graph", is_packed=True)
    ids = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    expected, got = run(model, ids, DynamicCache()).float(), run(exported, ids, DynamicCache())
    # (a value near the middle between two steps of 8 bits may fall to either side)
    allowed = 0.1 if how.get("activation_dtype") else 0.05 if dtype == torch.bfloat16 else 0.01
    assert float((got - expected).norm() / expected.norm()) < allowed
    if family == "gpt2":
        unpack_checkpoint(packed, tmp_path / "zeros")
        again = export_onnx(tmp_path / "zeros", tmp_path / "again", weights="packed")
        assert again["layers"] == record["layers"]
        assert (tmp_path / "again/model.onnx.data").stat().st_size == (
            tmp_path / "graph/model.onnx.data"
        ).stat().st_size
    if family == "llama" and not how:
        with BackgroundServer(str(tmp_path / "graph"), device="cpu", engine="onnx") as server:
            text = httpx.get(server.base_url.removesuffix("/v1") + "/metrics").text
        assert 'backend="cpu"' in text
        assert "halve's operator multiplies packed weights" in text


def test_packed_weights_need_the_kernels(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = pair("llama")
    with pytest.raises(UsageError, match="not float16"):
        export_onnx(packed, tmp_path / "graph", "float16", "packed")
    with pytest.raises(UsageError, match="--weights 'some' is not one of zeros, packed"):
        export_onnx(packed, tmp_path / "graph", weights="some")
    if library.load() is not None:
        with pytest.raises(CheckError, match=r"no layer of .* is 2:4"):
            export_onnx(packed.parent / "source", tmp_path / "graph", weights="packed")
    monkeypatch.setenv("HALVE_CPU_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(UsageError, match=r"needs halve's kernels: .*absent.so, which is no file"):
        export_onnx(packed, tmp_path / "graph", weights="packed")
    with pytest.raises(UsageError, match=r"halve's kernels are not there: .*absent.so"):
        OnnxModel(pair("llama")[1], is_packed=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "opt", "gpt2", "gpt_neox", "phi3"]
)
def test_every_family(family: str, tmp_path: Path) -> None:
    source = tiny_models.build(family, tmp_path / "source", layers=3)
    packed = compress(source, tmp_path / "packed", metric="magnitude", reconstruction="none").directory
    assert export_onnx(packed, tmp_path / "graph")["error"] < 1e-5
    assert export_onnx(packed, tmp_path / "half", "float16")["layers"]["sparse"] >= 12
    assert export_onnx(packed, tmp_path / "operators", weights="packed")["layers"]["sparse"] >= 12
