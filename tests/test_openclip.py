"""Weights of other programs and of ours, into models of other grids: what `--init` takes, does and refuses."""

import dataclasses
import json
import math
import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model.clip import CLIP
from model.openclip import from_openclip, to_openclip
from model.openclip_config import described, openclip_config
from model.positions import computed_positions
from model.presets import ImageConfig, ModelConfig, TextConfig, model_config
from model.weights import Weights, hand_over, own, read

WORDPIECE = ModelConfig(
    "small",
    ImageConfig(width=48, layers=2, heads=3, mlp_width=96, patch=8, pooling="patch_mean", position_scale=10.0),
    TextConfig(width=32, layers=1, heads=2, mlp_width=64, vocabulary=100),
    embed_dim=24,
)
BPE = dataclasses.replace(
    WORDPIECE,
    name="small-bpe",
    image=dataclasses.replace(WORDPIECE.image, pooling="class", pre_norm=True, sincos="mae", position_scale=1.0),
    text=dataclasses.replace(WORDPIECE.text, causal=True, pooling="end", tokenizer="bpe"),
    activation="gelu",
    norm_eps=1e-5,
)
DIALECTS = pytest.mark.parametrize("config", [WORDPIECE, BPE], ids=["wordpiece", "bpe"])
GRID, TEXT_TOKENS = (4, 4), 8


