"""Our parameters and config as Hugging Face's CLIPModel has them; export only. Nothing here writes a file.

It is the architecture of OpenAI's CLIP: a norm before the image's blocks, the class token pooled, causal text with the
end token pooled. So the BPE dialect fits, where it pools the class token, and the WordPiece dialect does not.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .presets import Activation, ImageConfig, ModelConfig, TextConfig

HUGGINGFACE_CONFIG = "config.json"
"""The file beside the weights that CLIPModel reads."""
START_ID, END_ID = 49_406, 49_407

_ACTIVATIONS: dict[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_BLOCK = {
    "attention_norm": "layer_norm1",
    "attention.out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
_OTHERS = {
    "image.class_token_D": "vision_model.embeddings.class_embedding",
    "image.pre_norm.weight": "vision_model.pre_layrnorm.weight",
    "image.pre_norm.bias": "vision_model.pre_layrnorm.bias",
    "image.final_norm.weight": "vision_model.post_layernorm.weight",
    "image.final_norm.bias": "vision_model.post_layernorm.bias",
    "image.projection.weight": "visual_projection.weight",
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positions_LD": "text_model.embeddings.position_embedding.weight",
    "text.final_norm.weight": "text_model.final_layer_norm.weight",
    "text.final_norm.bias": "text_model.final_layer_norm.bias",
    "text.projection.weight": "text_projection.weight",
    "logit_scale": "logit_scale",
}


def to_huggingface(
    config: ModelConfig, tensors: Mapping[str, torch.Tensor], table_GD: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Returns the tensors as CLIPModel has them; the class token gets a position of zeros. tensors: without a table."""
    patch = config.image.patch
    found = {theirs: tensors[ours] for ours, theirs in _OTHERS.items()}
    kernel = tensors["image.patch_embedding.weight"].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    found["vision_model.embeddings.patch_embedding.weight"] = kernel
    positions = torch.cat([torch.zeros_like(table_GD[:1]), table_GD])
    found["vision_model.embeddings.position_embedding.weight"] = positions
    for ours, theirs, tower in (("image", "vision_model", config.image), ("text", "text_model", config.text)):
        for i in range(tower.layers):
            here, there = f"{ours}.blocks.{i}", f"{theirs}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                for our_name, their_name in _BLOCK.items():
                    found[f"{there}.{their_name}.{kind}"] = tensors[f"{here}.{our_name}.{kind}"]
                parts = tensors[f"{here}.attention.qkv.{kind}"].chunk(3)
                for name, part in zip("qkv", parts, strict=True):
                    found[f"{there}.self_attn.{name}_proj.{kind}"] = part
    # Clones: three views of one product may not lie in one safetensors file.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def huggingface_config(
    config: ModelConfig, grid: tuple[int, int], text_tokens: int, *, logit_bias: float | None = None
) -> dict[str, Any]:
    """Returns by file name what CLIPModel and its image processor read. Raises ValueError, with the reason, for what
    CLIPModel cannot compute. The picture is squeezed to the square with a bilinear kernel, as we evaluate.
    logit_bias: the model's, if it has one."""
    if reason := _why_not(config, logit_bias):
        raise ValueError(f"Hugging Face's CLIPModel cannot compute {config.name}: {reason}; export it for open_clip")
    size = grid[0] * config.image.patch
    vision = {**_tower(config, config.image), "image_size": size, "patch_size": config.image.patch}
    text = {
        **_tower(config, config.text),
        "vocab_size": config.text.vocabulary,
        "max_position_embeddings": text_tokens,
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
    }
    model = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "text_config": {"model_type": "clip_text_model", **text},
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,  # PIL's number of the bilinear kernel
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
    }
    return {HUGGINGFACE_CONFIG: model, "preprocessor_config.json": processor}


def _tower(config: ModelConfig, tower: ImageConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_attention_heads": tower.heads,
        "num_hidden_layers": tower.layers,
        "hidden_act": _ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "projection_dim": config.embed_dim,
    }


def _why_not(config: ModelConfig, logit_bias: float | None) -> str | None:
    if not config.image.pre_norm:
        return "its image tower has no norm before the blocks"
    if config.image.pooling != "class":
        return f"its image pooling is {config.image.pooling}, not the class token"
    if not config.text.causal or config.text.pooling != "end":
        return "its text tower is not causal with the end token pooled"
    if logit_bias is not None:
        return "it has a logit bias, of the sigmoid loss"
    return None
