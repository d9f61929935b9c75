"""Weights from a file into a model of another grid or text length: `--init`.

In: safetensors or a .pt of nothing but tensors, in open_clip's, CLIPA's torch or our own names. Out: tensors that
load_state_dict takes, and the config they mean. A pickle is never run: torch.load(weights_only=True), without fallback.

Shapes: D width, G grid positions.
"""

import json
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import openclip
from .choices import OnResize, Positions
from .clip import CLIP
from .openclip_config import DEFAULT_ACTIVATION, DEFAULT_EPS, OPENCLIP_CONFIG, described
from .positions import computed_positions, resized_grid, resized_text
from .presets import ImageConfig, ModelConfig, TextConfig

# Of sines and cosines; wider than their rounding to float16. A trained or random table is far off.
_TABLE_ATOL = 1e-3


@dataclass(frozen=True)
class Weights:
    """A whole model's weights, by our names."""

    source: str
    """Where they came from, for messages."""
    config: ModelConfig
    tensors: dict[str, torch.Tensor]
    """float32, without a table of image positions."""
    grid: tuple[int, int]
    """(rows, columns) that they were trained for."""
    table_GD: torch.Tensor | None
    """Image positions on that grid; None where they are the config's sin-cos ones."""

    @property
    def text_tokens(self) -> int:
        return len(self.tensors["text.positions_LD"])

    @property
    def logit_bias(self) -> float | None:
        """That of the sigmoid loss; None where they have none."""
        bias = self.tensors.get(openclip.LOGIT_BIAS)
        return None if bias is None else bias.item()

    @property
    def image_positions(self) -> torch.Tensor:
        """Image positions, float32 [G, D]."""
        return computed_positions(self.config.image, self.grid) if self.table_GD is None else self.table_GD


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a .safetensors file, or of a .pt, .pth or .bin that holds tensors and plain values alone.

    A checkpoint's `state_dict` is taken out of it. Raises ValueError, in one line, for anything else.
    """
    if not path.is_file():
        raise ValueError(f"--init {path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"--init {path} is no whole safetensors file ({error})") from None
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"--init {path}: give a .safetensors file, a .pt state dict, or a run folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the file was pickled; whether it can be read is what counts
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"--init {path} is a pickle of more than tensors, which could run code, or damaged, so it is not opened; "
            "save its state_dict as safetensors where you trust it"
        ) from None
    except Exception as error:  # damaged bytes raise whatever the unpickler stumbles over
        raise ValueError(f"--init {path} cannot be read as a .pt file ({_first_line(error)})") from None
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    if not isinstance(values, dict) or not values:
        raise ValueError(f"--init {path} holds no state dict but {type(values).__name__}; save model.state_dict()")
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"--init {path} is no state dict: {name} is {type(value).__name__}, not a tensor")
        if not isinstance(name, str):
            raise ValueError(f"--init {path} is no state dict: a tensor is called {name!r}, which is no name")
    return values


def _first_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def read(path: Path, preset: ModelConfig) -> Weights:
    """Returns the weights of a file in open_clip's layout. Raises ValueError, in one line, where they do not fit.

    An open_clip_config.json beside it says what they mean. Without one the architecture is the preset's, and
    activation and norm epsilon are open_clip's defaults.
    """
    tensors = read_tensors(path)
    if not openclip.is_openclip(tensors):
        first = f"its first tensor is {next(iter(tensors))!r}" if tensors else "it holds no tensor"
        raise ValueError(
            f"--init {path} has neither open_clip's names nor CLIPA's ({first}); "
            "for a run of this program give the run's folder"
        )
    config = _described_beside(path, preset)
    check_same_architecture(str(path), config, preset)
    tensors = openclip.plain_names(tensors)
    has_bias = openclip.LOGIT_BIAS in tensors
    expected = _shapes(config, len(tensors.get("positional_embedding", ())), logit_bias=has_bias)
    if phrase := openclip.misfit(config, tensors, expected):
        raise ValueError(f"--init {path} does not fit --model {preset.name}: {phrase}")
    ours, table_GD = openclip.from_openclip(config, tensors)
    side = math.isqrt(len(table_GD))
    if side == 0 or side * side != len(table_GD):
        raise ValueError(f"--init {path} has {len(table_GD)} image positions, which is no square grid")
    formula_GD = computed_positions(config.image, (side, side))
    computed = torch.allclose(table_GD, formula_GD, rtol=0, atol=_TABLE_ATOL * config.image.position_scale)
    return Weights(str(path), config, ours, (side, side), None if computed else table_GD)


def _described_beside(path: Path, preset: ModelConfig) -> ModelConfig:
    """The config in the open_clip_config.json beside a file; without one, the preset with open_clip's defaults."""
    beside = path.parent / OPENCLIP_CONFIG
    if not beside.is_file():
        return replace(preset, activation=DEFAULT_ACTIVATION, norm_eps=DEFAULT_EPS)
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--init {path}: {beside} is no JSON ({error})") from None
    try:
        return described(values, preset)
    except ValueError as error:
        raise ValueError(f"--init {path}: {error}") from None
    except (AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"--init {path}: {beside} is not as open_clip writes it ({error})") from None


