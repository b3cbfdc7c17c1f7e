"""Scores through an OpenAI-compatible endpoint, so that what is measured is what is served.

`/v1/completions` scores a prompt with ``echo`` and ``logprobs``; prompts go as token ids, so the text is cut into
tokens here, once, and the same in every comparison. Whatever comes back is checked before it counts: an endpoint
that is down, refuses, serves another model, stalls or answers with something else is an error that says so.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import HalveError, UsageError, did_you_mean, one_line
from serve.loopback import is_loopback
from serve.measure.scoring import Done, Scored, finite

Result = TypeVar("Result")
# Else an endpoint that takes up what generation_config.json recommends, as halve and vLLM do, would not answer greedily.
_NO_PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0, "extra_body": {"repetition_penalty": 1}}
_RETRIES = 2  # of connections that break and of "busy" (429, 5xx); an answer that is wrong is not asked for again


class EndpointError(HalveError):
    """An endpoint did not do what it was asked."""


class _Logprobs(BaseModel):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _Choice(BaseModel):
    index: int
    text: str
    logprobs: _Logprobs | None = None


class _Answer(BaseModel):
    choices: list[_Choice]


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


class EndpointRunner:
    """A `Runner` over an endpoint.

    Args:
        url: ends in ``/v1``.
        model: its name there; None takes the only one.
        max_length: the most tokens of a prompt where the endpoint does not say (vLLM and halve do).
        timeout: seconds for one answer, from the first byte sent to the last one received.
        concurrency: requests that are under way at once.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        max_length: int,
        timeout: float = 120.0,
        concurrency: int = 1,
    ) -> None:
        if not _is_address(url):
            raise UsageError(
                f"--url {url!r} is not the address of an endpoint; give something like http://host:8000/v1"
            )
        self.url, self._wanted = url.rstrip("/"), model
        self._key = api_key or "none"  # the client insists on one
        self._fallback_length = max_length
        self._timeout, self._concurrency = timeout, concurrency

    def __enter__(self) -> Self:
        """Connects. Raises UsageError where nobody answers, or the model is not there."""
        self._runner = asyncio.Runner()
        try:
            self._client = AsyncOpenAI(
                base_url=self.url,
                api_key=self._key,
                max_retries=_RETRIES,
                timeout=self._timeout,
                http_client=DefaultAsyncHttpxClient(trust_env=False) if is_loopback(self.url) else None,
            )
            self._runner.run(self._choose_model())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if hasattr(self, "_client"):
            self._runner.run(self._client.close())
        self._runner.close()

    async def _choose_model(self) -> None:
        try:
            served = (await self._ask("/models", self._client.models.with_raw_response.list, _Models)).data
        except EndpointError as error:
            raise UsageError(str(error)) from None
        names = [model.id for model in served]
        if self._wanted is None and len(names) != 1:
            raise UsageError(f"{self.url} serves {len(names)} models ({', '.join(names)}); choose one with --model")
        if self._wanted is not None and self._wanted not in names:
            raise UsageError(f"{self.url} has no model {self._wanted!r}{did_you_mean(self._wanted, names)}")
        chosen = served[0 if self._wanted is None else names.index(self._wanted)]
        self.model = chosen.id
        self.max_length = min(self._fallback_length, chosen.max_model_len or self._fallback_length) - 1
        if self.max_length < 1:
            raise EndpointError(f"{self.url} says that {self.model!r} reads {chosen.max_model_len} tokens")

    def score(self, prompts: Sequence[list[int]], done: Done = lambda count: None) -> list[Scored]:
        async def one(number: int) -> Scored:
            ids = prompts[number]
            # No token is wanted after the prompt; servers that insist on one (it is cut off here) have room for it.
            choice = await self._complete(ids, max_tokens=0, echo=True, logprobs=1)
            found = choice.logprobs
            if found is None or min(len(found.token_logprobs), len(found.top_logprobs)) < len(ids):
                raise EndpointError(
                    f"{self.url} did not score the {len(ids)} tokens of a prompt; it has to support echo together "
                    "with logprobs and prompts of token ids, as halve and vLLM do"
                )
            logprobs, best = found.token_logprobs[1 : len(ids)], found.top_logprobs[1 : len(ids)]
            if any(value is None for value in logprobs) or not all(best):
                raise EndpointError(f"{self.url} left log-probabilities of a prompt out")
            values = [float(value) for value in logprobs if value is not None]
            return finite(Scored(values, [max(top.values()) for top in best if top]), number)

        return self._all(one, len(prompts), done)

    def generate(
        self, jobs: Sequence[tuple[list[int], int, tuple[str, ...]]], done: Done = lambda count: None
    ) -> list[str]:
        async def one(number: int) -> str:
            ids, most, stop = jobs[number]
            return (await self._complete(ids, max_tokens=most, stop=list(stop) or None, **_NO_PENALTIES)).text

        return self._all(one, len(jobs), done)

    def _all(self, one: Callable[[int], Awaitable[Result]], count: int, done: Done) -> list[Result]:
        """``one`` of 0 .. count - 1, in order, ``concurrency`` at once; the first error ends them all."""

        async def run() -> list[Result]:
            results: dict[int, Result] = {}
            numbers = iter(range(count))

            async def worker() -> None:
                for number in numbers:
                    results[number] = await one(number)
                    done(len(results))

            workers = [asyncio.ensure_future(worker()) for _ in range(self._concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            return [results[number] for number in range(count)]

        return self._runner.run(run())

    async def _complete(self, ids: list[int], **fields: Any) -> _Choice:
        fields = {name: value for name, value in fields.items() if value is not None}

        async def send() -> Any:
            return await self._client.completions.with_raw_response.create(
                model=self.model, prompt=ids, temperature=0, **fields
            )

        answer = await self._ask("/completions", send, _Answer)
        if len(answer.choices) != 1:
            raise EndpointError(f"{self.url}/completions gave {len(answer.choices)} choices where one was asked for")
        return answer.choices[0]

    async def _ask(self, path: str, send: Callable[[], Awaitable[Any]], form: type[BaseModel]) -> Any:
        """The answer in its form. Raises EndpointError."""
        where = self.url + path
        try:
            # The client's own time limit is one of silence; an endpoint that drips would hold us for ever.
            async with asyncio.timeout(self._timeout):
                text: str = (await send()).http_response.text
        except (TimeoutError, openai.APITimeoutError):
            raise EndpointError(
                f"{where} did not answer within {self._timeout:g} s; it stalls, or it needs a longer --timeout"
            ) from None
        except openai.APIStatusError as error:
            raise EndpointError(f"{where} refused ({error.status_code}): {_message(error)}") from None
        except openai.APIConnectionError as error:
            reason = one_line(error.__cause__ or error)
            raise EndpointError(f"{where} cannot be reached: {reason}; is it running? (`halve serve DIR`)") from None
        except (openai.APIError, ValueError) as error:
            raise EndpointError(f"{where} broke off: {one_line(error)}") from None
        try:
            return form.model_validate(json.loads(text))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise EndpointError(f"{where} did not answer as an OpenAI endpoint: {place}: {first['msg']}") from None
        except (ValueError, RecursionError):
            raise EndpointError(f"{where} answered with something that is not JSON; is it an endpoint?") from None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        return (
            parts.scheme in ("http", "https")
            and bool(host)
            and parts.port != 0
            and url.isprintable()
            and " " not in url
        )
    except ValueError:  # of a port, an IPv6 address or a name with an empty part
        return False


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or one_line(error)).split())[:300]
