"""Images per second of the loader alone, every stage counted: `python -m benchmarks.pipeline --data data/emoji/train`.

The unit is images per second of process CPU time, all threads and child processes together: on a busy machine it holds
still where wall time swings. Beside our loader, in the same run: open_clip's training loader (`make peers`), DALI's
stock webdataset reader at 224 px, and bare libjpeg-turbo decoding of the same bytes, which is the limit. Fair to the
others: open_clip makes its batches without hand-over between processes and takes the same crops (40 to 100 % of the
area); the stock reader cuts no captions.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from pipeline.command import exit_code
from pipeline.index import Index, open_index
from pipeline.loader import DecoderName
from pipeline.tokens import ImageReduction

from .cases import STANDARD_CASES, Case
from .command import write_json
from .contenders import BareDecode, Contender, OpenClip, OurLoader, StockDali, gil_us
from .environment import environment, warn_of_load
from .loader_rounds import BARE_FULL, BARE_SCALED, OPEN_CLIP, STOCK, batches_for, figures, take_turns
from .peer_process import PEERS_PYTHON, Skipped
from .pipeline_report import Row, draw_plot, format_rows, format_stages


@dataclass(frozen=True)
class Benchmark:
    """Measure the loader alone: read, checks, plan, decode, captions; and what others do with the same shards."""

    data: tuple[Path, ...]
    """Folders of shards, each measured for itself."""
    decoder: Literal["both", "dali", "turbo"] = "both"
    tokens: int = 16
    image_reduction: ImageReduction = "resize"
    image_size: int | None = None
    all_cases: bool = False
    """Instead of --tokens: 64/16, 112/49, 224/196 by resizing, and 224->49 by random, grid and block."""
    text_tokens: int = 16
    batch_size: int = 256
    batches: int | None = None
    """Of each contender in a round; default: as many as take --seconds."""
    seconds: float = 1.0
    """CPU time of each contender in a round."""
    rounds: int = 5
    threads: int = 1
    """Of our loader."""
    workers: int = 0
    """Processes that make our loader's batches instead; the GIL column is then that of the process that takes them."""
    peers: bool = True
    """Also run open_clip's loader, DALI's stock reader and bare decoding."""
    peer_workers: int = 0
    """Worker processes of open_clip's loader. 0 costs it least CPU time: batches are not handed over."""
    peers_python: Path = PEERS_PYTHON
    """The Python that has open_clip and torchvision."""
    json: Path | None = None
    """Write the rows here."""
    plot: Path | None = None
    """Draw them as this PNG."""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        for name in ("batch_size", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers} is below 0; 0 makes batches on --threads of this process")
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"--batches {self.batches} is below 1; leave it out to let --seconds decide")
        if self.seconds <= 0:
            raise ValueError(f"--seconds {self.seconds} is not above 0; 1 is usual")
        if self.all_cases and (self.tokens, self.image_reduction, self.image_size) != (16, "resize", None):
            raise ValueError("--all-cases has its own tokens; leave --tokens, --image-reduction and --image-size out")

    @property
    def cases(self) -> tuple[Case, ...]:
        return STANDARD_CASES if self.all_cases else (Case(self.tokens, self.image_reduction, self.image_size),)


@dataclass(frozen=True)
class Measured:
    """What a run of the benchmark found."""

    rows: list[Row]
    """Of our loader."""
    peers: list[Row]
    """Of the others, in the same units."""
    skipped: dict[str, str]
    """Contender -> why it did not run."""
    about: dict[str, Any]
    """open_clip's transform and versions."""


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    # The loader's threads are the parallelism that is measured.
    torch.set_num_threads(1)
    config = tyro.cli(Benchmark, args=arguments, description=__doc__)
    config.check()
    before = environment()
    # Others cost caches too, and the loader with the larger footprint the most.
    warn_of_load(
        "CPU times come out longer, open_clip's most of all, and GIL times mean nothing; run this on a quiet machine"
    )
    found = measure(config)
    rows = [*found.rows, *found.peers]
    for name, reason in found.skipped.items():
        print(f"{name} is left out: {reason}")
    print(f"{format_rows(rows)}\n\n{format_stages(found.rows)}")
    if config.plot:
        draw_plot(rows, config.plot)
        print(f"picture: {config.plot}")
    write_json(config.json, {"environment": before, "data": list(map(str, config.data)), **asdict(found)})


