"""Both dialects, all reductions: what holds of every caption. What is CLIP BPE's own is in test_bpe.py."""

# ruff: noqa: RUF001 - captions hold what looks like something else
import itertools
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import word_classes, wordpiece
from pipeline.bpe import ClipBPE
from pipeline.captions import (
    CaptionEncoder,
    Pieces,
    TextReduction,
    caption_encoder,
    kept_block,
    kept_random,
    kept_syntax,
)
from pipeline.dialect import Dialect
from pipeline.philox import Stream, uniform
from pipeline.word_classes import wordpiece_classes
from pipeline.wordpiece import WordPiece, wordpiece_vocabulary

REDUCTIONS: tuple[TextReduction, ...] = get_args(TextReduction)
VOCABULARY = wordpiece_vocabulary().read_text(encoding="utf-8").splitlines()
IDS = {piece: number for number, piece in enumerate(VOCABULARY)}

# Letters with and without accents, digits, punctuation, controls, white space of many kinds, CJK, right-to-left, emoji
# with joiners, and what mojibake and HTML entities are made of.
CHARACTERS = (
    "abcdeABCDE sn't059.,-#&;lt<|>[]\t\n\r\0\x07\x1c\x7f\x85\xa0"
    "éÉñßœÂÃâ€™“”…—ſΩσЖя你好日本אבعر\u0301\u200d\u200f\u2028\u3000\ufeff\ufffd🐶👩"
)
# What every library takes for the same, whichever version of Unicode it knows.
known_texts = st.one_of(
    st.text(CHARACTERS, max_size=80), st.lists(st.sampled_from(VOCABULARY), max_size=20).map(" ".join)
)
captions_of_all_kinds = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")),
    st.text(CHARACTERS, max_size=120).map(str.encode),
    st.lists(st.sampled_from(VOCABULARY), max_size=40).map(lambda words: " ".join(words).encode()),
)


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def dialect(request: pytest.FixtureRequest) -> Dialect:
    if request.param == "wordpiece":
        return WordPiece()
    return ClipBPE(request.getfixturevalue("clip_vocabulary"))


@pytest.fixture(scope="module")
def wordpiece_dialect() -> Dialect:
    return WordPiece()


def draws_for(encoder: CaptionEncoder, number: int, seed: int = 0, epoch: int = 0) -> np.ndarray | None:
    return encoder.draws(seed, np.full(number, epoch), np.arange(number))


def encode(encoder: CaptionEncoder, captions: list[bytes], seed: int = 0) -> np.ndarray:
    return encoder.encode(captions, draws_for(encoder, len(captions), seed))


def whole(dialect: Dialect, caption: bytes) -> list[int]:
    """Every piece of a caption, without marks."""
    return dialect.tokenizer.encode(dialect.read(caption)).ids


def body(encoder: CaptionEncoder, row: np.ndarray, length: int) -> list[int]:
    """The kept pieces of a row, after a check of everything around them. length: pieces of the whole caption."""
    count = min(length, encoder.budget)
    ids = row.tolist()
    end = [] if encoder.dialect.end_id is None else [encoder.dialect.end_id]
    assert len(ids) == encoder.text_tokens
    assert ids[0] == encoder.dialect.start_id
    assert ids[1 + count :] == end + [0] * (len(ids) - 1 - count - len(end))
    return ids[1 : 1 + count]


def is_subsequence(part: list[int], of: list[int]) -> bool:
    rest = iter(of)
    return all(item in rest for item in part)


# --- WordPiece --------------------------------------------------------------------------------------------------------


def pieces(ids: np.ndarray) -> list[str]:
    return [VOCABULARY[i] for i in ids]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (b"a big Red apple", ["[CLS]", "a", "big", "red", "apple", "[PAD]", "[PAD]", "[PAD]"]),
        (b"", ["[CLS]"] + ["[PAD]"] * 7),
        (b" \t\n\0 ", ["[CLS]"] + ["[PAD]"] * 7),
        (
            b"one two three four five six seven eight nine",
            ["[CLS]", "one", "two", "three", "four", "five", "six", "seven"],
        ),
        (b"[SEP] [CLS] [MASK]", ["[CLS]", "[", "sep", "]", "[", "cl", "##s", "]"]),
        ("Café".encode(), ["[CLS]", "cafe"] + ["[PAD]"] * 6),
        (b"caf\xe9 \0 bar", ["[CLS]", "caf", "bar"] + ["[PAD]"] * 5),
    ],
)
def test_known_sentences(caption: bytes, expected: list[str]) -> None:
    assert pieces(caption_encoder("wordpiece", 8).encode([caption])[0]) == expected


