"""Errors in OpenAI's shape, from everywhere: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from compress.errors import shortened
from serve.engines.base import EngineBusyError, EngineDeadError

LONGEST_MESSAGE = 4000  # characters; some repeat what a client sent


class ApiError(Exception):
    """An answer that is not the one asked for."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message = _printable(message[:LONGEST_MESSAGE])
        self.param = None if param is None else _printable(shortened(param))

    @property
    def body(self) -> dict[str, Any]:
        kinds: dict[int, str] = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status)


def _printable(text: str) -> str:
    """Escapes lone surrogates, which JSON can spell and a request may contain, but UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def install_error_handlers(app: FastAPI) -> None:
    """Gives every error of the application the same shape."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(EngineDeadError)
    async def _dead(request: Request, error: EngineDeadError) -> JSONResponse:
        return ApiError(503, str(error), code="engine_dead").response()

    @app.exception_handler(EngineBusyError)
    async def _busy(request: Request, error: EngineBusyError) -> JSONResponse:
        response = ApiError(429, str(error), code="queue_full").response()
        response.headers["retry-after"] = "1"
        return response

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _explain(error, request.headers.get("content-type", "")).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        allowed = Headers(error.headers).get("allow", "another method")
        messages = {
            404: f"There is no {where}; there are /v1/models, /v1/chat/completions and /v1/completions.",
            405: f"{where} is not allowed; this path takes {allowed}.",
        }
        answer = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
        response = answer.response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"The server failed: {type(error).__name__}.").response()


def _explain(error: RequestValidationError, content_type: str) -> ApiError:
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return bad_request(f"The body is not valid JSON: {reason} (at character {place[0] if place else 0}).")
    if not place:
        if "json" not in content_type:
            return bad_request(f"The body has to be JSON, of Content-Type application/json; it is {content_type!r}.")
        return bad_request(f"The body has to be a JSON object: {first['msg']}.")
    param = str(place[0])
    for part in place[1:]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.islower() and part.isidentifier() and part not in ("str", "int", "list"):
            param += f".{part}"  # other parts name the branch of a union, not a place in the body
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{param}: {message}", param)


class RequireKey:
    """Asks for the key on /v1 before anything of a request is read; /health and /metrics stay open."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1") and not self._allows(scope):
            error = ApiError(
                401,
                "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )
            response = error.response()
            response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        value = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = value.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self._digest)


def _digest(key: str | bytes) -> bytes:
    # Digests have one length, so comparing them does not tell how long the key is.
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
