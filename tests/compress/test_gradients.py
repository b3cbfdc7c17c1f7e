"""Gradients from one block in memory at a time are those of autograd over the whole model."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import gradients, pruner, sources
from compress.architecture import find_blocks, is_linear, oriented
from compress.backward import regional_gradients
from compress.blocks import BlockModel
from compress.calibration import CalibrationSet, text_set
from compress.errors import CorruptCheckpointError, OutputError, RecipeError, SourceError
from compress.gradients import GradientStore
from compress.layer_statistics import LayerStatistics
from compress.methods import Metric
from compress.metrics import METRICS
from compress.sources import Source
from tests import tiny_models
from tests.runs import beside, block_linears, compress, load, tree

CPU = torch.device("cpu")
KINDS = ("gradient_l1", "gradient_l2")
FAMILIES = ["llama", "gpt2", "opt", "mamba", "vit"]


def samples_of(family: str, count: int = 3) -> CalibrationSet:
    """A few windows, or images with classes."""
    generator = torch.Generator().manual_seed(5)
    if family == "vit":
        size = tiny_models.IMAGE_SIZE
        classes = torch.randint(len(tiny_models.CLASSES), (count,), generator=generator)
        return CalibrationSet("pixel_values", torch.randn(count, 3, size, size, generator=generator), classes=classes)
    return text_set(torch.randint(5, tiny_models.VOCABULARY, (count, 24), generator=generator))


def block_model(family: str, directory: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> BlockModel:
    source = tiny_models.build(family, directory / family, dtype=torch.float32, **overrides)
    return BlockModel(Source(source), dtype, CPU)


def layers_of(model: BlockModel) -> list[list[str]]:
    return [list(model.linears(index)) for index in range(len(model.blocks))]


def reference(
    source: Path, samples: CalibrationSet, classes: Tensor | None
) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """Σ|g| and sqrt(Σ g²) of the whole model's own loss, sample by sample, with everything in memory."""
    model = load(source)
    sums: dict[str, dict[str, Tensor]] = {}
    for n, inputs in enumerate(samples.batches(1)):
        model.zero_grad()
        labels = inputs["input_ids"] if samples.argument == "input_ids" else classes[n : n + 1]  # type: ignore[index]
        model(**inputs, labels=labels).loss.backward()
        for name in block_linears(model):
            module = model.get_submodule(name)
            gradient = oriented(module.weight.grad, module)
            entry = sums.setdefault(name, {kind: torch.zeros_like(gradient) for kind in KINDS})
            entry["gradient_l1"] += gradient.abs()
            entry["gradient_l2"] += gradient.square()
    for entry in sums.values():
        entry["gradient_l2"].sqrt_()
    return model, sums