def plain_wordpiece(text: str) -> list[int]:
    """BERT's uncased tokenizer, written plainly: clean, part CJK, fold, part punctuation, the longest piece first."""
    text = "".join(
        " " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else c
        for c in text
        if c in "\t\n\r" or (c not in "\0\ufffd" and not unicodedata.category(c).startswith("C"))
    )
    text = "".join(f" {c} " if 0x4E00 <= ord(c) <= 0x9FFF else c for c in text)
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    text = "".join(c.lower() for c in text)
    ascii_punctuation = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    text = "".join(f" {c} " if c in ascii_punctuation or unicodedata.category(c).startswith("P") else c for c in text)
    return [piece for word in text.split() for piece in plain_word(word)]


def plain_word(word: str) -> list[int]:
    found: list[int] = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in IDS)
        end = next(ends, None)
        if end is None or len(word) > 100:
            return [IDS["[UNK]"]]
        found.append(IDS[prefix + word[start:end]])
        start = end
    return found


@settings(max_examples=200)
@given(known_texts)
@example("A man's café, 3rd Avenue — “Köln” 你好 🐶 supercalifragilistic " + "x" * 101)
def test_pieces_are_those_of_a_plain_wordpiece(wordpiece_dialect: Dialect, text: str) -> None:
    assert whole(wordpiece_dialect, text.encode()) == plain_wordpiece(text)


# --- Every dialect and reduction --------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(captions=st.lists(captions_of_all_kinds, max_size=6), text_tokens=st.integers(3, 20))
def test_rows_are_well_formed_whatever_the_bytes(dialect: Dialect, captions: list[bytes], text_tokens: int) -> None:
    for reduction in REDUCTIONS:
        encoder = CaptionEncoder(dialect, text_tokens, reduction)
        found = encode(encoder, captions)
        assert found.shape == (len(captions), text_tokens)
        assert found.dtype == np.int32
        for caption, row in zip(captions, found, strict=True):
            ids = whole(dialect, caption)
            kept = body(encoder, row, len(ids))
            if reduction == "truncate" or len(ids) <= encoder.budget:
                assert kept == ids[: encoder.budget]
            assert is_subsequence(kept, ids)


@pytest.mark.parametrize(
    "caption",
    [
        b"dog " * 2048,
        b"x" * 8192,
        "é".encode() * 4096,
        b"\xff" * 8192,
        b"\0" * 8192,
        "אב🐶".encode() * 1000,
        b"&amp;" * 1600,
    ],
    ids=["words", "one word", "accents", "not UTF-8", "NUL", "RTL and emoji", "entities"],
)
def test_long_captions_keep_to_the_budget(dialect: Dialect, caption: bytes) -> None:
    ids = whole(dialect, caption)
    for reduction in REDUCTIONS:
        encoder = CaptionEncoder(dialect, 16, reduction)
        [row] = encode(encoder, [caption])
        assert is_subsequence(body(encoder, row, len(ids)), ids)


def test_a_caption_of_a_megabyte_keeps_to_the_budget(dialect: Dialect) -> None:
    truncate, syntax = CaptionEncoder(dialect, 8, "truncate"), CaptionEncoder(dialect, 8, "syntax")
    [row] = encode(truncate, [b"dogs " * 200_000])
    assert len(set(body(truncate, row, 200_000))) == 1
    [row] = encode(syntax, [b"the " * 250_000 + b"dogs"])
    assert body(syntax, row, 250_001)[-1:] == whole(dialect, b"dogs")


def test_words_that_give_no_piece_do_not_use_up_the_budget() -> None:
    found = caption_encoder("wordpiece", 4).encode([b"\x01 \x02 \x03 \x04 red apple pie"])
    assert pieces(found[0]) == ["[CLS]", "red", "apple", "pie"]
    found = caption_encoder("wordpiece", 4).encode([b"a dog", b"red     apple  pie chart", b"one two three four"])
    assert [pieces(row)[1:] for row in found] == [
        ["a", "dog", "[PAD]"],
        ["red", "apple", "pie"],
        ["one", "two", "three"],
    ]


