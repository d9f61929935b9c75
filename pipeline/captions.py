"""Caption bytes in, T token ids out, in either dialect, reduced by one of CLIPA's four ways where they are too many.

`truncate` keeps the first pieces, `block` a window that begins anywhere, `random` any of them, `syntax` nouns before
adjectives before verbs before the rest, earlier ones first. The order of a caption is always kept, and a caption
within the budget is never touched. Ways that draw do so from the plan, so they are pure too.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from .bpe import ClipBPE
from .dialect import Dialect, PieceIds
from .philox import Stream, uniform
from .wordpiece import WordPiece

TokenizerName = Literal["wordpiece", "bpe"]
TextReduction = Literal["truncate", "random", "block", "syntax"]

CaptionIds = npt.NDArray[np.int32]
"""int32 [batch, T]: a start token, the kept pieces, for BPE an end token, then zeros."""
Draws = npt.NDArray[np.float64]
"""float64 [batch, k], in [0, 1): what a reduction that draws goes by."""
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pieces:
    """The pieces of a batch of captions, laid end to end."""

    ids: PieceIds
    lengths: IntArray
    """[batch]: how many each caption has; they add up to len(ids)."""

    @cached_property
    def starts(self) -> IntArray:
        """[batch]: where each caption begins in `ids`."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def places(self) -> IntArray:
        """[pieces]: how many pieces of its caption stand before each."""
        return np.arange(len(self.ids)) - np.repeat(self.starts, self.lengths)


