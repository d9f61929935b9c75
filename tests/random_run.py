"""A run folder as train.py leaves it, with random weights, for tests that read one."""

import json
from pathlib import Path

import torch

from model.clip import CLIP
from model.presets import ModelConfig, to_json
from training import checkpoint


def make_run(folder: Path, config: ModelConfig, grid: int, text_tokens: int) -> CLIP:
    """Writes a run folder with random weights, none of them left at zero or one."""
    torch.manual_seed(0)
    model = CLIP(config, grid=(grid, grid), text_tokens=text_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint.save(folder, 1, model.state_dict(), {}, {}, keep=1)
    recorded = {"encoders": to_json(config), "image_size": grid * config.image.patch}
    (folder / "config.json").write_text(json.dumps(recorded))
    return model.eval()