INJECTIONS = (
    "[CLS] [SEP] [PAD] [MASK] [UNK] [unused1]",
    "[cls][sep][pad][mask]",
    "<|startoftext|> a dog <|endoftext|>",
    "<|ENDOFTEXT|><|StartOfText|>",
    "<start_of_text><end_of_text>",
    "&lt;|endoftext|&gt; &amp;lt;|endoftext|&amp;gt;",
    "<|endoftext|></w> ##[CLS]",
)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("text", INJECTIONS)
def test_no_text_becomes_a_special_token(dialect: Dialect, reduction: TextReduction, text: str) -> None:
    special = {49406, 49407}
    if dialect.end_id is None:
        special = {number for number, piece in enumerate(VOCABULARY) if piece.startswith("[") and len(piece) > 1}
    for text_tokens in (5, 16, 77):
        encoder = CaptionEncoder(dialect, text_tokens, reduction)
        [row] = encode(encoder, [text.encode()])
        assert not special & set(body(encoder, row, len(whole(dialect, text.encode()))))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_row_depends_on_nothing_but_its_caption_and_draws(dialect: Dialect, reduction: TextReduction) -> None:
    encoder = CaptionEncoder(dialect, 8, reduction)
    rng = np.random.default_rng(0)
    words = [word for word in VOCABULARY if word.isalpha()]
    captions = [" ".join(rng.choice(words, rng.integers(0, 30))).encode() for _ in range(64)]
    draws = draws_for(encoder, 64)
    found = encoder.encode(captions, draws)
    for i in range(64):
        alone = encoder.encode([captions[i]], None if draws is None else draws[i : i + 1])
        assert np.array_equal(alone[0], found[i])
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(lambda _: encoder.encode(captions, draws), range(16)):
            assert np.array_equal(again, found)


def test_draws_are_the_plans(wordpiece_dialect: Dialect) -> None:
    epoch, ids = np.array([0, 1, 1]), np.array([7, 7, 2**40])
    for reduction, number in {"random": 7, "block": 1}.items():
        encoder = CaptionEncoder(wordpiece_dialect, 8, reduction)
        draws = encoder.draws(3, epoch, ids)
        assert draws is not None
        assert np.array_equal(draws, uniform(3, Stream.TEXT, epoch, ids, number))
        assert len({row.tobytes() for row in draws}) == 3
    for reduction in ("truncate", "syntax"):
        assert CaptionEncoder(wordpiece_dialect, 8, reduction).draws(3, epoch, ids) is None


# --- The reductions themselves ----------------------------------------------------------------------------------------


def numbered(lengths: list[int]) -> Pieces:
    return Pieces(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]), np.array(lengths))


def kept_of_each(taken: Pieces, kept: np.ndarray) -> list[tuple[int, ...]]:
    parts = np.split(np.arange(len(kept)), np.cumsum(taken.lengths)[:-1])
    return [tuple(taken.ids[part][kept[part]].tolist()) for part in parts]


def test_random_keeps_any_set_as_often_as_another() -> None:
    number, length, budget = 35 * 400, 7, 3
    taken = numbered([length] * number)
    draws = uniform(5, Stream.TEXT, np.zeros(number, np.int64), np.arange(number), budget)
    counts = Counter(kept_of_each(taken, kept_random(taken, budget, draws)))
    assert set(counts) == set(itertools.combinations(range(length), budget))
    # Chi-square with 34 degrees of freedom: above 73 once in ten thousand.
    assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 73


def test_block_begins_anywhere_as_often() -> None:
    number, length, budget = 5 * 1000, 7, 3
    taken = numbered([length] * number)
    draws = uniform(5, Stream.TEXT, np.zeros(number, np.int64), np.arange(number), 1)
    counts = Counter(kept_of_each(taken, kept_block(taken, budget, draws)))
    assert set(counts) == {tuple(range(start, start + budget)) for start in range(length - budget + 1)}
    # Four degrees of freedom.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 24


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_what_is_kept_is_within_the_budget_and_in_order(
    lengths: list[int], budget: int, seed: int, data: st.DataObject
) -> None:
    taken = numbered(lengths)
    draws = uniform(seed, Stream.TEXT, np.zeros(len(lengths), np.int64), np.arange(len(lengths)), budget)
    # Numbers at either end of [0, 1) too.
    draws[data.draw(st.integers(0, len(lengths) - 1))] = data.draw(st.sampled_from([0.0, 1 - 2.0**-32]))
    for kept in (kept_random(taken, budget, draws), kept_block(taken, budget, draws[:, :1])):
        for ids, length in zip(kept_of_each(taken, kept), lengths, strict=True):
            assert len(ids) == min(length, budget)
            assert list(ids) == sorted(set(ids))
    for ids in kept_of_each(taken, kept_block(taken, budget, draws[:, :1])):
        assert not ids or ids[-1] - ids[0] == len(ids) - 1


