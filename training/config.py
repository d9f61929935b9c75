"""The command line in, checked frozen Configs out, one a stage; and every value filled in that follows from others."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.presets import model_config
from pipeline.order import default_lanes, lanes_of_rank

from .fields import STARTER, Config
from .preset import expand

__all__ = ["STARTER", "Config", "attention_backends", "parse", "resolved", "resolved_device"]


def parse(arguments: Sequence[str], description: str) -> list[Config]:
    """Returns the checked configs of a command line, one for each stage that it trains.

    Raises ValueError; for a value that is missing or of another type tyro prints and exits.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    configs: list[Config] = []
    for stage in expand(arguments, known):
        config = tyro.cli(Annotated[Config, tyro.conf.OmitArgPrefixes], args=stage.flags, description=description)
        if stage.name is not None:
            assert config.preset is not None
            out = config.out or Path("runs") / config.preset.stem
            init = config.init if stage.before is None else out / stage.before
            config = dataclasses.replace(config, out=out / stage.name, stage=stage.name, init=init)
        config.check()
        configs.append(config)
    return configs


def resolved_device(device: str, *, cuda: bool) -> Literal["cuda", "cpu"]:
    """Returns what --device comes to. cuda: whether this machine has a CUDA device. Raises ValueError if it must."""
    if device == "cuda" and not cuda:
        raise ValueError("--device cuda: no CUDA device is here, or this torch has none built in; use --device cpu")
    return "cuda" if cuda and device != "cpu" else "cpu"


def resolved(config: Config, *, cuda: bool, world_size: int = 1) -> Config:
    """Returns the config with every value that follows from others filled in: nothing is None or `auto`, save what
    is decided for each tower (--attention), by the weights (--on-resize) or by the batch (--tiled-loss).

    cuda: whether this machine has a CUDA device. world_size: processes that share the batch.
    Raises ValueError where the values ask for what is not there.
    """
    device = resolved_device(config.device, cuda=cuda)
    on_cuda = device == "cuda"
    if config.precision == "bf16" and not on_cuda:
        raise ValueError("--precision bf16 is for CUDA: most CPUs are slower with it; use --precision fp32")
    samples = config.total_steps * config.batch_size
    automatic = {
        "precision": "bf16" if on_cuda else "fp32",
        "decoder": "dali" if on_cuda else "turbo",
    }
    filled = dataclasses.replace(
        config,
        out=config.run_folder,
        device=device,
        image_size=config.geometry.image_size,
        lanes=config.lanes or default_lanes(config.batch_size),
        steps=config.total_steps,
        samples=samples,
        lr=config.peak_lr,
        base_lr=None,
        warmup_samples=min(50_000, samples // 10) if config.warmup_samples is None else config.warmup_samples,
        **{name: value for name, value in automatic.items() if getattr(config, name) == "auto"},
    )
    _check_shares(filled, world_size)
    attention_backends(filled)
    return filled


def _check_shares(config: Config, world_size: int) -> None:
    """Raises ValueError where ranks cannot share the lanes, or a rank's part cannot be cut into micro-batches."""
    assert config.lanes is not None
    lanes_of_rank(config.lanes, 0, world_size)
    if config.batch_size // world_size % config.accumulate:
        part = (
            f"a rank's {config.batch_size // world_size} pairs" if world_size > 1 else f"the {config.batch_size} pairs"
        )
        raise ValueError(
            f"--accumulate {config.accumulate} does not divide {part} of a batch; give a divisor of them, or another "
            "--batch-size"
        )


def attention_backends(config: Config) -> dict[str, str]:
    """Returns what a resolved config's --attention comes to for each tower. Raises ValueError where it cannot serve."""
    import torch

    from model.clip import attention_choices

    return attention_choices(
        model_config(config.model),
        config.attention,
        config.tokens,
        config.text_tokens,
        device=config.device,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
    )
