"""Which attention a model takes, by its name in transformers' registry."""

from __future__ import annotations

import inspect
import sys

from transformers import AttentionInterface, PreTrainedModel

from compress.errors import UsageError, did_you_mean

TORCH = "sdpa"
"""torch's own, the default of transformers."""
EAGER = "eager"
"""transformers' own, operator by operator."""


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Lets a model attend with what is registered under a name, where it would take torch's own.

    A model that asks for the name of its attention keeps torch's: those with sparse attention mask their keys themselves under
    the names that they know, and would attend to everything under another one. One that caps the logits of its attention (Gemma 2)
    takes transformers' own: torch's ignores the cap without a word.

    Raises:
        UsageError: nothing is registered under that name.
    """
    if name not in (known := {EAGER, *AttentionInterface()}):
        raise UsageError(
            f"attention={name!r} is not in transformers' registry{did_you_mean(name, known)}; halve's is there once "
            "serve.attention is imported"
        )
    if model.config._attn_implementation != TORCH:
        return
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation(EAGER)
    elif name != TORCH and not _asks_for_names(model):
        model.set_attn_implementation(name)


def _asks_for_names(model: PreTrainedModel) -> bool:
    """Whether the code of the model itself speaks of torch's attention by its name."""
    modules = {type(part).__module__ for part in model.modules()}
    for module in {module for module in modules if not module.startswith("torch.")}:
        try:
            source = inspect.getsource(sys.modules[module])
        except (OSError, TypeError, KeyError):  # made at run time: nothing can be said of it
            return True
        if f'"{TORCH}"' in source or f"'{TORCH}'" in source:
            return True
    return False
