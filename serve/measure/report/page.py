"""The HTML file of a report. Every text in it is escaped by jinja2, since names of layers and files come from outside."""

from __future__ import annotations

import datetime
import functools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from compress.version import version
from serve.measure.report import charts, speed, summary
from serve.measure.report.checkpoint import Checkpoint
from serve.measure.report.drawing import Picture
from serve.measure.report.quantities import bounds, gain, quantity
from serve.measure.report.results import Result
from serve.measure.report.rows import Row
from serve.measure.report.summary import Commands

_TEMPLATE = Path(__file__).parent / "template"
MOST_LAYERS = 1000
"""Rows of the table of all layers; what is more than a person reads is in ``report.json``."""


@dataclass(frozen=True)
class Tile:
    """One of the figures at the top; without a value, the command that measures it."""

    title: str
    command: str
    value: float | None = None
    text: str = ""
    unit: str = ""
    lines: tuple[str, ...] = ()
    tone: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of a sentence; a measured number carries its value."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Titled:
    title: str
    picture: Picture


class Page:
    """Everything that the template shows, gathered once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        results: list[Result],
        beside: list[tuple[Checkpoint, list[Result]]],
        notes: list[str],
    ) -> None:
        self.checkpoint = checkpoint
        self.results = results
        self.notes = [
            *notes,
            *speed.not_at_the_top(results),
            *checkpoint.warnings,
            *summary.undefined(results),
        ]
        self.commands = Commands(checkpoint)
        self.latencies = speed.latencies(results)
        self.perplexity = summary.perplexity(results)
        self.agreement = summary.agreement(results)
        self.tasks = summary.tasks(results)
        self.accuracy = [row for row in (self.perplexity, *self.agreement, *self.tasks) if row]
        self.sizes = summary.sizes(results)
        self.levels = speed.levels(results)
        self.memory = summary.memory(checkpoint, results)
        self.backends = summary.backends(results)
        self.kinds = summary.kinds(checkpoint.layers)
        self.reasons = summary.reasons(checkpoint.layers)
        self.runs = [summary.run(checkpoint, results)]
        self.runs += [summary.run(other, own, results) for other, own in beside]
        self.headline = [*self.latencies, *self.sizes, *self.accuracy]

    @functools.cached_property
    def tiles(self) -> list[Tile]:
        token, first = (next((r for r in self.latencies if r.key == key), None) for key in ("tpot", "ttft"))
        weights = next((row for row in self.sizes if row.label == "weights in memory"), None)
        return [
            _tile("Time per output token", token, self.commands.bench),
            _tile("Time to first token", first, self.commands.bench),
            _tile("Weights in memory", weights, self.commands.bench) if weights or not self.memory else self._stored(),
            _tile("Perplexity", self.perplexity, self.commands.evaluate),
        ]

    def _stored(self) -> Tile:
        assert self.memory is not None
        dense, this = (stack.total for stack in self.memory.stacks)
        lines = (
            f"{quantity(this, 'bytes')} against {quantity(dense, 'bytes')}",
            "as stored; in memory it was not measured",
        )
        return Tile(
            "Weights",
            self.commands.bench,
            this / dense,
            f"{this / dense * 100:.1f}\u00a0%",
            "of dense",
            lines,
            "better",
        )

    @functools.cached_property
    def verdict(self) -> list[Part]:
        """The headline as a sentence, of measured figures only."""
        parts: list[list[Part]] = []
        token = next((row for row in self.latencies if row.key == "tpot" and row.ratio), None)
        if token and (faster := token.times_as_fast):
            parts.append(_decodes(token, faster))
        weights = next((row for row in self.sizes if row.label == "weights in memory" and row.ratio), None)
        if weights and weights.ratio:
            parts.append(
                [
                    Part("its weights take "),
                    Part(f"{weights.ratio * 100:.1f}\u00a0%", weights.ratio),
                    Part(" of the memory"),
                ]
            )
        elif self.memory:
            dense, this = (stack.total for stack in self.memory.stacks)
            parts.append(
                [
                    Part("its tensors take "),
                    Part(f"{this / dense * 100:.1f}\u00a0%", this / dense),
                    Part(" of the bytes of the dense ones"),
                ]
            )
        if self.perplexity and self.perplexity.ratio and self.perplexity.dense:
            row = self.perplexity
            parts.append([
                Part("its perplexity is "), Part(quantity(row.value, "number"), row.value), Part(" where the dense model has "),
                Part(quantity(row.dense or 0.0, "number"), row.dense),
            ])  # fmt: skip
        if not parts:
            return [Part("Nothing was measured yet.")]
        sentence = []
        for index, part in enumerate(parts):
            joint = (
                ""
                if index == 0
                else " and "
                if index == len(parts) - 1 and index == 1
                else ", and "
                if index == len(parts) - 1
                else ", "
            )
            sentence += [Part(joint), *part]
        missing = [what for what, row in (("speed", token), ("perplexity", self.perplexity)) if row is None]
        end = (
            f". Its {' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not measured." if missing else "."
        )
        first = next(part for part in sentence if part.text)
        sentence[sentence.index(first)] = Part(first.text[:1].upper() + first.text[1:], first.value)
        return [*sentence, Part(end)]

    @property
    def called(self) -> str:
        """The model in tables and pictures."""
        return "sparse" if self.checkpoint.pruned else "this"

    @property
    def facts(self) -> list[str]:
        checkpoint = self.checkpoint
        facts = [checkpoint.architecture]
        if checkpoint.summary:
            facts += [str(checkpoint.summary.get("pattern", "")), f"by {checkpoint.method}"]
            facts.append(f"{len(checkpoint.pruned)} of {len(checkpoint.layers)} layers pruned")
        elif checkpoint.layers:
            facts.append(f"{len(checkpoint.layers)} layers packed 2:4")
        facts += [quantity(checkpoint.tensor_bytes, "bytes"), str(checkpoint.directory)]
        return [fact for fact in facts if fact]

    @property
    def pruned_line(self) -> str:
        before, after = self.checkpoint.pruned_bytes
        if not self.checkpoint.layers:
            return self.no_layers
        line = (
            f"{len(self.checkpoint.pruned)} of {len(self.checkpoint.layers)} linear layers of the blocks. Their weights took "
            f"{quantity(before, 'bytes')} and are stored in {quantity(after, 'bytes')}"
        )
        return f"{line}, {after / before:.4f} of it." if before else f"{line}."

    @property
    def no_layers(self) -> str:
        if self.checkpoint.complete:
            return ""
        return (
            "There is no report.json, which says what was pruned and why layers stayed dense; halve did not make this "
            f"checkpoint, or the file was left behind. `{self.commands.verify}` reads the weights and tells which layers are 2:4."
        )

    @property
    def outside(self) -> str:
        _, after = self.checkpoint.pruned_bytes
        rest = self.checkpoint.tensor_bytes - after
        return f"Embeddings, norms and the output layer are no part of them and hold {quantity(rest, 'bytes')}."

    @property
    def compress_command(self) -> str | None:
        if "recipe" not in self.checkpoint.recipe:
            return None
        recipe = shlex.quote(str(self.checkpoint.directory / "recipe.yaml"))
        return f"halve compress {shlex.quote(self.checkpoint.source)} --recipe {recipe} --out NEW"

    @property
    def recipe(self) -> list[tuple[str, str]]:
        saved = self.checkpoint.recipe
        if not saved:
            return []
        rows = [("model", self.checkpoint.source)]
        settings = {
            **saved.get("recipe", {}),
            **{f"calibration {k}": v for k, v in saved.get("calibration", {}).items()},
        }
        rows += [
            (str(name).replace("_", " "), _said(value))
            for name, value in settings.items()
            if value not in (None, {}, [])
        ]
        made_with = ", ".join(f"{name} {number}" for name, number in saved.get("versions", {}).items())
        rows.append(("made with", made_with))
        return [*rows, ("device", str(saved.get("device", "")))]

    @property
    def sources(self) -> list[dict[str, str]]:
        rows = []
        for result in self.results:
            environment = result.environment
            versions = environment.get("versions")
            told = [f"{name} {number}" for name, number in versions.items()] if isinstance(versions, dict) else []
            threads = [f"{environment['threads']} threads"] if "threads" in environment else []
            dates = [str(environment["date"])] if "date" in environment else []
            broken = ["cut off before its end"] if result.document.get("complete") is False else []
            rows.append({
                "path": str(result.path), "sha256": result.sha256, "machine": str(environment.get("machine", "not said")),
                "details": ", ".join([*broken, *dates, *threads, *told]),
            })  # fmt: skip
        return rows

    @functools.cached_property
    def heat_map(self) -> Picture | None:
        return charts.heat_map(self.checkpoint.layers)

    @functools.cached_property
    def allocation_picture(self) -> Picture | None:
        return charts.allocation(self.checkpoint.allocation) if self.checkpoint.allocation else None

    @property
    def allocation_line(self) -> list[Part]:
        """What the allocation gave back, and for what."""
        found = self.checkpoint.allocation
        if found is None:
            return []
        back = f"{found.given_back:.1f} µs" if found.unit == "us" else quantity(found.given_back, "bytes")
        share = found.given_back / found.saves_all if found.saves_all else 0.0
        kept = sum(len(candidate.names) for candidate in found.candidates if candidate.kept_dense)
        return [
            Part(f"{kept} layers", kept), Part(" stay dense, which gives "), Part(back, found.given_back), Part(", "),
            Part(f"{share:.1%}", share), Part(" of what pruning them all would save, back. The errors that the layers cause alone fall from "),
            Part(f"{found.error_all:.4f}", found.error_all), Part(" to "), Part(f"{found.error_left:.4f}", found.error_left), Part("."),
        ]  # fmt: skip

    @functools.cached_property
    def latency_pictures(self) -> list[Titled]:
        families: dict[tuple[str, str], list[speed.Level]] = {}
        for level in self.levels:
            if level.number is not None:
                families.setdefault((level.source, level.family), []).append(level)
        return [
            Titled(f"{title}, {source}" if self.several_sources else title, picture)
            for number, ((source, _), own) in enumerate(families.items())
            for title, picture in charts.latency(own, self.called, f"latency-{number}").items()
        ]

    @property
    def several_sources(self) -> bool:
        """Whether the loads are of several files."""
        return len({level.source for level in self.levels}) > 1

    @functools.cached_property
    def pareto(self) -> Picture | None:
        return charts.accuracy_against_speed(self.runs, summary.pareto(self.runs))

    @functools.cached_property
    def memory_picture(self) -> Picture | None:
        return charts.memory(self.memory) if self.memory else None

    @property
    def missing(self) -> dict[str, str]:
        """What was not measured, and the command that does."""
        commands = self.commands
        found: dict[str, tuple[Any, str]] = {
            "latency": (self.latencies, commands.bench),
            "latency against concurrency": (self.levels, commands.bench),
            "memory": (self.sizes, commands.bench),
            "kernels": (self.backends, commands.bench),
            "perplexity": (self.perplexity, commands.evaluate),
            "tasks": (self.tasks, commands.tasks),
        }
        return {name: command for name, (there, command) in found.items() if not there}

    def render(self) -> str:
        """The file's text."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATE),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
        )
        environment.filters |= {"quantity": quantity, "gain": gain, "bounds": bounds}
        return environment.get_template("report.html.j2").render(
            page=self,
            css=Markup((_TEMPLATE / "report.css").read_text()),
            version=version(),
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            most=MOST_LAYERS,
        )


