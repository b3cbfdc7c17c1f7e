"""How much one request may ask for: bytes of its body, sequences, log-probabilities. Engines limit how many wait in all.

The event loop serves everyone, so nothing that grows with a request may run on it for long.
"""

from __future__ import annotations

from collections import deque

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api_errors import ApiError, bad_request

MAX_BODY_BYTES = 8 * 2**20  # a prompt of a million token ids is about 7 MB of JSON
MAX_CHOICES = 1024  # prompts times n
MAX_PROMPT_LOGPROBS = (
    2**19
)  # of prompts, in one answer; a context of 128 Ki tokens has room for three alternatives each


class LimitBody:
    """Refuses bodies of more than `MAX_BODY_BYTES` before anything is made of them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"")
        too_long = announced.isdigit() and (len(announced) > 18 or int(announced) > MAX_BODY_BYTES)
        arrived: deque[Message] = deque()
        size, more = 0, True
        while more and not too_long:
            message = await receive()
            arrived.append(message)
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            too_long = size > MAX_BODY_BYTES
        if too_long:
            error = ApiError(
                413, f"The body has more than {MAX_BODY_BYTES // 2**20} MiB. Send several smaller requests."
            )
            await error.response()(scope, receive, send)
            return

        async def again() -> Message:
            return arrived.popleft() if arrived else await receive()

        await self._app(scope, again, send)


def check_choices(prompts: int, n: int) -> None:
    """Raises `ApiError` where a request asks for too many sequences."""
    if prompts * n > MAX_CHOICES:
        raise bad_request(
            f"prompt: {prompts} prompts with n = {n} are {prompts * n} answers; one request may ask for {MAX_CHOICES}. "
            "Send several requests.",
            "prompt",
        )


def check_logprobs(tokens: int, n: int, logprobs: int | None) -> None:
    """Raises `ApiError` where a request wants more log-probabilities of its prompts than one answer may hold.

    Args:
        tokens: of all prompts.
        logprobs: alternatives to each token; None asks for none at all.
    """
    count = 0 if logprobs is None else tokens * n * (1 + logprobs)
    if count > MAX_PROMPT_LOGPROBS:
        raise bad_request(
            f"logprobs: echo with {tokens} tokens of prompts, n = {n} and logprobs = {logprobs} is {count} log-probabilities; "
            f"one request may ask for {MAX_PROMPT_LOGPROBS}. Send several requests.",
            "logprobs",
        )
