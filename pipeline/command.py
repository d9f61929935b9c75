"""What commands do alike: an exit code for the shell, and one line where something is wrong."""

import difflib
import functools
import signal
import sys
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import ParamSpec

Arguments = ParamSpec("Arguments")


def exit_code(run: Callable[Arguments, None]) -> Callable[Arguments, int]:
    """Returns a command that gives its exit code: 0; 2 for what the user can mend, said in one line; 130 for Ctrl-C."""

    @functools.wraps(run)
    def main(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        try:
            run(*args, **kwargs)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 0

    return main


def did_you_mean(name: str, known: Collection[str], otherwise: str) -> str:
    """Returns what to say of a name that is not known: the nearest that is, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'did you mean "{near[0]}"?' if near else otherwise


def missing_packages_in_one_line() -> None:
    """Lets a package that is not installed end this process with one line and exit code 2.

    A command calls it before it imports anything but the standard library.
    """

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ModuleNotFoundError):
            print(f"error: no module named {error.name} here; run it with .venv/bin/python, or `make`", file=sys.stderr)
            sys.exit(2)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = say


@contextmanager
def sigterm_as_ctrl_c() -> Generator[None]:
    """Inside `with`, SIGTERM raises KeyboardInterrupt too: files are closed, and workers end with the process."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