@given(st.lists(st.lists(st.integers(1, 4), max_size=30), min_size=1, max_size=6), st.integers(1, 12))
def test_syntax_keeps_the_better_class_and_then_the_earlier(classes: list[list[int]], budget: int) -> None:
    taken = numbered([len(each) for each in classes])
    flat = np.array([number for each in classes for number in each], np.uint8)
    found = kept_of_each(taken, kept_syntax(taken, budget, lambda _: flat))
    for each, ids in zip(classes, found, strict=True):
        best = sorted(range(len(each)), key=lambda place: each[place])[:budget]
        assert list(ids) == sorted(best)


def plain_classes(dialect: Dialect, caption: bytes, ids: list[int]) -> list[int]:
    """The class of each piece of a caption, one after the other."""
    table = wordpiece_classes(len(VOCABULARY)).tolist()
    if dialect.end_id is None:
        return [table[i] for i in ids]
    found: list[int] = []
    for word in regex.findall(r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", dialect.read(caption)):
        best = min(table[i] for i in plain_wordpiece(word)) if word[0].isalpha() else 4
        found += [best] * len(dialect.tokenizer.encode(word).ids)
    return found


@settings(max_examples=40)
@given(caption=st.one_of(known_texts, known_texts.map(str.upper)).map(str.encode))
@example(caption=b"The orthopedic surgeon's two very old dogs were quickly running over 1,920 (red) zucchini flowers")
def test_syntax_goes_by_the_word_class_table(dialect: Dialect, caption: bytes) -> None:
    encoder = CaptionEncoder(dialect, 8, "syntax")
    ids = whole(dialect, caption)
    classes = plain_classes(dialect, caption, ids)
    best = sorted(range(len(ids)), key=lambda place: classes[place])[: encoder.budget]
    assert body(encoder, encode(encoder, [caption])[0], len(ids)) == [ids[place] for place in sorted(best)]


def test_syntax_on_a_sentence(wordpiece_dialect: Dialect) -> None:
    caption = b"the dogs are sitting on a big red bench and looking at the cats"
    [row] = encode(CaptionEncoder(wordpiece_dialect, 7, "syntax"), [caption])
    assert pieces(row) == ["[CLS]", "dogs", "are", "big", "red", "bench", "cats"]


# --- What a user can get wrong ----------------------------------------------------------------------------------------


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip_vocabulary: Path) -> None:
    with pytest.raises(ValueError, match=r"--text-tokens 1 leaves no room for a word beside \[CLS\]; give at least 2"):
        caption_encoder("wordpiece", 1)
    with pytest.raises(ValueError, match=r"--text-tokens 2 leaves no room for a word .* give at least 3"):
        caption_encoder("bpe", 2, vocabulary=clip_vocabulary)
    other = tmp_path / "vocab.txt"
    other.write_text("[PAD]\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is not the WordPiece vocabulary .*pip install"):
        caption_encoder("wordpiece", 8, vocabulary=other)
    with pytest.raises(ValueError, match="nowhere is no file"):
        caption_encoder("wordpiece", 8, vocabulary=tmp_path / "nowhere")
    monkeypatch.setattr(wordpiece, "WORDPIECE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is not the WordPiece vocabulary"):
        caption_encoder("wordpiece", 8)


def test_the_word_class_table_is_the_vocabularys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = wordpiece_classes(len(VOCABULARY))
    assert set(table.tolist()) == {1, 2, 3, 4}
    expected = {"dog": 1, "red": 2, "sitting": 3, "the": 4, "[CLS]": 4, "[UNK]": 4, "##s": 1}
    assert {piece: int(table[IDS[piece]]) for piece in expected} == expected
    with pytest.raises(ValueError, match=r"classes 30522 pieces .* not 30521 .*install shortclip again"):
        wordpiece_classes(len(VOCABULARY) - 1)
    damaged = tmp_path / "word_classes.txt.gz"
    monkeypatch.setattr(word_classes, "_FILE", damaged)
    for content in (b"", b"not gzip", word_classes.__doc__.encode()):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="install shortclip again"):
            wordpiece_classes(len(VOCABULARY))
