"""The encoders against a plain reference, written here from their parameters and nothing else of `model`."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.attention import attention, attention_backend
from model.clip import CLIP, gflops_per_pair
from model.image import PatchEmbedding
from model.positions import sincos_2d
from model.presets import PRESETS, ImageConfig, ModelConfig, TextConfig, from_json, model_config, to_json

GRID = (3, 5)
TEXT_TOKENS = 6
SMALL = ModelConfig(
    "small",
    ImageConfig(width=48, layers=2, heads=3, mlp_width=96, patch=8, pooling="patch_mean"),
    TextConfig(width=32, layers=2, heads=2, mlp_width=64, vocabulary=100),
    embed_dim=24,
)
SMALL_CLASS = dataclasses.replace(SMALL, image=dataclasses.replace(SMALL.image, pooling="class"))


def small_model(config: ModelConfig = SMALL, **options) -> CLIP:
    """Returns a model with nothing left at zero or one, so that no parameter can go unused unseen."""
    torch.manual_seed(0)
    model = CLIP(config, grid=GRID, text_tokens=TEXT_TOKENS, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def small_images(num: int = 4, patch: int = 8, seed: int = 1) -> torch.Tensor:
    """uint8 [num, rows * patch, columns * patch, 3]."""
    generator = torch.Generator().manual_seed(seed)
    size = (num, GRID[0] * patch, GRID[1] * patch, 3)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def patchify(pixels: torch.Tensor, patch: int = 8) -> torch.Tensor:
    batch = len(pixels)
    cut = pixels.reshape(batch, GRID[0], patch, GRID[1], patch, 3).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, GRID[0] * GRID[1], patch * patch * 3).contiguous()


def all_positions(num: int = 4) -> torch.Tensor:
    return torch.arange(GRID[0] * GRID[1], dtype=torch.int16).repeat(num, 1)


def captions(num: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 100, (num, TEXT_TOKENS), generator=generator, dtype=torch.int32)


def reference_tower(tower, x: torch.Tensor, heads: int, eps: float) -> torch.Tensor:
    """One sequence at a time and one head at a time, from the parameters' names. x: [batch, tokens, width]."""
    norm = partial(F.layer_norm, normalized_shape=x.shape[-1:], eps=eps)
    for block in tower.blocks:
        y = norm(x, weight=block.attention_norm.weight, bias=block.attention_norm.bias)
        query, key, value = (y @ block.attention.qkv.weight.T + block.attention.qkv.bias).chunk(3, dim=-1)
        size, mixed = x.shape[-1] // heads, []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(size)
            mixed.append(scores.softmax(dim=-1) @ value[..., part])
        x = x + torch.cat(mixed, dim=-1) @ block.attention.out.weight.T + block.attention.out.bias
        y = norm(x, weight=block.mlp_norm.weight, bias=block.mlp_norm.bias)
        y = y @ block.mlp_in.weight.T + block.mlp_in.bias
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ block.mlp_out.weight.T + block.mlp_out.bias
    return x