def assert_equal(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.dtype == torch.float32
    scale = float(expected.abs().max())
    assert scale > 0, name
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model(family: str, tmp_path: Path) -> None:
    model, samples = block_model(family, tmp_path), samples_of(family)
    store = GradientStore(tmp_path / "gradients", {"made": "for a test"})
    assert not store.has(KINDS)
    store.gather(model, samples, layers_of(model), KINDS)
    assert store.has(KINDS)
    _, expected = reference(tmp_path / family, samples, samples.classes)
    head = "classifier" if family == "vit" else "lm_head"
    assert set(expected) - {head} == {name for block in layers_of(model) for name in block}
    for index, names in enumerate(layers_of(model)):
        found = store.read(index, names, KINDS, CPU)
        assert list(found) == names
        for name in names:
            for kind in KINDS:
                assert_equal(found[name][kind], expected[name][kind], f"{name}, {kind}")
    assert all(parameter.is_meta for parameter in model.model.parameters())
    assert sorted(path.name for path in store.directory.iterdir()) == [
        *(f"gradients-{index:05d}.safetensors" for index in range(3)),
        gradients.RECORD,
    ]


def test_image_without_a_class_gets_what_the_model_sees(tmp_path: Path) -> None:
    model, samples = block_model("vit", tmp_path), samples_of("vit")
    unknown = CalibrationSet("pixel_values", samples.samples)
    with torch.no_grad():
        seen = load(tmp_path / "vit")(samples.samples).logits.argmax(dim=-1)
    assert not torch.equal(seen, samples.classes)
    store = GradientStore(tmp_path / "gradients", {})
    store.gather(model, unknown, layers_of(model), KINDS)
    _, expected = reference(tmp_path / "vit", unknown, seen)
    for name, found in store.read(1, layers_of(model)[1], KINDS, CPU).items():
        assert_equal(found["gradient_l1"], expected[name]["gradient_l1"], name)


def test_only_wanted_layers_and_kinds(tmp_path: Path) -> None:
    model, samples = block_model("llama", tmp_path), samples_of("llama")
    wanted = [["model.layers.0.mlp.up_proj"], [], ["model.layers.2.self_attn.o_proj"]]
    store = GradientStore(tmp_path / "gradients", {})
    store.gather(model, samples, wanted, ["gradient_l2"])
    assert store.has(["gradient_l2"])
    assert not store.has(["gradient_l1"])
    _, expected = reference(tmp_path / "llama", samples, None)
    for index, names in enumerate(wanted):
        for name, found in store.read(index, names, ["gradient_l2"], CPU).items():
            assert_equal(found["gradient_l2"], expected[name]["gradient_l2"], name)
    # A second kind is gathered beside the first, not in its place.
    again = GradientStore(tmp_path / "gradients", {})
    again.gather(model, samples, wanted, ["gradient_l1"])
    assert GradientStore(tmp_path / "gradients", {}).has(KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_regional(family: str, tmp_path: Path) -> None:
    """sqrt(mean g²) of the norm of a block's output, by hand."""
    model, samples = block_model(family, tmp_path), samples_of(family)
    whole = load(tmp_path / family)
    _, blocks = find_blocks(whole)
    inputs: list[tuple[Any, Any]] = []
    handle = blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for arguments in samples.batches(1):
            whole(**arguments)
    handle.remove()
    linears = {name: module for name, module in blocks[1].named_modules() if is_linear(module)}
    squares = {name: torch.zeros(oriented(module.weight, module).shape) for name, module in linears.items()}
    for args, kwargs in inputs:
        output = blocks[1](*args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        found = torch.autograd.grad(output.square().sum().sqrt(), [module.weight for module in linears.values()])
        for (name, module), gradient in zip(linears.items(), found, strict=True):
            squares[name] += oriented(gradient, module).square()

    hidden = model.record_calls(samples.batches(1))
    with torch.no_grad():
        model.load_block(0)
        hidden = [model.run_block(0, n, states) for n, states in enumerate(hidden)]
        model.drop_block(0)
        model.load_block(1)
    ours = regional_gradients(model, 1, model.linears(1), hidden)
    assert len(ours) == len(linears)
    for name, gradient in ours.items():
        expected = (squares[name.removeprefix(f"{model.block_name(1)}.")] / len(samples)).sqrt()
        assert_equal(gradient, expected, name)
        assert not model.linears(1)[name].weight.requires_grad


def test_regional_of_float16_is_that_of_float32(tmp_path: Path) -> None:
    """A massive token, as language models have one, makes the output's norm large and every other token's share of the
    gradient small."""
    halves = block_model("llama", tmp_path, torch.float16)
    wide = BlockModel(Source(tmp_path / "llama"), torch.float32, CPU)
    found = []
    for model in (halves, wide):
        hidden = model.record_calls(samples_of("llama").batches(1))
        for states in hidden:
            states[:, 0] = 3000.0
        model.load_block(1)
        for module in model.linears(1).values():  # the same weights, and as small as those of large models
            module.weight.data = (module.weight.data.half() / 8).to(model.dtype)
        found.append(regional_gradients(model, 1, model.linears(1), hidden))
        assert all(parameter.dtype == model.dtype for parameter in model.blocks[1].parameters())
    for name, expected in found[1].items():
        error = float((found[0][name] - expected).norm() / expected.norm())
        assert error < 0.01, f"{name}: {error}"


def test_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block runs, the others are on the meta device, and so is all that lies around them."""
    model, samples = block_model("llama", tmp_path), samples_of("llama")
    ran: list[tuple[int, bool]] = []
    run_block = BlockModel.run_block

    def checked(self: BlockModel, index: int, batch: int, hidden: Tensor) -> Tensor:
        inside = {id(parameter) for parameter in self.blocks[index].parameters()}
        assert not any(parameter.is_meta for parameter in self.blocks[index].parameters())
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in inside]
        assert all(parameter.is_meta for parameter in others)
        ran.append((index, torch.is_grad_enabled() and hidden.requires_grad))
        return run_block(self, index, batch, hidden)

    monkeypatch.setattr(BlockModel, "run_block", checked)
    steps: list[tuple[int, int, str]] = []
    store = GradientStore(tmp_path / "gradients", {})
    with torch.no_grad():
        store.gather(model, samples, layers_of(model), KINDS, lambda *step: steps.append(step))
    count = len(samples)
    assert ran == [(i, False) for i in (0, 1, 2) for _ in range(count)] + [
        (i, True) for i in (2, 1, 0) for _ in range(count)
    ]
    assert [done for done, _, _ in steps] == list(range(6))
    assert {total for _, total, _ in steps} == {6}
    assert [text.split(" through ")[0] for _, _, text in steps] == ["gradients: forward"] * 3 + [
        "gradients: backward"
    ] * 3


def test_a_model_that_gives_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = block_model("llama", tmp_path), samples_of("llama")
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda self, labels=None, **inputs: forward(self, **inputs))
    store = GradientStore(tmp_path / "gradients", {})
    with pytest.raises(SourceError, match="LlamaForCausalLM gives none: its loss does not depend"):
        store.gather(model, samples, layers_of(model), KINDS)
    assert not store.has(["gradient_l1"])
    assert not GradientStore(tmp_path / "gradients", {}).has(["gradient_l1"])

    def refusing(self: Any, **inputs: Any) -> Any:
        if "labels" in inputs:
            raise TypeError("forward() got an unexpected keyword argument 'labels'")
        return forward(self, **inputs)

    monkeypatch.setattr(type(model.model), "forward", refusing)
    with pytest.raises(SourceError, match=r"the model gives no loss: .*unexpected keyword argument 'labels'"):
        store.gather(model, samples, layers_of(model), KINDS)


def test_a_layer_that_the_loss_does_not_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = block_model("llama", tmp_path), samples_of("llama")
    up = type(model.model.get_submodule("model.layers.1.mlp"))
    monkeypatch.setattr(up, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    store = GradientStore(tmp_path / "gradients", {})
    with pytest.raises(SourceError, match=r"gives none for model\.layers\.2\.mlp\.up_proj \(1 layers\).*--ignore"):
        store.gather(model, samples, layers_of(model), KINDS)


# The directory


def test_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    model, samples = block_model("llama", tmp_path, num_hidden_layers=1), samples_of("llama")
    directory = tmp_path / "gradients"
    identity = {"calibration": "a", "source": {"x": [1, 2]}, "versions": {"torch": "2"}}
    GradientStore(directory, identity).gather(model, samples, layers_of(model), KINDS)
    before = tree(directory)
    assert GradientStore(directory, identity).has(KINDS)
    with pytest.raises(OutputError, match=r"of another run \(it differs in: calibration, source\)"):
        GradientStore(directory, {**identity, "calibration": "b", "source": {"x": [1, 3]}})
    assert tree(directory) == before
    (directory / gradients.RECORD).write_text("[]")
    with pytest.raises(OutputError, match="is not a record of gradients"):
        GradientStore(directory, identity)
    with pytest.raises(OutputError, match="is not a directory of gradients"):
        GradientStore(tmp_path / "llama", identity)


def test_what_a_killed_run_left_is_no_obstacle(tmp_path: Path) -> None:
    model, samples = block_model("llama", tmp_path, num_hidden_layers=2), samples_of("llama")
    directory = tmp_path / "gradients"
    directory.mkdir()
    for name in (".inputs-00000.safetensors.tmp", "gradients-00007.safetensors", "inputs-00000.safetensors"):
        (directory / name).write_bytes(b"half")
    store = GradientStore(directory, {})
    assert not store.has(KINDS)
    store.gather(model, samples, layers_of(model), KINDS)
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["gradients-00000.safetensors", "gradients-00001.safetensors", gradients.RECORD]


BLOCKS = 4


class Killed(BaseException):
    pass


def killed_at(text: str) -> Any:
    def kill(done: int, total: int, said: str) -> None:
        if text in said:
            raise Killed

    return kill


@pytest.mark.parametrize(
    ("kills", "left"),
    [
        (["forward through model.layers.3"], ["f2", "f3", "b3", "b2", "b1", "b0"]),
        (["forward through model.layers.3", "forward through model.layers.2"], ["f2", "f3", "b3", "b2", "b1", "b0"]),
        (["forward through model.layers.1", "backward through model.layers.2"], ["b2", "b1", "b0"]),
        (["backward through model.layers.3"], ["b3", "b2", "b1", "b0"]),
        (["backward through model.layers.2", "backward through model.layers.0"], ["b0"]),
    ],
)
def test_a_pass_that_is_killed_goes_on_where_it_was(kills: list[str], left: list[str], tmp_path: Path) -> None:
    """To the bit, with nothing kept in memory; also when it is killed for a second time."""
    expected = GradientStore(tmp_path / "expected", {})
    samples = samples_of("llama")
    model = block_model("llama", tmp_path, num_hidden_layers=BLOCKS)
    expected.gather(model, samples, layers_of(model), KINDS)
    directory = tmp_path / "gradients"

    def gather(progress: Any) -> None:
        anew = BlockModel(Source(tmp_path / "llama"), torch.float32, CPU)
        GradientStore(directory, {}).gather(anew, samples, layers_of(anew), KINDS, progress)

    for text in kills:
        with pytest.raises(Killed):
            gather(killed_at(text))
    steps: list[str] = []
    gather(lambda done, total, text: steps.append(text))
    assert [f"{text.split()[1][0]}{text[-1]}" for text in steps] == left
    assert tree(directory) == tree(expected.directory)


def test_what_another_pass_left_is_not_taken(tmp_path: Path) -> None:
    """Of another calibration, of other layers, or of fewer kinds; and a pass for more kinds serves."""
    model, samples = block_model("llama", tmp_path, num_hidden_layers=2), samples_of("llama")
    layers = layers_of(model)
    expected = GradientStore(tmp_path / "expected", {"calibration": "b"})
    expected.gather(model, samples, layers, KINDS)
    begun: list[tuple[Any, Any, Any]] = [
        ({"calibration": "a"}, layers, KINDS),
        ({"calibration": "b"}, [names[:1] for names in layers], KINDS),
        ({"calibration": "b"}, layers, ["gradient_l1"]),
    ]
    for number, (identity, some, kinds) in enumerate(begun):
        directory = tmp_path / str(number)
        with pytest.raises(Killed):
            GradientStore(directory, identity).gather(
                model, samples_of("llama", 2), some, kinds, killed_at("backward through model.layers.0")
            )
        GradientStore(directory, {"calibration": "b"}).gather(model, samples, layers, KINDS)
        assert tree(directory) == tree(expected.directory)
    directory = tmp_path / "more"
    with pytest.raises(Killed):
        GradientStore(directory, {}).gather(model, samples, layers, KINDS, killed_at("backward through model.layers.0"))
    steps: list[str] = []
    store = GradientStore(directory, {})
    store.gather(model, samples, layers, ["gradient_l2"], lambda done, total, text: steps.append(text))
    assert steps == ["gradients: backward through model.layers.0"]
    assert store.has(KINDS)


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a directory"):
        GradientStore(tmp_path / "file", {})
    store = GradientStore(tmp_path / "file" / "below", {})
    with pytest.raises(OutputError, match="cannot write"):
        store.provide(KINDS, lambda: pytest.fail("no model"), samples_of("llama"), [], set(), lambda *_: None)


def test_damage_is_noticed(tmp_path: Path) -> None:
    model, samples = block_model("llama", tmp_path, num_hidden_layers=2), samples_of("llama")
    directory = tmp_path / "gradients"
    store = GradientStore(directory, {})
    store.gather(model, samples, layers_of(model), KINDS)
    file = directory / "gradients-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CorruptCheckpointError, match="its SHA-256 does not fit"):
        store.read(1, layers_of(model)[1], KINDS, CPU)
    file.unlink()
    assert not GradientStore(directory, {}).has(KINDS), "a block is missing"


def test_two_runs_of_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, and gathers nothing itself."""
    samples = samples_of("llama")
    models = [block_model("llama", tmp_path / name, num_hidden_layers=2) for name in ("a", "b")]
    directory = tmp_path / "gradients"
    started, go_on, gathered = threading.Event(), threading.Event(), []
    gather = GradientStore.gather

    def slow(self: GradientStore, model: BlockModel, *args: Any) -> None:
        gathered.append(model)
        started.set()
        assert go_on.wait(30)
        gather(self, model, *args)

    monkeypatch.setattr(GradientStore, "gather", slow)
    said: list[str] = []

    def provide(model: BlockModel) -> GradientStore:
        store = GradientStore(directory, {})
        wanted = {name for block in layers_of(model) for name in block}

        def progress(done: int, total: int, text: str) -> None:
            said.append(text)
            if "waiting" in text:
                go_on.set()

        store.provide(KINDS, lambda: model, samples, layers_of(model), wanted, progress)
        return store

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(provide, models[0])
        assert started.wait(30)
        second = pool.submit(provide, models[1])
        stores = [first.result(60), second.result(60)]
    assert gathered == [models[0]]
    assert any("waiting for the run that is using" in text for text in said)
    one, two = (store.read(1, layers_of(models[0])[1], KINDS, CPU) for store in stores)
    assert all(torch.equal(one[name][kind], two[name][kind]) for name in one for kind in KINDS)
    for store in stores:
        store.close()


# In a run


@pytest.fixture
def gblm(monkeypatch: pytest.MonkeyPatch) -> list[LayerStatistics]:
    """A metric that needs gradients, and what it was shown."""
    shown: list[LayerStatistics] = []

    def score(weight: Tensor, statistics: LayerStatistics, options: Any) -> Tensor:
        assert statistics.gradient_l1.shape == statistics.gradient_l2.shape == weight.shape
        shown.append(statistics)
        return weight.abs() * statistics.gradient_l2

    metric = Metric("test_gradient", score, paper="none", cost="none", needs=frozenset(KINDS))
    monkeypatch.setitem(METRICS, metric.name, metric)
    return shown


SETTINGS: dict[str, Any] = {"metric": "test_gradient", "reconstruction": "none"}


@pytest.mark.parametrize("family", ["llama", "mamba", "vit"])
def test_run(family: str, gblm: list[LayerStatistics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run uses the dense model's gradients, keeps them only where it is told to, and uses what is there."""
    source = tiny_models.build(family, tmp_path / "source", layers=2)
    settings = {**SETTINGS, "calibration": "random"} if family == "vit" else SETTINGS
    kept = tmp_path / "kept"
    one = compress(source, tmp_path / "one", gradients=kept, **settings).directory
    assert json.loads((kept / gradients.RECORD).read_text())["kinds"] == list(KINDS)
    assert len(gblm) == len(block_linears(load(source)).keys() - {"lm_head", "classifier"})
    two = compress(source, tmp_path / "two", **settings).directory
    assert tree(one) == tree(two)
    assert beside(one) == ["calibration.txt", "kept", "one", "source", "two"]
    monkeypatch.setattr(GradientStore, "gather", lambda *_: pytest.fail("they are there already"))
    three = compress(source, tmp_path / "three", gradients=kept, **settings).directory
    assert tree(one) == tree(three)
    with pytest.raises(OutputError, match="it differs in: calibration"):
        compress(source, tmp_path / "four", gradients=kept, seed=1, **settings)


def test_kept_gradients_are_for_any_layers_and_a_refusal_leaves_nothing(
    gblm: list[LayerStatistics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, kept = tiny_models.build("llama", tmp_path / "source", layers=2), tmp_path / "kept"
    compress(source, tmp_path / "one", gradients=kept, ignore=("*.k_proj",), **SETTINGS)
    expected = compress(source, tmp_path / "expected", **SETTINGS).directory
    monkeypatch.setattr(GradientStore, "gather", lambda *_: pytest.fail("they are there already"))
    two = compress(source, tmp_path / "two", gradients=kept, **SETTINGS).directory
    assert tree(two) == tree(expected)
    for wrong in ({"samples": 5}, {"gradients": source}):
        with pytest.raises(OutputError):
            compress(source, tmp_path / "three", **{"gradients": kept, **wrong}, **SETTINGS)
        assert not (tmp_path / "three.partial").exists()
    three = compress(source, tmp_path / "three", gradients=kept, **SETTINGS).directory
    assert tree(three) == tree(expected)


def test_a_directory_of_gradients_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"gradients='.*kept' was given, and nothing in the recipe reads the gradients"
    ):
        compress(tmp_path / "source", tmp_path / "out", gradients=tmp_path / "kept", metric="wanda++")
    assert beside(tmp_path / "out") == ["calibration.txt"]


def test_kept_gradients_of_a_gguf(gblm: list[LayerStatistics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of the file is new in each run; the file is what counts."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    gguf, kept = tmp_path / "model.gguf", tmp_path / "kept"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(sources, "from_gguf", lambda _, directory: shutil.copytree(source, directory))
    one = compress(gguf, tmp_path / "one", gradients=kept, **SETTINGS).directory
    monkeypatch.setattr(GradientStore, "gather", lambda *_: pytest.fail("they are there already"))
    two = compress(gguf, tmp_path / "two", gradients=kept, **SETTINGS).directory
    assert tree(one)["model.safetensors"] == tree(two)["model.safetensors"]
    gguf.write_bytes(b"GGUF2")
    with pytest.raises(OutputError, match="it differs in: source"):
        compress(gguf, tmp_path / "three", gradients=kept, **SETTINGS)


def test_regional_leaves_no_graph_in_the_block(tmp_path: Path) -> None:
    """Some blocks keep what they computed, such as a recurrent state."""
    model = block_model("llama", tmp_path, num_hidden_layers=1)
    hidden = model.record_calls(samples_of("llama").batches(1))
    block = model.load_block(0)
    block.register_forward_hook(lambda module, args, output: setattr(module, "state", output))
    regional_gradients(model, 0, model.linears(0), hidden)
    assert not hasattr(block, "state")
    assert all(not parameter.requires_grad for parameter in block.parameters())
    copy.deepcopy(block)


@pytest.mark.parametrize(("stored", "passes"), [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_dtype_of_the_passes(
    stored: str, passes: str, gblm: list[LayerStatistics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1, dtype=getattr(torch, stored))
    dtypes: list[torch.dtype] = []
    gather = GradientStore.gather

    def recording(self: GradientStore, model: BlockModel, *args: Any) -> None:
        dtypes.append(model.dtype)
        gather(self, model, *args)

    monkeypatch.setattr(GradientStore, "gather", recording)
    compress(source, tmp_path / "out", **SETTINGS)
    assert dtypes == [getattr(torch, passes)]
    assert all(statistics.gradient_l1.dtype == torch.float32 for statistics in gblm)


@pytest.mark.parametrize(
    ("at", "again"),
    [
        ("forward through model.layers.0", ["forward 0", "forward 1", "backward 1", "backward 0"]),
        ("forward through model.layers.1", ["forward 0", "forward 1", "backward 1", "backward 0"]),
        ("backward through model.layers.1", ["backward 1", "backward 0"]),
        ("backward through model.layers.0", ["backward 0"]),
        ("layers.0, rel", []),
    ],
)
def test_resume(at: str, again: list[str], gblm: list[LayerStatistics], tmp_path: Path) -> None:
    """A run that is killed while it gathers gradients goes on with the block that it was killed in; one that is killed
    later gathers nothing."""
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    expected = compress(source, tmp_path / "expected", **SETTINGS).directory

    def kill(done: int, total: int, text: str) -> None:
        if at in text:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        compress(source, out, checkpoint_seconds=0, progress=kill, **SETTINGS)
    partial = out.with_name("out.partial") / "gradients"
    gathered = (partial / gradients.RECORD).exists()
    assert gathered == ("rel" in at)
    (partial / ".gradients-00001.safetensors.tmp").write_bytes(b"half")  # as a kill leaves it
    steps: list[str] = []
    compress(source, out, resume=True, progress=lambda done, total, text: steps.append(text), **SETTINGS)
    passes = [text.removeprefix("gradients: ") for text in steps if text.startswith("gradients: ")]
    assert [text.replace("through model.layers.", "") for text in passes] == again
    assert tree(out) == tree(expected)
    assert beside(out) == ["calibration.txt", "expected", "out", "source"]


def test_regional_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A regional gradient is taken of each sample's own loss: the batches have one sample each."""
    shown: list[Tensor] = []

    def score(weight: Tensor, statistics: LayerStatistics, options: Any) -> Tensor:
        shown.append(statistics.regional_gradient)
        return weight.abs() * statistics.regional_gradient

    metric = Metric("test_regional", score, paper="none", cost="none", needs=frozenset({"regional_gradient"}))
    monkeypatch.setitem(METRICS, metric.name, metric)
    lengths: list[int] = []

    def recording(model: BlockModel, index: int, linears: Any, hidden: list[Tensor]) -> Any:
        lengths.extend(len(states) for states in hidden)
        return regional_gradients(model, index, linears, hidden)

    monkeypatch.setattr(pruner, "regional_gradients", recording)
    source = tiny_models.build("mamba", tmp_path / "source", layers=2)
    done = compress(source, tmp_path / "out", metric="test_regional", reconstruction="none", samples=4)
    assert lengths == [1] * 4 * 2
    assert done.report["summary"]["layers_pruned"] == len(shown) == 8
    assert all(bool(torch.isfinite(gradient).all()) and bool(gradient.any()) for gradient in shown)
