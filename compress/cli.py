"""The commands that make checkpoints: compress, methods, verify, pack, unpack.

The flags of ``compress`` are the fields of `Recipe`, taken from its schema: a new field is a new flag.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
import yaml
from rich.padding import Padding
from rich.text import Text

from compress.console import Json, emit, human_bytes, out, progress_bar, say, table
from compress.errors import RecipeError
from compress.presets import PRESETS, preset_fields
from compress.recipe import Recipe

if TYPE_CHECKING:
    from compress.allocate import Savings

Model = Annotated[str, typer.Argument(help="a Hugging Face directory, a hub id, or a .gguf file", show_default=False)]
Directory = Annotated[Path, typer.Argument(help="a checkpoint directory", show_default=False)]
Out = Annotated[Path, typer.Option(help="the directory to make", show_default=False)]


def compress(
    model: str,
    out_directory: Path,
    preset: str | None,
    recipe_file: Path | None,
    resume: bool,
    checkpoint_seconds: float,
    device: str,
    gradients: Path | None,
    as_json: bool,
    attention: Callable[[], str],
    savings: Savings | None,
    **fields: Any,
) -> None:
    """Prune a model block by block, repair it, and write a verified checkpoint."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name.endswith("_options"):
            given[name] = _parse_options(name, given[name])
    if preset and recipe_file:
        raise RecipeError("give a preset or a recipe file, not both: a preset is a recipe (`halve methods` prints it)")
    if preset:
        given = preset_fields(preset, given)
    recipe = Recipe.load(recipe_file, **given) if recipe_file else Recipe.create(**given)
    started = time.perf_counter()

    # torch takes seconds to import, and --help should not wait for it
    from compress.architecture import reads_images
    from compress.pipeline import compress_model
    from compress.sources import read_config

    with progress_bar("pruning") as progress:
        done = compress_model(
            model,
            out_directory,
            recipe=recipe,
            resume=resume,
            checkpoint_seconds=checkpoint_seconds,
            device=device,
            attention=attention(),
            savings=savings,
            gradients=gradients,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    summary = done.report["summary"]
    document = {"out": str(done.directory), "seconds": round(seconds, 3), **summary, "bytes": done.report["bytes"]}
    document["warnings"] = done.report["warnings"]

    def human() -> None:
        out.print(
            table(
                f"{done.directory}",
                "",
                "",
                rows=[
                    ["layers pruned", f"{summary['layers_pruned']} of {summary['layers']}"],
                    ["metric, reconstruction", f"{summary['metric']}, {summary['reconstruction']}"],
                    ["relative output error, mean", f"{summary['mean_relative_output_error']:.4f}"],
                    *_allocation_rows(done.report.get("allocation")),
                    *_repair_rows(summary),
                    *_distillation_rows(summary),
                    ["their weights, before", human_bytes(summary["pruned_bytes_before"])],
                    ["their weights, after", human_bytes(summary["pruned_bytes_after"])],
                    ["the whole directory", human_bytes(done.report["bytes"]["total"])],
                    ["time", f"{seconds:.1f} s"],
                ],
            )
        )
        kept = [layer for layer in done.report["layers"] if layer["status"] == "dense"]
        if kept:
            say(f"dense: {len(kept)} layers, the first is {kept[0]['name']}: {kept[0]['reason']}")
        for warning in done.report["warnings"]:
            out.print(Text.assemble(("warning", "yellow"), ": ", warning), highlight=False)
        steps = ["verify"] if reads_images(read_config(done.directory)) else ["verify", "serve"]
        say("next: " + ", ".join(f"halve {step} {done.directory}" for step in steps))

    emit(document, as_json, human)


def _allocation_rows(allocation: dict[str, Any] | None) -> list[list[str]]:
    """What the linears that were kept dense cost and bought."""
    if allocation is None:
        return []
    share = allocation["given_back"] / allocation["saves_all"] if allocation["saves_all"] else 0.0
    return [
        [
            "kept dense by the allocation",
            f"{share:.1%} of what pruning saves; errors of the blocks, each linear alone, {allocation['error_all']:.4f} in "
            f"all and {allocation['error_left']:.4f} without them",
        ]
    ]


def _repair_rows(summary: dict[str, Any]) -> list[list[str]]:
    """What the repair of the blocks bought."""
    if "mean_held_out_error" not in summary:
        return []
    before, after = summary["mean_held_out_error_before"], summary["mean_held_out_error"]
    rows = [["error of the blocks, held out", f"{before:.4f} before the repair, {after:.4f} after"]]
    if "predictions_tokens" in summary:
        before, after = (summary[f"predictions_held_out_divergence{when}"] for when in ("_before", ""))
        said = f"{before:.4f} before {summary['predictions_tokens']:,} tokens of the last block, {after:.4f} after"
        rows.append(["divergence of the predictions, held out", said])
    return rows


def _distillation_rows(summary: dict[str, Any]) -> list[list[str]]:
    """What the training of the whole model bought."""
    if "held_out_divergence" not in summary:
        return []
    before, after = summary["held_out_divergence_before"], summary["held_out_divergence"]
    said = f"{before:.4f} before {summary['distilled_tokens']:,} tokens, {after:.4f} after"
    return [["divergence from the dense model, held out", said]]


def methods(as_json: Json = False) -> None:
    """What there is: every metric and reconstruction, its paper, what it needs, what it costs."""
    from compress.catalogue import SLOTS, catalogue, takes

    listed = catalogue()

    def human() -> None:
        out.print("any metric goes with any reconstruction; options are NAME=VALUE", highlight=False)
        for slot in SLOTS:
            out.print(f"\n[bold]--{slot}[/]", highlight=False)
            for method in listed:
                if method["kind"] == slot:
                    _describe(method, takes)
        out.print("\n[bold]--preset[/]", highlight=False)
        for name, preset in PRESETS.items():
            out.print(f"\n[bold cyan]{name}[/]", highlight=False)
            out.print(Padding(preset.purpose, (0, 0, 0, 4)), highlight=False)
            out.print(
                Padding(yaml.safe_dump(dict(preset.fields), sort_keys=False).rstrip(), (0, 0, 0, 4)), highlight=False
            )

    presets = {name: {"purpose": preset.purpose, "fields": dict(preset.fields)} for name, preset in PRESETS.items()}
    emit({"methods": listed, "presets": presets}, as_json, human)


def _describe(method: dict[str, Any], takes: Callable[[dict[str, Any]], str]) -> None:
    """One method for people: its name, then what it is, needs and costs, then its options and what they take."""
    out.print(f"\n[bold cyan]{method['name']}[/]", highlight=False)
    if method["paper"]:
        out.print(Padding(method["paper"], (0, 0, 0, 4)), highlight=False)
    out.print(Padding(f"cost: {method['cost']}", (0, 0, 0, 4)), highlight=False)
    if method["needs"]:
        out.print(Padding(f"needs: {', '.join(method['needs'])}", (0, 0, 0, 4)), highlight=False)
    if "group" in method:
        out.print(Padding(f"group: {method['group']}, in unstructured patterns", (0, 0, 0, 4)), highlight=False)
    for name, option in method["options"].items():
        default = "chosen" if option["default"] is None else option["default"]
        if isinstance(default, bool):
            default = str(default).lower()  # as it has to be typed
        values = f" ({taken})" if (taken := takes(option)) else ""
        out.print(Padding(f"{name}={default}  {option['description']}{values}", (0, 0, 0, 4)), highlight=False)


def verify(directory: Directory, as_json: Json = False) -> None:
    """Is it really 2:4 (or what its recipe says), whole and finite; which layers are dense and why; how many bytes."""
    from compress.verify import verify as run

    with progress_bar("verifying") as progress:
        verdict = run(directory, progress)
    dense = [layer for layer in verdict.layers if layer["status"] == "dense"]
    document = {
        "directory": str(directory),
        "kind": verdict.kind,
        "value_dtype": verdict.value_dtype,
        "activation_dtype": verdict.activation_dtype,
        "ok": verdict.ok,
        "pattern": verdict.pattern,
        "layers_2_4": len(verdict.sparse) if verdict.pattern == "2:4" else 0,
        "layers_sparse": len(verdict.sparse),
        "layers_dense": len(dense),
        "dense": dense,
        "bytes": verdict.bytes,
        "files": verdict.files,
        "sealed_files": verdict.sealed_files,
        "notes": verdict.notes,
    }

    def human() -> None:
        rows = [
            ["kind", verdict.kind],
            *([["kept values", verdict.value_dtype]] if verdict.value_dtype else []),
            *([["activations", verdict.activation_dtype]] if verdict.activation_dtype else []),
            [f"layers that are {verdict.pattern}", len(verdict.sparse)],
            ["their bytes", f"{verdict.bytes['sparse_layers']:,}"],
            ["layers that are dense", len(dense)],
            ["their bytes", f"{verdict.bytes['dense_layers']:,}"],
            ["bytes of the directory", f"{verdict.bytes['directory']:,}"],
            ["weight files, with a digest", f"{verdict.files}, {verdict.sealed_files}"],
        ]
        title = f"{directory} is whole" + ("" if verdict.ok else f", and no layer of it is {verdict.pattern}")
        out.print(table(title, "", "", rows=rows))
        for layer in dense[:20]:
            say(f"dense: {layer['name']}: {layer['reason']}")
        if len(dense) > 20:
            say(f"... and {len(dense) - 20} more (--json lists all)")
        for note in verdict.notes:
            say(f"note: {note}")

    emit(document, as_json, human)
    if not verdict.ok:
        raise typer.Exit(1)


def pack(
    directory: Directory,
    out_directory: Annotated[Path, typer.Option("--out", help="the directory to make")],
    value_dtype: Annotated[
        Literal["auto", "int8", "float8_e4m3fn"],
        typer.Option(
            help="what the kept values are stored as: auto: as they are; int8 or float8_e4m3fn: rounded to 8 bits with a scale for "
            "each row, 5/16 of the bytes of dense 16-bit weights; the checkpoint may be packed already"
        ),
    ] = "auto",
    activation_dtype: Annotated[
        Literal["auto", "none", "int8", "float8_e4m3fn"],
        typer.Option(
            help="what the inputs of packed layers are rounded to when the model is served, each token with a scale of its own: auto: "
            "what they are; none; or that of the values, so that products are of 8 bits"
        ),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Store a checkpoint that is 2:4 already in 9/16 of the bytes, to the bit; or in 5/16, rounded. It may be of compressed-tensors."""
    from compress.convert import pack_checkpoint

    notes: list[str] = []
    counts = pack_checkpoint(directory, out_directory, value_dtype, activation_dtype, notes.append)

    def show() -> None:
        for note in notes:
            say(note)
        say(f"{out_directory}: {counts['packed']} layers packed, {counts['dense']} stay dense")

    emit({"out": str(out_directory), **counts, "notes": notes}, as_json, show)


def unpack(
    directory: Directory,
    out_directory: Annotated[Path, typer.Option("--out", help="the directory to make")],
    as_json: Json = False,
) -> None:
    """Write a packed checkpoint as an ordinary dense one with zeros, to the bit."""
    from compress.convert import unpack_checkpoint

    counts = unpack_checkpoint(directory, out_directory)
    emit(
        {"out": str(out_directory), **counts},
        as_json,
        lambda: say(f"{out_directory}: {counts['unpacked']} layers unpacked"),
    )


def register(app: typer.Typer, attention: Callable[[], str] = lambda: "sdpa", savings: Savings | None = None) -> None:
    """Adds the commands of this module to an application.

    Args:
        attention: names what blocks attend with, see `compress.pipeline.compress_model`; called when a run begins.
        savings: what 2:4 saves on this machine, see there, too.
    """

    def run(**arguments: Any) -> None:
        compress(**arguments, attention=attention, savings=savings)

    run.__doc__ = compress.__doc__
    app.command("compress")(_with_recipe_flags(run))
    for command in (methods, verify, pack, unpack):
        app.command(command.__name__)(command)


def _with_recipe_flags(function: Any) -> Any:
    """Gives ``compress`` the signature that typer reads its flags from: one flag for each field of `Recipe`."""
    parameter = inspect.Parameter
    keyword = parameter.KEYWORD_ONLY
    parameters = [
        parameter("model", keyword, annotation=Model),
        parameter(
            "out_directory",
            keyword,
            annotation=Annotated[Path, typer.Option("--out", help="the directory to make", show_default=False)],
        ),
    ]
    parameters.append(
        parameter(
            "preset",
            keyword,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    help=f"a recipe by name, which other flags change: {', '.join(PRESETS)} (see `halve methods`)",
                    show_default=False,
                ),
            ],
        )
    )
    for name, field in Recipe.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, (), {}) else f" \\[default: {default}]"
        option = typer.Option("--" + name.replace("_", "-"), help=f"{field.description}{shown}", show_default=False)
        parameters.append(
            parameter(name, keyword, default=None, annotation=Annotated[_flag_type(field.annotation), option])
        )
    parameters += [
        parameter(
            "recipe_file",
            keyword,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option("--recipe", help="a YAML file with these fields; flags win", show_default=False),
            ],
        ),
        parameter(
            "resume",
            keyword,
            default=False,
            annotation=Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")],
        ),
        parameter(
            "checkpoint_seconds",
            keyword,
            default=60.0,
            annotation=Annotated[float, typer.Option(help="how often the activations are saved, for --resume")],
        ),
        parameter(
            "device", keyword, default="auto", annotation=Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")]
        ),
        parameter(
            "gradients",
            keyword,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(
                    help="a directory that keeps the gradients of the dense model for other runs, for metrics that need them",
                    show_default=False,
                ),
            ],
        ),
        parameter("as_json", keyword, default=False, annotation=Json),
    ]
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def _flag_type(annotation: Any) -> Any:
    """What typer shall parse for a field: repeatable strings for tuples and mappings, text for choices, else the type."""
    origin = get_origin(annotation)
    if origin in (tuple, dict):
        return list[str] | None
    if origin is Literal:
        return str | None
    plain = [argument for argument in get_args(annotation) if argument is not type(None)]
    return (plain[0] if plain else annotation) | None


def _parse_options(flag: str, pairs: list[str]) -> dict[str, Any]:
    """``["damping=0.1"]`` as ``{"damping": 0.1}``."""
    parsed = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise RecipeError(f"--{flag.replace('_', '-')} takes NAME=VALUE, got {pair!r}")
        try:
            parsed[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RecipeError(f"--{flag.replace('_', '-')}: {value!r} is not a value for {name!r}") from None
    return parsed
