"""From a dense checkpoint to an artefact that loads: every family, every kind of source, every slot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from compress import calibration as texts
from compress import pipeline, pruner, wide
from compress.architecture import find_blocks
from compress.card import model_card
from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import RecipeError
from compress.files import check_digest
from compress.journal import Journal
from compress.recipe import Recipe
from compress.sources import Source
from compress.verify import verify
from compress.wide import is_emulated
from serve.engines.loading import load_checkpoint
from serve.linear import Sparse24Linear
from serve.loading import linear_bytes
from serve.measure import shapes
from tests import tiny_models
from tests.runs import (
    LENGTH,
    SAMPLES,
    beside,
    block_linears,
    calibration,
    compress,
    generated,
    identical,
    kept_in_groups,
    load,
    logits,
    report,
    stored,
    tree,
)

LINEARS_OF_A_BLOCK = {"gpt2": 4, "gpt_neox": 4, "phi3": 4, "mamba": 4, "opt": 6}  # the others have 7


def stem(name: str) -> str:
    """The dense name of a stored tensor."""
    return name.removesuffix("_packed").removesuffix("_mask")


def both(model: Path, directory: Path, **settings: Any) -> tuple[Path, Path]:
    """One recipe, packed and dense."""
    packed = compress(model, directory / "packed", **settings).directory
    dense = compress(model, directory / "dense", format="dense", **settings).directory
    return packed, dense


def assert_same_model(packed: Path, dense: Path) -> None:
    """The packed model computes what the dense one with zeros does, to the bit. Where torch emulates the dtype's products, nearly: with
    AVX2 alone its results were seen to depend on where in the memory the operands lie, and a layer here expands its weight anew."""
    ours, plain = load(packed), load(dense)
    assert ours.dtype == plain.dtype
    assert not any(isinstance(module, Sparse24Linear) for module in plain.modules())
    if is_emulated(plain.dtype, torch.device("cpu")):
        found, expected = logits(ours).float(), logits(plain).float()
        assert float((found - expected).abs().max()) <= 0.02 * float(expected.abs().max())
        return
    assert identical(logits(ours), logits(plain))
    assert torch.equal(generated(ours), generated(plain))


def assert_artefact(source: Path, packed: Path, dense: Path, itemsize: int = 2) -> None:
    """Everything that must hold for the artefacts of a recipe that prunes all block linears to 2:4."""
    original, packed_tensors, dense_tensors = stored(source), stored(packed), stored(dense)
    assert dense_tensors.keys() == original.keys()
    assert {stem(name) for name in packed_tensors} == original.keys()
    pruned = {stem(name) for name in packed_tensors if name.endswith("_packed")}
    for name, tensor in original.items():
        if name in pruned:
            values, mask = packed_tensors[f"{name}_packed"], packed_tensors[f"{name}_mask"]
            assert values.nbytes + mask.nbytes == tensor.numel() * (itemsize / 2 + 1 / 8)
            if itemsize == 2:
                assert values.nbytes + mask.nbytes == 0.5625 * tensor.nbytes
            assert not identical(tensor, dense_tensors[name])
        else:
            assert identical(tensor, packed_tensors[name]), name
            assert identical(tensor, dense_tensors[name]), name

    model = load(packed)
    weights = block_linears(model)
    assert len(weights) == len(pruned)
    for name, weight in weights.items():
        assert int(kept_in_groups(weight, 4).max()) <= 2, name
        assert int(kept_in_groups(weight, 4).sum()) > 0.45 * weight.numel(), name
        assert isinstance(model.get_submodule(name), Sparse24Linear), name
    held = linear_bytes(model, set(weights))
    assert held <= 0.60 * sum(weight.nbytes for weight in weights.values()) * (1 if itemsize == 2 else 2)

    for directory, kind in ((packed, "packed"), (dense, "dense")):
        verdict = verify(directory)
        assert verdict.kind == kind
        assert len(verdict.sparse) == len(verdict.layers) == len(pruned)
        assert not verdict.notes
        assert all(check_digest(file) for file in directory.glob("*.safetensors"))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (directory / name).read_bytes() == (source / name).read_bytes()
        assert AutoTokenizer.from_pretrained(directory).chat_template == tiny_models.CHAT_TEMPLATE
    assert_same_model(packed, dense)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny_models.FAMILIES},
    "opt with norms at the end": ("opt", {"do_layer_norm_before": False}),
    "mamba with biases": ("mamba", {"use_bias": True, "residual_in_fp32": False}),
    "mamba, not tied": ("mamba", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_family(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    source = tiny_models.build(family, tmp_path / "source", **overrides)
    before = tree(source)
    packed, dense = both(source, tmp_path)
    assert tree(source) == before
    assert beside(packed) == ["calibration.txt", "dense", "packed", "source"]
    assert_artefact(source, packed, dense)

    report = json.loads((packed / "report.json").read_text())
    layers = report["layers"]
    assert len(layers) == 3 * LINEARS_OF_A_BLOCK.get(family, 7) == report["summary"]["layers_pruned"]
    for layer in layers:
        assert layer["status"] == "pruned"
        assert 0 < layer["relative_output_error"] < 0.7, layer
        assert layer["sparsity"] == 0.5
        assert layer["bytes_after"] == 0.5625 * layer["bytes_before"]

    again = load(packed)
    again.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert any(isinstance(module, Sparse24Linear) for module in reloaded.modules())
    assert identical(logits(reloaded), logits(load(packed)))
    assert verify(tmp_path / "saved").kind == "packed"

    unpack_checkpoint(packed, tmp_path / "unpacked")
    pack_checkpoint(dense, tmp_path / "again")
    for one, other in ((tmp_path / "unpacked", dense), (tmp_path / "again", packed)):
        theirs = stored(other)
        assert stored(one).keys() == theirs.keys()
        assert all(identical(tensor, theirs[name]) for name, tensor in stored(one).items())


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_gpt2_with_the_keys_of_the_hub(max_shard_size: str, tmp_path: Path) -> None:
    source = tiny_models.build("gpt2", tmp_path / "hub", hub_gpt2_keys=True, max_shard_size=max_shard_size)
    packed, dense = both(source, tmp_path)
    assert_artefact(source, packed, dense)
    plain = tiny_models.build("gpt2", tmp_path / "plain")
    compress(plain, tmp_path / "of-plain")
    assert identical(logits(load(packed)), logits(load(tmp_path / "of-plain")))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_shards(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = tiny_models.build(family, tmp_path / "single")
    sharded = tiny_models.build(family, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    compress(single, tmp_path / "of-single")
    compress(sharded, tmp_path / "of-sharded")
    one, many = stored(tmp_path / "of-single"), stored(tmp_path / "of-sharded")
    assert one.keys() == many.keys()
    assert all(identical(one[name], many[name]) for name in one)

    # And the artefact itself in several shards.
    monkeypatch.setattr("compress.artefact.SHARD_BYTES", 60_000)
    packed, dense = both(sharded, tmp_path)
    for directory in (packed, dense):
        shards = list(directory.glob("*.safetensors"))
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert len(shards) > 2
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        assert index["weight_map"].keys() == stored(directory).keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(directory).values())
    assert_artefact(sharded, packed, dense)
    assert {name: tensor.shape for name, tensor in stored(packed).items()} == {n: t.shape for n, t in one.items()}


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("llama", "float16"), ("gpt2", "float16")])
def test_source_dtypes(family: str, dtype: str, tmp_path: Path) -> None:
    source = tiny_models.build(family, tmp_path / "source", dtype=getattr(torch, dtype))
    packed, dense = both(source, tmp_path)
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["value_dtype"] == dtype
    assert_artefact(source, packed, dense, itemsize=4 if dtype == "float32" else 2)
    assert load(packed).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("said", [{}, {"text_config": {"dtype": "float16"}}])
def test_a_config_without_a_dtype(said: dict[str, Any], tmp_path: Path) -> None:
    """What most of the checkpoint is stored in, as transformers reads it."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1, dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | said))
    assert Source(source).dtype == ("float16" if said else "bfloat16")
    if not said:
        assert load_checkpoint(str(source), "cpu", "auto")[0].dtype == torch.bfloat16
        out = compress(source, tmp_path / "out").directory
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == config["quantization_config"]["value_dtype"] == "bfloat16"
        assert load_checkpoint(str(out), "cpu", "auto")[0].dtype == torch.bfloat16
        assert shapes.read(str(out)).dtype == torch.bfloat16
        del config["dtype"]
        (out / "config.json").write_text(json.dumps(config))
        assert load_checkpoint(str(out), "cpu", "auto")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "stored", "packs"),
    [
        ({}, "in 0.5312 of their bytes", False),
        ({"format": "dense"}, "as a dense checkpoint", True),
        ({"format": "dense", "pattern": "4:8"}, "as a dense checkpoint", False),
    ],
)
def test_the_card_says_what_is_there(settings: dict[str, Any], stored: str, packs: bool, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1, dtype=torch.float32)
    card = (compress(source, tmp_path / "out", **settings).directory / "README.md").read_text()
    assert stored in card
    assert ("halve pack" in card) == packs