def _decodes(row: Row, faster: float) -> list[Part]:
    """What the headline says of decoding: no more than the verdict on it carries, and first what failed."""
    it = [Part(f"{row.failures}; it decodes ")] if row.failures else [Part("It decodes ")]
    if row.verdict == "no difference":
        return [*it, Part("as fast as the dense model, as far as this was measured")]
    told = [*it, Part(f"{faster:.2f} times", faster), Part(" as fast as the dense model")]
    if row.verdict not in ("better", "worse", "equal"):
        told.append(Part(f", which does not show a difference yet ({row.why or 'it was measured too seldom'})"))
    return told


def _tile(title: str, row: Row | None, command: str) -> Tile:
    if row is None:
        return Tile(title, command)
    told = gain(row)
    if told is None:
        lines = ("no dense model was measured beside it", f"run {command}")
        return Tile(title, command, row.value, quantity(row.value, row.unit), "", lines)
    number, text, unit = told
    assert row.dense is not None
    load = "" if row.unit == "bytes" else row.load
    lines = [
        f"{quantity(row.value, row.unit)} against {quantity(row.dense, row.unit)}",
        row.failures,
        bounds(row),
        load,
    ]
    if row.verdict == "no difference":
        lines.insert(1, "no difference that was measured")
    tone = row.verdict if row.verdict in ("better", "worse") and not row.failures else ""
    return Tile(title, command, number, text, unit, tuple(filter(None, lines)), tone)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={given}" for name, given in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
