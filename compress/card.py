"""The model card, README.md of an artefact: what was done, what it costs, how to load it."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

MEASURED_BEGIN = "<!-- halve report: begin -->"
MEASURED_END = "<!-- halve report: end -->"
"""Between these marks `halve report` puts what it measured of the artefact."""

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}, {{ pattern }}

Pruned to **{{ pattern }}** by halve {{ version }} {{ how }}, and stored {{ stored }}.

| | |
|---|---|
| source | `{{ model }}` |
| metric | {{ metric }} |
| reconstruction | {{ reconstruction }} |
| calibration | {{ samples }} of `{{ calibration }}`, seed {{ seed }} |
| layers pruned | {{ pruned }} of {{ layers }} |
{% if permuted %}| channels reordered for it, folded into neighbouring layers | in {{ permuted }} layers |
{% endif %}{% if rotated %}| channels of attention heads mixed for it, and mixed back in the next layer | for {{ rotated }} layers |
{% endif %}{% if dense_targets %}| layers fitted to | what the dense model has where their errors show, not to themselves |
{% endif %}| their weights | {{ before }} bytes dense, {{ after }} bytes here |
| relative output error | {{ error }} on average over the pruned layers{{ error_of }} |
{% if repaired %}| blocks trained to give the dense model's activations | {{ repaired }}; error on held-out windows {{ repair_before }} before, {{ repair_after }} after, on average |
{% endif %}{% if predictions %}| **last block trained on the dense model's logits** | {{ predictions }} tokens of the calibration text |
{% endif %}{% if distilled %}| **distilled**: trained from end to end on the dense model's logits | {{ distilled }} tokens of the calibration text |
{% endif %}
Exact settings are in `recipe.yaml`; every layer, every byte and every file in `report.json`. Accuracy was not
measured by the run that made this{{ measure }}.

## Load it

{{ usage }}
"""

_USAGE_PACKED = """```python
import serve.transformers_plugin  # a part of halve
from transformers import {auto_class}

model = {auto_class}.from_pretrained("PATH_OR_ID")
```

{serve}Without the plugin the weights cannot be read; `halve unpack` makes an ordinary checkpoint of them."""

_USAGE_DENSE = "An ordinary Hugging Face checkpoint with zeros in it; it loads anywhere, in its full size."
_CAN_PACK = """
`halve pack` stores it smaller, for hardware that multiplies 2:4."""


def _samples(settings: dict[str, Any], images: bool) -> str:
    """How much of the calibration each stage saw."""
    what = "images" if images else f"windows of {settings['length']} tokens"
    more = settings.get("training_samples")
    return f"{settings['samples']} {what}" + (f" ({more} to train on)" if more else "")


def _how(report: dict[str, Any]) -> str:
    if "distillation" in report:
        return "and distilled"
    return "without training it as a whole" if "predictions_tokens" in report["summary"] else "without retraining"


def _error_of(settings: dict[str, Any], report: dict[str, Any]) -> str:
    """What the layers' errors are of, where it is not the layers here against those of the source."""
    said = ", against the weights that were fitted to the dense model" if settings.get("targets") == "dense" else ""
    if report["summary"].get("blocks_repaired") or "distillation" in report:
        said += ", before anything was trained"
    return said


def _stored(format: str, value_dtype: str, activation_dtype: str, before: int, after: int) -> str:
    if format != "packed":
        return "as a dense checkpoint with zeros"
    how = "packed" if value_dtype == "auto" else f"packed, the kept values as {value_dtype}"
    if activation_dtype != "none":
        how += f", by which activations are multiplied in {activation_dtype}"
    return f"{how}, the pruned layers in {after / before:.4g} of their bytes" if before else how


def model_card(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    """The text of the card from the saved recipe and report."""
    settings, summary = recipe["recipe"], report["summary"]
    model = recipe["model"]
    images = "images" in recipe["calibration"]
    # (older recipes do not say it)
    is_hub_id = recipe.get("from_hub", model.count("/") == 1 and not model.startswith((".", "/", "~")))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if images else "text-generation",
        tags=["halve", "pruned", "sparse", settings["pattern"]],
        base_model=model if is_hub_id else None,
    )
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=report["name"],
        pattern=settings["pattern"],
        version=recipe["versions"]["halve"],
        stored=_stored(
            settings["format"],
            settings.get("value_dtype", "auto"),
            settings.get("activation_dtype", "none"),
            summary["pruned_bytes_before"],
            summary["pruned_bytes_after"],
        ),
        model=model,
        metric=summary["metric"],
        reconstruction=settings["reconstruction"],
        samples=_samples(settings, images),
        calibration=settings["calibration"],
        seed=settings["seed"],
        pruned=summary["layers_pruned"],
        layers=summary["layers"],
        permuted=summary["layers_permuted"],
        rotated=summary.get("layers_rotated"),
        dense_targets=settings.get("targets") == "dense",
        before=f"{summary['pruned_bytes_before']:,}",
        after=f"{summary['pruned_bytes_after']:,}",
        error=f"{summary['mean_relative_output_error']:.4f}",
        how=_how(report),
        error_of=_error_of(settings, report),
        repaired=summary.get("blocks_repaired"),
        repair_before=f"{summary.get('mean_held_out_error_before', 0):.4f}",
        repair_after=f"{summary.get('mean_held_out_error', 0):.4f}",
        predictions=f"{summary['predictions_tokens']:,}" if "predictions_tokens" in summary else None,
        distilled=f"{report['distillation']['tokens']:,}" if "distillation" in report else None,
        measure="" if images else ": `halve eval` does",
        usage=_USAGE_PACKED.format(
            auto_class="AutoModelForImageClassification" if images else "AutoModelForCausalLM",
            serve="" if images else "or `halve serve PATH_OR_ID` for an OpenAI-compatible endpoint. ",
        )
        if settings["format"] == "packed"
        else _USAGE_DENSE + (_CAN_PACK if settings["pattern"] == "2:4" else ""),
    )
    return str(card)
