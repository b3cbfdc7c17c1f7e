"""The OpenAI-compatible endpoint, for engines that bring none of their own.

    GET  /v1/models   /health   /version   /metrics
    POST /v1/chat/completions   /v1/completions        both whole and streamed (server-sent events)

`create_app` binds the routes to one engine with one model. Requests are validated in `api_models`, run in
`api_generation`, written in `api_answers`; errors have OpenAI's shape (`api_errors`).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from compress.errors import did_you_mean, shortened
from serve.api_answers import ChatStyle, CompletionStyle, Style
from serve.api_errors import ApiError, RequireKey, bad_request, install_error_handlers
from serve.api_generation import ClientGoneError, Generation, Job, unless_disconnected
from serve.api_json import dumps, dumps_in_pieces
from serve.api_limits import LimitBody, check_choices, check_logprobs
from serve.api_metrics import Metrics
from serve.api_models import ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from serve.engines.base import Delta, Engine, SamplingParams
from serve.engines.text import TokenPieces

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is nginx's name for this in logs
Result = TypeVar("Result")
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat gets all that is left of the context


class EventStream(StreamingResponse):
    """Server-sent events whose source is told when the stream ends, however it ends."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


class Endpoint:
    """What the routes do, for one engine that is loaded."""

    def __init__(self, engine: Engine, model_name: str, root: str) -> None:
        self.engine, self.model_name, self.root = engine, model_name, root
        self.metrics = Metrics(engine, model_name)
        self._pieces = TokenPieces(engine.tokenizer)
        self._created = int(time.time())

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.model(self.model_name)]}

    def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return {
            "id": self.model_name, "object": "model", "created": self._created, "owned_by": "halve",
            "root": self.root, "parent": None, "max_model_len": self.engine.max_model_len,
        }  # fmt: skip

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self._check_model(body.model)
        prompt = await asyncio.to_thread(self._render, body)  # a long one would hold up everyone else
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if limit is None:
            limit = self._recommended_length(prompt)
        params = self._sampling(body, [prompt], limit, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        style = ChatStyle(self.model_name, self._pieces, body.n, logprobs=body.logprobs)
        return await self._answer(body, request, Job([prompt], params, body.n), style)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self._check_model(body.model)
        check_choices(len(body.prompt), body.n)
        prompts = await asyncio.to_thread(
            lambda: [self._tokens("prompt", prompt, body.add_special_tokens) for prompt in body.prompt]
        )
        limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        params = self._sampling(
            body, prompts, limit, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None
        )
        echoes = None
        if body.echo:
            check_logprobs(sum(map(len, prompts)), body.n, body.logprobs)
            texts = await asyncio.to_thread(lambda: [self._text(given) for given in body.prompt])
            echoes = [pair for pair in zip(texts, prompts, strict=True) for _ in range(body.n)]
        count = len(prompts) * body.n
        style = CompletionStyle(self.model_name, self._pieces, count, logprobs=body.logprobs is not None, echoes=echoes)
        return await self._answer(body, request, Job(prompts, params, body.n), style)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            hint = did_you_mean(name, [self.model_name])
            raise ApiError(
                404, f"There is no model {shortened(name)!r} here{hint}.", param="model", code="model_not_found"
            )

    def _tokens(self, param: str, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            ids = self._encode(param, prompt, add_special_tokens)
            beginning = self.engine.tokenizer.bos_token_id
            ids = ids or ([beginning] if isinstance(beginning, int) else [])
        else:
            ids = prompt
        if not ids:
            raise bad_request(f"{param}: is empty, and this model has no token to begin with.", param)
        self._check_token_ids(param, ids)
        return ids

    def _encode(self, param: str, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise bad_request(f"{param}: is not Unicode text: {error.reason}.", param) from error
        # Too long a text is an error of the request, told with both numbers, not a warning in our log.
        return list(self.engine.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _check_token_ids(self, param: str, ids: list[int]) -> None:
        wrong = [token for token in ids if not 0 <= token < self.engine.vocab_size]
        if wrong:
            raise bad_request(
                f"{param}: {wrong[0]} is not a token id; the model has 0 to {self.engine.vocab_size - 1}.",
                param,
            )

    def _text(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        text = self.engine.tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _render(self, body: ChatRequest) -> list[int]:
        tokenizer = self.engine.tokenizer
        if not tokenizer.chat_template:
            raise bad_request(
                "This model has no chat template, so it cannot take messages; use /v1/completions.",
                "messages",
            )
        own = {"tokenize", "conversation", "add_generation_prompt", "chat_template", "tools", "return_dict"}
        if taken := own & body.chat_template_kwargs.keys():
            raise bad_request(f"chat_template_kwargs: {min(taken)} is not for the template.", "chat_template_kwargs")
        messages = [message.for_template() for message in body.messages]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **body.chat_template_kwargs
            )
        except Exception as error:  # templates are programs of the model's authors and raise what they like
            raise bad_request(f"messages: the chat template refuses them: {error}", "messages") from error
        assert isinstance(text, str)
        # The template has written the special tokens itself.
        return self._tokens("messages", text, False)

    def _recommended_length(self, prompt: list[int]) -> int | None:
        """How long an answer may be where the request names no limit: as the checkpoint says, or to the end of the context."""
        recommended = self.engine.default_sampling.get("max_new_tokens")
        if recommended is None:
            return None
        left = self.engine.max_model_len - len(prompt)
        return min(int(recommended), left) if left > 0 else None

    def _sampling(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        limit: int | None,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The parameters of a request, once they are known to fit the model. What it does not name is as the
        checkpoint recommends it, as in vLLM."""
        longest, context = max(len(prompt) for prompt in prompts), self.engine.max_model_len
        # A prompt that fills the context leaves nothing to generate, but it can be scored.
        needed = longest + (1 if limit is None else limit)
        if needed > context:
            asked = "" if limit is None else f" and asks for {limit} more"
            raise bad_request(
                f"This model's maximum context length is {context} tokens, but the prompt has {longest} "
                f"tokens{asked}. Shorten the prompt or lower max_tokens.",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        bias = body.bias()
        self._check_token_ids("logit_bias", list(bias))
        self._check_token_ids("stop_token_ids", body.stop_token_ids)
        recommended = self.engine.default_sampling

        def given_or(name: str, fallback: float) -> float:
            value = getattr(body, name)
            return recommended.get(name, fallback) if value is None else value

        return SamplingParams(
            max_tokens=context - longest if limit is None else limit,
            temperature=given_or("temperature", 1.0),
            top_p=given_or("top_p", 1.0),
            top_k=max(0, int(given_or("top_k", 0))),
            min_p=given_or("min_p", 0.0),
            seed=body.seed,
            stop=body.stop,
            stop_token_ids=frozenset(body.stop_token_ids),
            ignore_eos=body.ignore_eos,
            frequency_penalty=given_or("frequency_penalty", 0.0),
            presence_penalty=given_or("presence_penalty", 0.0),
            repetition_penalty=given_or("repetition_penalty", 1.0),
            logit_bias=bias,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    async def _answer(self, body: GenerationRequest, request: Request, job: Job, style: Style) -> Response:
        generation = Generation(self.engine, self.metrics, job)
        if body.stream:
            return EventStream(_events(generation, style, body.stream_options or StreamOptions()), generation.cancel)
        try:
            await unless_disconnected(request, _gather(generation, style))
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            generation.cancel()
        return await asyncio.to_thread(lambda: _whole(style, generation))


def _whole(style: Style, generation: Generation) -> Response:
    answer = {**style.envelope(style.whole(), streamed=False), "usage": generation.usage}
    return Response(dumps_in_pieces(answer), media_type="application/json")


async def _gather(generation: Generation, style: Style) -> None:
    async for index, delta in generation.deltas():
        await _aside(delta, lambda index=index, delta=delta: style.add(index, delta))


async def _aside(delta: Delta, write: Callable[[], Result]) -> Result:
    """Writes a delta: in a thread where it has the log-probabilities of a prompt, which may be many."""
    return await asyncio.to_thread(write) if delta.prompt_logprobs else write()


async def _events(generation: Generation, style: Style, options: StreamOptions) -> AsyncIterator[str]:
    def event(index: int, delta: Delta) -> str | None:
        choice = style.chunk(index, delta)
        if choice is None:
            return None
        usage = {"usage": generation.usage if options.continuous_usage_stats else None} if options.include_usage else {}
        write = dumps_in_pieces if delta.prompt_logprobs else dumps
        return _event({**style.envelope([choice], streamed=True), **usage}, write)

    try:
        async with aclosing(generation.deltas()) as deltas:
            async for index, delta in deltas:
                written = await _aside(delta, lambda index=index, delta=delta: event(index, delta))
                if written is not None:
                    yield written
        if options.include_usage:
            yield _event({**style.envelope([], streamed=True), "usage": generation.usage})
    except ApiError as error:  # the status line is long sent; clients know this form
        yield _event(error.body)
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any], write: Callable[[Any], str] = dumps) -> str:
    return f"data: {write(data)}\n\n"


def create_app(engine: Engine, model_name: str, *, root: str = "", api_key: str | None = None) -> FastAPI:
    """The ASGI application over an engine that is loaded; ``root`` is shown in /v1/models."""
    version = _version()
    app = FastAPI(title="halve", version=version, redirect_slashes=False)
    endpoint = Endpoint(engine, model_name, root)
    install_error_handlers(app)
    app.add_middleware(LimitBody)
    if api_key is not None:
        app.add_middleware(RequireKey, key=api_key)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return endpoint.models()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return endpoint.model(name)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await endpoint.chat(body, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await endpoint.complete(body, request)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if engine.failure is not None:
            raise ApiError(503, engine.failure, code="engine_dead")
        return {"status": "ok"}

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(endpoint.metrics.expose(), media_type=CONTENT_TYPE_LATEST)

    return app


def _version() -> str:
    try:
        return importlib.metadata.version("halve")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
