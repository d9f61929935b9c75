"""Checkpoints of real FSDP2 models: two gloo processes write their own shards; they, more of them, or none read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from training import checkpoint, optim
from training.checkpoint_writer import CheckpointWriter

ROOT = Path(__file__).parents[1]


class Small(nn.Module):
    """Sizes that do not divide: shards are uneven, and the last bias has none on rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 5), nn.Linear(5, 9), nn.Linear(9, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scale * self.last(self.second(self.first(inputs).tanh()).tanh())


def small(seed: int) -> Small:
    torch.manual_seed(seed)
    return Small()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    optimizer = optim.build(model, weight_decay=0.1, beta2=0.95)
    optim.set_learning_rate(optimizer, 0.01)
    return optimizer


def sharded(seed: int) -> tuple[Small, torch.optim.AdamW]:
    from torch.distributed.fsdp import fully_shard

    model = small(seed)
    fully_shard(model, ignored_params={model.scale})
    return model, adamw(model)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, writer: CheckpointWriter | None = None
) -> None:
    for step in steps:
        inputs = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if writer is not None:
            writer.save(step, model.state_dict(), optim.state_tensors(model, optimizer), {})


def load(model: nn.Module, optimizer: torch.optim.Optimizer, last: checkpoint.Checkpoint) -> None:
    model.load_state_dict(last.tensors_like("model", model.state_dict()))
    parameters = dict(model.named_parameters())
    optim.load_state_tensors(model, optimizer, last.tensors_like("optimizer", parameters))


def rank_main(folder: Path, rank: int, world_size: int) -> None:
    """What one process does: trains and saves, resumes in a fresh model, and passes on what others have written."""
    from torch import distributed
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=world_size)

    def writer(name: str) -> CheckpointWriter:
        return CheckpointWriter(folder / name, keep=9, rank=rank, world_size=world_size, nonce="n")

    model, optimizer = sharded(seed=0)
    with writer("trained") as saving:
        train(model, optimizer, range(1, 5), saving)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    moments = optim.state_tensors(model, optimizer)
    whole |= {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in moments.items()}
    distributed.barrier()
    if rank == 0:
        save_file(whole, folder / "gathered.safetensors")

    model, optimizer = sharded(seed=1)
    load(model, optimizer, checkpoint.at(folder / "trained" / "checkpoints" / "step-00000002"))
    with writer("resumed") as saving:
        train(model, optimizer, range(3, 5), saving)
    for name in ("alone", "others"):
        for path in checkpoint.list_steps(folder / name)[-1:]:
            model, optimizer = sharded(seed=2)
            load(model, optimizer, checkpoint.at(path))
            with writer(f"{name}-passed-on") as saving:
                saving.save(1, model.state_dict(), optim.state_tensors(model, optimizer), {})
    distributed.destroy_process_group()


def run_ranks(folder: Path, world_size: int) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank), str(world_size)],
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            _, error = process.communicate(timeout=600)
            assert process.returncode == 0, error
    finally:
        for process in processes:
            process.kill()


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    last, passed_over = checkpoint.newest(run)
    assert last is not None
    assert passed_over == []
    assert last.state["step"] == step
    return last.model_tensors() | last.optimizer_tensors()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave behind, and a checkpoint that one process without shards wrote for them."""
    folder = tmp_path_factory.mktemp("ranks")
    model = small(seed=3)
    optimizer = adamw(model)
    with CheckpointWriter(folder / "alone", keep=1) as writer:
        train(model, optimizer, range(1, 3), writer)
    run_ranks(folder, 2)
    return folder


def test_shards_put_together_are_the_gathered_tensors(two_ranks: Path) -> None:
    assert same(tensors(two_ranks / "trained", 4), load_file(two_ranks / "gathered.safetensors"))


def test_each_rank_wrote_its_shards_and_rank_0_what_is_whole(two_ranks: Path) -> None:
    folder = checkpoint.list_steps(two_ranks / "trained")[-1]
    first, second = (load_file(folder / f"model-0000{rank}-of-00002.safetensors") for rank in (0, 1))
    assert first["first.weight"].shape == (3, 7)
    assert second["first.weight"].shape == (2, 7)
    assert "scale" in first
    assert {"scale", "last.bias"} & second.keys() == set()
    moments = load_file(folder / "optimizer-00001-of-00002.safetensors")
    assert moments.keys() == {f"{name}.{kind}" for name in second for kind in ("exp_avg", "exp_avg_sq")}


def test_a_resumed_sharded_run_is_bit_equal(two_ranks: Path) -> None:
    assert same(tensors(two_ranks / "resumed", 4), tensors(two_ranks / "trained", 4))


def test_shards_load_in_one_process_without_ranks(two_ranks: Path) -> None:
    last, _ = checkpoint.newest(two_ranks / "trained")
    assert last is not None
    model = small(seed=5)
    optimizer = adamw(model)
    load(model, optimizer, last)
    assert same(dict(model.state_dict()) | optim.state_tensors(model, optimizer), tensors(two_ranks / "trained", 4))


def test_one_process_hands_over_to_shards(two_ranks: Path) -> None:
    assert same(tensors(two_ranks / "alone-passed-on", 1), tensors(two_ranks / "alone", 2))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])
def test_other_numbers_of_ranks(two_ranks: Path, tmp_path: Path, world_size: int) -> None:
    (tmp_path / "others").symlink_to(two_ranks / "resumed")
    run_ranks(tmp_path, world_size)
    assert same(tensors(tmp_path / "others-passed-on", 1), tensors(two_ranks / "resumed", 4))
    names = {path.name for path in checkpoint.list_steps(tmp_path / "others-passed-on")[0].glob("model-*.safetensors")}
    # Nine rows over four ranks are 3, 3, 3 and none, and a rank that holds nothing writes no file.
    assert names == {f"model-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(3)}


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
