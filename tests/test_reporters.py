"""Metrics on their way to TensorBoard, wandb and trackio. The packages themselves where they are installed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest

from training import reporters
from training.reporters import Reporters

installed = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "wandb", "trackio")}


class Recorder:
    def __init__(self, fail_at: int | None = None) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.fail_at = fail_at

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step == self.fail_at:
            raise ConnectionError("the service is away")
        self.logged.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def with_reporters(run: Path, **given: Recorder) -> Reporters:
    made = Reporters((), run, {}, 0)
    made._reporters.update(given)
    return made


def test_only_numbers_are_passed_on(tmp_path: Path) -> None:
    recorder = Recorder()
    made = with_reporters(tmp_path, wandb=recorder)
    made.log({"step": 7, "loss": 0.5, "rejected": 2, "ledger": ["ab"], "finished": True}, 7)
    made.close()
    assert recorder.logged == [(7, {"loss": 0.5, "rejected": 2.0})]
    assert recorder.closed


def test_a_service_that_fails_is_named_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, other = Recorder(fail_at=2), Recorder()
    made = with_reporters(tmp_path, trackio=failing, wandb=other)
    for step in range(1, 5):
        made.log({"loss": 1.0}, step)
    made.close()
    assert [step for step, _ in failing.logged] == [1]
    assert [step for step, _ in other.logged] == [1, 2, 3, 4]
    assert not failing.closed
    assert capsys.readouterr().err.count("--report-to trackio failed and is left out: the service is away") == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_one_line(
    name: reporters.ReporterName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(reporters.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=f"--report-to {name}: the package is not installed; pip install {name}"):
        Reporters([name], tmp_path, {}, 0)


@pytest.mark.skipif(not installed["tensorboard"], reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_goes_on_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 4), (3, 6)):
        made = Reporters(["tensorboard"], tmp_path, {"lr": 0.1}, first - 1)
        for step in range(first, last + 1):
            made.log({"loss": step + first / 10}, step)
        made.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert losses == [(1, 1.1), (2, 2.1), (3, 3.3), (4, 4.3), (5, 5.3), (6, 6.3)]


@pytest.mark.skipif(not installed["wandb"], reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = Reporters(["wandb"], tmp_path, {"lr": 0.1}, 0)
    made.log({"loss": 1.0}, 1)
    made.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.skipif(not installed["trackio"], reason="trackio is not installed")
@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_a_local_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    made = Reporters(["trackio"], tmp_path, {"lr": 0.1}, 0)
    made.log({"loss": 1.0}, 1)
    made.close()
    assert any(path.is_file() for path in (tmp_path / "trackio").rglob("*"))
