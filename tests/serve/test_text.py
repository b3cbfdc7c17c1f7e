"""Streams of text: whole characters, stop strings over token borders, bytes of tokens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from serve.engines.text import StopScanner, TextStream, TokenPieces
from tests.serve.conftest import build_tokenizer

TOKENIZER = build_tokenizer()
PIECES = TokenPieces(TOKENIZER)


@given(st.text(max_size=80), st.text(max_size=10))
def test_a_stream_is_the_text_and_never_half_a_character(text, before):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    stream = TextStream(TOKENIZER, TOKENIZER(before, add_special_tokens=False).input_ids)
    parts = [stream.push(token) for token in ids]
    clean = text.rstrip("\ufffd")  # what cannot be told from the beginning of a character stays out
    assert "".join(parts).startswith(clean)
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
    assert b"".join(PIECES.bytes(token) for token in ids).decode() == text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
       st.lists(st.integers(0, 30)))  # fmt: skip
def test_a_stop_string_is_found_wherever_the_text_is_cut(text, stops, cuts):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    scanner, shown, stopped = StopScanner(stops), "", False
    for start, end in itertools.pairwise(edges):
        part, stopped = scanner.push(text[start:end])
        shown += part
        assert not any(stop in shown for stop in stops)
        if stopped:
            break
    else:
        shown += scanner.flush()
    first_end = min((at + len(stop) for stop in stops if (at := text.find(stop)) >= 0), default=None)
    assert stopped == (first_end is not None)
    assert text.startswith(shown)
    if not stopped:
        assert shown == text


def test_byte_fallback_tokenizers():
    """Llama 2's way: a character outside the vocabulary is spelled in tokens of one byte."""
    vocab = {"<unk>": 0, "\u2581the": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "\u2581cat": 5}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    stream = TextStream(fast, [1])
    assert [stream.push(token) for token in (5, 2, 3, 4, 5)] == [" cat", "", "", "€", " cat"]
    pieces = TokenPieces(fast)
    assert pieces.bytes(5) == b" cat"
    assert pieces.text(2) == "bytes:\\xe2"


@pytest.mark.parametrize("text", ["the cat", "naïve €5 🐈 the"])
def test_offsets_are_character_positions(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    offsets = PIECES.offsets(ids, 100)
    for offset, token in zip(offsets, ids, strict=True):
        piece = PIECES.text(token)
        if not piece.startswith("bytes:"):
            assert text[offset - 100 :].startswith(piece)