def random_model(
    config: ModelConfig,
    grid: tuple[int, int] = GRID,
    text_tokens: int = TEXT_TOKENS,
    logit_bias: float | None = None,
) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(config, grid=grid, text_tokens=text_tokens, logit_bias=logit_bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def features(model: CLIP, num: int = 2) -> torch.Tensor:
    """Features of random whole images and captions, [2 num, E]."""
    generator = torch.Generator().manual_seed(1)
    tokens = model.grid[0] * model.grid[1]
    patches = torch.randint(0, 256, (num, tokens, 192), generator=generator, dtype=torch.uint8)
    positions = torch.arange(tokens, dtype=torch.int16).repeat(num, 1)
    captions = torch.randint(0, 100, (num, model.text_tokens), generator=generator, dtype=torch.int32)
    with torch.no_grad():
        return torch.cat([model.encode_image(patches, positions), model.encode_text(captions)])


def tensors_of(model: CLIP) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def as_openclip(model: CLIP) -> dict[str, torch.Tensor]:
    return to_openclip(model.config, tensors_of(model), model.image.position_table_GD)


def loaded(config: ModelConfig, state: dict[str, torch.Tensor], grid: tuple[int, int], text_tokens: int) -> CLIP:
    model = CLIP(config, grid=grid, text_tokens=text_tokens)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("logit_bias", [None, -10.0])
@DIALECTS
def test_there_and_back_again_is_the_same_model(config: ModelConfig, logit_bias: float | None) -> None:
    model = random_model(config, logit_bias=logit_bias)
    theirs = as_openclip(model)
    assert ("logit_bias" in theirs) == (logit_bias is not None)
    assert theirs["visual.conv1.weight"].shape == (48, 3, 8, 8)
    assert theirs["visual.positional_embedding"].shape == (17, 48)
    assert not theirs["visual.positional_embedding"][0].any()
    assert theirs["visual.proj"].shape == (48, 24)
    assert ("visual.ln_pre.weight" in theirs) == config.image.pre_norm
    back, table = from_openclip(config, theirs)
    assert torch.equal(table, model.image.position_table_GD)
    state = tensors_of(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_patch_kernel_is_that_of_a_convolution() -> None:
    model = random_model(WORDPIECE)
    patch = torch.rand(1, 8, 8, 3)
    ours = patch.reshape(1, -1) @ model.image.patch_embedding.weight.T
    theirs = F.conv2d(patch.permute(0, 3, 1, 2), as_openclip(model)["visual.conv1.weight"])
    torch.testing.assert_close(theirs.flatten(1), ours)


def test_the_class_tokens_position_is_added_to_it() -> None:
    theirs = as_openclip(random_model(WORDPIECE))
    theirs["visual.positional_embedding"][0] = 3.0
    ours, _ = from_openclip(WORDPIECE, theirs)
    torch.testing.assert_close(ours["image.class_token_D"], theirs["visual.class_embedding"] + 3)


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-H-14", "ViT-bigG-14"])
def test_the_config_is_that_of_open_clips_own_entries(name: str) -> None:
    config = model_config(name)
    found = openclip_config(config, (16, 16), 32)
    model = found["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    assert vision["image_size"] == 224
    assert int(vision["width"] * vision["mlp_ratio"]) == config.image.mlp_width
    assert vision["width"] // vision["head_width"] == config.image.heads
    assert (vision["no_ln_pre"], vision["pool_type"], vision["final_ln_after_pool"]) == (True, "avg", True)
    assert (text["pool_type"], text["no_causal_mask"], text["vocab_size"]) == ("last", True, 32_000)
    assert text["hf_tokenizer_name"] == "bert-base-uncased"
    assert text["tokenizer_kwargs"] == {"strip_sep_token": True}
    assert found["preprocess_cfg"] == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    for tower in (vision, text):
        assert tower["act_kwargs"] == {"approximate": "tanh"}
        assert tower["norm_kwargs"] == {"eps": 1e-6}
    assert described(json.loads(json.dumps(found)), config) == config


def test_pooling_with_the_class_token_cannot_be_exported() -> None:
    with pytest.raises(ValueError, match=r"cannot compute ViT-L-16-bpe: .*token_mean averages the class token too"):
        openclip_config(model_config("ViT-L-16-bpe"), (14, 14), 16)


def test_a_file_alone_computes_as_open_clip_does_by_default_and_a_config_beside_it_says_otherwise(
    tmp_path: Path,
) -> None:
    model, path = random_model(WORDPIECE), tmp_path / "model.safetensors"
    save_file(as_openclip(model), path)
    alone = read(path, WORDPIECE).config
    assert (alone.activation, alone.norm_eps) == ("gelu", 1e-5)
    values = openclip_config(WORDPIECE, GRID, TEXT_TOKENS)
    values["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    beside = read(path, WORDPIECE).config
    assert (beside.activation, beside.norm_eps, beside.pixel_mean) == ("gelu_tanh", 1e-6, (0.5, 0.5, 0.5))
    config, state, phrases = hand_over(read(path, WORDPIECE), WORDPIECE, grid=GRID, text_tokens=TEXT_TOKENS)
    assert config == dataclasses.replace(WORDPIECE, pixel_mean=(0.5, 0.5, 0.5))
    assert phrases == ["image positions as they were, fixed from here on"]
    (tmp_path / "open_clip_config.json").unlink()
    config, state, phrases = hand_over(read(path, WORDPIECE), WORDPIECE, grid=GRID, text_tokens=TEXT_TOKENS)
    assert "gelu and norm epsilon 1e-05 as the weights were made with" in phrases
    changed = dataclasses.replace(model.config, activation="gelu", norm_eps=1e-5)
    expected = loaded(changed, tensors_of(model), GRID, TEXT_TOKENS)
    assert torch.equal(features(loaded(config, state, GRID, TEXT_TOKENS)), features(expected))


def save_pt(tensors: dict[str, torch.Tensor], path: Path, wrap: str) -> None:
    """As open_clip, its separate text model, CLIPA's v1 training or a half-precision file has them."""
    theirs: dict[str, Any] = dict(tensors)
    theirs["attn_mask"] = torch.zeros(8, 8)
    if wrap == "text":
        shared = ("visual.", "logit_scale")
        theirs = {name if name.startswith(shared) else f"text.{name}": value for name, value in theirs.items()}
    elif wrap == "clipa":
        state = {f"module.{name}": value for name, value in theirs.items()}
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
        theirs = {"epoch": 6, "name": "i50_t16", "state_dict": state, "optimizer": optimizer}
    elif wrap == "compiled":
        theirs = {f"_orig_mod.module.{name}": value for name, value in theirs.items()}
    elif wrap == "half":
        theirs = {name: value.half() for name, value in theirs.items()}
        theirs["logit_scale"] = theirs["logit_scale"].reshape(1)
    torch.save(theirs, path)


@pytest.mark.parametrize("wrap", ["plain", "text", "clipa", "compiled", "half"])
@DIALECTS
def test_every_layout_of_a_state_dict_is_read(tmp_path: Path, config: ModelConfig, wrap: str) -> None:
    config = dataclasses.replace(config, activation="gelu", norm_eps=1e-5)
    model = random_model(config)
    save_pt(as_openclip(model), tmp_path / "epoch_6.pt", wrap)
    weights = read(tmp_path / "epoch_6.pt", config)
    assert weights.table_GD is None  # recognised as the sin-cos table, rounded or not
    found, state, _ = hand_over(weights, config, grid=GRID, text_tokens=TEXT_TOKENS)
    assert found == config
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    atol = 2e-2 if wrap == "half" else 0
    torch.testing.assert_close(features(loaded(found, state, GRID, TEXT_TOKENS)), features(model), rtol=0, atol=atol)


class Canary:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path: Path, form: str) -> None:
    path, sung = tmp_path / "evil.pt", tmp_path / "sung"
    values = {**as_openclip(random_model(WORDPIECE)), "logit_scale": Canary(sung)}
    if form == "bare":
        path.write_bytes(pickle.dumps(values["logit_scale"]))
    else:
        torch.save(values, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"evil.pt is a pickle of more than tensors.*not opened") as error:
        read(path, WORDPIECE)
    assert "\n" not in str(error.value)
    assert not sung.exists()
    with path.open("rb") as file:  # and it would have run
        pickle.load(file) if form == "bare" else torch.load(path, weights_only=False)
    assert sung.exists()


def remove(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("ln_final.bias"), r"does not fit --model small: it lacks ln_final.bias$"),
        (lambda t: [t.pop(k) for k in ("visual.proj", "logit_scale")], r"it lacks visual.proj and 1 more$"),
        (lambda t: t.update(logit_bias=torch.zeros(2)), r"logit_bias is 2 there and a single number in the model$"),
        (
            lambda t: t.update({"visual.proj": torch.zeros(48, 32)}),
            r"visual.proj is 48x32 there and 48x24 in the model$",
        ),
        (
            lambda t: t.update({"visual.conv1.weight": torch.zeros(48, 3, 16, 16)}),
            r"visual.conv1.weight is 48x3x16x16 there and 48x3x8x8 in the model$",
        ),
        (
            lambda t: t.update({"positional_embedding": torch.zeros(8, 33)}),
            r"positional_embedding is 8x33 there and 8x32",
        ),
        (
            lambda t: t.update({"visual.positional_embedding": torch.zeros(14, 48)}),
            r"has 13 image positions, which is no square grid$",
        ),
        (
            lambda t: t.update({"visual.ln_pre.weight": torch.ones(48), "visual.ln_pre.bias": torch.ones(48)}),
            r"it has the unknown visual.ln_pre.bias and 1 more$",
        ),
        (
            lambda t: t.update({"visual.positional_embedding": torch.zeros(1, 48)}),
            r"has 0 image positions, which is no square grid$",
        ),
        (lambda t: t.update({"positional_embedding": torch.zeros(0, 32)}), r"positional_embedding is empty$"),
        (
            lambda t: t.update({"visual.proj": torch.zeros(48, 24, dtype=torch.int8)}),
            r"visual.proj is int8 there, not a plain tensor of floating-point numbers$",
        ),
        (
            lambda t: t["visual.ln_post.bias"].fill_(float("nan")),
            r"visual.ln_post.bias holds values that are not finite$",
        ),
        (lambda t: t.clear(), r"has neither open_clip's names nor CLIPA's \(it holds no tensor\)"),
        (lambda t: [t.pop(k) for k in list(t) if "visual" in k], r"has neither open_clip's names nor CLIPA's"),
    ],
)
def test_weights_of_another_model_are_one_line(tmp_path: Path, change: Any, message: str) -> None:
    tensors = as_openclip(random_model(WORDPIECE))
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "model.safetensors", WORDPIECE)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--init ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model_cfg"].update(quick_gelu=True), r"has quick_gelu True, which these models have not"),
        (lambda v: v["model_cfg"]["vision_cfg"].update(ls_init_value=0.1), r"has vision_cfg.ls_init_value 0.1"),
        (lambda v: v["model_cfg"]["text_cfg"].update(norm_kwargs={"eps": 1e-5}), r"two towers differ in"),
        (lambda v: v["model_cfg"]["vision_cfg"].update(final_ln_after_pool=False), r"norm comes before the average"),
        (lambda v: v["model_cfg"]["text_cfg"].update(pool_type="first"), r"text pooling is first"),
        (lambda v: v["model_cfg"]["vision_cfg"].update(head_width=0), r"json is not as open_clip writes it \(.*zero"),
        (lambda v: v.update(model_cfg=[1]), r"json is not as open_clip writes it"),
        (lambda v: v.update(preprocess_cfg={"mean": [None] * 3}), r"json is not as open_clip writes it"),
        (
            lambda v: v["model_cfg"]["vision_cfg"].update(head_width=24),
            r"is of another model: its image heads is 2, and that of --model small is 3$",
        ),
        (
            lambda v: v["model_cfg"]["text_cfg"].update(no_causal_mask=False),
            r"its text causal is True, and that of --model small is False$",
        ),
    ],
)
def test_a_config_beside_the_weights_that_is_of_another_model_is_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    save_file(as_openclip(random_model(WORDPIECE)), tmp_path / "model.safetensors")
    values = openclip_config(WORDPIECE, GRID, TEXT_TOKENS)
    change(values)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "model.safetensors", WORDPIECE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_a_config_beside_the_weights_that_is_no_json_is_one_line(tmp_path: Path, text: str) -> None:
    save_file(as_openclip(random_model(WORDPIECE)), tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"^--init .*model.safetensors: .*open_clip_config.json is no JSON") as error:
        read(tmp_path / "model.safetensors", WORDPIECE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_with_damaged_bytes_is_one_line_or_whole(tmp_path: Path, form: str) -> None:
    """Cut short, or with bytes overwritten near either end, where the names and sizes are."""
    tensors, path = (
        as_openclip(random_model(WORDPIECE)),
        tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt"),
    )
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    whole, rng, messages = path.read_bytes(), random.Random(0), list[str]()
    for _ in range(40):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(20)):
            place = rng.randrange(min(len(damaged), 6000))
            damaged[place if rng.random() < 0.5 else -1 - place] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path, WORDPIECE)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 10
    for message in messages:
        assert "\n" not in message
        assert message.startswith(f"--init {path}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.safetensors", None, r"no such file"),
        ("model.txt", b"x", r"give a .safetensors file, a .pt state dict, or a run folder"),
        ("model.safetensors", b"\xff" * 64, r"is no whole safetensors file"),
        ("model.pt", b"", r"cannot be read as a .pt file"),
        ("model.pt", b"PK\x03\x04 cut", r"cannot be read as a .pt file"),
        ("model.pt", [torch.zeros(1)], r"holds no state dict but list"),
        ("model.pt", {0: torch.zeros(1)}, r"is no state dict: a tensor is called 0, which is no name"),
        ("model.pt", b"hello", r"cannot be read as a .pt file \(\w+: "),
        ("model.pt", pickle.dumps({"cut": [1.5] * 9})[:-9], r"which could run code, or damaged, so it is not opened"),
        ("model.pt", {"epoch": 3, "name": "x"}, r"is no state dict: epoch is int, not a tensor"),
    ],
)
def test_a_file_that_is_none_of_these_is_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"^--init {re.escape(str(path))}.*{message}") as error:
        read(path, WORDPIECE)
    assert "\n" not in str(error.value)


