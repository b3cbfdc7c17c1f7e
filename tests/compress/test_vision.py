"""An image classifier goes the whole way, with images as calibration."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification, ConvNextConfig, PvtV2Config, SwinConfig

from compress import pipeline, vision
from compress.architecture import find_blocks
from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import CalibrationError, HalveError, SourceError
from compress.files import check_digest
from compress.journal import Journal
from compress.pipeline import Compressed, compress_model
from compress.recipe import Recipe
from compress.verify import verify
from compress.vision import load_images
from compress.wide import widen
from serve.engines.loading import load_checkpoint
from serve.linear import Sparse24Linear
from serve.loading import load_model
from tests import tiny_models
from tests.runs import Halve, beside, identical, kept_in_groups, load, stored, tree

SIZE = tiny_models.IMAGE_SIZE


def picture(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Path:
    """An image of coloured noise, in the format that the suffix says."""
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.numpy()).convert(mode).save(path)
    return path


def pictures(directory: Path, count: int = 12) -> Path:
    """Images of several formats and sizes, in directories named after classes."""
    suffixes = ["png", "jpg", "jpeg", "webp", "bmp", "PNG"]
    labels = ["cat", "DOG", "tench, Tinca tinca", "3"]
    for n in range(count):
        path = directory / labels[n % 4] / f"{n}.{suffixes[n % len(suffixes)]}"
        picture(path, n, size=(30 + n, 50 - n))
    (directory / "cat" / "notes.txt").write_text("no image")
    return directory


def compress(model: Path, out: Path, **settings: Any) -> Compressed:
    """With 8 images."""
    images = model.parent / "images"
    if not images.exists():
        pictures(images)
    return compress_model(model, out, **{"calibration": str(images), "samples": 8, **settings})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    pixels = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    return model(pixels.to(model.dtype)).logits


# The whole way


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whole_way(dtype: str, tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source", dtype=getattr(torch, dtype))
    before = tree(source)
    packed = compress(source, tmp_path / "packed").directory
    dense = compress(source, tmp_path / "dense", format="dense").directory
    assert tree(source) == before
    assert beside(packed) == ["dense", "images", "packed", "source"]

    original, ours, plain = stored(source), stored(packed), stored(dense)
    assert plain.keys() == original.keys()
    pruned = {name.removesuffix("_packed") for name in ours if name.endswith("_packed")}
    assert len(pruned) == 3 * 6
    assert all(".layer" in name for name in pruned)
    for name, tensor in original.items():
        if name not in pruned:  # the patches' convolution, the positions, the classifier, norms and biases
            assert identical(tensor, ours[name])
            assert identical(tensor, plain[name])
        elif dtype == "bfloat16":
            assert ours[f"{name}_packed"].nbytes + ours[f"{name}_mask"].nbytes == 0.5625 * tensor.nbytes
    assert {"classifier.weight", "vit.embeddings.patch_embeddings.projection.weight"} <= original.keys() - pruned

    one, other = load(packed), load(dense)
    assert type(one).__name__ == type(other).__name__ == "ViTForImageClassification"
    assert not any(isinstance(module, Sparse24Linear) for module in other.modules())
    sparse = [module for module in one.modules() if isinstance(module, Sparse24Linear)]
    assert len(sparse) == 18
    assert all(int(kept_in_groups(module.weight, 4).max()) <= 2 for module in sparse)
    assert identical(logits(one), logits(other))
    assert not torch.allclose(logits(one), logits(load(source)))
    assert identical(logits(load_model(packed)), logits(one))
    _, loading = AutoModelForImageClassification.from_pretrained(dense, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]

    for directory, kind in ((packed, "packed"), (dense, "dense")):
        verdict = verify(directory)
        assert (verdict.kind, len(verdict.sparse), len(verdict.layers)) == (kind, 18, 18)
        assert not verdict.notes
        assert all(check_digest(file) for file in directory.glob("*.safetensors"))
        name = "preprocessor_config.json"
        assert (directory / name).read_bytes() == (source / name).read_bytes()
        assert not list(directory.glob("tokenizer*"))
    ignored = json.loads((packed / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["classifier"]

    unpack_checkpoint(packed, tmp_path / "unpacked")
    pack_checkpoint(dense, tmp_path / "again")
    for directory, theirs in ((tmp_path / "unpacked", plain), (tmp_path / "again", ours)):
        assert stored(directory).keys() == theirs.keys()
        assert all(identical(tensor, theirs[name]) for name, tensor in stored(directory).items())
        assert identical(logits(load(directory)), logits(one))
    one.save_pretrained(tmp_path / "saved")
    assert identical(logits(load(tmp_path / "saved")), logits(one))
    assert verify(tmp_path / "saved").kind == "packed"


def test_records(tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source")
    packed = compress(source, tmp_path / "packed", seed=4).directory
    dense = compress(source, tmp_path / "dense", format="dense").directory
    saved = yaml.safe_load((packed / "recipe.yaml").read_text())
    drawn = load_images(str(tmp_path / "images"), source, samples=8, seed=4)
    assert saved["calibration"] == {"images": 8, "sha256": drawn.digest}
    card = (packed / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert f"| calibration | 8 images of `{tmp_path / 'images'}`, seed 4 |" in card
    assert "AutoModelForImageClassification.from_pretrained" in card
    for text in (card, (dense / "README.md").read_text()):
        assert "halve serve" not in text
        assert "halve eval" not in text
        assert "CausalLM" not in text
    recipe = Recipe.load(packed / "recipe.yaml")
    assert tree(compress_model(source, tmp_path / "again", recipe=recipe).directory) == tree(packed)


def test_cast(tmp_path: Path) -> None:
    wide = tiny_models.build("vit", tmp_path / "wide", dtype=torch.float32)
    narrow = tiny_models.build("vit", tmp_path / "narrow", dtype=torch.bfloat16)
    cast = stored(compress(wide, tmp_path / "cast", dtype="bfloat16").directory)
    plain = stored(compress(narrow, tmp_path / "plain").directory)
    assert cast.keys() == plain.keys()
    assert all(identical(cast[name], plain[name]) for name in plain)
    assert load(tmp_path / "cast").dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_names_of_this_transformers(format: str, tmp_path: Path) -> None:
    """transformers writes the hub's older names; a checkpoint with the model's own is the same model."""
    source = tiny_models.build("vit", tmp_path / "source")
    other = tiny_models.build("vit", tmp_path / "other")
    load(source).save_pretrained(other, save_original_format=False)
    assert any("attention.q_proj" in name for name in stored(other))
    assert any("attention.query" in name for name in stored(source))
    one = compress(source, tmp_path / "one", format=format).directory
    two = compress(other, tmp_path / "two", format=format).directory
    assert verify(two).kind == verify(one).kind == format
    assert identical(logits(load(one)), logits(load(two)))
    assert stored(two).keys() != stored(one).keys()


@pytest.mark.parametrize("batch", [1, 4])
def test_activations_are_those_of_the_pruned_model(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_models.build("vit", tmp_path / "source")
    propagated: dict[int, list[Tensor]] = {}
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", batch * vision.TOKENS_OF_AN_IMAGE)
    monkeypatch.setattr(
        Journal, "save_activations", lambda self, i, kinds: propagated.update({i: [h.clone() for h in kinds["hidden"]]})
    )
    model = load(compress(source, tmp_path / "out", format="dense").directory)
    widen(model, model.dtype, torch.device("cpu"))  # as blocks are that are pruned
    drawn = load_images(str(tmp_path / "images"), source, samples=8, seed=0)
    inputs: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for index, block in enumerate(model.get_submodule(find_blocks(load(source))[0])):
        block.register_forward_pre_hook(lambda module, args, into=inputs[index]: into.append(args[0]))
    with torch.no_grad():
        for part in drawn.samples.split(batch):
            model(part.bfloat16())
    for index in range(3):
        assert len(propagated[index]) == len(inputs[index]) == 8 // batch
        for ours, theirs in zip(propagated[index], inputs[index], strict=True):
            assert identical(ours, theirs)


@pytest.mark.parametrize("metric", [None, "magnitude", "wanda"])
@pytest.mark.parametrize("reconstruction", ["none", "sparsegpt"])
def test_slots(metric: str | None, reconstruction: str, tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    done = compress(source, tmp_path / "out", metric=metric, reconstruction=reconstruction)
    assert done.report["summary"]["layers_pruned"] == 6
    assert all(0 < layer["relative_output_error"] < 0.7 for layer in done.report["layers"])


class Killed(BaseException):
    pass


@torch.no_grad()
def test_layers_are_fitted_to_the_dense_model(tmp_path: Path) -> None:
    """Its logits are then nearer to the dense model's, on the images that it was calibrated on."""
    source = tiny_models.build("vit", tmp_path / "source")
    drawn = load_images(str(pictures(tmp_path / "images")), source, samples=8, seed=0)
    wanted = load(source)(pixel_values=drawn.samples).logits
    distances = []
    for targets in ("own", "dense"):
        done = compress(source, tmp_path / targets, targets=targets, reconstruction="none", metric="wanda")
        distances.append(float((load(done.directory)(pixel_values=drawn.samples).logits - wanted).norm()))
    assert distances[1] < distances[0]


