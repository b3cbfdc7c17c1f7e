"""Recipe, report and model card of an artefact that is converted into the other form."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import artefact
from compress.card import MEASURED_BEGIN, MEASURED_END, model_card
from compress.errors import CorruptCheckpointError, RecipeError
from compress.files import write_text
from compress.recipe import Recipe


@dataclass(frozen=True)
class Records:
    """What is to be said of the new directory; None where the source says nothing.

    A recipe or a card that is not halve's is copied as it is.
    """

    recipe: dict[str, Any] | None
    report: dict[str, Any] | None
    card: str | None

    @classmethod
    def of(
        cls,
        source: Path,
        format: str,
        sizes: dict[str, int],
        value_dtype: str = "auto",
        activation_dtype: str | None = None,
    ) -> Records:
        """The records of ``source`` as they are after it was converted.

        Args:
            format: "packed" or "dense", what it is converted to.
            sizes: bytes of each converted linear afterwards, by its name.
            value_dtype: what packed values are stored as; ``activation_dtype``: what their layers' inputs are rounded to.

        Raises:
            CorruptCheckpointError: the report or the recipe lacks what halve writes into it.
        """
        before, report = artefact.read_recipe(source), artefact.read_report(source)
        stored = {"format": format, "value_dtype": value_dtype, "activation_dtype": activation_dtype or "none"}
        recipe = None if before is None else {**before, "recipe": {**before["recipe"], **stored}}
        card = _read(source / artefact.CARD_NAME)
        if report is None:
            return cls(recipe, None, card)
        try:
            changed = _resized(report, sizes)
            if before is None or recipe is None:
                return cls(None, changed, card)
            changed["recipe_sha256"] = _digest(recipe, report["recipe_sha256"])
            return cls(recipe, changed, _card(card, model_card(before, report), model_card(recipe, changed)))
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpointError(
                f"{source / artefact.REPORT_NAME} or {artefact.RECIPE_NAME} lacks what halve writes into it ({error!r}); "
                "remove both to convert the weights alone"
            ) from None

    def write(self, source: Path, directory: Path) -> None:
        """Writes them, after everything else that lies in ``directory``."""
        if self.recipe is not None and self.report is not None:
            artefact.write_records(directory, self.recipe, self.report, self.card)
            return
        if self.recipe is not None:
            artefact.write_recipe(directory, self.recipe)
        elif (foreign := source / artefact.RECIPE_NAME).is_file():
            shutil.copyfile(foreign, directory / artefact.RECIPE_NAME)
        if self.card is not None:
            write_text(directory / artefact.CARD_NAME, self.card)
        if self.report is not None:
            write_text(directory / artefact.REPORT_NAME, artefact.account(directory, self.report))


def _resized(report: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The report with the bytes that pruned layers take now."""
    layers = [
        {**layer, "bytes_after": sizes[layer["name"]]}
        if layer.get("status") == "pruned" and layer["name"] in sizes
        else layer
        for layer in report["layers"]
    ]
    after = sum(layer["bytes_after"] for layer in layers if layer.get("status") == "pruned")
    return {**report, "layers": layers, "summary": {**report["summary"], "pruned_bytes_after": after}}


def _digest(saved: dict[str, Any], before: str) -> str:
    try:
        return Recipe.create(**saved["recipe"]).digest
    except RecipeError:  # of another version of halve, or of no valid run: packed, but of another pattern
        return before


def _card(card: str | None, generated: str, now: str) -> str | None:
    """The card as it is now: what halve generated is made anew, what a person added stays, and measured figures, which are
    of the other artefact, go. None where it is to be generated as a whole."""
    if card is None:
        return None
    begin, end = card.find(MEASURED_BEGIN), card.find(MEASURED_END)
    if 0 <= begin < end:
        card = card[:begin].rstrip() + "\n" + card[end + len(MEASURED_END) :].lstrip()
    return card.replace(generated.strip(), now.strip(), 1)


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
