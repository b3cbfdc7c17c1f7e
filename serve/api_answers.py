"""The answers of the endpoint, whole or in chunks, as the dictionaries that become JSON.

A `Style` knows how one kind of completion looks. It is fed deltas and keeps, for each choice, what the next
chunk depends on.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve.engines.base import Delta, TokenLogprob
from serve.engines.text import TokenPieces

LOWEST = -9999.0  # JSON has no infinity; this is what OpenAI writes for it


class Style(Protocol):
    """Builds the choices of one answer, and the envelope around them."""

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """The choice of a streamed chunk, or None if nothing is to be shown yet."""
        ...

    def add(self, index: int, delta: Delta) -> None:
        """Gathers for `whole`."""
        ...

    def whole(self) -> list[dict[str, Any]]: ...

    def envelope(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]: ...


@dataclass
class _Choice:
    text: str = ""
    logprobs: dict[str, list] = field(default_factory=dict)
    finish_reason: str | None = None
    started: bool = False

    def gather(self, text: str, logprobs: dict[str, list] | None, finish_reason: str | None) -> None:
        self.text += text
        for name, values in (logprobs or {}).items():
            self.logprobs.setdefault(name, []).extend(values)
        self.finish_reason = finish_reason or self.finish_reason


class ChatStyle:
    """`chat.completion` and its chunks."""

    def __init__(self, model: str, pieces: TokenPieces, count: int, *, logprobs: bool) -> None:
        self._id, self._created, self._model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._pieces, self._with_logprobs = pieces, logprobs
        self._choices = [_Choice() for _ in range(count)]

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        choice = self._choices[index]
        shown: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if not choice.started:
            choice.started = True
            shown = {"role": "assistant", "content": delta.text}
        elif not delta.text and not delta.logprobs and delta.finish_reason is None:
            return None
        return {
            "index": index,
            "delta": shown,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def add(self, index: int, delta: Delta) -> None:
        self._choices[index].gather(delta.text, self._logprobs(delta.logprobs), delta.finish_reason)

    def whole(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": {"content": [], **choice.logprobs} if self._with_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]

    def envelope(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {
            "id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices
        }  # fmt: skip

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, list] | None:
        if not self._with_logprobs or not entries:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token_id, entry.logprob),
                    "top_logprobs": [self._token(token, logprob) for token, logprob in entry.top],
                }
                for entry in entries
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._pieces.text(token),
            "logprob": max(logprob, LOWEST),
            "bytes": list(self._pieces.bytes(token)),
        }


class CompletionStyle:
    """`text_completion`, whose logprobs are four parallel lists.

    ``echoes`` holds for each choice the (text, token ids) of its prompt where that is to be repeated.
    """

    def __init__(
        self,
        model: str,
        pieces: TokenPieces,
        count: int,
        *,
        logprobs: bool,
        echoes: Sequence[tuple[str, Sequence[int]]] | None = None,
    ) -> None:
        self._id, self._created, self._model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._pieces, self._with_logprobs, self._echoes = pieces, logprobs, echoes
        self._choices = [_Choice() for _ in range(count)]
        self._echoed = [0] * count  # characters of the prompt before the answer

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        text, logprobs = self._shown(index, delta)
        if not text and not logprobs and delta.finish_reason is None:
            return None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def add(self, index: int, delta: Delta) -> None:
        self._choices[index].gather(*self._shown(index, delta), delta.finish_reason)

    def whole(self) -> list[dict[str, Any]]:
        empty = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        return [
            {
                "index": index,
                "text": choice.text,
                "logprobs": {**empty, **choice.logprobs} if self._with_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]

    def envelope(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        return {
            "id": self._id, "object": "text_completion", "created": self._created, "model": self._model,
            "choices": choices,
        }  # fmt: skip

    def _shown(self, index: int, delta: Delta) -> tuple[str, dict[str, list] | None]:
        """The text and the logprobs of a delta, with those of the prompt before the first one."""
        text, parts = delta.text, []
        if self._echoes is not None and not self._choices[index].started:
            prompt, ids = self._echoes[index]
            text = prompt + text
            first = TokenLogprob(ids[0], float("nan"))
            parts.append((0, [first, *delta.prompt_logprobs]))
            self._echoed[index] = len(prompt)
        self._choices[index].started = True
        if delta.logprobs:
            parts.append((self._echoed[index] + delta.logprobs_at, delta.logprobs))
        if not self._with_logprobs or not parts:
            return text, None
        lists: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for start, entries in parts:
            self._append(lists, entries, start)
        return text, lists

    def _append(self, lists: dict[str, list], entries: Sequence[TokenLogprob], start: int) -> None:
        lists["text_offset"] += self._pieces.offsets([entry.token_id for entry in entries], start)
        for entry in entries:
            name = self._pieces.text(entry.token_id)
            lists["tokens"].append(name)
            if entry.logprob != entry.logprob:  # NaN: nothing precedes the first token of a prompt
                lists["token_logprobs"].append(None)
                lists["top_logprobs"].append(None)
                continue
            logprob = max(entry.logprob, LOWEST)
            top = {self._pieces.text(token): max(value, LOWEST) for token, value in reversed(entry.top)}
            lists["token_logprobs"].append(logprob)
            lists["top_logprobs"].append({**dict(reversed(top.items())), name: logprob})
