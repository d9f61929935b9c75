"""A run's numbers to where people watch them: TensorBoard, wandb, trackio, each imported only when it is named.

metrics.jsonl stays the record. These are copies of it, so a service that fails is named once and left out.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

ReporterName = Literal["tensorboard", "wandb", "trackio"]

PROJECT = "shortclip"


class Reporter(Protocol):
    """One place that numbers go to."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; those of a resumed run go on, without the steps that were lost."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        _required("tensorboard")
        # Only here: it takes a second to import.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        if not step:
            self._writer.add_text("config", "\n".join(f"    {name} = {value}" for name, value in config.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Service:
    """wandb, or trackio, which follows its calls. The run's folder is its name, and its identity on resume."""

    def __init__(self, name: ReporterName, run: Path, config: Mapping[str, Any], step: int) -> None:
        module = _required(name)
        settings: dict[str, Any] = {"project": PROJECT, "name": run.name, "config": dict(config)}
        if name == "wandb":
            # An id makes it one run over resumes; the folder's whole path keeps two runs of one name apart.
            settings |= {"dir": str(run), "id": _identity(run), "resume": "allow" if step else None}
        else:
            settings |= {"resume": "allow" if step else "never"}
        try:
            module.init(**settings)
        # Each service has errors of its own, such as that nobody is logged in.
        except Exception as error:
            raise ValueError(f"--report-to {name} cannot start: {error}; mend that, or leave it out") from None
        self._module = module

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


class Reporters:
    """All the places that --report-to names."""

    def __init__(self, names: Sequence[ReporterName], run: Path, config: Mapping[str, Any], step: int) -> None:
        """step: how many the run has done. Raises ValueError where one cannot start, or is not installed."""
        self._reporters: dict[str, Reporter] = {
            name: TensorBoard(run, config, step) if name == "tensorboard" else Service(name, run, config, step)
            for name in dict.fromkeys(names)
        }

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Passes on what is a number. A service that raises is named on stderr and gets nothing more."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
        }
        self._each("log", numbers, step)

    def close(self) -> None:
        """Waits until all has been sent."""
        self._each("close")

    def _each(self, what: Literal["log", "close"], *arguments: Any) -> None:
        for name, reporter in list(self._reporters.items()):
            try:
                getattr(reporter, what)(*arguments)
            # Whatever a service of others raises must not end the run that it watches.
            except Exception as error:
                del self._reporters[name]
                print(f"warning: --report-to {name} failed and is left out: {error}", file=sys.stderr)


def _required(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"--report-to {name}: the package is not installed; pip install {name}") from None


def _identity(run: Path) -> str:
    """Returns an id of letters, digits and dashes that stands for the run's folder."""
    text = str(run.resolve())
    return "".join(letter if letter.isalnum() else "-" for letter in text).strip("-")[-64:]