def weights_of(model: CLIP) -> Weights:
    return own("runs/x", model.config, tensors_of(model), model.grid)


@pytest.mark.parametrize("positions", ["fixed", "learned"])
@pytest.mark.parametrize("on_resize", ["recompute", "interpolate"])
@pytest.mark.parametrize(("text_tokens", "new_text_tokens"), [(8, 32), (16, 32)])
@DIALECTS
def test_hand_over_to_more_tokens(
    config: ModelConfig, positions: Any, on_resize: Any, text_tokens: int, new_text_tokens: int
) -> None:
    """64 to 224 pixels at patch 16: grid 4x4 to 14x14."""
    weights = weights_of(random_model(config, (4, 4), text_tokens))
    found, state, phrases = hand_over(
        weights, config, grid=(14, 14), text_tokens=new_text_tokens, positions=positions, on_resize=on_resize
    )
    model = loaded(found, state, (14, 14), new_text_tokens)
    if on_resize == "recompute":
        expected = computed_positions(config.image, (14, 14))
    else:
        old = computed_positions(config.image, (4, 4)).T.reshape(1, 48, 4, 4)
        expected = F.interpolate(old, (14, 14), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(model.image.position_table_GD.detach(), expected)
    trained = "image.position_table_GD" in dict(model.named_parameters())
    assert trained == (positions == "learned")
    old = weights.tensors["text.positions_LD"].T[None]
    expected = F.interpolate(old, new_text_tokens, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(model.text.positions_LD.detach(), expected)
    done = "computed anew" if on_resize == "recompute" else "interpolated"
    assert f"image positions 4x4 to 14x14, {done}, {positions} from here on" in phrases
    assert f"text positions {text_tokens} to {new_text_tokens}, interpolated" in phrases
    kept = {name for name in weights.tensors if name != "text.positions_LD"}
    assert all(torch.equal(state[name], weights.tensors[name]) for name in kept)
    assert torch.isfinite(features(model)).all()


def test_auto_recomputes_fixed_sines_and_interpolates_what_is_trained() -> None:
    weights = weights_of(random_model(BPE))
    fixed, _, _ = hand_over(weights, BPE, grid=(7, 7), text_tokens=8)
    assert fixed.image.positions == "computed"
    learned, state, phrases = hand_over(weights, BPE, grid=(7, 7), text_tokens=8, positions="learned")
    assert learned.image.positions == "learned"
    assert "4x4 to 7x7, interpolated" in phrases[0]
    # And from there on: a trained table is kept on its grid, interpolated to another, and never thrown away.
    tuned = loaded(learned, state, (7, 7), 8)
    with torch.no_grad():
        tuned.image.position_table_GD.add_(0.1)
    weights = weights_of(tuned)
    same, state, _ = hand_over(weights, BPE, grid=(7, 7), text_tokens=8)
    assert same.image.positions == "stored"
    assert torch.equal(features(loaded(same, state, (7, 7), 8)), features(tuned))
    larger, state, _ = hand_over(weights, BPE, grid=(9, 9), text_tokens=8)
    assert larger.image.positions == "stored"
    assert state["image.position_table_GD"].shape == (81, 48)
    with pytest.raises(ValueError, match=r"recompute would throw away the image positions of runs/x.*interpolate$"):
        hand_over(weights, BPE, grid=(9, 9), text_tokens=8, on_resize="recompute")


def test_the_same_lengths_change_nothing() -> None:
    model = random_model(WORDPIECE)
    config, state, phrases = hand_over(weights_of(model), WORDPIECE, grid=GRID, text_tokens=TEXT_TOKENS)
    assert config == WORDPIECE
    assert torch.equal(features(loaded(config, state, GRID, TEXT_TOKENS)), features(model))
    assert phrases == ["image positions as they were, fixed from here on"]


def test_the_table_of_the_weights_wins_over_that_of_the_preset() -> None:
    """Computed anew for another grid too: the weights were trained with it."""
    other = dataclasses.replace(WORDPIECE.image, sincos="mae", position_scale=1.0)
    preset = dataclasses.replace(WORDPIECE, image=other)
    weights = weights_of(random_model(WORDPIECE))
    for grid in (GRID, (7, 7)):
        config, state, _ = hand_over(weights, preset, grid=grid, text_tokens=TEXT_TOKENS)
        assert config == WORDPIECE
        model = loaded(config, state, grid, TEXT_TOKENS)
        assert torch.equal(model.image.position_table_GD, computed_positions(WORDPIECE.image, grid))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_logit_bias_travels_with_the_weights_to_a_model_that_has_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = random_model(WORDPIECE, logit_bias=-10.0)
    bias = model.logit_bias
    assert bias is not None
    theirs = as_openclip(model)
    theirs["logit_bias"] = theirs["logit_bias"].reshape(shape)
    save_file(theirs, tmp_path / "model.safetensors")
    values = openclip_config(WORDPIECE, GRID, TEXT_TOKENS, logit_bias=bias.item())
    assert values["model_cfg"]["init_logit_bias"] == bias.item()
    assert described(values, WORDPIECE) == WORDPIECE
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    plain = "image positions as they were, fixed from here on"
    for weights in (read(tmp_path / "model.safetensors", WORDPIECE), weights_of(model)):
        assert weights.logit_bias == bias.item()
        config, state, phrases = hand_over(weights, WORDPIECE, grid=GRID, text_tokens=TEXT_TOKENS, logit_bias=-10.0)
        assert phrases == [plain]
        other = CLIP(config, grid=GRID, text_tokens=TEXT_TOKENS, logit_bias=0.0)
        other.load_state_dict(state)
        assert all(
            torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), model.parameters(), strict=True)
        )
        # InfoNCE has no use for it.
        config, state, phrases = hand_over(weights, WORDPIECE, grid=GRID, text_tokens=TEXT_TOKENS)
        assert phrases == [plain, "the logit bias left out, which is of the sigmoid loss alone"]
        loaded(config, state, GRID, TEXT_TOKENS)


