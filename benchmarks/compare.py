"""What changed between two results: `python -m benchmarks.compare before.json after.json`, of any benchmark here.

One line a row. A measure changed beyond the noise where the two ranges over the rounds have no value in common; what
has no range is told apart as such. Exit code 0 whatever changed, 2 where a file cannot be compared.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import tyro

from pipeline.command import exit_code

_RANGE = "_range"
_SPREAD = {"median", "low", "high"}
_SIZES = ("tokens", "batch_size", "text_tokens", "image_size", "threads", "workers", "samples", "rank", "width")
"""Whole numbers that say what was measured rather than what came out."""


@dataclass(frozen=True)
class Compare:
    """Compare two results of the same benchmark, row by row."""

    before: tyro.conf.Positional[Path]
    after: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class Measure:
    """A number, and between which it lay over the rounds; None where that was not kept."""

    value: float
    noise: tuple[float, float] | None


Row = dict[str, Measure]
Key = tuple[str, ...]


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Prints what changed."""
    config = tyro.cli(Compare, args=arguments, description=__doc__)
    before, after = (_read(path) for path in (config.before, config.after))
    print("\n".join(list(compare(before, after))))


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Yields what differs of the environment, then a line a row. Raises ValueError where no row is in both."""
    old, new = rows(before), rows(after)
    common = [key for key in old if key in new]
    if not common:
        raise ValueError("the two files have no row in common; compare results of the same benchmark and sizes")
    yield from _environment(before.get("environment"), after.get("environment"))
    for key in common:
        yield f"{' '.join(key)}: {_line(old[key], new[key])}"
    for where, only in (
        ("before", [key for key in old if key not in new]),
        ("after", [k for k in new if k not in old]),
    ):
        for key in only:
            yield f"{' '.join(key)}: only in the file {where}"


def rows(result: Mapping[str, Any]) -> dict[Key, Row]:
    """Returns the measures of each row of each list of rows, by what the row says was measured."""
    found: dict[Key, Row] = {}
    for values in result.values():
        if not isinstance(values, list):
            continue
        for each in cast("list[Any]", values):
            if not _is_object(each):
                continue
            key = tuple(
                f"{name}={value}" if isinstance(value, int) else str(value)
                for name, value in each.items()
                if isinstance(value, str) or (name in _SIZES and isinstance(value, int))
            )
            while key in found:  # nothing that it says tells it from the row before it
                key = (*key, "again")
            found[key] = dict(_measures(each))
    return {key: row for key, row in found.items() if row}


def _measures(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Measure]]:
    for name, value in row.items():
        if name.endswith(_RANGE) or name in _SIZES or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield prefix + name, Measure(value, _pair(row.get(name + _RANGE)))
        elif _is_object(value) and set(value) == _SPREAD:
            yield prefix + name, Measure(value["median"], (value["low"], value["high"]))
        elif _is_object(value):
            ranges = row.get(name + _RANGE)
            ranges = ranges if _is_object(ranges) else {}
            inside = {**value, **{part + _RANGE: pair for part, pair in ranges.items()}}
            yield from _measures(inside, f"{prefix}{name}.")


def _pair(value: Any) -> tuple[float, float] | None:
    return (value[0], value[1]) if isinstance(value, list) and len(cast("list[Any]", value)) == 2 else None


def _line(old: Row, new: Row) -> str:
    beyond: list[str] = []
    within: list[str] = []
    unknown: list[str] = []
    for name, before in old.items():
        after = new.get(name)
        if after is None or after.value == before.value:
            continue
        said = f"{name} {before.value:,.4g} -> {after.value:,.4g} ({_change(before.value, after.value)})"
        if before.noise is None or after.noise is None:
            unknown.append(said)
        elif before.noise[1] < after.noise[0] or after.noise[1] < before.noise[0]:
            beyond.append(said)
        else:
            within.append(said)
    parts = [
        f"{title}: {', '.join(said)}"
        for title, said in (("beyond the noise", beyond), ("within it", within), ("no spread kept", unknown))
        if said
    ]
    return "; ".join(parts) or "nothing changed"


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else "from nothing"


def _environment(before: Any, after: Any) -> Iterator[str]:
    if not _is_object(before) or not _is_object(after):
        return
    differing = [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]
    if differing:
        yield f"environment: {', '.join(differing)}"


def _read(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is no benchmark's result."""
    try:
        found = json.loads(path.read_text())
    except UnicodeDecodeError:
        found = None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error.msg}, line {error.lineno}); give what --json wrote") from None
    if not _is_object(found) or not rows(found):
        raise ValueError(f"{path} holds no rows with measures; give what a benchmark's --json wrote")
    return found


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


if __name__ == "__main__":
    sys.exit(main())
