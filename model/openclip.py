"""Our parameters under open_clip's names and back, and the config that tells open_clip what they mean.

CLIPA's torch checkpoints have the same names. Nothing here reads or writes a file.

Shapes: D width, E embedding, G grid positions, P patch values.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .presets import (
    Activation,
    ImageConfig,
    ImagePooling,
    ModelConfig,
    TextConfig,
    TextPooling,
)

TABLE = "image.position_table_GD"
"""Our name of image positions, where they are among the tensors."""

_BLOCK = {
    "attention_norm.weight": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "attention.qkv.weight": "attn.in_proj_weight",
    "attention.qkv.bias": "attn.in_proj_bias",
    "attention.out.weight": "attn.out_proj.weight",
    "attention.out.bias": "attn.out_proj.bias",
    "mlp_norm.weight": "ln_2.weight",
    "mlp_norm.bias": "ln_2.bias",
    "mlp_in.weight": "mlp.c_fc.weight",
    "mlp_in.bias": "mlp.c_fc.bias",
    "mlp_out.weight": "mlp.c_proj.weight",
    "mlp_out.bias": "mlp.c_proj.bias",
}
_OTHERS = {
    "image.patch_embedding.weight": "visual.conv1.weight",
    "image.class_token_D": "visual.class_embedding",
    TABLE: "visual.positional_embedding",
    "image.pre_norm.weight": "visual.ln_pre.weight",
    "image.pre_norm.bias": "visual.ln_pre.bias",
    "image.final_norm.weight": "visual.ln_post.weight",
    "image.final_norm.bias": "visual.ln_post.bias",
    "image.projection.weight": "visual.proj",
    "text.token_embedding.weight": "token_embedding.weight",
    "text.positions_LD": "positional_embedding",
    "text.final_norm.weight": "ln_final.weight",
    "text.final_norm.bias": "ln_final.bias",
    "text.projection.weight": "text_projection",
    "logit_scale": "logit_scale",
}
LOGIT_BIAS = "logit_bias"
"""Of models trained with the sigmoid loss alone; open_clip's name and ours."""
_SINGLE = ("logit_scale", LOGIT_BIAS)
_TRANSPOSED = ("image.projection.weight", "text.projection.weight")
# Buffers and marks of older files, which hold no weight.
_NO_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")

_IMAGE_POOLINGS: dict[ImagePooling, str] = {"class": "tok", "patch_mean": "avg"}
_TEXT_POOLINGS: dict[TextPooling, str] = {"last": "last", "end": "argmax"}
_ACTIVATIONS: dict[Activation, dict[str, str] | None] = {"gelu_tanh": {"approximate": "tanh"}, "gelu": None}
_TORCH_EPS = 1e-5


def names(config: ModelConfig, *, logit_bias: bool = False) -> dict[str, str]:
    """Returns open_clip's name for each of ours. logit_bias: whether the model has one."""
    found = {ours: theirs for ours, theirs in _OTHERS.items() if config.image.pre_norm or "pre_norm" not in ours}
    if logit_bias:
        found[LOGIT_BIAS] = LOGIT_BIAS
    towers = (("image.", "visual.", config.image), ("text.", "", config.text))
    for ours, theirs, tower in towers:
        for i in range(tower.layers):
            for our_name, their_name in _BLOCK.items():
                found[f"{ours}blocks.{i}.{our_name}"] = f"{theirs}transformer.resblocks.{i}.{their_name}"
    return found


def is_openclip(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether these are the names of open_clip or of CLIPA's torch code, in any of their layouts."""
    return any(name.endswith("visual.conv1.weight") for name in tensors)


def plain_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors under open_clip's plain names: without what wrappers and a separate text model put before."""
    found = dict(tensors)
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    found = {name.removeprefix("text."): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in found.items() if name not in _NO_WEIGHTS}


def to_openclip(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], table_GD: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the tensors as open_clip has them; the class token gets a position of zeros. tensors: without a table."""
    patch = config.image.patch
    found: dict[str, torch.Tensor] = {}
    for ours, theirs in names(config, logit_bias=LOGIT_BIAS in tensors).items():
        if ours == TABLE:
            tensor = torch.cat([torch.zeros_like(table_GD[:1]), table_GD])
        elif ours == "image.patch_embedding.weight":
            tensor = tensors[ours].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
        else:
            tensor = tensors[ours].T if ours in _TRANSPOSED else tensors[ours]
        found[theirs] = tensor.detach().contiguous()
    return found


def from_openclip(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns our tensors, and the table of image positions [G, D]. tensors: all that `names` says, of fitting shapes.

    The class token's position is added to the class token, which is what the model does with it.
    """
    found: dict[str, torch.Tensor] = {}
    for ours, theirs in names(config, logit_bias=LOGIT_BIAS in tensors).items():
        tensor = tensors[theirs].to(torch.float32)
        if ours == "image.patch_embedding.weight":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        elif ours in _TRANSPOSED:
            tensor = tensor.T
        elif ours in _SINGLE:
            tensor = tensor.reshape(())
        found[ours] = tensor.contiguous()
    table = found.pop(TABLE)
    found["image.class_token_D"] = found["image.class_token_D"] + table[0]
    return found, table[1:]


def misfit(config: ModelConfig, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> str | None:
    """Returns how tensors under open_clip's names do not fit the model, as a phrase; None where they fit.

    expected: shapes of our tensors. The numbers of image and text positions may differ.
    """
    wanted = names(config, logit_bias=LOGIT_BIAS in tensors)
    missing = [theirs for theirs in wanted.values() if theirs not in tensors]
    extra = sorted(set(tensors) - set(wanted.values()))
    if missing or extra:
        return missing_or_extra(missing, extra)
    patch, width = config.image.patch, config.image.width
    for ours, theirs in wanted.items():
        found = tuple(tensors[theirs].shape)
        shape = tuple(expected.get(ours, (*found[:1], width)))
        if ours == "image.patch_embedding.weight":
            shape = (width, 3, patch, patch)
        elif ours in _TRANSPOSED:
            shape = shape[::-1]
        free = ours in (TABLE, "text.positions_LD")
        same = len(found) == 2 and found[1:] == shape[1:] if free else found == shape
        if not same and not (ours in _SINGLE and math.prod(found) == 1):
            return wrong_shape(theirs, found, shape)
    return None


def missing_or_extra(missing: list[str], extra: list[str]) -> str:
    """Returns a phrase that names the first and counts the rest."""
    phrases = [
        f"it {verb} {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        for verb, found in (("lacks", missing), ("has the unknown", extra))
        if found
    ]
    return ", ".join(phrases)


def wrong_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    there, here = ("x".join(map(str, shape)) or "a single number" for shape in (found, expected))
    return f"{name} is {there} there and {here} in the model"


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
        pixel_mean=tuple(preprocess.get("mean", preset.pixel_mean)),
        pixel_std=tuple(preprocess.get("std", preset.pixel_std)),
    )


def _epsilon(arguments: Mapping[str, float] | None) -> float:
    return float((arguments or {}).get("eps", _TORCH_EPS))


def _activation(arguments: Mapping[str, str] | None) -> Activation:
    return "gelu_tanh" if (arguments or {}).get("approximate") == "tanh" else "gelu"


def _inverse(table: Mapping[Any, str], value: str, what: str) -> Any:
    for ours, theirs in table.items():
        if theirs == value:
            return ours
    raise ValueError(f"its {what} is {value}, which these models have not")
