"""What commands do alike: an exit code for the shell, and one line where something is wrong."""

import functools
import sys
from collections.abc import Callable
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
