"""Tokens to text, piece by piece: whole characters only, and stop strings that span tokens.

Two views are needed. A *stream* decodes tokens in context, as the tokenizer would decode them all at once. A
*piece* is the bytes of one token alone, which log-probabilities are reported with.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
# Where tokens have no bytes of their own: those that are decoded again as context, for rules that look at neighbours.
CONTEXT = 6
WINDOW = 24
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
LONGEST_CHARACTER = 4  # bytes, so at most as many tokens


class TextStream:
    """Decodes a growing sequence of tokens into whole characters; only ever appends.

    ``context`` are the tokens before it, which are not returned but decide how the first one is written.

    Where the text of tokens is that of their bytes, one after the other, they are decoded as bytes. Decoding all tokens again and comparing
    would not do: a byte-fallback decoder shows a run of bytes as nothing but U+FFFD while its last character is unfinished.
    """

    def __init__(self, pieces: TokenPieces, context: Sequence[int] = ()) -> None:
        self._stream = _ByteStream(pieces, context) if pieces.are_text else _WindowStream(pieces.tokenizer, context)

    def push(self, token: int) -> str:
        """The text that this token completes, often empty."""
        return self._stream.push(token)


class _ByteStream:
    """By the bytes of each token. Bytes that are no text become U+FFFD, as soon as that is certain."""

    def __init__(self, pieces: TokenPieces, context: Sequence[int]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in context[-LONGEST_CHARACTER:]:
            self._decoder.decode(pieces.shown(token))
        self._at_start = pieces.strips_first_space and not any(map(pieces.shown, context))

    def push(self, token: int) -> str:
        text = self._decoder.decode(self._pieces.shown(token))
        if text and self._at_start:
            self._at_start = False
            return text.removeprefix(" ")
        return text


class _WindowStream:
    """By decoding the last tokens together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-CONTEXT:])
        self._done = len(self._decode()) if context else 0

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode()
        ready = text.removesuffix(REPLACEMENT)  # which may be the beginning of a character
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
    """The bytes of single tokens.

    Attributes:
        are_text: the text of tokens is that of their bytes, one after the other.
        strips_first_space: but for a space that the first one begins with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        parts = list(_decoder_parts(decoder))
        kinds = {part["type"] for part in parts}
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._added = set(tokenizer.added_tokens_decoder)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._special = special if backend is not None else special.union(tokenizer.all_special_ids)
        self._known: dict[int, bytes] = {}
        self.are_text = (
            kinds <= {"ByteLevel", "Fuse"} if self._alphabet else self._byte_fallback and all(map(_is_usual, parts))
        )
        self.strips_first_space = self.are_text and "Strip" in kinds

    def bytes(self, token: int) -> bytes:
        """What the token stands for, exactly, also where that is a part of a character."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._bytes(token)
        return known

    def shown(self, token: int) -> bytes:
        """Its bytes, as far as they are part of the text: special tokens are not."""
        return b"" if token in self._special else self.bytes(token)

    def _bytes(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""  # a row of the output layer that has no token
        # (a decoder's rules are for added tokens, too: Gemma has runs of spaces among them)
        if self._alphabet is not None:
            spelled = all(character in self._alphabet for character in piece)
            return bytes(self._alphabet[character] for character in piece) if spelled else piece.encode()
        if self._byte_fallback:
            if _BYTE.fullmatch(piece):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("\u2581", " ").encode()
        if token in self._added:
            return piece.encode()
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()

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
        offsets = []
        for token in tokens:
            offsets.append(start)
            start += len(decoder.decode(self.shown(token)))
        return offsets


def _decoder_parts(decoder: dict | None) -> Iterator[dict]:
    """What a decoder is put together of."""
    if decoder is not None and decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _decoder_parts(part)
    elif decoder is not None:
        yield decoder


def _is_usual(part: dict) -> bool:
    """Whether it is of Llama's decoder, by which a token's text is that of its bytes."""
    if part["type"] == "Replace":
        return part["pattern"] == {"String": "\u2581"} and part["content"] == " "
    if part["type"] == "Strip":
        return (part["content"], part["start"], part["stop"]) == (" ", 1, 0)
    return part["type"] in ("ByteFallback", "Fuse")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2): bytes that print stand for themselves,
    the others take the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
