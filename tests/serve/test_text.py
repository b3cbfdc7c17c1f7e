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
    stream = TextStream(PIECES, TOKENIZER(before, add_special_tokens=False).input_ids)
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


def byte_fallback_tokenizer(*last: decoders.Decoder, words: tuple[str, ...] = ("\u2581the", "\u2581cat", "b")):
    """Llama 2's way: a character outside the vocabulary is spelled in tokens of one byte. Ids 0 to 255 are the bytes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "<s>": 257}
    vocab |= {word: 258 + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


LLAMA = byte_fallback_tokenizer(decoders.Strip(" ", 1, 0))
GEMMA = byte_fallback_tokenizer()
BOS, THE, CAT, B = 257, 258, 259, 260


def test_byte_fallback_tokenizers():
    pieces = TokenPieces(LLAMA)
    stream = TextStream(pieces, [THE])
    assert [stream.push(token) for token in (CAT, 0xE2, 0x82, 0xAC, CAT)] == [" cat", "", "", "€", " cat"]
    assert pieces.bytes(CAT) == b" cat"
    assert pieces.text(0xE2) == "bytes:\\xe2"


@given(st.sampled_from([LLAMA, GEMMA]), st.lists(st.sampled_from(["the", "cat", "b", "€", "日", "語", "😀", "é", "\ufffd"]), max_size=30),
       st.integers(0, 30))  # fmt: skip
def test_characters_of_several_tokens_one_after_the_other(tokenizer, characters, given):
    """As the tokenizer decodes them all at once, wherever the prompt ends, and each as soon as its last byte is there."""
    words = {"the": [THE], "cat": [CAT], "b": [B]}
    tokens = [BOS, *(token for piece in characters for token in words.get(piece, piece.encode()))]
    stream = TextStream(TokenPieces(tokenizer), tokens[: given + 1])
    parts = [stream.push(token) for token in tokens[given + 1 :]]
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = tokenizer.decode(tokens[: given + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    shown = "".join(parts)
    assert whole.endswith(shown)
    started = whole[: len(whole) - len(shown)]  # at most the character that the prompt began is in both
    assert before.rstrip("\ufffd").startswith(started.rstrip("\ufffd")) or "\ufffd" in before
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in characters


def test_added_tokens_are_written_by_the_same_rules():
    """Gemma has runs of spaces among them, and lines."""
    tokenizer = byte_fallback_tokenizer(words=("\u2581the", "\u2581cat", "b", "<0xZZ>"))
    tokenizer.add_tokens(["\u2581\u2581", "\n", "é", "<0x0B>x"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    added = [
        tokenizer.convert_tokens_to_ids(name) for name in ("\u2581\u2581", "\n", "é", "<0x0B>x", "<0xZZ>", "<end>")
    ]
    tokens = [BOS, THE, *added, 0x0A, CAT, *added]
    stream = TextStream(TokenPieces(tokenizer), [BOS])
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(stream.push(token) for token in tokens[1:]) == whole
    assert whole.startswith(" the  \né<0x0B>x<0xZZ>\n cat")

    bytes_alone = Tokenizer(models.BPE({"a": 0, "Ġb": 1}, []))
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
    tokenizer.add_tokens(["<think>", "日本", "Ġ"])
    tokens = [0, 1, 2, 3, 4, 0]
    stream = TextStream(TokenPieces(tokenizer), [0])
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(stream.push(token) for token in tokens[1:]) == whole.removeprefix("a")


def test_bytes_that_are_no_text_cost_nothing_after_them():
    stream = TextStream(TokenPieces(LLAMA), [THE])
    pushed = (0xE6, 0x97, 0xA5, 0xFF, 0xE6, 0x97, 0xA5, CAT, 0xE6, CAT, 0xE6)
    assert [stream.push(token) for token in pushed] == [
        "",
        "",
        "日",
        "\ufffd",
        "",
        "",
        "日",
        " cat",
        "",
        "\ufffd cat",
        "",
    ]


def test_the_first_space_is_stripped_once():
    for tokenizer, first in ((LLAMA, "the"), (GEMMA, " the")):
        for context in ([], [BOS]):
            stream = TextStream(TokenPieces(tokenizer), context)
            assert [stream.push(THE), stream.push(THE)] == [first, " the"]
        assert TextStream(TokenPieces(tokenizer), [BOS, CAT]).push(THE) == " the"


def test_other_decoders_look_at_neighbours():
    """WordPiece's text is not that of its tokens, one after the other."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "##s": 3}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    pieces = TokenPieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
    assert not pieces.are_text
    stream = TextStream(pieces, [1])
    assert [stream.push(token) for token in (2, 3, 1)] == [" cat", "s", " the"]


@pytest.mark.parametrize("text", ["the cat", "naïve €5 🐈 the"])
def test_offsets_are_character_positions(text):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    offsets = PIECES.offsets(ids, 100)
    for offset, token in zip(offsets, ids, strict=True):
        piece = PIECES.text(token)
        if not piece.startswith("bytes:"):
            assert text[offset - 100 :].startswith(piece)
