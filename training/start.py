"""What train.py does before torch is loaded, which takes seconds: answers --help and what cannot be, and Ctrl-C."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from pipeline.command import missing_packages_in_one_line

from .signals import INTERRUPTED

BEFORE_FIRST_STEP = "interrupted before the first step; the same command begins again"


def before_torch(arguments: Sequence[str], description: str) -> None:
    """Ends the process with 0 for --help, with 2 for flags that cannot be; from here on Ctrl-C ends it with one line.

    Under torchrun only Ctrl-C is seen to: rank 0 alone is to speak.
    """
    missing_packages_in_one_line()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if "LOCAL_RANK" in os.environ:
        return
    from .config import parse

    try:
        parse(arguments, description)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def torch_is_there() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again, for who can put things in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    # An exception in the midst of an import would be a traceback at best.
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{BEFORE_FIRST_STEP}\n".encode())
    os._exit(INTERRUPTED)