def test_a_directory_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card names a base model where the hub has one, and not a directory that is called like one."""
    tiny_models.build("llama", tmp_path / "models" / "smol", layers=1)
    monkeypatch.chdir(tmp_path)
    text = calibration(tmp_path)
    out = compress(Path("models/smol"), tmp_path / "out", calibration=str(text)).directory
    card = (out / "README.md").read_text()
    assert "base_model" not in card
    assert "# smol, 2:4" in card
    assert yaml.safe_load((out / "recipe.yaml").read_text())["from_hub"] is False
    monkeypatch.chdir(tmp_path / "models" / "smol")
    here = compress(Path(), tmp_path / "here", calibration=str(text)).directory
    assert "# smol, 2:4" in (here / "README.md").read_text()
    saved, said = yaml.safe_load((out / "recipe.yaml").read_text()), report(out)
    named = {**saved, "model": "someone/smol"}
    assert "base_model: someone/smol" in model_card({**named, "from_hub": True}, said)
    del named["from_hub"]  # of an older halve
    assert "base_model: someone/smol" in model_card(named, said)


def test_cast(tmp_path: Path) -> None:
    """dtype in the recipe converts what is saved; the run is that of a source that was converted before."""
    wide = tiny_models.build("qwen2", tmp_path / "wide", dtype=torch.float32)
    narrow = tiny_models.build("qwen2", tmp_path / "narrow", dtype=torch.bfloat16)
    compress(wide, tmp_path / "cast", dtype="bfloat16")
    compress(narrow, tmp_path / "plain")
    cast, plain = stored(tmp_path / "cast"), stored(tmp_path / "plain")
    assert cast.keys() == plain.keys()
    assert all(identical(cast[name], plain[name]) for name in plain)
    assert load(tmp_path / "cast").dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_output_layer_is_left_alone(tied: bool, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", tie_word_embeddings=tied)
    packed, dense = both(source, tmp_path)
    assert ("lm_head.weight" in stored(source)) is not tied
    assert_artefact(source, packed, dense)
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_ignored_layers(format: str, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", intermediate_size=156)  # 156 = 4 * 39: 2:4, not packed
    ignore = ("*.k_proj", "model.layers.1.self_attn.q_proj")
    out = compress(source, tmp_path / "out", ignore=ignore, format=format).directory
    report = json.loads((out / "report.json").read_text())
    reasons = {layer["name"]: layer["reason"] for layer in report["layers"] if layer["status"] == "dense"}
    expected = {f"model.layers.{i}.self_attn.k_proj": "ignored by the recipe (*.k_proj)" for i in range(3)}
    expected[ignore[1]] = f"ignored by the recipe ({ignore[1]})"
    if format == "packed":
        narrow = "156 input features are not a multiple of 8, which the packed format needs"
        expected |= {f"model.layers.{i}.mlp.down_proj": narrow for i in range(3)}
        ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
        assert ignored == sorted([*expected, "lm_head"])
    assert reasons == expected
    original, now = stored(source), stored(out)
    for name in expected:
        assert identical(original[f"{name}.weight"], now[f"{name}.weight"])
    verdict = verify(out)
    assert {layer["name"]: layer["reason"] for layer in verdict.layers if layer["status"] == "dense"} == expected
    assert len(verdict.sparse) == 21 - len(expected)
    logits(load(out))


@pytest.mark.parametrize("metric", [None, "magnitude", "wanda"])
@pytest.mark.parametrize("reconstruction", ["none", "sparsegpt", "bias", "dsnot", "r2-dsnot", "swaps"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "unstructured"])
def test_slots(metric: str | None, reconstruction: str, pattern: str, tmp_path: Path) -> None:
    source = tiny_models.build("qwen3", tmp_path / "source", layers=1)
    sparsity = 0.4 if pattern == "unstructured" else None
    settings = {"metric": metric, "reconstruction": reconstruction, "pattern": pattern, "sparsity": sparsity}
    if pattern != "2:4":
        with pytest.raises(RecipeError, match="only 2:4 can be packed"):
            Recipe.create(**settings)
    done = compress(source, tmp_path / "out", format="dense", **settings)
    name = metric or ("sparsegpt" if reconstruction == "sparsegpt" else "wanda")
    for layer in done.report["layers"]:
        assert (layer["metric"], layer["reconstruction"]) == (name, reconstruction)
    original, pruned = block_linears(load(source)), block_linears(load(done.directory))
    for name, weight in pruned.items():
        if pattern == "unstructured":
            assert 1 - float((weight != 0).float().mean()) == pytest.approx(0.4, abs=0.01)
        else:
            keep, m = map(int, pattern.split(":"))
            assert int(kept_in_groups(weight, m).max()) <= keep
        survivors = weight[weight != 0], original[name][weight != 0]
        assert torch.equal(*survivors) is (reconstruction != "sparsegpt")  # the others only choose, or correct the bias


def test_reconstruction_helps(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source")
    errors = {}
    for metric, reconstruction in [("magnitude", "none"), ("wanda", "none"), ("wanda", "swaps"), (None, "sparsegpt")]:
        out = tmp_path / f"{metric}-{reconstruction}"
        done = compress(source, out, metric=metric, reconstruction=reconstruction, samples=16)
        errors[out.name] = done.report["summary"]["mean_relative_output_error"]
    assert errors["None-sparsegpt"] < errors["wanda-none"] < errors["magnitude-none"]
    assert errors["wanda-swaps"] < errors["wanda-none"]


def test_the_same_recipe_gives_the_same_files(tmp_path: Path) -> None:
    source = tiny_models.build("gemma2", tmp_path / "source")
    one = compress(source, tmp_path / "one", seed=3)
    two = compress(source, tmp_path / "two", seed=3)
    assert tree(one.directory) == tree(two.directory)
    other = compress(source, tmp_path / "other", seed=4)
    assert stored(other.directory).keys() == stored(one.directory).keys()
    assert tree(other.directory)["model.safetensors"] != tree(one.directory)["model.safetensors"]


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_report_accounts_for_every_byte(format: str, tmp_path: Path) -> None:
    source = tiny_models.build("opt", tmp_path / "source")
    (source / "LICENSE").write_text("as you like\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    out = compress(source, tmp_path / "out", format=format).directory
    report = json.loads((out / "report.json").read_text())
    sizes = {name: len(content) for name, content in tree(out).items()}
    assert {"LICENSE", "additional_chat_templates/tools.jinja", "README.md", "recipe.yaml"} <= sizes.keys()
    assert {name: entry["bytes"] for name, entry in report["files"].items()} == {
        name: size for name, size in sizes.items() if name != "report.json"
    }
    parts = dict(report["bytes"])
    total = parts.pop("total")
    assert total == sum(sizes.values()) == sum(parts.values())
    assert parts["this_report"] == sizes["report.json"]
    tensors = stored(out)
    assert parts["packed_values"] == sum(t.nbytes for name, t in tensors.items() if name.endswith("_packed"))
    assert parts["packed_masks"] == sum(t.nbytes for name, t in tensors.items() if name.endswith("_mask"))
    pruned = parts["packed_values"] + parts["packed_masks"]
    if format == "packed":
        assert pruned == report["summary"]["pruned_bytes_after"] == 0.5625 * report["summary"]["pruned_bytes_before"]
    else:
        assert pruned == 0
        assert report["summary"]["pruned_bytes_after"] == report["summary"]["pruned_bytes_before"]


def test_saved_recipe_repeats_the_run(tmp_path: Path) -> None:
    source = tiny_models.build("mistral", tmp_path / "source")
    one = compress(source, tmp_path / "one", metric="wanda", reconstruction="sparsegpt", seed=7, ignore=("*.0.mlp.*",))
    saved = yaml.safe_load((one.directory / "recipe.yaml").read_text())
    assert saved["calibration"]["tokens"] == SAMPLES * LENGTH
    assert saved["versions"]["torch"] == torch.__version__
    recipe = Recipe.load(one.directory / "recipe.yaml")
    two = pipeline.compress_model(source, tmp_path / "two", recipe=recipe)
    assert tree(one.directory) == tree(two.directory)


# The method, against an implementation that knows nothing of the pipeline


def reference_sparsegpt(weight: torch.Tensor, x: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Algorithm 1 of the SparseGPT paper for 2:4, column by column in float64. weight [N, K], x [T, K]."""
    weight = weight.double().clone()
    gram = x.double().T @ x.double()
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % 4 == 0:
            scores = (weight[:, j : j + 4] / upper.diagonal()[j : j + 4]) ** 2
            kept[:, j : j + 4].scatter_(1, scores.topk(2, dim=1).indices, True)
        error = torch.where(kept[:, j], 0.0, weight[:, j]) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, None, j:]
    return weight * kept


