"""Stock open_clip and this program give the same features from the same weights, both ways: `make test-interop`.

open_clip runs in .venv-peers, in a process of its own; its random weights come from its own initialisation.
"""

import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from random_run import make_run

import export
from model.clip import CLIP
from model.loss import Features, contrastive_loss
from model.openclip_config import openclip_config
from model.presets import ModelConfig, model_config
from model.weights import hand_over, read
from pipeline.captions import caption_encoder
from pipeline.tokens import patchify

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".venv-peers" / "bin" / "python"
ATOL = 1e-4
SENTENCES = (
    "a photo of an astronaut in an orange suit",
    "An e-mail, 3.5 MB: 'naïve café' — 東京!",
    "",
    "one very long caption that goes on and on about a cat which sat upon the mat beside the hat that had been left "
    "behind by somebody who never came back to fetch it, antidisestablishmentarianism notwithstanding",
)

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PEER.exists(), reason="`make peers` makes .venv-peers, which has open_clip"),
]


def peer(*arguments: object) -> None:
    """Runs a command of peer_openclip.py where nothing can be downloaded."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    command = [str(PEER), str(ROOT / "tests" / "peer_openclip.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def cut(config: ModelConfig, layers: int) -> ModelConfig:
    """Returns the preset with fewer layers in both towers; 0: as it is."""
    if not layers:
        return config
    towers = (dataclasses.replace(tower, layers=layers) for tower in (config.image, config.text))
    return dataclasses.replace(config, **dict(zip(("image", "text"), towers, strict=True)))


def inputs(path: Path, config: ModelConfig, grid: int, text_tokens: int, **more: Any) -> dict[str, npt.NDArray[Any]]:
    """Writes and returns two pictures of noise and two captions of random length, as the tokenizer lays them out."""
    rng = np.random.default_rng(1)
    side = grid * config.image.patch
    ids = np.zeros((2, text_tokens), np.int64)
    for row, length in enumerate((text_tokens - 2, text_tokens // 2)):
        ids[row, : length + 1] = rng.integers(1, 30_000, length + 1)
    if config.text.tokenizer == "bpe":
        ids[:, 0] = 49_406
        ids[0, text_tokens - 1] = ids[1, text_tokens // 2] = 49_407
    values = {"pixels": rng.integers(0, 256, (2, side, side, 3), np.uint8), "caption_ids": ids}
    values |= {"mean": np.array(config.pixel_mean), "std": np.array(config.pixel_std), **more}
    np.savez(path, **values)
    return values


def our_features(model: CLIP, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
    patches = torch.from_numpy(patchify(pixels, model.config.image.patch))
    positions = torch.arange(patches.shape[1], dtype=torch.int16).repeat(len(patches), 1)
    with torch.no_grad():
        image = model.encode_image(patches, positions)
        return [image.numpy(), model.encode_text(torch.from_numpy(ids).to(torch.int32)).numpy()]


def check(name: str, ours: list[npt.NDArray[np.float32]], theirs: list[npt.NDArray[np.float32]]) -> None:
    for tower, our, their in zip(("image", "text"), ours, theirs, strict=True):
        difference = float(np.abs(our - their).max())
        print(f"{name}: {tower} features of {our.shape[1]}, max abs difference {difference:.1e}")
        assert difference < ATOL, f"{tower}: {difference}"
        assert np.abs(our[0] - our[1]).max() > 10 * ATOL, "the inputs make no difference"


# open_clip's entry, our preset, layers (0: all), grid
ENTRIES = [
    ("ViT-L-14-CLIPA", "ViT-L-14", 0, 16),
    ("ViT-L-14-CLIPA-336", "ViT-L-14", 2, 24),
    ("ViT-H-14-CLIPA", "ViT-H-14", 2, 16),
    ("ViT-H-14-CLIPA-336", "ViT-H-14", 1, 24),
    ("ViT-bigG-14-CLIPA", "ViT-bigG-14", 1, 16),
    ("ViT-bigG-14-CLIPA-336", "ViT-bigG-14", 1, 24),
    ("ViT-B-16", "ViT-B-16-bpe", 0, 14),
]


@pytest.mark.parametrize(("entry", "preset", "layers", "grid"), ENTRIES, ids=[entry[0] for entry in ENTRIES])
def test_open_clips_weights_give_its_features_here(
    tmp_path: Path, entry: str, preset: str, layers: int, grid: int
) -> None:
    config, text_tokens = cut(model_config(preset), layers), 32
    values = inputs(tmp_path / "inputs.npz", config, grid, text_tokens)
    peer("create", entry, layers, tmp_path / "inputs.npz", tmp_path)
    weights = read(tmp_path / "model.safetensors", config)
    assert weights.grid == (grid, grid)
    found, state, _ = hand_over(weights, config, grid=(grid, grid), text_tokens=text_tokens)
    with torch.device("meta"):
        model = CLIP(found, grid=(grid, grid), text_tokens=text_tokens)
    model.load_state_dict(state, assign=True)
    # Not parameters and not in the file: what the meta device left empty.
    fresh = CLIP(cut(found, 1), grid=(grid, grid), text_tokens=text_tokens)
    model.image.patch_embedding.patch_mean_P = fresh.image.patch_embedding.patch_mean_P
    model.image.patch_embedding.patch_std_P = fresh.image.patch_embedding.patch_std_P
    theirs = np.load(tmp_path / "features.npz")
    check(entry, our_features(model, values["pixels"], values["caption_ids"]), [theirs["image"], theirs["text"]])
    # open_clip counts image positions, the class token's among them.
    positions = (grid * grid + 1) * config.image.width
    ours = sum(p.numel() for p in model.parameters()) + positions
    assert ours == int(theirs["num_parameters"])
    (tmp_path / "model.safetensors").unlink()


# preset, layers, grid, text tokens: at CLIPA's published sizes, 224 and 336 px, and at those of the reduced stages
EXPORTS = [
    ("ViT-L-14", 0, 16, 32),
    ("ViT-L-14", 2, 24, 32),
    ("ViT-H-14", 2, 16, 32),
    ("ViT-H-14", 1, 24, 32),
    ("ViT-H-14", 2, 6, 8),
    ("ViT-bigG-14", 1, 16, 32),
    ("ViT-bigG-14", 1, 24, 32),
    ("ViT-bigG-14", 1, 4, 8),
    ("ViT-B-16", 0, 4, 16),
    ("ViT-B-16-bpe", 0, 4, 16),
    ("ViT-B-16-bpe", 0, 14, 32),
    ("ViT-Ti-16", 0, 7, 16),
    ("ViT-256x2-8", 0, 4, 12),
    ("ViT-L-14-bpe", 2, 6, 16),
]


@pytest.mark.parametrize(
    ("preset", "layers", "grid", "text_tokens"), EXPORTS, ids=[f"{each[0]}-grid{each[2]}" for each in EXPORTS]
)
def test_an_export_gives_our_features_in_open_clip(
    tmp_path: Path,
    clip_vocabulary: Path,
    photographs: list[npt.NDArray[np.uint8]],
    preset: str,
    layers: int,
    grid: int,
    text_tokens: int,
) -> None:
    config = cut(model_config(preset), layers)
    model = make_run(tmp_path / "run", config, grid, text_tokens)
    folder = tmp_path / "exported"
    assert export.main([str(tmp_path / "run"), "--out", str(folder / "model.safetensors")]) == 0
    picture = photographs[1]
    values = inputs(tmp_path / "inputs.npz", config, grid, text_tokens, picture=picture, sentences=np.array(SENTENCES))
    peer("load", folder, tmp_path / "inputs.npz")
    theirs = np.load(folder / "features.npz")
    ours = our_features(model, values["pixels"], values["caption_ids"])
    check(f"{preset}, grid {grid}", ours, [theirs["image"], theirs["text"]])

    tokenizer = config.text.tokenizer
    encoder = caption_encoder(tokenizer, text_tokens, vocabulary=clip_vocabulary if tokenizer == "bpe" else None)
    ids = encoder.encode([sentence.encode() for sentence in SENTENCES])
    np.testing.assert_array_equal(theirs["tokens"], ids)
    mean, std = (np.array(each)[:, None, None] for each in (config.pixel_mean, config.pixel_std))
    pixels = np.rint((theirs["picture"] * std + mean) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    side = openclip_config(config, (grid, grid), text_tokens)["model_cfg"]["vision_cfg"]["image_size"]
    assert pixels.shape == (1, side, side, 3)
    ours = our_features(model, np.ascontiguousarray(pixels), ids)
    for our, name in zip(ours, ("picture_features", "sentence_features"), strict=True):
        difference = float(np.abs(our - theirs[name]).max())
        print(f"{preset}, grid {grid}: {name}, max abs difference {difference:.1e}")
        assert difference < ATOL


def test_an_export_of_the_sigmoid_loss_gives_our_loss_in_open_clip(tmp_path: Path) -> None:
    config = model_config("ViT-Ti-16")
    model = make_run(tmp_path / "run", config, 4, 8, logit_bias=-9.5)
    folder = tmp_path / "exported"
    assert export.main([str(tmp_path / "run"), "--out", str(folder / "model.safetensors")]) == 0
    values = inputs(tmp_path / "inputs.npz", config, 4, 8)
    peer("load", folder, tmp_path / "inputs.npz")
    theirs = np.load(folder / "features.npz")
    ours = our_features(model, values["pixels"], values["caption_ids"])
    check("sigmoid", ours, [theirs["image"], theirs["text"]])
    assert theirs["bias"] == -9.5
    scale, bias = model.logit_scale.detach().exp(), model.logit_bias
    assert theirs["scale"] == pytest.approx(scale.item())
    features = Features(torch.from_numpy(ours[0]), torch.from_numpy(ours[1]), scale, bias)
    loss = contrastive_loss(features, torch.ones(2, dtype=torch.bool), kind="sigmoid")
    assert theirs["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_an_export_gives_our_features_in_hugging_faces_clip(tmp_path: Path, clip_vocabulary: Path) -> None:
    config = model_config("ViT-B-16-bpe")
    model = make_run(tmp_path / "run", config, 4, 16)
    folder = tmp_path / "exported"
    command = [str(tmp_path / "run"), "--out", str(folder / "model.safetensors"), "--format", "huggingface"]
    assert export.main([*command, "--vocabulary", str(clip_vocabulary)]) == 0
    values = inputs(tmp_path / "inputs.npz", config, 4, 16, sentences=np.array(SENTENCES))
    peer("huggingface", folder, tmp_path / "inputs.npz")
    theirs = np.load(folder / "features.npz")
    check("CLIPModel", our_features(model, values["pixels"], values["caption_ids"]), [theirs["image"], theirs["text"]])
    ids = caption_encoder("bpe", 16, vocabulary=clip_vocabulary).encode([text.encode() for text in SENTENCES])
    for our, their in zip(ids, theirs["tokens"], strict=True):
        end = our.argmax()  # what follows is padding, which counts for nothing
        np.testing.assert_array_equal(their[: end + 1], our[: end + 1])