def measure(config: Benchmark) -> Measured:
    """Returns the rows of every data set and case. Raises ValueError for data or cases that cannot be used."""
    found = Measured([], [], {}, {})
    for case in config.cases:
        _ = case.geometry  # what cannot be is said before the first minute is spent
    for folder in config.data:
        index = open_index([folder])
        for case in config.cases:
            print(f"measuring {folder}: {case.name}", file=sys.stderr, flush=True)
            _measure_case(config, folder, index, case, found)
    return found


def _measure_case(config: Benchmark, folder: Path, index: Index, case: Case, found: Measured) -> None:
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        batches: dict[str, int] = {}
        for name, make in _makers(config, folder, index, case).items():
            try:
                contender = make()
                stack.callback(contender.close)
                batches[name] = batches_for(contender, config.batch_size, config.seconds)
            except Skipped as reason:
                found.skipped[name] = str(reason)
                continue
            contenders[name] = contender
            if isinstance(contender, OpenClip):
                found.about.update(contender.about)
        if config.batches is not None:
            batches = dict.fromkeys(batches, config.batches)
        rounds, dropped = take_turns(contenders, batches, config.rounds)
        found.skipped.update({name: f"{case.name}: {reason}" for name, reason in dropped.items()})
        mean_bytes = _mean_image_bytes(index)
        for name, figure in figures(rounds).items():
            contender = contenders[name]
            ours = isinstance(contender, OurLoader)
            row = Row(
                data=_name(folder, config.data),
                decoder=name,
                case=case.name,
                tokens=case.tokens,
                image_reduction=case.image_reduction,
                image_size=case.geometry.image_size,
                threads=config.threads if ours else 1,
                workers=config.workers if ours else 0,
                megabytes_per_cpu_s=figure.images_per_cpu_s * mean_bytes / 1e6,
                gil_us=gil_us(contender, batches[name]) if ours else None,
                **asdict(figure),
            )
            (found.rows if ours else found.peers).append(row)


def _makers(config: Benchmark, folder: Path, index: Index, case: Case) -> dict[str, Callable[[], Contender]]:
    """What is to take part, not made yet: any of it may be missing on this machine."""
    names: tuple[DecoderName, ...] = ("turbo", "dali") if config.decoder == "both" else (config.decoder,)
    makers: dict[str, Callable[[], Contender]] = {
        name: partial(
            OurLoader,
            index,
            case.geometry,
            name,
            batch_size=config.batch_size,
            text_tokens=config.text_tokens,
            threads=config.threads,
            workers=config.workers,
        )
        for name in names
    }
    if config.peers:
        shards = [Path(shard.path) for shard in index.shards]
        makers[OPEN_CLIP] = partial(
            OpenClip, shards, case.geometry.image_size, config.batch_size, config.peer_workers, config.peers_python
        )
        makers[STOCK] = partial(StockDali, shards, config.batch_size, 1)
        makers[BARE_SCALED] = partial(BareDecode, index, case.geometry, config.batch_size)
        makers[BARE_FULL] = partial(BareDecode, index, None, config.batch_size)
    return makers


def _mean_image_bytes(index: Index) -> float:
    rows = [index.rows(shard) for shard in range(len(index.shards))]
    return sum(float(each.image_bytes[each.usable].sum()) for each in rows) / index.num_usable


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """A data set's name in tables: the folder's own, or its whole path where two are called the same."""
    return folder.name if [other.name for other in folders].count(folder.name) == 1 else str(folder)


if __name__ == "__main__":
    sys.exit(main())