def reference_wanda(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    scores = (weight.double().abs() * x.double().square().sum(dim=0).sqrt()).unflatten(1, (-1, 4))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2, dim=2).indices, True)
    return weight.double() * kept.flatten(1)


@torch.no_grad()
def reference_pruning(
    source: Path, windows: torch.Tensor, prune: Any, ours: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole model in memory, block after block; returns the inputs [T, K] and the new weights by layer.

    In float32 a near tie may fall the other way, and the rest of that row is another row then. So that what comes behind is one
    model on both sides, it goes on with such rows as they are in ``ours``.
    """
    model = load(source)
    inputs: dict[str, torch.Tensor] = {}
    pruned: dict[str, torch.Tensor] = {}
    blocks: dict[str, list[str]] = {}
    for name in block_linears(model):
        blocks.setdefault(name.split(".layers.")[1].split(".")[0], []).append(name)
    for names in blocks.values():
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, into=seen[name]: into.append(args[0].flatten(0, -2).clone())
            )
            for name in names
        ]
        for window in windows:
            model(window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name in names:
            inputs[name] = torch.cat(seen[name])
            weight = model.get_submodule(name).weight
            pruned[name] = prune(weight, inputs[name])
            same = same_masks(ours[name], pruned[name])
            weight.copy_(torch.where(same[:, None], pruned[name].to(weight.dtype), ours[name]))
    return inputs, {name: weight.to(torch.float32) for name, weight in pruned.items()}


def same_masks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """For each row [N], whether both keep the same weights."""
    return ((a != 0) == (b != 0)).all(dim=1)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_against_a_reference_that_holds_the_whole_model(
    family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_models.build(family, tmp_path / "source", dtype=torch.float32)
    seen: dict[str, Any] = {}
    drawn: list[torch.Tensor] = []

    def recording(function: Any, keep: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            keep(args, result)
            return result

        return wrapper

    monkeypatch.setattr(
        pruner, "prune_layer", recording(pruner.prune_layer, lambda args, _: seen.update({args[0]: args[2].inputs}))
    )
    monkeypatch.setattr(texts, "load_windows", recording(texts.load_windows, lambda _, w: drawn.append(w)))
    # The damping is the paper's, which so few tokens would not be given otherwise.
    by_sparsegpt: dict[str, Any] = {"reconstruction_options": {"damping": 0.01}}
    settings = {"metric": "wanda", "reconstruction": "none"} if method == "wanda" else by_sparsegpt
    out = compress(source, tmp_path / "out", samples=8, **settings).directory
    prune = reference_wanda if method == "wanda" else reference_sparsegpt
    ours = block_linears(load(out))
    inputs, weights = reference_pruning(source, drawn[0], prune, ours)

    assert seen.keys() == inputs.keys() == weights.keys()
    for name, x in inputs.items():
        statistics = seen[name]
        assert statistics.count == len(x) == 8 * LENGTH
        statistic, expected = (
            (statistics.gram, x.double().T @ x.double())
            if method == "sparsegpt"
            else (statistics.sum_of_squares, x.double().square().sum(dim=0))
        )
        scale = float(expected.abs().max())
        torch.testing.assert_close(statistic.double(), expected, rtol=1e-3, atol=1e-4 * scale)

    for name, expected in weights.items():
        same = same_masks(ours[name], expected)
        assert float(same.float().mean()) > 0.97, name
        torch.testing.assert_close(
            ours[name][same], expected[same], rtol=1e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )

    # Layers that read one tensor share its statistics, others do not.
    groups: dict[int, set[str]] = {}
    for name, statistics in seen.items():
        groups.setdefault(id(statistics), set()).add(name.split(".layers.")[1])
    fused = family == "gpt_neox"
    first = {tuple(sorted(group)) for group in groups.values() if all(name.startswith("0.") for name in group)}
    assert first == (
        {
            ("0.attention.query_key_value",),
            ("0.attention.dense",),
            ("0.mlp.dense_h_to_4h",),
            ("0.mlp.dense_4h_to_h",),
        }
        if fused
        else {
            ("0.self_attn.k_proj", "0.self_attn.q_proj", "0.self_attn.v_proj"),
            ("0.self_attn.o_proj",),
            ("0.mlp.gate_proj", "0.mlp.up_proj"),
            ("0.mlp.down_proj",),
        }
    )
    assert len(groups) == 3 * len(first)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 4])
def test_activations_are_those_of_the_pruned_model(
    variant: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes into each block is, to the bit, what goes into it in the whole pruned model."""
    monkeypatch.setattr(wide, "EMULATED", {})  # both multiply as torch does
    family, overrides = VARIANTS[variant]
    source = tiny_models.build(family, tmp_path / "source", **overrides)
    propagated: dict[int, list[torch.Tensor]] = {}
    drawn: list[torch.Tensor] = []
    load_windows = texts.load_windows

    def record_windows(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(load_windows(*args, **kwargs))
        return drawn[0]

    monkeypatch.setattr(texts, "load_windows", record_windows)
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", batch * LENGTH)
    monkeypatch.setattr(
        Journal, "save_activations", lambda self, i, kinds: propagated.update({i: [h.clone() for h in kinds["hidden"]]})
    )
    out = compress(source, tmp_path / "out").directory
    model = load(out)
    blocks = model.get_submodule(find_blocks(load(source))[0])  # (packed modules are no linears to find them by)
    for number, windows in enumerate(drawn[0].split(batch)):
        states: list[torch.Tensor] = []
        handles = [
            block.register_forward_pre_hook(
                lambda module, args, kwargs, into=states: into.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            for block in blocks
        ]
        with torch.no_grad():
            model(windows, use_cache=False)
        for handle in handles:
            handle.remove()
        assert len(states) == len(propagated) == 3
        for index in range(3):
            assert identical(propagated[index][number], states[index]), (index, number)
