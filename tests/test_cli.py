"""The contract of the command: exit codes, standard output and standard error, and what --help costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compress import console
from compress.metrics import METRICS
from compress.recipe import Recipe
from compress.reconstruction import RECONSTRUCTIONS
from compress.version import version
from tests import tiny_models
from tests.runs import ROOT, Halve, call, compress, environment, flags


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['halve', *{arguments!r}]\n"
        "from serve.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = sorted({{'torch', 'transformers', 'pandas'}} & sys.modules.keys())\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["compress", "--help"], ["--version"], ["verify", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments=arguments)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_help_names_every_command_and_field(halve: Halve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    called = halve("--help")
    assert called.code == 0
    for command in ("compress", "methods", "verify", "pack", "unpack"):
        assert command in called.stdout
    called = halve("compress", "--help")
    for name, field in Recipe.model_fields.items():
        assert f"--{name.replace('_', '-')}" in called.stdout
        assert (field.description or "").split()[0] in called.stdout
    assert called.stderr == ""


def test_version(halve: Halve) -> None:
    called = halve("--version")
    assert (called.code, called.stdout) == (0, f"{version()}\n")


def test_methods(halve: Halve) -> None:
    called = halve("methods", "--json")
    assert called.code == 0
    methods = {(method["kind"], method["name"]): method for method in called.document["methods"]}
    assert methods.keys() == {("metric", name) for name in METRICS} | {
        ("reconstruction", name) for name in RECONSTRUCTIONS
    } | {
        ("permutation", "fold"),
        ("rotation", "heads"),
        ("allocate", "allocate"),
        ("targets", "dense"),
        ("repair", "block"),
        ("distill", "distill"),
    }
    assert methods["metric", "wanda"]["needs"] == ["sum_of_squares"]
    assert methods["metric", "gblm"]["needs"] == ["gradient_l2", "sum_of_squares"]  # one of them by its options
    assert methods["reconstruction", "sparsegpt"]["options"]["block_size"]["default"] == 128
    for method in methods.values():
        assert {"kind", "name", "paper", "needs", "cost", "options"} <= method.keys()
        assert method["cost"]
    assert methods["reconstruction", "admm"]["group"] == "layer"
    assert "group" not in methods["reconstruction", "dsnot"], "the group is the metric's"
    options = {name: method["options"] for (_, name), method in methods.items()}
    assert options["r2-dsnot"]["relative"]["choices"] == ["prune", "grow"]
    assert set(options["symwanda"]["input"]["choices"]) == {"none", "constant", "activations", "weights", "relative"}
    assert (options["symwanda"]["p"]["minimum"], options["symwanda"]["p"]["default"]) == (1, None)
    assert (options["stochria"]["fraction"]["above"], options["stochria"]["fraction"]["maximum"]) == (0, 1)
    assert (options["apt"]["refit_tolerance"]["above"], options["apt"]["refit_tolerance"]["below"]) == (0, 1)
    human = halve("methods")
    said = " ".join(human.stdout.split())
    assert "relative=prune which criterion uses relative importance (one of prune, grow)" in said
    assert "(one of none, constant, activations, weights, relative)" in said
    assert "(above 0 up to 1)" in said
    assert "group: layer, in unstructured patterns" in said
    assert "variant=false" in said
    assert all(f" {text} " in said for text in ("rounds=0", "rows=1", "gamma_grow=0.0", "rho=1.0"))
    assert "no calibration" not in said
    assert human.code == 0
    assert all(name in human.stdout for _, name in methods)


@pytest.mark.parametrize(
    "arguments", [["--nonesuch"], ["nonesuch"], ["compress"], ["compress", "m"], ["compress", "m", "--samples", "x"]]
)
def test_wrong_calls(arguments: list[str], halve: Halve) -> None:
    called = halve(*arguments)
    assert called.code == 2
    assert called.stdout == ""
    assert called.stderr
    assert "Traceback" not in called.stderr


@pytest.mark.parametrize("value", ["[1", "%x", "{"])
def test_an_option_value_that_is_none(value: str, halve: Halve, tmp_path: Path) -> None:
    called = halve("compress", "m", "--out", tmp_path / "out", "--metric", "ria", "--metric-options", f"alpha={value}")
    assert called.code == 2
    assert called.message == f"--metric-options: {value!r} is not a value for 'alpha'"


def test_a_path_that_the_system_refuses(halve: Halve, tmp_path: Path) -> None:
    """No traceback, and the path and the reason are named."""
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    dense = compress(source, tmp_path / "dense", format="dense").directory
    long = tmp_path / ("n" * 300)
    for arguments in (("verify", long), ("pack", long, "--out", tmp_path / "out"), ("pack", dense, "--out", long)):
        called = halve(*arguments)
        assert called.code == 2
        assert "n" * 300 in called.message
        assert "File name too long" in called.message
    (tmp_path / "out.converting").write_text("a file of that name is in nobody's way")
    assert halve("pack", dense, "--out", tmp_path / "out").code == 0


@pytest.mark.parametrize("name", ["b[/red]", "b[bold]x", "b:cat:", "[link=x", "back\\"])
def test_names_are_no_markup(name: str, halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "_width", 400)
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    dense = compress(source, tmp_path / "dense", format="dense").directory
    for arguments in (
        ("pack", dense, "--out", tmp_path / name),
        ("verify", tmp_path / name),
        ("unpack", tmp_path / name, "--out", tmp_path / "more" / name),
        flags(source, tmp_path / "compressed" / name),
    ):
        called = halve(*arguments)
        assert called.code == 0, called
        assert name in called.stdout
    called = halve("verify", tmp_path / f"absent{name}")
    assert called.message == f"there is no model directory {tmp_path / f'absent{name}'}"


def test_few_tokens_are_warned_of(halve: Halve, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    few = halve(*flags(source, tmp_path / "few", samples=1, length=60), "--json")
    [warning] = few.document["warnings"]
    assert warning.startswith("7 of 7 layers, the first is model.layers.0.self_attn.q_proj: 0.94 calibration tokens")
    assert "damping 0.1" in warning
    report = json.loads((tmp_path / "few" / "report.json").read_text())
    assert report["warnings"] == [warning]
    assert {layer["damping"] for layer in report["layers"]} == {0.1}
    human = halve(*flags(source, tmp_path / "human", samples=1, length=60))
    assert "warning: 7 of 7 layers" in " ".join(human.stdout.split())
    enough = halve(*flags(source, tmp_path / "enough", samples=16), "--json")
    assert enough.document["warnings"] == []
    by_scores = halve(*flags(source, tmp_path / "scores", samples=1, length=60, metric="wanda", reconstruction="none"))
    assert "warning" not in by_scores.stdout


def test_compress(halve: Halve, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    called = halve(*flags(source, tmp_path / "out"), "--json")
    assert called.code == 0
    document = called.document
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document.items() >= report["summary"].items()
    assert (document["out"], document["layers_pruned"], document["bytes"]) == (
        str(tmp_path / "out"),
        14,
        report["bytes"],
    )
    lines = called.stderr.splitlines()
    assert any("pruning 2/2 model.layers.1, relative output error 0." in line for line in lines), lines

    called = halve(*flags(source, tmp_path / "again"))
    assert called.code == 0
    assert "14 of 14" in called.stdout
    assert "halve verify" in called.stdout


def test_flags_are_the_fields_of_the_recipe(halve: Halve, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "metric: wanda\nseed: 5\nignore: ['*.v_proj']\nreconstruction_options: {damping: 0.2}\nsamples: 3\n"
    )
    given = flags(source, tmp_path / "out", recipe=file, samples=4, reconstruction="sparsegpt")
    called = halve(*given, "--ignore", "*.o_proj", "--ignore", "*.k_proj", "--json")
    assert called.code == 0, called
    import yaml

    recipe = Recipe.create(**yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["recipe"])
    assert (recipe.metric, recipe.seed, recipe.samples) == ("wanda", 5, 4)  # a flag wins over the file
    assert recipe.ignore == ("*.o_proj", "*.k_proj")
    assert recipe.reconstruction_options == {"damping": 0.2}
    called = halve(*flags(source, tmp_path / "options"), "--reconstruction-options", "damping=0.5", "--json")
    assert called.code == 0
    layers = json.loads((tmp_path / "options" / "report.json").read_text())["layers"]
    assert {layer["damping"] for layer in layers} == {0.5}


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """What a shell sees: JSON alone on standard output, progress on standard error."""
    source = tiny_models.build("gpt2", tmp_path / "source", layers=1)
    called = call(*flags(source, tmp_path / "out"), "--json")
    assert called.code == 0, called.stderr
    assert called.document["layers_pruned"] == 4
    assert "pruning 1/1" in called.stderr
    assert "Warning" not in called.stderr


def test_interrupt(halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.pruner.prune_layer", interrupt)
    called = halve(*flags(source, tmp_path / "out"))
    assert called.code == 130
    assert "Traceback" not in called.stderr
    monkeypatch.undo()
    assert halve(*flags(source, tmp_path / "out"), "--resume").code == 0
