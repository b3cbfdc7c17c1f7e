"""The calibration samples of a run: text or images, as many as the recipe and the model want."""

from __future__ import annotations

from compress import calibration, vision
from compress.architecture import reads_images
from compress.blocks import BlockModel
from compress.calibration import CalibrationSet
from compress.decisions import widest
from compress.errors import CalibrationError, RecipeError, SourceError
from compress.recipe import Recipe
from compress.sources import load_tokenizer
from compress.split import Split
from compress.substitution import exchangeable_tokens, substitute


def choose_samples(
    model: BlockModel, recipe: Recipe, decisions: dict[str, str | None], batch_tokens: int
) -> tuple[CalibrationSet, Recipe, Split]:
    """Reads the samples; with the recipe that says how many there are, which gives the same ones again, and what each is for.
    Behind those of the recipe there may be more, that only a distillation sees.

    Args:
        decisions: for every linear None if it is pruned.
        batch_tokens: in one forward pass, if nothing speaks for fewer.

    Raises:
        HalveError: they cannot be read, there are too few, or they do not belong to the model.
    """
    source = model.source
    if reads_images(source.config):
        if recipe.distill:
            raise RecipeError("distill learns from the logits of a language model, and this is an image classifier")
        fitted = recipe.fitted_to(widest(model, decisions), vision.TOKENS_OF_AN_IMAGE)
        images = vision.load_images(
            recipe.calibration, source.directory, samples=fitted.windows, seed=recipe.seed, at_least=recipe.samples
        )
        fitted = fitted.at_most(len(images)).model_copy(update={"substitute": 0.0})  # images have no tokens to exchange
        return images, fitted, Split.of(len(images), fitted, vision.TOKENS_OF_AN_IMAGE, batch_tokens)
    text = model.config.get_text_config()
    sizes = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    limit = next((size for size in sizes if isinstance(size, int)), None)
    if limit is not None and recipe.length > limit:
        raise CalibrationError(f"the model reads at most {limit} tokens; --length {recipe.length} is more than that")
    fitted = recipe.fitted_to(widest(model, decisions))
    distillation = recipe.chosen_distillation
    tokenizer = load_tokenizer(source.directory)
    windows = calibration.load_windows(
        recipe.calibration,
        tokenizer,
        samples=max(fitted.windows, (distillation and distillation.windows) or 0),
        length=recipe.length,
        seed=recipe.seed,
        at_least=recipe.samples,
    )
    vocabulary = getattr(text, "vocab_size", None)
    if isinstance(vocabulary, int) and int(windows.max()) >= vocabulary:
        raise SourceError(
            f"the tokenizer gives token {int(windows.max())}, the model knows {vocabulary}: they do not belong together"
        )
    count = len(windows)
    fitted = fitted.at_most(count)
    split = Split.of(fitted.windows, fitted, recipe.length, batch_tokens)
    if recipe.substitute:
        candidates = exchangeable_tokens(tokenizer, vocabulary if isinstance(vocabulary, int) else None)
        learned = slice(split.fitted)  # nothing that training holds out; and distillation does better on text as it is
        windows[learned] = substitute(windows[learned], recipe.substitute, candidates, recipe.seed)
    return calibration.text_set(windows), fitted, split
