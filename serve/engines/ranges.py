"""What sampling parameters may be, in a request and in a checkpoint's advice alike.

The advice is ``generation_config.json``: as in vLLM, it counts where a request names no value of its own.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import SourceError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[Finite, Field(ge=0)]
TopP = Annotated[Finite, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1)]
MinP = Annotated[Finite, Field(ge=0, le=1)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
# transformers and vLLM take any positive number; beyond these, logits overflow.
RepetitionPenalty = Annotated[Finite, Field(ge=0.01, le=100)]

# Fields of transformers that change what is generated, with the values that change nothing.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "length_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "num_beams": (1,),
    "guidance_scale": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "stop_strings": ([],),
}


class Advice(BaseModel):
    """The sampling parameters that a checkpoint recommends; None where it says nothing."""

    model_config = ConfigDict(strict=True, extra="ignore")

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


def read_advice(generation: dict[str, Any], directory: str) -> tuple[dict[str, float], list[str]]:
    """What a checkpoint recommends, by the names of `Advice`, and a line for the log where that, or what it also
    asks for and does not get, is worth one.

    Args:
        generation: the content of ``generation_config.json``.

    Raises:
        SourceError: a value is none that a request could have, either.
    """
    try:
        advice = Advice.model_validate(generation).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise SourceError(
            f"generation_config.json of {directory!r} recommends {name} {generation[name]!r}: {first['msg']}. Correct it "
            "there, or remove it."
        ) from None
    notes = []
    if advice:
        told = ", ".join(f"{name} {value:g}" for name, value in advice.items())
        notes.append(f"where a request says nothing else: {told} (generation_config.json)")
    ignored = [
        name
        for name, neutral in _NOT_HONOURED.items()
        if generation.get(name) is not None and generation[name] not in neutral
    ]
    if ignored:
        notes.append(f"generation_config.json also asks for {', '.join(ignored)}, which is not supported and left out")
    return advice, notes