def test_weights_without_a_logit_bias_get_the_one_named() -> None:
    weights = weights_of(random_model(WORDPIECE))
    assert weights.logit_bias is None
    config, state, phrases = hand_over(weights, WORDPIECE, grid=GRID, text_tokens=TEXT_TOKENS, logit_bias=-10.0)
    assert phrases[1:] == ["a logit bias of -10 beside the temperature of the weights"]
    model = CLIP(config, grid=GRID, text_tokens=TEXT_TOKENS, logit_bias=0.0)
    model.load_state_dict(state)
    assert model.logit_bias is not None
    assert model.logit_bias.item() == -10
    assert torch.equal(model.logit_scale, weights.tensors["logit_scale"])


def test_own_weights_of_another_model_or_config_are_one_line() -> None:
    model = random_model(WORDPIECE)
    other = dataclasses.replace(WORDPIECE, name="other", embed_dim=32)
    with pytest.raises(ValueError, match=r"its embed_dim is 24, and that of --model other is 32$"):
        hand_over(weights_of(model), other, grid=GRID, text_tokens=8)
    tensors = tensors_of(model)
    with pytest.raises(ValueError, match=r"runs/x does not fit its config: text.projection.weight is 24x32 .* 32x32"):
        own("runs/x", other, {**tensors, "image.projection.weight": torch.zeros(32, 48)}, GRID)
    del tensors["logit_scale"]
    with pytest.raises(ValueError, match=r"runs/x does not fit its config: it lacks logit_scale$"):
        own("runs/x", WORDPIECE, tensors, GRID)
    stored = dataclasses.replace(WORDPIECE, image=dataclasses.replace(WORDPIECE.image, positions="stored"))
    with pytest.raises(ValueError, match=r"runs/x lacks the image positions of its 4x4 grid"):
        own("runs/x", stored, tensors_of(model), GRID)


def test_mlp_widths_survive_open_clips_rounding() -> None:
    for width, mlp_width in ((1664, 8192), (48, 97), (7 * 16, 1000), (384, 1537)):
        image = dataclasses.replace(WORDPIECE.image, width=width, heads=4, mlp_width=mlp_width)
        vision = openclip_config(dataclasses.replace(WORDPIECE, image=image), GRID, 8)["model_cfg"]["vision_cfg"]
        assert int(width * vision["mlp_ratio"]) == mlp_width
        assert math.isclose(vision["mlp_ratio"], mlp_width / width, rel_tol=1e-12)
