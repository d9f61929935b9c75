"""A run folder as train.py leaves it, with random weights, for tests that read one."""

import json
from pathlib import Path

import torch

from model.clip import CLIP
from model.presets import ModelConfig, to_json
from training.checkpoint_writer import CheckpointWriter


def make_run(folder: Path, config: ModelConfig, grid: int, text_tokens: int, logit_bias: float | None = None) -> CLIP:
    """Writes a run folder with random weights, none of them left at zero or one."""
    torch.manual_seed(0)
    model = CLIP(config, grid=(grid, grid), text_tokens=text_tokens, logit_bias=logit_bias)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with CheckpointWriter(folder, keep=1) as writer:
        writer.save(1, model.state_dict(), {}, {})
    recorded = {"encoders": to_json(config), "image_size": grid * config.image.patch}
    (folder / "config.json").write_text(json.dumps(recorded))
    return model.eval()
