"""Rows in, numbered work lists out, each the rows of one future shard; and the plan, which says that they are whole."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_text

PLAN_NAME = "plan.json"
_BATCH_ROWS = 10_000


@dataclass(frozen=True)
class Plan:
    """What was selected: the work lists of one pass over the web."""

    first_list: int
    num_lists: int
    rows: int
    """In the lists."""
    rows_read: int
    filtered_out: int
    statuses: dict[str, int] = field(default_factory=dict[str, int])
    """Of rows that will not be asked for."""
    problems: dict[str, str] = field(default_factory=dict[str, str])
    """Of own shards: file -> what is wrong with it as a whole."""

    @property
    def lists(self) -> range:
        return range(self.first_list, self.first_list + self.num_lists)


def read_plan(folder: Path) -> Plan | None:
    """Returns the plan of a folder of work lists, or None where none was finished."""
    try:
        return Plan(**json.loads((folder / PLAN_NAME).read_text()))
    except FileNotFoundError:
        return None


def list_path(folder: Path, list_id: int) -> Path:
    return folder / f"{list_id:05d}.parquet"


def write_lists(tables: Iterable[Any], folder: Path, first_list: int, list_rows: int) -> tuple[int, int]:
    """Writes rows as work lists of `list_rows` each, the last shorter. Returns the numbers of lists and of rows."""
    rows: list[Any] = []
    waiting = num_lists = total = 0
    for table in tables:
        rows.append(table)
        waiting += table.num_rows
        total += table.num_rows
        if waiting >= list_rows:
            whole = pa.concat_tables(rows)
            while waiting >= list_rows:
                _write(whole.slice(0, list_rows), list_path(folder, first_list + num_lists))
                whole, num_lists, waiting = whole.slice(list_rows), num_lists + 1, waiting - list_rows
            rows = [whole]
    if waiting:
        _write(pa.concat_tables(rows), list_path(folder, first_list + num_lists))
        num_lists += 1
    return num_lists, total


def finish(folder: Path, plan: Plan) -> None:
    """Writes the plan, which says that the lists are whole."""
    write_text(folder / PLAN_NAME, json.dumps(asdict(plan), indent=1) + "\n")


def _write(table: Any, path: Path) -> None:
    # URLs and captions do not repeat: a dictionary of them would only cost time. Numbers of rows nearly follow each
    # other. Without compression it takes half the time and up to three times the disk.
    encoding = {"row": "DELTA_BINARY_PACKED"} if "row" in table.column_names else None
    pq.write_table(
        table, path, compression="snappy", use_dictionary=False, write_statistics=False, column_encoding=encoding,
        write_batch_size=_BATCH_ROWS,
    )  # fmt: skip
