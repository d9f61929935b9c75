"""Real processes over gloo, each with its rows of a batch, add up to one process with the whole of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_ranks import BAD, KINDS, PAIRS, TILE, cases, step

from model import loss_tiled

ROOT = Path(__file__).parents[1]
Results = dict[tuple[str, bool, str], dict[str, torch.Tensor]]


def run(folder: Path, world: int) -> list[Results]:
    """Returns what each rank of a world gives."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
    }
    script = str(ROOT / "tests" / "loss_ranks.py")
    # What gloo says of a host's name is no concern; a warning of Python is an error.
    commands = [[sys.executable, "-W", "error", script, str(rank), str(world), str(folder)] for rank in range(world)]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=600)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), errors
    return [torch.load(folder / f"rank-{rank}-of-{world}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def whole() -> Results:
    """What one process without a group gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_tiled, "TILE", TILE)
        return {case: step(*case, slice(0, PAIRS), None) for case in cases()}


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run(tmp_path_factory.mktemp("ranks"), request.param)


def test_losses_and_gradients_of_the_ranks_add_up_to_the_whole_batchs(whole: Results, split: list[Results]) -> None:
    for kind, tiled, bad in cases():
        for name, dense in whole[kind, False, bad].items():
            total = torch.stack([rank[kind, tiled, bad][name] for rank in split]).sum(dim=0)
            difference = (total - dense).abs().max() / dense.abs().max().clamp(min=1e-300)
            assert difference < 1e-10, f"{kind} {tiled} {bad} {name}: {difference}"
            # What the case says is what it tests: there is something to add up, or nothing at all.
            idle = bad == "none" or (kind == "infonce" and name == "bias")
            assert bool(dense.any()) != idle, f"{kind} {bad} {name}"
            if len(split) == 1:  # nothing is sent, and not a bit is another
                assert torch.equal(total, whole[kind, tiled, bad][name]), f"{kind} {tiled} {bad} {name}"


def test_a_ranks_share_is_the_same_dense_and_tiled(split: list[Results]) -> None:
    for rank in split:
        for kind in KINDS:
            for bad in BAD:
                dense, tiled = (rank[kind, form, bad]["loss"] for form in (False, True))
                torch.testing.assert_close(tiled, dense, rtol=1e-10, atol=1e-13)
