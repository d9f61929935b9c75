"""What torchrun starts for test_distributed.py: gradients of one batch over several ranks, in every way there is."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from model import loss_tiled
from model.clip import CLIP
from model.loss import Features, LossKind, contrastive_loss
from model.presets import ModelConfig, model_config
from training.accumulation import accumulated
from training.distributed import World, joined, place
from training.fields import Config
from training.parallel import backward, over_ranks, spread

BATCH, TOKENS, TEXT_TOKENS = 16, 3, 5


@dataclass(frozen=True)
class Case:
    kind: LossKind
    tiled: bool
    shard: bool
    accumulate: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))


def cases() -> Iterator[Case]:
    for kind, tiled, shard, accumulate in itertools.product(
        ("infonce", "sigmoid"), (False, True), (False, True), (1, 4)
    ):
        yield Case(kind, tiled, shard, accumulate)
    yield Case("infonce", False, False, 1, True)
    yield Case("infonce", False, True, 4, True)


def tiny(kind: LossKind) -> CLIP:
    """A CLIP small enough for float64, of odd sizes, so that shards are uneven."""
    preset = model_config("ViT-Ti-16")
    image = dataclasses.replace(preset.image, width=12, layers=2, heads=3, mlp_width=20, patch=2, positions="learned")
    text = dataclasses.replace(preset.text, width=12, layers=2, heads=2, mlp_width=28, vocabulary=31)
    config: ModelConfig = dataclasses.replace(preset, image=image, text=text, embed_dim=7)
    torch.manual_seed(0)
    bias = -3.0 if kind == "sigmoid" else None
    return CLIP(config, grid=(3, 3), text_tokens=TEXT_TOKENS, attention="math", logit_bias=bias).double()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches, positions, caption ids and which pairs are valid: unevenly many in any equal parts."""
    draw = torch.Generator().manual_seed(1)
    patches = torch.randint(0, 256, (BATCH, TOKENS, 12), dtype=torch.uint8, generator=draw)
    positions = torch.stack([torch.randperm(9, generator=draw)[:TOKENS] for _ in range(BATCH)]).to(torch.int16)
    captions = torch.randint(0, 31, (BATCH, TEXT_TOKENS), dtype=torch.int32, generator=draw)
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[[2, 9, 10, 12, 15]] = False
    return patches, positions, captions, valid


def gradients(case: Case, world: World) -> dict[str, torch.Tensor]:
    """Returns every parameter's gradient, the loss and the gradients' norm, as this rank has them, each whole."""
    model = tiny(case.kind)
    config = Config(tokens=TOKENS, text_tokens=TEXT_TOKENS, shard=case.shard, grad_checkpointing=case.checkpointing,
                    device="cpu", batch_size=BATCH)  # fmt: skip
    called = spread(model, config, world)
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    *inputs, valid = (each[own] for each in batch())

    def loss_of(features: Features) -> torch.Tensor:
        return contrastive_loss(features, valid, kind=case.kind, tiled=case.tiled, group=world.group)

    if case.accumulate == 1:
        loss = loss_of(called(*inputs))
        backward(loss, model, world)
    else:
        _, loss = accumulated(
            lambda each: called(*each), loss_of, inputs, case.accumulate, called=called, model=model, world=world
        )
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), case
    total, norm = over_ranks(loss, [gradient for gradient in found.values() if gradient is not None], world)
    whole = {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in found.items()
        if gradient is not None
    }
    return {**whole, "loss": total, "norm": norm}


def main() -> None:
    torch.set_num_threads(1)
    loss_tiled.TILE = 3  # smaller than a rank's part, and no divisor of it
    world = place()
    with joined(world, "cpu"):
        for case in cases():
            found = gradients(case, world)
            save_file({name: value.contiguous() for name, value in found.items()},
                      Path(sys.argv[1]) / f"{case.name}.{world.rank}.safetensors")  # fmt: skip


if __name__ == "__main__":
    main()