def reference_image(model: CLIP, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels through a convolution, every patch kept. pixels: uint8 [batch, height, width, 3]."""
    config, tower = model.config, model.image
    patch = config.image.patch
    mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    kernel = tower.patch_embedding.weight.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    x = F.conv2d(images, kernel, stride=patch).flatten(2).transpose(1, 2) + tower.position_table_GD
    x = torch.cat([tower.class_token_D.expand(len(x), 1, -1), x], dim=1)
    x = reference_tower(tower, x, config.image.heads, config.norm_eps)
    x = x[:, 1:].mean(dim=1) if config.image.pooling == "patch_mean" else x[:, 0]
    x = F.layer_norm(x, x.shape[-1:], tower.final_norm.weight, tower.final_norm.bias, config.norm_eps)
    return F.normalize(x @ tower.projection.weight.T, dim=-1)


def reference_text(model: CLIP, caption_ids: torch.Tensor) -> torch.Tensor:
    config, tower = model.config, model.text
    x = tower.token_embedding.weight[caption_ids.long()] + tower.positions_LD
    x = reference_tower(tower, x, config.text.heads, config.norm_eps)
    x = F.layer_norm(x, x.shape[-1:], tower.final_norm.weight, tower.final_norm.bias, config.norm_eps)
    return F.normalize((x @ tower.projection.weight.T)[:, -1], dim=-1)


@pytest.mark.parametrize("config", [SMALL, SMALL_CLASS], ids=["patch_mean", "class"])
def test_all_patches_in_order_give_what_a_plain_vision_transformer_gives(config):
    model, pixels = small_model(config), small_images()
    with torch.no_grad():
        features, expected = model.encode_image(patchify(pixels), all_positions()), reference_image(model, pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_patch_weights_get_the_gradient_of_normalised_pixels():
    model, pixels = small_model(), small_images()
    target = torch.randn(4, SMALL.embed_dim)
    weight = model.image.patch_embedding.weight
    (expected,) = torch.autograd.grad((reference_image(model, pixels) * target).sum(), weight)
    (gradient,) = torch.autograd.grad((model.encode_image(patchify(pixels), all_positions()) * target).sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_callers_patches_are_not_changed():
    model, patches = small_model(), patchify(small_images())
    before = patches.clone()
    model.encode_image(patches, all_positions())
    assert torch.equal(patches, before)
    floats = before.float()
    model.encode_image(floats, all_positions())
    assert torch.equal(floats, before.float())


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_the_order_of_kept_patches_does_not_matter_and_their_positions_do(dtype, atol):
    model = small_model().to(dtype)
    patches, positions = patchify(small_images()), all_positions()
    kept = torch.stack([torch.randperm(15, generator=torch.Generator().manual_seed(i))[:7] for i in range(4)])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(9))

    def encode(index, position_index):
        rows = torch.arange(4)[:, None]
        return model.encode_image(patches[rows, index], positions[rows, position_index])

    with torch.no_grad():
        features, permuted = encode(kept, kept), encode(kept[:, order], kept[:, order])
        displaced = encode(kept[:, order], kept)
    assert features.dtype == dtype
    torch.testing.assert_close(permuted, features, rtol=0, atol=atol)
    assert (displaced - features).abs().max() > 1e-3


def test_masking_nothing_is_the_full_input_bit_for_bit():
    model, patches, positions = small_model(), patchify(small_images()), all_positions()
    kept = torch.arange(15)  # a mask that keeps every patch in its order
    with torch.no_grad():
        full, masked = model.encode_image(patches, positions), model.encode_image(patches[:, kept], positions[:, kept])
    assert torch.equal(masked, full)


def test_text_tower_is_the_reference_and_pools_the_last_position():
    model, caption_ids = small_model(), captions()
    with torch.no_grad():
        features, expected = model.encode_text(caption_ids), reference_text(model, caption_ids)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
        # Without attention's output nothing but the last position is left to see.
        for block in model.text.blocks:
            block.attention.out.weight.zero_()
        features, changed = model.encode_text(caption_ids), caption_ids.clone()
        changed[:, :-1] = (changed[:, :-1] + 1) % 100
        assert torch.equal(model.encode_text(changed), features)
        changed[:, -1] = (changed[:, -1] + 1) % 100
        assert not torch.isclose(model.encode_text(changed), features).all(dim=1).any()


def test_every_text_position_and_padding_takes_part():
    model, caption_ids = small_model(), torch.zeros(2, TEXT_TOKENS, dtype=torch.int32)
    for position in range(TEXT_TOKENS):
        changed = caption_ids.clone()
        changed[:, position] = 7
        with torch.no_grad():
            assert not torch.allclose(model.encode_text(changed), model.encode_text(caption_ids), atol=1e-6)


def test_another_text_length_is_refused():
    with pytest.raises(ValueError, match=r"captions of 5 tokens came to a text tower of 6.*--text-tokens"):
        small_model().encode_text(captions()[:, :5])


def test_forward_gives_unit_features_and_the_initial_temperature():
    model = small_model(SMALL)
    image_features, text_features, scale = model(patchify(small_images()), all_positions(), captions())
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    assert CLIP(SMALL, grid=GRID, text_tokens=2).logit_scale.exp().item() == pytest.approx(1 / 0.07)
    (image_features.sum() + text_features.sum() + scale).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_model_compiles_as_one_graph_and_runs_in_bfloat16():
    model, inputs = small_model(), (patchify(small_images()), all_positions(), captions())
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # traces, and refuses a graph break
    with torch.no_grad():
        plain = model(*inputs)
        for ours, theirs in zip(compiled(*inputs), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = model(*inputs)
    for ours, theirs in zip(lowered, plain, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


def test_bfloat16_patch_embedding_and_its_gradient_are_near_float32():
    torch.manual_seed(0)
    embedding = PatchEmbedding(SMALL)
    patches = torch.randint(0, 256, (32, 15, 192), dtype=torch.uint8)
    # A target with a mean: what a gradient of uncentred pixels would lose its digits to.
    target = torch.randn(32, 15, 48) + 1
    exact = embedding(patches)
    (exact_gradient,) = torch.autograd.grad((exact * target).sum(), embedding.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = embedding(patches)
    (gradient,) = torch.autograd.grad((lowered * target).sum(), embedding.weight)
    for name, ours, theirs in (("output", lowered, exact), ("gradient", gradient, exact_gradient)):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < 6e-3, f"{name}: relative error {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sdpa_equals_math(dtype):
    torch.manual_seed(0)
    qkv = torch.randn(3, 17, 3, 4, 16, dtype=dtype, requires_grad=True)
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    outputs = [attention(*qkv.unbind(2), backend) for backend in (attention_backend("auto"), attention_backend("math"))]
    torch.testing.assert_close(*outputs, rtol=0, atol=atol)
    weights = torch.randn_like(outputs[0])
    torch.testing.assert_close(
        *(torch.autograd.grad((output * weights).sum(), qkv)[0] for output in outputs), rtol=0, atol=10 * atol
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", r"^--attention flash is not built yet; use --attention auto or sdpa$"),
        ("xformers", r"^--attention xformers is not built yet; use --attention auto or sdpa$"),
        ("spda", r"^--attention spda is not known; did you mean sdpa\?$"),
    ],
)
def test_attention_that_cannot_be_had_is_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=message):
        CLIP(SMALL, grid=GRID, text_tokens=2, attention=name)


@pytest.mark.parametrize(("width", "grid"), [(48, (3, 5)), (8, (1, 1)), (192, (14, 14))])
def test_position_table_is_the_formula(width, grid):
    num_frequencies = width // 4
    expected = np.zeros((grid[0] * grid[1], width))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(num_frequencies):
                frequency = 10000 ** (-i / (num_frequencies - 1))
                line = expected[row * grid[1] + column]
                line[i], line[num_frequencies + i] = np.sin(column * frequency), np.cos(column * frequency)
                line[2 * num_frequencies + i], line[3 * num_frequencies + i] = (
                    np.sin(row * frequency),
                    np.cos(row * frequency),
                )
    table = sincos_2d(width, grid)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=1e-7)


def test_positions_are_no_parameter_and_weights_move_to_another_grid():
    model = small_model()
    assert not any("table" in name or "patch_mean" in name for name in model.state_dict())
    other = CLIP(SMALL, grid=(2, 2), text_tokens=TEXT_TOKENS)
    other.load_state_dict(model.state_dict())
    patches, positions = patchify(small_images())[:, :2], all_positions()[:, :2]
    with torch.no_grad():  # the first two positions are the first row of either grid
        torch.testing.assert_close(other.encode_image(patches, positions), model.encode_image(patches, positions))


# Millions of parameters (image, text, total), as CLIPA publishes them, in whole millions.
PUBLISHED = {"ViT-S-16": (22, 33, 55), "ViT-B-16": (86, 53, 141), "ViT-L-16": (303, 109, 414)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        count = CLIP(model_config(name), grid=(14, 14), text_tokens=32).num_parameters()
    assert count["total"] == count["image"] + count["text"] + 1
    millions = [count[tower] / 1e6 for tower in ("image", "text", "total")]
    # Towers within 1.5 M: the paper rounds some down, and its text counts are short of the sizes it prints by up to
    # 1.5 M. Totals within 0.6 M, which is rounding.
    np.testing.assert_allclose(millions[:2], PUBLISHED[name][:2], rtol=0, atol=1.5)
    assert millions[2] == pytest.approx(PUBLISHED[name][2], abs=0.6)


def test_flops_are_open_clips_for_l_14():
    large = model_config("ViT-L-16")
    l_14 = dataclasses.replace(large, image=dataclasses.replace(large.image, patch=14))
    image, text = gflops_per_pair(l_14, 256, 32)
    assert image + text == pytest.approx(167.5, abs=0.05)
    assert gflops_per_pair(l_14, 576, 32)[0] + text == pytest.approx(387, abs=0.5)


def test_flops_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = small_model(attention="math")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(patchify(small_images()), all_positions())
    # torch counts no fold of the patch weights, and neither does the formula.
    assert counter.get_total_flops() / 4e9 == pytest.approx(gflops_per_pair(SMALL, 15, TEXT_TOKENS)[0], rel=1e-6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_text(captions())
    assert counter.get_total_flops() / 4e9 == pytest.approx(gflops_per_pair(SMALL, 15, TEXT_TOKENS)[1], rel=1e-6)


def test_initialisation_is_the_dialects():
    torch.manual_seed(0)
    config = model_config("ViT-Ti-16")
    model = CLIP(config, grid=(4, 4), text_tokens=8)
    image, text = model.image, model.text
    block, width = image.blocks[0], config.image.width
    assert not image.class_token_D.any()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
    for weight in block.attention.qkv.weight.chunk(3):  # each of query, key and value has a fan-out of its own
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / (2 * width)), rel=1e-3)
    text_width, depth = config.text.width, config.text.layers
    expected = {
        block.mlp_in.weight: math.sqrt(2 / (width + config.image.mlp_width)),
        image.patch_embedding.weight: 768**-0.5,
        image.projection.weight: width**-0.5,
        text.token_embedding.weight: 0.02,
        text.positions_LD: 0.01,
        text.blocks[0].attention.qkv.weight: text_width**-0.5,
        text.blocks[0].attention.out.weight: text_width**-0.5 * (2 * depth) ** -0.5,
        text.blocks[0].mlp_in.weight: (2 * text_width) ** -0.5,
        text.blocks[0].mlp_out.weight: text_width**-0.5 * (2 * depth) ** -0.5,
        text.projection.weight: text_width**-0.5,
    }
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.05)


def test_the_same_seed_gives_the_same_weights():
    first, second = (small_model().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    config = model_config(name)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(depth=3), r"unknown field depth"),
        (lambda values: values["image"].update(dropout=0.1), r"unknown field image\.dropout"),
        (lambda values: values["text"].pop("width"), r"lacks the field text\.width"),
        (lambda values: values.pop("image"), r"lacks the field image\.heads"),
        (lambda values: values["image"].update(pooling="max"), r"image pooling 'max'.*patch_mean, class"),
        (lambda values: values["image"].update(heads=5), r"image width 128 is no multiple of its 5 heads"),
        (lambda values: values["text"].update(layers=0), r"text layers 0 is below 1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    values = to_json(model_config("ViT-Ti-16"))
    change(values)
    with pytest.raises(ValueError, match=message):
        from_json(values)


def test_config_of_an_older_checkpoint_takes_defaults():
    values = to_json(model_config("ViT-Ti-16"))
    del values["norm_eps"], values["text"]["pooling"]
    assert from_json(values) == model_config("ViT-Ti-16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit-b16", r"^--model vit-b16 is not known; did you mean ViT-B-16"),
        ("resnet", r"^--model resnet is not known; choose from ViT-Ti-16, ViT-S-16, ViT-B-16, ViT-L-16$"),
    ],
)
def test_unknown_model_names_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        model_config(name)
