"""The open_clip_config.json of a model of ours, which tells open_clip what the weights mean, and the way back.

Nothing here reads or writes a file.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .presets import Activation, ImageConfig, ImagePooling, ModelConfig, TextConfig, TextPooling

OPENCLIP_CONFIG = "open_clip_config.json"
"""The file beside the weights that holds what is written and read here."""
_IMAGE_POOLINGS: dict[ImagePooling, str] = {"class": "tok", "patch_mean": "avg"}
_TEXT_POOLINGS: dict[TextPooling, str] = {"last": "last", "end": "argmax"}
_ACTIVATIONS: dict[Activation, dict[str, str] | None] = {"gelu_tanh": {"approximate": "tanh"}, "gelu": None}
DEFAULT_ACTIVATION: Activation = "gelu"
"""What open_clip computes with, where no config says otherwise."""
DEFAULT_EPS = 1e-5
"""Epsilon of its norms, likewise: torch's own."""


def openclip_config(
    config: ModelConfig, grid: tuple[int, int], text_tokens: int, *, logit_bias: float | None = None
) -> dict[str, Any]:
    """Returns what open_clip_config.json holds. Raises ValueError, with the reason, for what open_clip cannot compute.

    The picture is squeezed to the square with a bilinear kernel, as we evaluate. logit_bias: the model's, if it has
    one: where the config names none, open_clip makes no parameter for it.
    """
    image, text = config.image, config.text
    if image.pooling not in _IMAGE_POOLINGS:
        raise ValueError(
            f"open_clip cannot compute {config.name}: its image pooling {image.pooling} averages the class token too, "
            "and open_clip's average is over the patch tokens alone"
        )
    rows, columns = grid
    common: dict[str, Any] = {"norm_kwargs": {"eps": config.norm_eps}}
    if (arguments := _ACTIVATIONS[config.activation]) is not None:
        common["act_kwargs"] = arguments
    vision_cfg = {
        "image_size": rows * image.patch if rows == columns else [rows * image.patch, columns * image.patch],
        "layers": image.layers,
        "width": image.width,
        "head_width": image.width // image.heads,
        "mlp_ratio": _mlp_ratio(image),
        "patch_size": image.patch,
        "no_ln_pre": not image.pre_norm,
        "pool_type": _IMAGE_POOLINGS[image.pooling],
        "final_ln_after_pool": True,
        **common,
    }
    text_cfg = {
        "context_length": text_tokens,
        "vocab_size": text.vocabulary,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": _mlp_ratio(text),
        "pool_type": _TEXT_POOLINGS[text.pooling],
        "no_causal_mask": not text.causal,
        **common,
    }
    if text.tokenizer == "wordpiece":
        text_cfg |= {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    preprocess = {
        "mean": list(config.pixel_mean),
        "std": list(config.pixel_std),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    model: dict[str, Any] = {"embed_dim": config.embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    if logit_bias is not None:
        model["init_logit_bias"] = logit_bias
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _mlp_ratio(tower: ImageConfig | TextConfig) -> float:
    """A ratio from which open_clip, which cuts off what follows the point, computes the very width."""
    ratio = tower.mlp_width / tower.width
    while int(tower.width * ratio) < tower.mlp_width:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


# What a config of open_clip may say beside what is read below, without changing what is computed.
_HARMLESS = frozenset(
    {"image_size", "context_length", "patch_dropout", "pos_embed_type", "output_tokens", "pad_id", "eos_id"}
    | {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "custom_text"}
    # What the weights replace.
    | {"init_logit_scale", "init_logit_bias"}
)


def described(values: Mapping[str, Any], preset: ModelConfig) -> ModelConfig:
    """Returns the model that an open_clip_config.json describes; what it does not say is the preset's.

    Raises ValueError, with the reason, for what these models have not.
    """
    model = dict(values.get("model_cfg", values))
    preprocess = values.get("preprocess_cfg") or {}
    vision, text = dict(model.pop("vision_cfg", {})), dict(model.pop("text_cfg", {}))
    norms = {_epsilon(tower.pop("norm_kwargs", None)) for tower in (vision, text)}
    activations = {_activation(tower.pop("act_kwargs", None)) for tower in (vision, text)}
    if len(norms) > 1 or len(activations) > 1:
        raise ValueError("its two towers differ in activation or norm epsilon, which is one for both here")
    final_norm_last = vision.pop("final_ln_after_pool", False)
    pool = vision.pop("pool_type", "tok")
    if pool == "avg" and not final_norm_last:
        raise ValueError("its final norm comes before the average over patches, not after it")
    width, text_width = vision.pop("width", 768), text.pop("width", 512)
    image = replace(
        preset.image,
        width=width,
        layers=vision.pop("layers", 12),
        heads=width // vision.pop("head_width", 64),
        mlp_width=int(width * vision.pop("mlp_ratio", 4.0)),
        patch=vision.pop("patch_size", 16),
        pooling=_inverse(_IMAGE_POOLINGS, pool, "image pooling"),
        pre_norm=not vision.pop("no_ln_pre", False),
    )
    words = replace(
        preset.text,
        width=text_width,
        layers=text.pop("layers", 12),
        heads=text.pop("heads", 8),
        mlp_width=int(text_width * text.pop("mlp_ratio", 4.0)),
        vocabulary=text.pop("vocab_size", 49_408),
        tokenizer="wordpiece" if text.get("hf_tokenizer_name") else "bpe",
        pooling=_inverse(_TEXT_POOLINGS, text.pop("pool_type", "argmax"), "text pooling"),
        causal=not text.pop("no_causal_mask", False),
    )
    embed_dim = model.pop("embed_dim", 0)
    for where, rest in (("", model), ("vision_cfg.", vision), ("text_cfg.", text)):
        for key, value in rest.items():
            if value and key not in _HARMLESS:
                raise ValueError(f"its open_clip_config.json has {where}{key} {value!r}, which these models have not")
    return replace(
        preset,
        image=image,
        text=words,
        embed_dim=embed_dim,
        activation=activations.pop(),
        norm_eps=norms.pop(),
        pixel_mean=_three(preprocess.get("mean", preset.pixel_mean)),
        pixel_std=_three(preprocess.get("std", preset.pixel_std)),
    )


def _epsilon(arguments: Mapping[str, float] | None) -> float:
    return float((arguments or {}).get("eps", DEFAULT_EPS))


def _activation(arguments: Mapping[str, str] | None) -> Activation:
    return "gelu_tanh" if (arguments or {}).get("approximate") == "tanh" else DEFAULT_ACTIVATION


def _three(values: Iterable[float]) -> Any:
    return tuple(float(value) for value in values)


def _inverse(table: Mapping[Any, str], value: str, what: str) -> Any:
    for ours, theirs in table.items():
        if theirs == value:
            return ours
    raise ValueError(f"its {what} is {value}, which these models have not")
