"""The recipe: one schema for the Python arguments, the flags, the YAML file and the record in the artefact."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.errors import RecipeError, did_you_mean, one_line
from compress.presets import merged

# The methods import torch, which takes two seconds: they are imported where a recipe is checked, so that the
# schema alone (which `--help` shows) costs nothing.
if TYPE_CHECKING:
    from compress.allocate import AllocateOptions
    from compress.distill import DistillOptions
    from compress.methods import Metric, Options, Reconstruction
    from compress.patterns import Group, Pattern
    from compress.repair import RepairOptions
    from compress.rotation import RotationOptions
    from compress.targets import TargetOptions

Scalar = bool | int | float | str


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads a bare ``2:4`` as a number to the base 60 (124); here it is the text that it looks like."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [("tag:yaml.org,2002:str", re.compile(r"[0-9]+:[0-9]+$")), *resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Recipe(BaseModel):
    """How a model is pruned. Frozen; the same names everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str | None = Field(
        None,
        description="which weights matter (see `halve methods`); left out: the reconstruction's own, or wanda",
    )
    reconstruction: str = Field("sparsegpt", description="how the surviving weights are repaired (see `halve methods`)")
    pattern: str = Field("2:4", description="2:4, any N:M with N kept of M, or unstructured")
    sparsity: float | None = Field(None, description="share of weights to prune, for pattern unstructured")
    group: Literal["auto", "row", "block", "layer"] = Field(
        "auto", description="which weights compete in an unstructured pattern; auto: as in the method's paper"
    )
    metric_options: dict[str, Scalar] = Field(default_factory=dict, description="options of the metric, NAME=VALUE")
    reconstruction_options: dict[str, Scalar] = Field(
        default_factory=dict, description="options of the reconstruction, NAME=VALUE"
    )
    permutation: Literal["none", "fold"] = Field(
        "none",
        description="fold: reorder the channels between neighbouring layers so that N:M costs less; free at run time",
    )
    rotation: Literal["none", "heads"] = Field(
        "none",
        description="heads: mix the channels of the values within each attention head so that N:M costs less, and mix them back in "
        "the output projection; free at run time",
    )
    rotation_options: dict[str, Scalar] = Field(default_factory=dict, description="options of the rotation, NAME=VALUE")
    targets: Literal["own", "dense"] = Field(
        "own",
        description="what a layer is fitted to: own: its output on the inputs that the pruned layers before it give; dense: "
        "what the dense model has there, so that it makes up for what they lost (see `halve methods`)",
    )
    targets_options: dict[str, Scalar] = Field(default_factory=dict, description="options of the targets, NAME=VALUE")
    repair: Literal["none", "block"] = Field(
        "none",
        description="block: train what is left of each block to give the dense block's output again (see `halve methods`)",
    )
    repair_options: dict[str, Scalar] = Field(default_factory=dict, description="options of the repair, NAME=VALUE")
    distill: int = Field(
        0,
        ge=0,
        description="tokens on which the whole pruned model is trained to give the dense model's logits, at the end; 0: none",
    )
    distill_options: dict[str, Scalar] = Field(
        default_factory=dict, description="options of the distillation, NAME=VALUE"
    )
    allocate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of what pruning saves that is given back to keep the linears dense that lose most by it; 0: none "
        "(see `halve methods`)",
    )
    allocate_options: dict[str, Scalar] = Field(
        default_factory=dict, description="options of the allocation, NAME=VALUE"
    )
    add_bias: bool = Field(
        False,
        description="give linear layers a bias where the model's config.json has a switch for it, for methods that "
        "correct it",
    )
    calibration: str = Field(
        "c4",
        description="c4 (a part of C4 that comes with halve), a .txt or .jsonl[.gz] file, a Hugging Face data set, or "
        "for an image classifier a directory of images",
    )
    samples: int = Field(128, ge=1, description="calibration windows, or images")
    tokens_per_input: float = Field(
        0,
        ge=0,
        le=10_000,
        description="calibration tokens for each input channel of the widest layer, at least: more windows than --samples where "
        "the model is wide, as far as the text goes",
    )
    training_samples: int | None = Field(
        None,
        ge=1,
        description="calibration windows that repair and distill train on, or all where the text holds fewer; the first "
        "--samples of them give the statistics, too; left out: --samples",
    )
    length: int = Field(2048, ge=1, description="tokens in a calibration window")
    substitute: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the different tokens in every second calibration window that others stand for, drawn from the whole "
        "vocabulary, so that the model holds in fields that the text lacks, too; not in windows that are held out from training, or "
        "that distillation alone sees",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything that is drawn")
    ignore: tuple[str, ...] = Field((), description="linear layers to leave dense: names or globs such as '*.k_proj'")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of the run and of the saved weights; auto: the checkpoint's own"
    )
    format: Literal["packed", "dense"] = Field(
        "packed", description="packed: 2:4 in 9/16 of the bytes; dense: an ordinary checkpoint with zeros"
    )
    value_dtype: Literal["auto", "int8", "float8_e4m3fn"] = Field(
        "auto",
        description="what the kept values of packed weights are stored as, at the very end: auto: the dtype of the run; int8 or "
        "float8_e4m3fn: 8 bits and a scale for each row, 5/16 of the bytes of dense 16-bit weights",
    )
    activation_dtype: Literal["none", "int8", "float8_e4m3fn"] = Field(
        "none",
        description="what the inputs of packed layers are rounded to when the model is served, each token with a scale of its own: none: "
        "they stay as they are; else that of the values, so that products are of 8 bits",
    )

    @field_validator("metric")
    @classmethod
    def _metric_exists(cls, name: str | None) -> str | None:
        from compress.methods import find
        from compress.metrics import METRICS

        if name is not None:
            find("metric", name, METRICS)
        return name

    @field_validator("reconstruction")
    @classmethod
    def _reconstruction_exists(cls, name: str) -> str:
        from compress.methods import find
        from compress.reconstruction import RECONSTRUCTIONS

        find("reconstruction", name, RECONSTRUCTIONS)
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        from compress.layer_statistics import GRADIENT_NEEDS
        from compress.patterns import NMPattern

        pattern = self.parsed_pattern
        if self.format == "packed" and pattern != NMPattern(2, 4):
            raise RecipeError(
                f"only 2:4 can be packed, and the pattern is {self.pattern!r}; add format='dense' (flag --format dense)"
            )
        if self.format == "dense" and self.value_dtype != "auto":
            raise RecipeError(
                f"value_dtype={self.value_dtype!r} is of packed weights, and the format is 'dense'; leave --value-dtype or "
                "--format out"
            )
        if self.activation_dtype not in ("none", self.value_dtype):
            raise RecipeError(
                f"activation_dtype={self.activation_dtype!r} needs kept values of the same dtype, and value_dtype is "
                f"{self.value_dtype!r}; add value_dtype={self.activation_dtype!r} (flag --value-dtype {self.activation_dtype})"
            )
        metric = self.chosen_metric
        if metric is None and self.metric_options:
            raise RecipeError(f"metric_options were given, but no metric: {self.reconstruction} uses its own")
        if self.group in ("block", "layer") and isinstance(pattern, NMPattern):
            raise RecipeError(
                f"group={self.group!r} is of unstructured patterns: the weights that compete in {self.pattern!r} are "
                f"the groups of {pattern.m} in a row; leave --group out"
            )
        for options in self._parsed_options():
            options.check(pattern)
            if options.group is not None and self.group not in ("auto", options.group):
                raise RecipeError(
                    f"the options of the metric compare the weights of a whole {options.group}, and group is {self.group!r}; "
                    "leave --group or the options out"
                )
        for field, missing, remedy in (
            ("rotation", "no rotation", "add rotation='heads' (flag --rotation heads)"),
            ("repair", "no repair", "add repair='block' (flag --repair block)"),
            ("distill", "distill is 0", "say on how many tokens (flag --distill)"),
            ("allocate", "allocate is 0", "say which share (flag --allocate 0.1)"),
            ("targets", "no targets", "add targets='dense' (flag --targets dense)"),
        ):
            if getattr(self, field) in ("none", "own", 0) and getattr(self, f"{field}_options"):
                raise RecipeError(f"{field}_options were given, but {missing}; {remedy}")
        if (
            (allocation := self.chosen_allocation) is not None
            and allocation.by == "latency"
            and self.format != "packed"
        ):
            raise RecipeError(
                "allocate by latency goes by the times of packed 2:4 weights, and the format is 'dense'; use by='bytes' (flag "
                "--allocate-options by=bytes)"
            )
        _ = self.chosen_targets
        _ = self.chosen_distillation
        if (repair := self.chosen_repair) is not None:
            repair.check(pattern)
        if self.training_samples is not None:
            if self.repair == "none" and not self.distill:
                raise RecipeError("training_samples were given, but nothing trains; add repair='block' or distill")
            if self.training_samples < self.samples:
                raise RecipeError(
                    f"training_samples={self.training_samples} count all calibration windows, and are fewer than "
                    f"samples={self.samples}, which give the statistics; raise them, or lower --samples"
                )
        if self.add_bias and not self.chosen_reconstruction.corrects_bias and not (metric and metric.corrects_bias):
            raise RecipeError(
                "add_bias gives layers a bias of zeros, and neither the metric nor the reconstruction would change it; use "
                "it with metric 'stade' or 'stade-w' or reconstruction 'bias', 'refit', 'admm' or 'alps', or leave --add-bias out"
            )
        if self.permutation != "none" and not isinstance(pattern, NMPattern):
            raise RecipeError(
                f"permutation={self.permutation!r} moves columns between the groups of an N:M pattern, and the pattern is "
                f"{self.pattern!r}; leave --permutation out"
            )
        if self.chosen_rotation is not None:
            if not isinstance(pattern, NMPattern):
                raise RecipeError(
                    f"rotation={self.rotation!r} goes by the groups of an N:M pattern, and the pattern is {self.pattern!r}; leave "
                    "--rotation out"
                )
            if self.needs & GRADIENT_NEEDS:
                raise RecipeError(
                    f"metric {self.metric!r} weighs each weight by a gradient of the model as it is, and rotation={self.rotation!r} "
                    "makes other weights of them; leave --rotation out, or choose another metric"
                )
        own_group = self.chosen_reconstruction.group
        if metric is None and self.group == "layer" != own_group and not isinstance(pattern, NMPattern):
            raise RecipeError(
                f"{self.reconstruction} goes through a layer by blocks of columns, so its own metric cannot compare a whole "
                "layer; use group 'block' or 'row', or choose a metric"
            )
        return self

    @property
    def chosen_group(self) -> Group:
        """The comparison group, with "auto" resolved to that of the method's paper."""
        if self.group != "auto":
            return self.group
        for options in self._parsed_options()[:1]:
            if options.group is not None:
                return options.group
        return self.chosen_metric.group if self.chosen_metric else self.chosen_reconstruction.group

    @property
    def parsed_pattern(self) -> Pattern:
        from compress.patterns import parse_pattern

        return parse_pattern(self.pattern, self.sparsity)

    @property
    def chosen_reconstruction(self) -> Reconstruction:
        from compress.reconstruction import RECONSTRUCTIONS

        return RECONSTRUCTIONS[self.reconstruction]

    @property
    def chosen_metric(self) -> Metric | None:
        """The metric that makes the mask, or None when the reconstruction chooses by its own."""
        from compress.metrics import METRICS

        if self.metric is not None:
            return METRICS[self.metric]
        return None if self.chosen_reconstruction.own_metric else METRICS["wanda"]

    @property
    def chosen_rotation(self) -> RotationOptions | None:
        """How channels are mixed before anything is pruned, or None where they are not."""
        if self.rotation == "none":
            return None
        from compress.methods import parse_options
        from compress.rotation import HEADS

        return cast("RotationOptions", parse_options(HEADS, self.rotation_options))

    @property
    def chosen_targets(self) -> TargetOptions | None:
        """How layers are fitted to the dense model, or None where they are fitted to themselves."""
        if self.targets == "own":
            return None
        from compress.methods import parse_options
        from compress.targets import TARGETS

        return cast("TargetOptions", parse_options(TARGETS, self.targets_options))

    @property
    def wants_dense(self) -> bool:
        """Whether the activations of the dense model go through the blocks beside those of the pruned one."""
        return self.repair != "none" or self.targets != "own"

    @property
    def chosen_repair(self) -> RepairOptions | None:
        """How blocks are repaired, or None where they are not."""
        if self.repair == "none":
            return None
        from compress.methods import parse_options
        from compress.repair import REPAIRS

        return cast("RepairOptions", parse_options(REPAIRS[self.repair], self.repair_options))

    @property
    def chosen_distillation(self) -> DistillOptions | None:
        """How the whole model is trained at the end, or None where it is not."""
        if not self.distill:
            return None
        from compress.distill import DISTILL
        from compress.methods import parse_options

        return cast("DistillOptions", parse_options(DISTILL, self.distill_options))

    @property
    def chosen_allocation(self) -> AllocateOptions | None:
        """How linears are chosen that stay dense, or None where all are pruned."""
        if not self.allocate:
            return None
        from compress.allocate import ALLOCATE
        from compress.methods import parse_options

        return cast("AllocateOptions", parse_options(ALLOCATE, self.allocate_options))

    @property
    def windows(self) -> int:
        """Calibration windows (or images) that are read: ``samples`` for the statistics, and more where a stage trains."""
        return self.training_samples or self.samples

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the metric, the reconstruction and the permutation need together."""
        needs = self.chosen_reconstruction.needs
        if self.chosen_metric is not None or self.permutation != "none":
            needs |= self.scoring_needs
        return needs.union(*(options.needs for options in self._parsed_options()))

    @property
    def scoring_needs(self) -> frozenset[str]:
        """The statistics that scores need: those of the metric, or of Wanda's where the permutation has no other."""
        metric = self.chosen_metric
        return frozenset({"sum_of_squares"}) if metric is None else metric.needs | self._parsed_options()[0].needs

    @property
    def named_layers(self) -> dict[str, str]:
        """Parts of names by which methods tell layers apart, by the option that gives them."""
        return {name: part for options in self._parsed_options() for name, part in options.named_layers.items()}

    def _parsed_options(self) -> list[Options]:
        """The options of the method that makes the mask first, then of the reconstruction if that is another one."""
        from compress.methods import parse_options

        parsed = [parse_options(self.chosen_reconstruction, self.reconstruction_options)]
        if self.chosen_metric is not None:
            parsed.insert(0, parse_options(self.chosen_metric, self.metric_options))
        return parsed

    @property
    def digest(self) -> str:
        """SHA-256 over all fields; two recipes with one digest prune alike."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @classmethod
    def create(cls, **fields: Any) -> Recipe:
        """A checked recipe; a wrong field is explained in one line.

        Raises:
            RecipeError: names the field, the value and what it could be.
        """
        for name in fields:
            if name not in cls.model_fields:
                raise RecipeError(f"a recipe has no field {name!r}{did_you_mean(name, cls.model_fields)}")
        try:
            return cls(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            raise RecipeError(f"{where}: {first['msg']} (got {first['input']!r})") from None

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> Recipe:
        """Reads a YAML file; what is given beside it wins. Reads a saved ``recipe.yaml`` of an artefact, too."""
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {path} is not YAML: {one_line(error)}") from None
        if isinstance(data, dict) and isinstance(data.get("recipe"), dict):
            data = data["recipe"]
        if not isinstance(data, dict):
            raise RecipeError(f"the recipe {path} must be a mapping of fields, such as 'metric: wanda'")
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return cls.create(**merged({str(key): value for key, value in data.items()}, overrides, defaults))

    def fitted_to(self, widest: int, tokens: int | None = None) -> Recipe:
        """The same with as many windows as ``tokens_per_input`` wants for a model.

        Args:
            widest: input channels of its widest layer that is pruned.
            tokens: in a window; left out: ``length``.
        """
        wanted = math.ceil(self.tokens_per_input * widest / (tokens or self.length))
        return self.with_samples(
            max(self.samples, wanted), self.training_samples and max(self.training_samples, wanted)
        )

    def with_samples(self, samples: int, training_samples: int | None) -> Recipe:
        """The same with other numbers of windows."""
        return self.model_copy(update={"samples": samples, "training_samples": training_samples})

    def at_most(self, windows: int) -> Recipe:
        """The same with no more windows than there are."""
        return self.with_samples(
            min(self.samples, windows), self.training_samples and min(self.training_samples, windows)
        )

    def differences(self, other: Recipe) -> list[str]:
        """``"samples: 64 instead of 128"`` for each field in which this one differs from the other."""
        mine, its = self.model_dump(mode="json"), other.model_dump(mode="json")
        return [f"{name}: {mine[name]!r} instead of {its[name]!r}" for name in mine if mine[name] != its[name]]