def test_resume(tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source")
    expected = compress(source, tmp_path / "expected").directory

    def kill(done: int, total: int, text: str) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        compress(source, tmp_path / "out", checkpoint_seconds=0, progress=kill)
    assert tree(compress(source, tmp_path / "out", resume=True).directory) == tree(expected)


def test_random_pixels(tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source")
    (source / "preprocessor_config.json").unlink()  # they need none
    done = compress_model(source, tmp_path / "out", calibration="random", samples=4)
    assert done.report["summary"]["layers_pruned"] == 18
    one, same, other = (load_images("random", source, samples=4, seed=seed) for seed in (0, 0, 1))
    assert one.argument == "pixel_values"
    assert one.samples.shape == (4, 3, SIZE, SIZE)
    assert one.classes is None
    assert torch.equal(one.samples, same.samples)
    assert not torch.equal(one.samples, other.samples)
    assert 0.9 < float(one.samples.std()) < 1.1


# The images


def test_pixels_are_those_of_the_image_processor(tmp_path: Path) -> None:
    """Resized with Pillow's bilinear filter, scaled to [-1, 1], channels first."""
    source = tiny_models.build("vit", tmp_path / "source")
    images = pictures(tmp_path / "images")
    found = load_images(str(images), source, samples=12, seed=0)
    assert found.argument == "pixel_values"
    assert found.settings == {}
    assert found.samples.dtype == torch.float32
    assert found.samples.shape == (12, 3, SIZE, SIZE)
    assert found.classes is not None
    expected: dict[bytes, int] = {}
    for path in images.rglob("*"):
        if path.suffix and path.suffix != ".txt":
            with Image.open(path) as image:
                resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            values = torch.tensor(list(resized.tobytes()), dtype=torch.float32).view(SIZE, SIZE, 3).permute(2, 0, 1)
            label = {"cat": 0, "DOG": 1, "tench, Tinca tinca": 2, "3": 3}[path.parent.name]
            expected[(values * 2 - 255).to(torch.int16).contiguous().numpy().tobytes()] = label
    assert len(expected) == 12
    for pixels, label in zip(found.samples, found.classes.tolist(), strict=True):
        key = (pixels * 255).round().to(torch.int16).contiguous().numpy().tobytes()
        assert expected[key] == label


def test_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed draws without repeats, from the natural order, wherever the directory lies."""
    source = tiny_models.build("vit", tmp_path / "source")
    for place in ("here", "there"):
        for n in range(12) if place == "here" else reversed(range(12)):
            picture(tmp_path / place / f"part {n // 10}" / f"{n}.png", n)
    names = [path.name for path in vision.find_images(tmp_path / "here", "here")]
    assert names == [f"{n}.png" for n in range(12)]
    one, same, other = (
        load_images(str(tmp_path / place), source, samples=7, seed=seed)
        for place, seed in (("here", 0), ("there", 0), ("here", 1))
    )
    assert torch.equal(one.samples, same.samples)
    assert one.digest == same.digest != other.digest
    assert len({image.numpy().tobytes() for image in one.samples}) == 7
    assert one.classes is None
    monkeypatch.chdir(tmp_path)
    assert load_images("here", source, samples=7, seed=0).digest == one.digest


@pytest.mark.parametrize(
    ("directories", "expected"),
    [
        (["cat", "dog", "DOG"], [0, 1, 1]),
        (["2", "0"], [2, 0]),
        (["tench, tinca tinca", "Snow Leopard"], [2, 3]),
        (["cat/dog", "dog/cat", "cat/more"], [1, 0, 0]),  # the nearest
        (["cat", "unsorted"], None),
        (["4", "cat"], None),  # there are four classes, from 0
        (["."], None),
    ],
)
def test_classes(directories: list[str], expected: list[int] | None, tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    images = [picture(tmp_path / "dog" / name / f"{n}.png", n) for n, name in enumerate(directories)]
    found = load_images(str(tmp_path / "dog"), source, samples=len(images), seed=0)
    if expected is None:
        assert found.classes is None
        return
    assert found.classes is not None
    assert found.classes.dtype == torch.int64
    assert sorted(found.classes.tolist()) == sorted(expected)
    alone = {  # image -> class, from sets of one image
        load_images(str(path.parent), source, samples=1, seed=0).samples[0].numpy().tobytes(): label
        for path, label in zip(images, expected, strict=True)
        if len(list(path.parent.rglob("*.png"))) == 1
    }
    for pixels, label in zip(found.samples, found.classes.tolist(), strict=True):
        assert alone.get(pixels.numpy().tobytes(), label) == label
    assert alone


def test_odd_images(tmp_path: Path) -> None:
    """Grey, with transparency, with a palette, turned by their metadata: all are colour images to the model."""
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    for n, mode in enumerate(["L", "LA", "RGBA", "P", "1"]):
        picture(tmp_path / "images" / f"{mode}.png", n, mode)
    with Image.open(picture(tmp_path / "palette.png", 7, "P")) as image:
        image.info["transparency"] = bytes(range(256))
        image.save(tmp_path / "images" / "transparent.png")
    found = load_images(str(tmp_path / "images"), source, samples=6, seed=0)
    assert found.samples.shape == (6, 3, SIZE, SIZE)

    upright = Image.new("RGB", (64, 32), (255, 0, 0))
    upright.paste((0, 0, 255), (0, 0, 32, 32))  # the left half is blue
    (tmp_path / "turned").mkdir()
    exif = upright.getexif()
    exif[0x0112] = 6  # stored as it is; to be turned clockwise by a quarter
    upright.save(tmp_path / "turned" / "image.png", exif=exif)
    (pixels,) = load_images(str(tmp_path / "turned"), source, samples=1, seed=0).samples
    assert float(pixels[2, 0].mean()) == 1.0  # so the upper half is blue
    assert float(pixels[0, -1].mean()) == 1.0


# What is refused


def refusal(tmp_path: Path, error: type[HalveError], source: Path, **settings: Any) -> str:
    with pytest.raises(error) as caught:
        compress(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    return str(caught.value)


def test_calibrations_that_are_no_images(tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    for text in ("c4", "wikitext2"):
        message = refusal(tmp_path, CalibrationError, source, calibration=text)
        assert f"calibration {text!r} is text" in message
        assert "give --calibration a directory of images" in message
    message = refusal(tmp_path, CalibrationError, source, calibration=str(tmp_path / "nowhere"))
    assert f"there is no directory {tmp_path / 'nowhere'}" in message
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "text.txt").write_text("words")
    message = refusal(tmp_path, CalibrationError, source, calibration=str(tmp_path / "empty"))
    assert "holds no images" in message
    message = refusal(tmp_path, CalibrationError, source, samples=13)
    assert "holds 12 images, and 13 were asked for" in message
    assert "--samples 12" in message


@pytest.mark.parametrize("family", ["swin", "convnext", "pvt_v2"])
def test_models_in_stages(family: str, tmp_path: Path) -> None:
    """Whose later blocks take other shapes."""
    size = tiny_models.IMAGE_SIZE
    config = {
        "swin": lambda: SwinConfig(image_size=size, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 2], window_size=4),
        "convnext": lambda: ConvNextConfig(image_size=size, hidden_sizes=[32, 64], depths=[1, 1], num_stages=2),
        "pvt_v2": lambda: PvtV2Config(
            image_size=size, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[32, 64], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        ),
    }[family]()  # fmt: skip
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    for file in ("model.safetensors", "config.json"):
        (source / file).unlink()
    AutoModelForImageClassification.from_config(config).save_pretrained(source)
    with pytest.raises(SourceError, match=r"models in stages .* are not supported"):
        compress_model(source, tmp_path / "out", calibration="random", samples=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image(content: bytes | None, tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    broken = picture(tmp_path / "images" / "broken.png", 0)
    broken.write_bytes(broken.read_bytes()[:-200] if content is None else content)
    message = refusal(tmp_path, CalibrationError, source, samples=1)
    assert f"cannot read the image {broken}" in message


def test_image_processors_that_are_unusable(tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    file = source / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.unlink()
    message = refusal(tmp_path, SourceError, source)
    assert "has no preprocessor_config.json" in message
    assert "copy the model's own" in message
    for content in ("{", '{"image_processor_type": "NoSuchProcessor"}'):
        file.write_text(content)
        assert "has no usable image processor" in refusal(tmp_path, SourceError, source)
    # Images of another size than the model's: the model itself refuses them.
    file.write_text(json.dumps({**settings, "size": {"height": 48, "width": 48}}))
    message = refusal(tmp_path, SourceError, source)
    assert "ViTForImageClassification refuses the calibration samples" in message
    assert "48" in message
    # Images that keep their own size do not fit into one batch.
    file.write_text(json.dumps({**settings, "do_resize": False}))
    assert "give images of one size" in refusal(tmp_path, CalibrationError, source)


def test_grey_models_are_refused_colour_images(tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1, num_channels=1)
    assert "reads images of 1 channels" in refusal(tmp_path, SourceError, source)
    assert load_images("random", source, samples=2, seed=0).samples.shape == (2, 1, SIZE, SIZE)


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    pictures(tmp_path / "images")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    message = refusal(tmp_path, CalibrationError, source)
    assert "pip install -e '.[vision]'" in message


def test_as_many_images_as_there_are(tmp_path: Path) -> None:
    """What trains on more takes what there is, as with text; what is left out is not recorded as done."""
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    settings = {"samples": 8, "training_samples": 100, "repair": "block", "repair_options": {"passes": 1}}
    done = compress(source, tmp_path / "out", substitute=0.2, **settings)
    saved = yaml.safe_load((done.directory / "recipe.yaml").read_text())
    recipe = saved["recipe"]
    assert (recipe["samples"], recipe["training_samples"], recipe["substitute"]) == (8, 12, 0)
    assert saved["calibration"]["images"] == 12
    with pytest.raises(CalibrationError, match="holds 12 images, and 13 were asked for"):
        compress(source, tmp_path / "no", **{**settings, "samples": 13})


def test_wide_models_get_more_images(tmp_path: Path) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    wide = max(model.in_features for model in load(source).modules() if isinstance(model, torch.nn.Linear))
    done = compress(source, tmp_path / "out", calibration="random", samples=2, tokens_per_input=4.9 * 256 / wide)
    assert yaml.safe_load((done.directory / "recipe.yaml").read_text())["recipe"]["samples"] == 5


def test_commands(tmp_path: Path, halve: Halve) -> None:
    source = tiny_models.build("vit", tmp_path / "source", layers=1)
    pictures(tmp_path / "images")
    out = tmp_path / "out"
    called = halve("compress", source, "--out", out)
    assert called.code == 2
    assert "calibration 'c4' is text" in called.message
    called = halve("compress", source, "--out", out, "--calibration", tmp_path / "images", "--samples", 6)
    assert called.code == 0
    assert "next: halve verify" in called.stdout
    assert "halve serve" not in called.stdout
    assert "transformers" not in called.stderr
    called = halve("verify", out, "--json")
    assert called.code == 0
    assert called.document["kind"] == "packed"
    for command in ("serve", "eval", "bench"):
        for directory in (out, source):
            called = halve(command, directory)
            assert called.code == 2
            assert "is an image classifier" in called.message
            assert f"`halve {command}`" in called.message
    called = halve("unpack", out, "--out", tmp_path / "unpacked")
    assert called.code == 0
    assert halve("pack", tmp_path / "unpacked", "--out", tmp_path / "packed").code == 0
    assert stored(tmp_path / "packed").keys() == stored(out).keys()
    with pytest.raises(SourceError, match="is an image classifier"):
        load_checkpoint(str(out), "cpu", "auto")