class CaptionEncoder:
    """Captions to ids for one text encoder. Stateless, and safe to share between threads."""

    def __init__(self, dialect: Dialect, text_tokens: int, reduction: TextReduction) -> None:
        """text_tokens: T, start and end tokens counted. Raises ValueError where they leave no room for a piece."""
        self.dialect, self.text_tokens, self.reduction = dialect, text_tokens, reduction
        marks = 1 if dialect.end_id is None else 2
        self.budget = text_tokens - marks
        """Pieces of a caption that are kept at most."""
        if self.budget < 1:
            what = "[CLS]" if marks == 1 else "the start and end tokens"
            raise ValueError(
                f"--text-tokens {text_tokens} leaves no room for a word beside {what}; give at least {marks + 1}"
            )
        if reduction == "syntax":
            # A missing table is found now, not in the first batch on some thread.
            dialect.classes(np.zeros(0, np.int32))

    @property
    def num_draws(self) -> int:
        """Numbers that a caption's reduction takes, however long it is."""
        return {"truncate": 0, "random": self.budget, "block": 1, "syntax": 0}[self.reduction]

    def draws(self, seed: int, epoch: IntArray, sample_ids: IntArray) -> Draws | None:
        """Returns what `encode` takes as draws, a pure function of (seed, epoch, sample); None where it takes none.

        epoch, sample_ids: int64 [batch].
        """
        return uniform(seed, Stream.TEXT, epoch, sample_ids, self.num_draws) if self.num_draws else None

    def encode(self, captions: Sequence[bytes], draws: Draws | None = None) -> CaptionIds:
        """Returns the ids of captions, int32 [batch, T].

        captions: UTF-8; what is not is read with replacement characters. draws: float64 [batch, num_draws], needed
        where num_draws is not 0.
        """
        texts = [self.dialect.read(caption) for caption in captions]
        if self.reduction == "truncate":
            pieces = _end_to_end(self._first_ids(texts))
            kept = pieces.places < self.budget
        else:
            pieces = _end_to_end(self._ids(texts))
            kept = self._kept(pieces, draws)
        return self._laid_out(pieces.ids[kept], np.minimum(pieces.lengths, self.budget))

    def spelled(self, ids: npt.NDArray[np.int32]) -> list[str]:
        """Returns the pieces in one row of what `encode` gives, without marks and padding, for a person to read."""
        ends = np.flatnonzero(ids == (0 if self.dialect.end_id is None else self.dialect.end_id))
        return [self.dialect.spell(piece) for piece in ids[1 : int(ends[0]) if len(ends) else None].tolist()]

    def _kept(self, pieces: Pieces, draws: Draws | None) -> BoolArray:
        if self.reduction == "syntax":
            return kept_syntax(pieces, self.budget, self.dialect.classes)
        assert draws is not None, f"{self.reduction} needs the plan's draws"
        return (kept_random if self.reduction == "random" else kept_block)(pieces, self.budget, draws)

    def _first_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The pieces of each caption, at least the first `budget` where it has so many."""
        # Every word gives a piece at least, so the first few fill the budget and the rest need not be looked at.
        # Only plain spaces are cut at: what else counts as white space is the tokenizer's affair.
        cut = [text.count(" ") >= self.budget for text in texts]
        found = self._ids(
            [
                " ".join(text.split(" ", self.budget)[:-1]) if long else text
                for text, long in zip(texts, cut, strict=True)
            ]
        )
        # Between two spaces is no word, and one of control characters gives no piece: such a caption is read whole.
        short = [row for row, long in enumerate(cut) if long and len(found[row]) < self.budget]
        for row, ids in zip(short, self._ids([texts[row] for row in short]), strict=True):
            found[row] = ids
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.dialect.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _laid_out(self, ids: PieceIds, counts: IntArray) -> CaptionIds:
        """Puts the kept pieces between the marks. ids: int32 [kept pieces]; counts: how many of each caption."""
        batch = len(counts)
        out = np.zeros((batch, self.text_tokens), np.int32)
        out[:, 0] = self.dialect.start_id
        out[:, 1 : 1 + self.budget][np.arange(self.budget) < counts[:, None]] = ids
        if self.dialect.end_id is not None:
            out[np.arange(batch), 1 + counts] = self.dialect.end_id
        return out


def _end_to_end(ids: Sequence[Sequence[int]]) -> Pieces:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return Pieces(np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths)


def caption_encoder(
    tokenizer: TokenizerName,
    text_tokens: int,
    reduction: TextReduction = "truncate",
    vocabulary: Path | None = None,
) -> CaptionEncoder:
    """Returns the encoder of a dialect.

    vocabulary: its vocabulary file, else that of an installed distribution. Raises ValueError when it is missing or not
    the one that the models were trained with, or when text_tokens leave no room for a piece.
    """
    dialect = WordPiece(vocabulary) if tokenizer == "wordpiece" else ClipBPE(vocabulary)
    return CaptionEncoder(dialect, text_tokens, reduction)


def kept_random(pieces: Pieces, budget: int, draws: Draws) -> BoolArray:
    """Returns which pieces are kept where any may be: each set of `budget` of a caption is as likely as another.

    draws: float64 [batch, budget]. Returns bool [pieces]: min(length, budget) of each caption.
    """
    long = pieces.lengths > budget
    kept = np.repeat(~long, pieces.lengths)
    start, length, draws = pieces.starts[long], pieces.lengths[long], draws[long]
    # Floyd's sampling: one number a kept piece, whatever the length. Source: Bentley and Floyd, "A sample of
    # brilliance" (CACM, 1987).
    for i in range(budget):
        last = length - budget + i
        pick = start + (draws[:, i] * (last + 1)).astype(np.int64)
        kept[np.where(kept[pick], start + last, pick)] = True
    return kept


def kept_block(pieces: Pieces, budget: int, draws: Draws) -> BoolArray:
    """Returns which pieces are kept where they are one window, as likely to begin at any place as at another.

    draws: float64 [batch, 1]. Returns bool [pieces]: min(length, budget) of each caption.
    """
    first = (draws[:, 0] * np.maximum(pieces.lengths - budget + 1, 1)).astype(np.int64)
    place = pieces.places - np.repeat(first, pieces.lengths)
    return (place >= 0) & (place < budget)


def kept_syntax(pieces: Pieces, budget: int, classes: Callable[[PieceIds], npt.NDArray[np.uint8]]) -> BoolArray:
    """Returns which pieces are kept by class, in a class the earlier ones; bool [pieces]: min(length, budget) each."""
    caption = np.repeat(np.arange(len(pieces.lengths)), pieces.lengths)
    order = np.argsort(caption * 8 + classes(pieces.ids), kind="stable")
    rank = np.empty_like(order)
    # Sorted by caption first, so a caption's places are where they were.
    rank[order] = pieces.places
    return rank < budget
