"""What the commands of the benchmarks do alike: an exit code for the shell, and figures into a file."""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

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


def write_json(path: Path | None, result: Mapping[str, Any], indent: int | None = 1) -> None:
    """Writes what --json asked for; nothing where it did not. Makes the folder."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=indent) + "\n")
