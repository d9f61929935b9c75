"""The word class of every WordPiece piece: the static table that syntax masking looks up, free of any tagger.

word_classes.txt.gz holds one digit a piece, in vocabulary order (0 special, 1 noun, 2 adjective, 3 verb, 4 other).
It was computed once, as CLIPA's own code does at each start: every piece of BERT's uncased vocabulary was tagged alone,
without a context, by an averaged perceptron, and its Penn tag cut down to the class (NN*, JJ*, VB*, any other).
"""

import gzip
from pathlib import Path

import numpy as np

from .dialect import PieceClasses

OTHER = 4
_FILE = Path(__file__).with_name("word_classes.txt.gz")


def wordpiece_classes(num_pieces: int) -> PieceClasses:
    """Returns the class of each piece, 1 to 4, uint8 [num_pieces]. Special pieces rank with the others.

    Raises ValueError where the table is not of this vocabulary's length or is damaged.
    """
    try:
        digits = np.frombuffer(gzip.decompress(_FILE.read_bytes()).strip(), np.uint8) - ord("0")
    except (OSError, EOFError) as error:
        raise ValueError(f"{_FILE} cannot be read ({error}); install shortclip again") from None
    if len(digits) != num_pieces or digits.max() > OTHER:
        raise ValueError(
            f"{_FILE} classes {len(digits)} pieces from 0 to {digits.max(initial=0)}, not {num_pieces} from 0 to "
            f"{OTHER}; install shortclip again"
        )
    return np.where(digits == 0, OTHER, digits).astype(np.uint8)
