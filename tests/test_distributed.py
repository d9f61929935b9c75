"""Losses and gradients over real ranks: those of one process on the full batch, however the work is laid out."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import gradient_ranks
import pytest
import torch
import torchrun
from safetensors.torch import load_file

from model.loss import contrastive_loss
from training.config import parse, resolved
from training.distributed import World, joined


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    yield
    torchrun.kill_left_over()


def expected(kind: gradient_ranks.LossKind) -> dict[str, torch.Tensor]:
    """One process, the whole batch, the dense loss, plain autograd."""
    model = gradient_ranks.tiny(kind)
    *inputs, valid = gradient_ranks.batch()
    loss = contrastive_loss(model(*inputs), valid, kind=kind)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in found.values()]).sum().sqrt()
    return {**found, "loss": loss.detach(), "norm": norm}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_have_the_gradients_of_one_process(world_size: int, tmp_path: Path) -> None:
    torchrun.run(world_size, str(torchrun.ROOT / "tests" / "gradient_ranks.py"), str(tmp_path))
    wanted = {kind: expected(kind) for kind in ("infonce", "sigmoid")}
    worst: dict[str, float] = {}
    for case in gradient_ranks.cases():
        want = wanted[case.kind]
        for rank in range(world_size):
            found = load_file(tmp_path / f"{case.name}.{rank}.safetensors")
            assert found.keys() == want.keys(), case
            for name, value in want.items():
                error = float((found[name] - value).norm() / value.norm())
                assert math.isfinite(error), (case, name)
                worst[f"{case.name} {name} {rank}"] = error
    name = max(worst, key=lambda each: worst[each])
    assert worst[name] < 1e-10, f"{name}: {worst[name]:.1e}"
    assert len(worst) == world_size * sum(len(wanted[case.kind]) for case in gradient_ranks.cases())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lanes", "16"), "world size 3 does not divide the 16 lanes; use a divisor of them"),
        (("--lanes", "48", "--accumulate", "5"), "--accumulate 5 does not divide a rank's 16 pairs of a batch"),
    ],
)
def test_what_three_ranks_cannot_share_is_refused(more: tuple[str, ...], message: str) -> None:
    (config,) = parse(["--steps", "2", "--batch-size", "48", *more], "")
    with pytest.raises(ValueError, match=message):
        resolved(config, cuda=False, world_size=3)
    assert resolved(dataclasses.replace(config, accumulate=1), cuda=False, world_size=2 if message[0] == "w" else 3)


def test_all_ranks_of_a_host_with_too_few_gpus_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it one of them alone, the others would wait for it, and rank 0 would say nothing."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in (0, 1):
        with (
            pytest.raises(ValueError, match="has 1 GPUs, too few for the 2 ranks on it"),
            joined(World(rank, 2, rank), "cuda"),
        ):
            pass


@pytest.mark.slow
def test_the_lanes_must_be_divisible_by_the_ranks(shards: Path, tmp_path: Path) -> None:
    arguments = ("train.py", "--data", str(shards), "--out", str(tmp_path / "run"), "--steps", "2", "--tokens", "4")
    more = ("--batch-size", "32", "--lanes", "16", "--device", "cpu", "--model", "ViT-Ti-16")
    process = torchrun.start(3, *arguments, *more)
    output = torchrun.end(process)
    assert process.returncode == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert errors == ["error: world size 3 does not divide the 16 lanes; use a divisor of them"]
