"""Tokens to text, piece by piece: whole characters only, and stop strings that span tokens.

Two views are needed. A *stream* decodes tokens in context, as the tokenizer would decode them all at once. A
*piece* is the bytes of one token alone, which log-probabilities are reported with.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
# Tokens that are decoded again as context: enough for rules that look at neighbours (a stripped first space,
# a character of up to four bytes).
CONTEXT = 6
WINDOW = 24


def whole_characters(text: str) -> str:
    """Drops what may be the beginning of a character.

    A byte-level decoder shows an unfinished character as one U+FFFD, a byte-fallback decoder shows one for
    each of its bytes, of which there are at most three.
    """
    for _ in range(3):
        text = text.removesuffix(REPLACEMENT)
    return text


class TextStream:
    """Decodes a growing sequence of tokens; only ever appends.

    ``context`` are the tokens before it, which are not returned but decide how the first one is written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-CONTEXT:])
        self._done = len(self._decode()) if context else 0

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        self._window.append(token)
        text = self._decode()
        ready = whole_characters(text)
        new = ready[self._done :]
        self._done = max(self._done, len(ready))
        if len(self._window) > WINDOW and ready == text:
            self._window = self._window[-CONTEXT:]
            self._done = len(self._decode())
        return new

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopScanner:
    """Holds back text that may begin a stop string, and cuts at the first one that is whole.

    Positions count characters since the beginning of the stream.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.released = 0

    @property
    def position(self) -> int:
        """Where the next character goes."""
        return self.released + len(self._held)

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found; it and what follows are dropped)."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._release(min(found)), True
        overlap = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._release(len(self._held) - overlap), False

    def flush(self) -> str:
        """The rest, once nothing follows."""
        return self._release(len(self._held))

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        self.released += len(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class TokenPieces:
    """The bytes of single tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        kinds = _decoder_kinds(decoder)
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._added = set(tokenizer.added_tokens_decoder)

    def bytes(self, token: int) -> bytes:
        """What the token stands for, exactly, also where that is a part of a character."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""  # a row of the output layer that has no token
        if token in self._added:
            return piece.encode()
        if self._alphabet is not None and all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        if self._byte_fallback:
            if len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()

    def text(self, token: int) -> str:
        """The token as a string; a part of a character in OpenAI's notation, ``bytes:\\xe2\\x82``."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, tokens: Sequence[int], start: int = 0) -> list[int]:
        """Where each token begins in the text, in characters; special tokens take no room in it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        special = set(self._tokenizer.all_special_ids)
        offsets = []
        for token in tokens:
            offsets.append(start)
            if token not in special:
                start += len(decoder.decode(self.bytes(token)))
        return offsets


def _decoder_kinds(decoder: dict | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_kinds(part) for part in decoder.get("decoders", ())))


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2): bytes that print stand for themselves,
    the others take the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
