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


def starting_encoders(config: Config) -> tuple[ModelConfig, dict[str, torch.Tensor] | None]:
    """Returns the encoders' config, and their weights where `--init` gives some. Prints what was done to those.

    Raises ValueError, in one line, where the weights cannot be read or are of another model.
    """
    preset = model_config(config.model)
    if config.init is None:
        positions = "learned" if config.image_positions == "learned" else preset.image.positions
        return replace(preset, image=replace(preset.image, positions=positions)), None
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
    print(f"init      {config.init}: {'; '.join(phrases)}")
    return encoders, state


def recorded_encoders(run: Path) -> ModelConfig:
    """Returns the encoders that a run folder was made with, wherever its first weights came from."""
    return from_json(_recorded(run)["encoders"])


def read_run(run: Path) -> Weights:
    """Returns the newest whole weights of a run folder. Raises ValueError, in one line, where there are none."""
    recorded = _recorded(run)
    last, passed_over = checkpoint.newest(run)
    if last is None:
        reason = f"its checkpoints are damaged ({passed_over[0]})" if passed_over else "it has no checkpoint yet"
        raise ValueError(f"{run} has no weights: {reason}")
    config = from_json(recorded["encoders"])
    side = recorded["image_size"] // config.image.patch
    return weights.own(str(last.path), config, last.model_tensors(), (side, side))


def _recorded(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{run} is not a run folder: it has no config.json; `python train.py` makes one") from None
    except ValueError:
        raise ValueError(f"{path} is damaged; train again with --resume never") from None
