"""Our parameters under open_clip's names and back. CLIPA's torch checkpoints have the same names.

What they mean is said by openclip_config.py. Nothing here reads or writes a file.

Shapes: D width, E embedding, G grid positions, P patch values.
"""

import math
from collections.abc import Mapping

import torch

from .presets import ModelConfig

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
    # Of DistributedDataParallel and torch.compile, either outside the other.
    for prefix in ("module.", "_orig_mod.", "module."):
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
        tensor = tensors[theirs]
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{theirs} is {kind} there, not a plain tensor of floating-point numbers"
        if not tensor.numel():
            return f"{theirs} is empty"
        found = tuple(tensor.shape)
        shape = tuple(expected.get(ours, (*found[:1], width)))
        if ours == "image.patch_embedding.weight":
            shape = (width, 3, patch, patch)
        elif ours in _TRANSPOSED:
            shape = shape[::-1]
        free = ours in (TABLE, "text.positions_LD")
        same = len(found) == 2 and found[1:] == shape[1:] if free else found == shape
        if not same and not (ours in _SINGLE and math.prod(found) == 1):
            return wrong_shape(theirs, found, shape)
        if not tensor.to(torch.float32).isfinite().all():
            return f"{theirs} holds values that are not finite"
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
    """Returns a phrase that gives both shapes."""
    there, here = ("x".join(map(str, shape)) or "a single number" for shape in (found, expected))
    return f"{name} is {there} there and {here} in the model"
