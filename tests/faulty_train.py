"""train.py with a fault on one rank, for test_faults.py: `torchrun ... faulty_train.py FAULT RANK FOLDER ARGUMENTS`.

FAULT is `loss:3,4` (not a number at these steps), `gradient:3` (infinite) or `hang:3` (the step never ends). At the end
each rank leaves in FOLDER what it counted, and the weights that it holds.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import train
from model.loss import Features


def main() -> int:
    fault, _, steps = sys.argv[1].partition(":")
    rank, folder = int(os.environ.get("RANK", "0")), Path(sys.argv[3])
    faulty = {int(step) for step in steps.split(",")} if rank == int(sys.argv[2]) else set()
    num_losses = 0
    counted: list[tuple[int, int]] = []
    models: list[Any] = []

    def contrastive_loss(features: Features, *arguments: Any, **more: Any) -> torch.Tensor:
        nonlocal num_losses
        num_losses += 1
        if num_losses in faulty and fault == "hang":
            time.sleep(3600)
        if num_losses in faulty and fault == "gradient":
            features.image_features_BE.register_hook(lambda gradient: gradient * float("inf"))
        loss = plain_loss(features, *arguments, **more)
        return loss * float("nan") if num_losses in faulty and fault == "loss" else loss

    class Skips(train.Skips):
        def read(self) -> tuple[int, int]:
            counted.append(super().read())
            return counted[-1]

    def spread(model: Any, *arguments: Any) -> Any:
        models.append(model)
        return plain_spread(model, *arguments)

    plain_loss, plain_spread = train.contrastive_loss, train.spread
    train.contrastive_loss, train.Skips, train.spread = contrastive_loss, Skips, spread
    code = train.main(sys.argv[4:])
    if models:
        (folder / f"counted.{rank}.json").write_text(json.dumps(counted))
        weights = {name: weight.detach() for name, weight in models[0].named_parameters()}
        held = {name: weight.to_local() if isinstance(weight, DTensor) else weight for name, weight in weights.items()}
        save_file(held, folder / f"weights.{rank}.safetensors")
    return code


if __name__ == "__main__":
    sys.exit(main())
