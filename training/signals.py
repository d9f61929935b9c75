"""Ctrl-C and SIGTERM as a question that the loop asks between steps."""

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, with a checkpoint saved."""


class StopSignal:
    """Notes Ctrl-C and SIGTERM inside `with`, once for each stage. Alone, a second one ends the process at once; under
    torchrun, which sends the same signal to all ranks and kills them 30 seconds later, it does not, and what comes
    between two stages is noted too."""

    def __init__(self, *, among_others: bool = False) -> None:
        self.asked = False
        self._among_others = among_others

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        if self._among_others:
            # torchrun sends it to the ranks that are left, which still have to say who is lost, or to end well.
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._among_others:
            # Not a word: torchrun also sends it to the ranks that are left when one has died.
            self.asked = True
            return
        if self.asked:
            os._exit(INTERRUPTED)
        self.asked = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping after this step; once more to stop at once\n")
