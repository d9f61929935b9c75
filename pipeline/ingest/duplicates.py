"""Strings in, which of them were seen before out, in a fixed amount of memory however many come.

Each string is a 64-bit fingerprint in a table of buckets of eight. A full bucket forgets its oldest, so some
repetitions are missed: of 0.3 times `capacity` different strings 0.04 %, of 0.6 times 2 %, of 0.9 times 10 %, and
beyond that what came long before. That two different strings are taken for one happens with a chance of 2^-64 a pair.
About 0.2 us a string of 80 bytes.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

Fingerprints = npt.NDArray[np.uint64]

_WAYS = 8
_PIECE = 8192
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MURMUR = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_MASKS = np.array([(1 << 8 * num_bytes) - 1 for num_bytes in range(9)], np.uint64)
"""Number of bytes of a word that belong to the string -> those bytes."""
_MAX_WORDS = 128
"""Below 256, since a byte holds the count. Longer strings are rare, and each further word costs all of a piece."""


class Seen:
    """What was seen so far: 8 bytes for each of `capacity` strings, in memory as they come."""

    def __init__(self, capacity: int = 1 << 25) -> None:
        bits = max((capacity // _WAYS - 1).bit_length(), 1)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros((1 << bits, _WAYS), np.uint64)
        self._count = np.zeros(1 << bits, np.uint8)

    def repeated(self, strings: Any) -> npt.NDArray[np.bool_]:
        """Returns which strings of an Arrow array came before, in it or in one given before; all are remembered."""
        found = np.zeros(len(strings), bool)
        if not len(strings):
            return found
        # In pieces that stay in the processor's cache.
        pieces = [strings.slice(start, _PIECE) for start in range(0, len(strings), _PIECE)]
        fingerprints = np.concatenate([_fingerprints(piece) for piece in pieces])
        order = _order(fingerprints)
        ordered = fingerprints[order]
        first = np.ones(len(ordered), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        if not first.all():
            found[order[~first]] = True
            order, ordered = order[first], ordered[first]
        buckets = (ordered >> self._shift).astype(np.int64)
        hits = self._table.take(buckets, axis=0) == ordered[:, None]
        known = hits.view(np.uint64).ravel() != 0  # eight at once: NumPy's any() of eight is slow
        found[order[known]] = True
        self._remember(ordered[~known], buckets[~known])
        return found

    def _remember(self, fingerprints: Fingerprints, buckets: npt.NDArray[np.int64]) -> None:
        """Adds new fingerprints, in an order in which those of one bucket stand side by side."""
        if not len(fingerprints):
            return
        index = np.arange(len(buckets))
        starts = np.ones(len(buckets), bool)
        starts[1:] = buckets[1:] != buckets[:-1]
        rank = index - np.maximum.accumulate(np.where(starts, index, 0))
        used = self._count[buckets] + rank
        self._table.reshape(-1)[buckets * _WAYS + used % _WAYS] = fingerprints
        # Of equal buckets the last assignment stands, which has the highest rank.
        self._count[buckets] = (used + 1) % _WAYS


def _order(fingerprints: Fingerprints) -> npt.NDArray[np.int64]:
    """Returns an order in which equal fingerprints stand side by side, the first to come first, and buckets too.

    NumPy sorts numbers several times as fast as it sorts indices by them, so each index takes the place of its
    fingerprint's low bits. Two that differ in these alone may then part two that are equal: a repetition missed, with a
    chance far below that of a full bucket.
    """
    low = np.uint64((1 << max(len(fingerprints) - 1, 1).bit_length()) - 1)
    keys = (fingerprints & ~low) | np.arange(len(fingerprints), dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)


def _fingerprints(strings: Any) -> Fingerprints:
    """A hash of each string's bytes and length; never 0, which marks an empty place.

    Eight bytes at a time, each word scrambled on its own with a number of its place, then added up: the first words of
    all strings, then the second of those that have one.
    """
    edges, values = _buffers(strings)
    lengths = edges[1:] - edges[:-1]
    num_words = np.maximum((lengths + 7) >> 3, 1)
    is_long = num_words > _MAX_WORDS
    num_words[is_long] = 1
    # Those with most words first, so that those which have a k-th word are the first of all.
    order = np.argsort(num_words.astype(np.uint8), kind="stable")[::-1]
    longer = len(order) - np.cumsum(np.bincount(num_words))
    # Words stand at any byte; the eight bytes after the last string make its last word whole.
    padded = np.concatenate([values[edges[0] : edges[-1]], np.zeros(8, np.uint8)])
    at_any_byte = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
    places = edges[:-1][order] - edges[0]
    last_bytes = np.minimum((lengths - 8 * (num_words - 1))[order], 8)
    sums = np.zeros(len(order), np.uint64)
    for k in range(len(longer) - 1):
        count, going_on = longer[k], longer[k + 1]
        words = at_any_byte[places[:count]]
        words[going_on:] &= _MASKS[last_bytes[going_on:count]]
        words += np.uint64((k + 1) * int(_GOLDEN) & (1 << 64) - 1)
        sums[:count] += _scramble(words)
        places += 8
    hashes = np.empty_like(sums)
    hashes[order] = sums
    for i in np.flatnonzero(is_long):
        digest = hashlib.blake2b(values[edges[i] : edges[i + 1]].tobytes(), digest_size=8).digest()
        hashes[i] = np.uint64(int.from_bytes(digest))
    hashes += lengths.astype(np.uint64) * _GOLDEN
    return np.maximum(_scramble(hashes), np.uint64(1))


def _scramble(words: Fingerprints) -> Fingerprints:
    """The end of murmur3, in place: each bit of the word changes about half of the bits."""
    for factor in _MURMUR:
        words ^= words >> np.uint64(33)
        words *= factor
    words ^= words >> np.uint64(33)
    return words


def _buffers(strings: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The (offsets, bytes) of an array; a null has no bytes."""
    _, offsets, values = strings.buffers()
    first, length = strings.offset, len(strings)
    edges = np.frombuffer(offsets, np.int32)[first : first + length + 1].astype(np.int64)
    return edges, np.frombuffer(values, np.uint8) if values is not None else np.zeros(0, np.uint8)
