"""One rank of a split batch, for tests/test_loss_distributed.py: run as a process of its own.

`RANK WORLD FOLDER`: what `step` gives for this rank's rows of every case, into FOLDER/rank-R-of-W.pt.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import loss_tiled
from model.loss import Features, LossKind, contrastive_loss

PAIRS, INPUT, EMBED, TILE = 16, 6, 5, 3
# Slots that do not count. With two ranks of 8: 7 and 5 valid pairs, then 0 and 7, then none.
BAD = {"whole": (), "uneven": (3, 8, 9, 13), "a rank of none": (*range(8), 11), "none": tuple(range(PAIRS))}
KINDS: tuple[LossKind, ...] = ("infonce", "sigmoid")


def cases() -> Iterator[tuple[LossKind, bool, str]]:
    for kind in KINDS:
        for tiled in (False, True):
            for bad in BAD:
                yield kind, tiled, bad


def step(
    kind: LossKind, tiled: bool, bad: str, part: slice, group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """Returns the loss and the gradients, float64, of two linear towers, temperature and bias, on part of the batch.

    A slot that does not count holds numbers that no other process can see, and one of them is not a number.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, PAIRS, INPUT, generator=generator, dtype=torch.float64)
    towers = torch.randn(2, INPUT, EMBED, generator=generator, dtype=torch.float64)
    valid = torch.ones(PAIRS, dtype=torch.bool)
    valid[list(BAD[bad])] = False
    parameters = {
        "image": towers[0].clone(),
        "text": towers[1].clone(),
        "log_scale": torch.tensor(2.0, dtype=torch.float64),
        "bias": torch.tensor(-3.0, dtype=torch.float64),
    }
    for parameter in parameters.values():
        parameter.requires_grad_()
    image, text = (F.normalize(x[part] @ parameters[name], dim=-1) for x, name in zip(inputs, parameters, strict=False))
    spoilt = torch.where(valid[part, None], 0.0, torch.nan)
    features = Features(image + spoilt, text - spoilt, parameters["log_scale"].exp(), parameters["bias"])
    loss = contrastive_loss(features, valid[part], kind=kind, tiled=tiled, group=group)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=kind == "infonce")
    grads = {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), found, strict=True)
    }
    return {"loss": loss.detach(), **grads}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    loss_tiled.TILE = TILE
    store = (folder / f"store-{world}").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    rows = PAIRS // world
    results = {case: step(*case, slice(rank * rows, (rank + 1) * rows), dist.group.WORLD) for case in cases()}
    torch.save(results, folder / f"rank-{rank}-of-{world}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
