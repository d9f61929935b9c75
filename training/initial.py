"""The encoders a run starts with: a preset's, or those of `--init`, handed over to its grid and text length.

Also reads the weights of any run folder, which is what export.py needs.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import weights
from model.presets import ModelConfig, from_json, model_config
from model.weights import Weights

from . import checkpoint
from .config import Config
from .ema import EMA
from .stages import weights_folder


def starting_encoders(config: Config) -> tuple[ModelConfig, dict[str, torch.Tensor] | None]:
    """Returns the encoders' config, and their weights where `--init` gives some. Prints what was done to those.

    Raises ValueError, in one line, where the weights cannot be read or are of another model.
    """
    preset = model_config(config.model)
    if config.init is None:
        positions = "learned" if config.image_positions == "learned" else preset.image.positions
        return replace(preset, image=replace(preset.image, positions=positions)), None
    of_stage = config.stage is not None and config.init.parent == config.run_folder.parent
    if of_stage and not checkpoint.list_steps(config.init):
        raise ValueError(
            f"the stage {config.stage} starts from the weights of {config.init.name}, and {config.init} has none; "
            f"train --stage {config.init.name} first, or all stages without --stage"
        )
    unfinished = _unfinished(config.init)
    if of_stage and unfinished:
        raise ValueError(
            f"the stage {config.stage} starts from the weights of {config.init.name}, which is unfinished: "
            f"{config.init} has {unfinished}; train --stage {config.init.name} to its end first, or give --init "
            f"{config.init} with another --out to start from it as it is"
        )
    found = read_run(config.init) if config.init.is_dir() else weights.read(config.init, preset)
    encoders, state, phrases = weights.hand_over(
        found,
        preset,
        grid=config.geometry.grid,
        text_tokens=config.text_tokens,
        positions=config.image_positions,
        on_resize=config.on_resize,
        logit_bias=config.logit_bias,
    )
    if unfinished:
        phrases = [*phrases, f"an unfinished run, {unfinished}"]
    print(f"init      {config.init}: {'; '.join(phrases)}")
    return encoders, state


def _unfinished(init: Path) -> str | None:
    """Returns how far the run of a folder is, or None where it is finished, has no checkpoint, or is no run."""
    steps = checkpoint.list_steps(init)
    if not steps or not (init / "config.json").exists():
        return None
    done, total = checkpoint.step_of(steps[-1]), recorded_values(init).get("steps")
    return f"{done:,} of {total:,} steps" if isinstance(total, int) and done < total else None


def recorded_encoders(run: Path) -> ModelConfig:
    """Returns the encoders that a run folder was made with, wherever its first weights came from."""
    return from_json(recorded_values(run)["encoders"])


def read_run(run: Path, *, ema: bool = False) -> Weights:
    """Returns the newest whole weights of a run folder, or their moving average. Raises ValueError, in one line, where
    there are none."""
    recorded = recorded_values(run)
    last, passed_over = checkpoint.newest(run)
    if last is None:
        reason = f"its checkpoints are damaged ({passed_over[0]})" if passed_over else "it has no checkpoint yet"
        raise ValueError(f"{run} has no weights: {reason}")
    config = from_json(recorded["encoders"])
    side = recorded["image_size"] // config.image.patch
    tensors, averages = last.model_tensors(), last.tensors(EMA) if ema else {}
    if ema and not averages:
        raise ValueError(f"{run} keeps no moving average of its weights; leave --ema out, or train with --ema 0.9999")
    return weights.own(str(last.path), config, {**tensors, **averages}, (side, side))


def recorded_values(run: Path) -> dict[str, Any]:
    """Returns what a run folder's config.json holds. Raises ValueError, in one line, where there is none."""
    path = run / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stages = sorted(found.parent for found in run.glob("*/config.json"))
        if stages:
            names = ", ".join(stage.name for stage in stages)
            last, _ = weights_folder(run)
            last = stages[-1] if last == run else last
            raise ValueError(f"{run} holds the stages {names}, each a run of its own; give {last}") from None
        raise ValueError(f"{run} is not a run folder: it has no config.json; `python train.py` makes one") from None
    except ValueError:
        raise ValueError(f"{path} is damaged; train again with --resume never") from None
