"""The requests of the endpoint, as pydantic models: the OpenAI fields that the engine honours, and vLLM's
`top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `ignore_eos`, `add_special_tokens` and `chat_template_kwargs`.

What would change the answer and is not supported is refused, never ignored. A field that cannot change it
(`user`, `store`, ...) is accepted, and so is an unsupported one at the value that turns it off.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from compress.errors import did_you_mean, shortened
from serve.api_errors import bad_request
from serve.engines.base import MAX_LOGPROBS
from serve.engines.ranges import Finite, MinP, Penalty, RepetitionPenalty, Temperature, TopK, TopP

MAX_BIASES = 1024  # they are added at each token
LONGEST_ID = 18  # digits; Python itself refuses to read a number of thousands of them

HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id",
    "prompt_cache_retention", "parallel_tool_calls", "priority",
}  # fmt: skip

# Standard fields of OpenAI or vLLM that are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "return_tokens_as_token_ids": (False,),
    "logits_processors": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


def _one_or_more_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(s, str) and s for s in stops):
        raise ValueError("has to be a non-empty string or a list of at most 16 of them")
    return tuple(stops)


def _prompts(value: Any) -> Any:
    """All four forms of `prompt` as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_ids(value)):
        return [value]
    if isinstance(value, list) and value and all(isinstance(p, str) or _is_ids(p) for p in value):
        return value
    raise ValueError("has to be a string, a list of strings, a list of token ids or a list of such lists")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


Stops = Annotated[tuple[str, ...], BeforeValidator(_one_or_more_stops)]
Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts)]


class StreamOptions(BaseModel):
    """OpenAI's, and vLLM's ``continuous_usage_stats``. ``include_obfuscation`` cannot change the answer."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(BaseModel):
    """What both kinds of completion share. None means that the field was not given."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    model: str | None = None
    max_tokens: int | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = ()
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_honoured(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in cls.model_fields:
                # An explicit null is the same as leaving the field out.
                if value is not None or cls.model_fields[name].is_required():
                    kept[name] = value
            elif name in UNSUPPORTED:
                if value is not None and value not in UNSUPPORTED[name]:
                    raise bad_request(f"{name} is not supported by this server; leave it out.", name)
            elif name not in HARMLESS:
                hint = did_you_mean(name, cls.model_fields)
                raise bad_request(f"{shortened(name)} is not a field of this request{hint}.", name)
        if "stream_options" in kept and not kept.get("stream"):
            raise bad_request("stream_options is only allowed with stream: true.", "stream_options")
        return kept

    def bias(self) -> dict[int, float]:
        """logit_bias by token id. Raises `ApiError` for a key that is not a number."""
        if not all(key.isdecimal() and len(key) <= LONGEST_ID for key in self.logit_bias):
            raise bad_request("logit_bias: the keys have to be token ids.", "logit_bias")
        return {int(key): value for key, value in self.logit_bias.items()}


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. What a template may read goes on to it; other keys that clients send back (`refusal`, `annotations`, ...) are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_tools(cls, message: Any) -> Any:
        for field in ("tool_calls", "function_call"):
            if isinstance(message, dict) and message.get(field):
                raise bad_request(f"{field} in messages are not supported by this server.", "messages")
        return message

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: `developer` is the newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": text}
        given = {"name": self.name, "reasoning_content": self.reasoning_content}
        return turn | {key: value for key, value in given.items() if value is not None}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _logprobs_belong_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs is only allowed with logprobs: true.", "top_logprobs")
        return self