def own(source: str, config: ModelConfig, tensors: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> Weights:
    """Returns the weights of a model of ours. Raises ValueError, in one line, where config and tensors do not fit."""
    has_bias = openclip.LOGIT_BIAS in tensors
    expected = _shapes(config, len(tensors.get("text.positions_LD", ())), logit_bias=has_bias)
    found = dict(tensors)
    table_GD = found.pop(openclip.TABLE, None)
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise ValueError(f"{source} does not fit its config: {openclip.missing_or_extra(missing, extra)}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            phrase = openclip.wrong_shape(name, tuple(found[name].shape), tuple(shape))
            raise ValueError(f"{source} does not fit its config: {phrase}")
    stored = config.image.positions != "computed"
    if stored and (table_GD is None or len(table_GD) != grid[0] * grid[1]):
        raise ValueError(f"{source} lacks the image positions of its {grid[0]}x{grid[1]} grid")
    return Weights(source, config, found, grid, table_GD if stored else None)


def hand_over(
    weights: Weights,
    preset: ModelConfig,
    *,
    grid: tuple[int, int],
    text_tokens: int,
    positions: Positions = "fixed",
    on_resize: OnResize = "auto",
    logit_bias: float | None = None,
) -> tuple[ModelConfig, dict[str, torch.Tensor], list[str]]:
    """Returns the config and state of a model for another grid and text length, and what was done, in phrases.

    The config is the preset with the activation, norm epsilon, pixel mean and sin-cos table (formula and scale) of the
    weights: they travel with them. positions: whether image positions are trained from here on. on_resize: `recompute`
    the sin-cos table for the new grid, as CLIPA's JAX code, or `interpolate` the old one, as its torch code; `auto`
    recomputes fixed positions that are sin-cos and interpolates others. Text positions are always resampled.
    logit_bias: what the model's bias begins with where the weights have none, as those of InfoNCE; None: the model has
    none. Raises ValueError, in one line, where the model is another, or where trained positions would be thrown away.
    """
    check_same_architecture(weights.source, weights.config, preset)
    sincos = weights.table_GD is None
    if on_resize == "recompute" and not sincos and grid != weights.grid:
        raise ValueError(
            f"--on-resize recompute would throw away the image positions of {weights.source}, which are no sin-cos "
            "table; use --on-resize interpolate"
        )
    recompute = on_resize == "recompute" or (on_resize == "auto" and sincos and positions == "fixed")
    if grid == weights.grid:
        recompute, how = sincos, "as they were"
    else:
        sizes = f"{weights.grid[0]}x{weights.grid[1]} to {grid[0]}x{grid[1]}"
        how = f"{sizes}, {'computed anew' if recompute else 'interpolated'}"
    kind = "learned" if positions == "learned" else "computed" if recompute else "stored"
    source = weights.config
    image = source.image
    config = replace(
        preset,
        image=replace(preset.image, positions=kind, sincos=image.sincos, position_scale=image.position_scale),
        activation=source.activation,
        norm_eps=source.norm_eps,
        pixel_mean=source.pixel_mean,
        pixel_std=source.pixel_std,
    )
    state = dict(weights.tensors)
    if kind != "computed":
        new_GD = computed_positions(config.image, grid) if recompute else None
        state[openclip.TABLE] = resized_grid(weights.image_positions, weights.grid, grid) if new_GD is None else new_GD
    state["text.positions_LD"] = resized_text(state["text.positions_LD"], text_tokens)
    phrases = [f"image positions {how}, {positions} from here on"]
    if logit_bias is None:
        if state.pop(openclip.LOGIT_BIAS, None) is not None:
            phrases.append("the logit bias left out, which is of the sigmoid loss alone")
    elif openclip.LOGIT_BIAS not in state:
        state[openclip.LOGIT_BIAS] = torch.tensor(float(logit_bias))
        phrases.append(f"a logit bias of {logit_bias:g} beside the temperature of the weights")
    if text_tokens != weights.text_tokens:
        phrases.append(f"text positions {weights.text_tokens} to {text_tokens}, interpolated")
    if (config.activation, config.norm_eps) != (preset.activation, preset.norm_eps):
        phrases.append(f"{config.activation} and norm epsilon {config.norm_eps:g} as the weights were made with")
    return config, state, phrases


_ARCHITECTURE: dict[type[Any], tuple[str, ...]] = {
    ModelConfig: ("embed_dim",),
    ImageConfig: ("width", "layers", "heads", "mlp_width", "patch", "pooling", "pre_norm"),
    TextConfig: ("width", "layers", "heads", "mlp_width", "vocabulary", "tokenizer", "pooling", "causal"),
}


def check_same_architecture(source: str, config: ModelConfig, preset: ModelConfig) -> None:
    """Raises ValueError, naming the first difference, where weights are of another model than the preset."""
    pairs = (("", config, preset), ("image ", config.image, preset.image), ("text ", config.text, preset.text))
    for where, ours, theirs in pairs:
        for name in _ARCHITECTURE[type(ours)]:
            there, here = getattr(ours, name), getattr(theirs, name)
            if there != here:
                raise ValueError(
                    f"{source} is of another model: its {where}{name} is {there}, "
                    f"and that of --model {preset.name} is {here}"
                )


def _shapes(config: ModelConfig, text_tokens: int, *, logit_bias: bool = False) -> dict[str, torch.Size]:
    """The shapes of a model's tensors, without a table of image positions."""
    computed = replace(config, image=replace(config.image, positions="computed"))
    with torch.device("meta"):
        model = CLIP(computed, grid=(1, 1), text_tokens=max(text_tokens, 1), logit_bias=0.0 if logit_bias else None)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
