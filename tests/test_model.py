"""The encoders against a plain reference, written here from their parameters and nothing else of `model`."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import attention as attention_module
from model.attention import Sequences, attention, choose, packed_attention, token_at
from model.blocks import Block
from model.clip import CLIP, attention_choices, gflops_per_pair
from model.image import PatchEmbedding
from model.loss import contrastive_loss
from model.positions import computed_positions, resized_grid, resized_text, sincos_2d
from model.presets import PRESETS, ImageConfig, ModelConfig, TextConfig, from_json, model_config, to_json
from model.text import end_positions
from pipeline.plan import kept_positions
from pipeline.tokens import gather_patches, token_geometry
from pipeline.tokens import patchify as cut

GRID = (3, 5)
TEXT_TOKENS = 6
SMALL = ModelConfig(
    "small",
    ImageConfig(width=48, layers=2, heads=3, mlp_width=96, patch=8, pooling="patch_mean"),
    TextConfig(width=32, layers=2, heads=2, mlp_width=64, vocabulary=100),
    embed_dim=24,
)
SMALL_CLASS = dataclasses.replace(SMALL, image=dataclasses.replace(SMALL.image, pooling="class"))
SMALL_BPE = dataclasses.replace(
    SMALL,
    image=dataclasses.replace(SMALL.image, pooling="token_mean", pre_norm=True, sincos="mae"),
    text=dataclasses.replace(SMALL.text, causal=True, pooling="end"),
    activation="gelu",
    norm_eps=1e-5,
    max_logit_scale=100.0,
)
SIGMOID = {"logit_bias": -10.0}
DIALECTS = pytest.mark.parametrize("config", [SMALL, SMALL_CLASS, SMALL_BPE], ids=["patch_mean", "class", "bpe"])


def small_model(config: ModelConfig = SMALL, grid: tuple[int, int] = GRID, **options) -> CLIP:
    """Returns a model with nothing left at zero or one, so that no parameter can go unused unseen."""
    torch.manual_seed(0)
    model = CLIP(config, grid=grid, text_tokens=TEXT_TOKENS, **options)
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


def reference_tower(tower, x: torch.Tensor, heads: int, config: ModelConfig, causal: bool = False) -> torch.Tensor:
    """One head at a time, from the parameters' names. x: [batch, tokens, width]."""
    eps = config.norm_eps
    norm = partial(F.layer_norm, normalized_shape=x.shape[-1:], eps=eps)
    for block in tower.blocks:
        y = norm(x, weight=block.attention_norm.weight, bias=block.attention_norm.bias)
        query, key, value = (y @ block.attention.qkv.weight.T + block.attention.qkv.bias).chunk(3, dim=-1)
        size, mixed = x.shape[-1] // heads, []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(size)
            if causal:
                scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            mixed.append(scores.softmax(dim=-1) @ value[..., part])
        x = x + torch.cat(mixed, dim=-1) @ block.attention.out.weight.T + block.attention.out.bias
        y = norm(x, weight=block.mlp_norm.weight, bias=block.mlp_norm.bias)
        y = y @ block.mlp_in.weight.T + block.mlp_in.bias
        if config.activation == "gelu":
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        else:
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
    if config.image.pre_norm:
        x = F.layer_norm(x, x.shape[-1:], tower.pre_norm.weight, tower.pre_norm.bias, config.norm_eps)
    x = reference_tower(tower, x, config.image.heads, config)
    first = {"patch_mean": 1, "token_mean": 0}.get(config.image.pooling)
    x = x[:, 0] if first is None else x[:, first:].mean(dim=1)
    x = F.layer_norm(x, x.shape[-1:], tower.final_norm.weight, tower.final_norm.bias, config.norm_eps)
    return F.normalize(x @ tower.projection.weight.T, dim=-1)


def reference_text(model: CLIP, caption_ids: torch.Tensor) -> torch.Tensor:
    config, tower = model.config, model.text
    x = tower.token_embedding.weight[caption_ids.long()] + tower.positions_LD
    x = reference_tower(tower, x, config.text.heads, config, config.text.causal)
    x = F.layer_norm(x, x.shape[-1:], tower.final_norm.weight, tower.final_norm.bias, config.norm_eps)
    last = [-1] * len(x) if config.text.pooling == "last" else [ids.index(max(ids)) for ids in caption_ids.tolist()]
    x = torch.stack([row[place] for row, place in zip(x, last, strict=True)])
    return F.normalize(x @ tower.projection.weight.T, dim=-1)


@DIALECTS
def test_all_patches_in_order_give_what_a_plain_vision_transformer_gives(config):
    model, pixels = small_model(config), small_images()
    with torch.no_grad():
        features, expected = model.encode_image(patchify(pixels), all_positions()), reference_image(model, pixels)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@DIALECTS
def test_the_text_tower_is_what_a_plain_transformer_gives(config):
    model, caption_ids = small_model(config), captions()
    with torch.no_grad():
        features, expected = model.encode_text(caption_ids), reference_text(model, caption_ids)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_a_causal_tower_pools_the_end_token_and_what_follows_changes_nothing():
    model, caption_ids = small_model(SMALL_BPE), captions()
    caption_ids = caption_ids % 90
    caption_ids[:, 3] = 99
    changed = caption_ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 90
    with torch.no_grad():
        features = model.encode_text(caption_ids)
        assert end_positions(caption_ids).tolist() == [3] * 4
        assert torch.equal(model.encode_text(changed), features)
        changed[:, 1] = (changed[:, 1] + 1) % 90
        assert (model.encode_text(changed) - features).abs().amax(dim=1).min() > 1e-3


def test_padding_can_be_left_out_of_a_causal_tower():
    model, caption_ids = small_model(SMALL_BPE), captions()
    caption_ids = caption_ids % 90
    for row, end in enumerate((1, 5, 3, 2)):
        caption_ids[row, end], caption_ids[row, end + 1 :] = 99, 0
    tower = model.text
    x = F.embedding(caption_ids, tower.token_embedding.weight) + tower.positions_LD
    pooled, whole = tower.pooled_without_padding(x, caption_ids), x
    for block in tower.blocks:
        whole = block(whole)
    torch.testing.assert_close(pooled, whole[torch.arange(4), torch.tensor([1, 5, 3, 2])], rtol=0, atol=1e-5)


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


@DIALECTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_order_of_kept_patches_does_not_matter_and_their_positions_do(config, dtype):
    model = small_model(config).to(dtype)
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
    torch.testing.assert_close(permuted, features, rtol=0, atol=1e-6)
    assert (displaced - features).abs().max() > 1e-3


@DIALECTS
@pytest.mark.parametrize("reduction", ["random", "block", "resize"])
def test_masking_nothing_is_the_full_input_bit_for_bit(config, reduction):
    """What the input side keeps of a 4x4 grid when it may keep all 16 patches, against the image cut in order."""
    geometry = token_geometry(
        16, image_reduction=reduction, image_size=None if reduction == "resize" else 32, patch=config.image.patch
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    kept = kept_positions(0, np.zeros(4, np.int64), np.arange(4), geometry)
    masked = torch.from_numpy(gather_patches(pixels, kept, geometry.patch)), torch.from_numpy(kept)
    whole = torch.from_numpy(cut(pixels, geometry.patch)), torch.arange(16, dtype=torch.int16).repeat(4, 1)
    model = small_model(config, geometry.grid)
    with torch.no_grad():
        assert torch.equal(model.encode_image(*masked), model.encode_image(*whole))


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
    image_features, text_features, scale, bias = model(patchify(small_images()), all_positions(), captions())
    assert bias is None
    for features in (image_features, text_features):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    assert CLIP(SMALL, grid=GRID, text_tokens=2).logit_scale.exp().item() == pytest.approx(1 / 0.07)
    (image_features.sum() + text_features.sum() + scale).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_for_the_sigmoid_loss_has_a_bias_and_begins_with_its_temperature():
    model = CLIP(SMALL, grid=GRID, text_tokens=TEXT_TOKENS, **SIGMOID)
    features = model(patchify(small_images()), all_positions(), captions())
    assert features.logit_scale.item() == pytest.approx(10)
    assert features.logit_bias.item() == -10
    contrastive_loss(features, torch.ones(4, dtype=torch.bool), kind="sigmoid").backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(model.state_dict()) == {*small_model().state_dict(), "logit_bias"}
    assert model.num_parameters()["total"] == small_model().num_parameters()["total"] + 1


@DIALECTS
def test_the_model_compiles_as_one_graph_and_runs_in_bfloat16(config):
    model, inputs = small_model(config, **SIGMOID), (patchify(small_images()), all_positions(), captions())
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


def outputs_and_gradients(qkv, backends, **options):
    outputs = [attention(qkv, backend, **options) for backend in backends]
    weights = torch.randn(outputs[0].shape, dtype=qkv.dtype, device=qkv.device)
    return outputs, [torch.autograd.grad((output * weights).sum(), qkv)[0] for output in outputs]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 17, 65])
def test_sdpa_equals_math(dtype, causal, num_tokens):
    torch.manual_seed(0)
    qkv = torch.randn(3, num_tokens, 3, 4, 16, dtype=dtype, requires_grad=True)
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    outputs, gradients = outputs_and_gradients(qkv, ("sdpa", "math"), causal=causal)
    torch.testing.assert_close(*outputs, rtol=0, atol=atol)
    torch.testing.assert_close(*gradients, rtol=0, atol=10 * atol)


def test_causal_attention_sees_nothing_later():
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3, 2, 8)
    changed = qkv.clone()
    changed[:, 5:] = torch.randn(2, 4, 3, 2, 8)
    for backend in ("math", "sdpa"):
        before, after = (attention(each, backend, causal=True) for each in (qkv, changed))
        torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-6)
        assert (before[:, 5:] - after[:, 5:]).abs().min() > 0


def test_packed_sequences_do_not_see_each_other():
    torch.manual_seed(0)
    lengths = (3, 1, 6)
    qkv = torch.randn(sum(lengths), 3, 2, 8)
    offsets = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    packed = packed_attention(qkv, Sequences(offsets, 6), "math", causal=True)
    alone = [attention(part[None], "math", causal=True)[0] for part in qkv.split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone))


class Kernels:
    """Stands where flash_attn and xformers.ops would: checks what it is called with, and computes it plainly."""

    def __init__(self):
        self.calls = []

    def flash_attn_qkvpacked_func(self, qkv, dropout_p=0.0, softmax_scale=None, causal=False):
        batch, tokens, three, heads, size = qkv.shape
        assert three == 3
        assert dropout_p == 0.0
        assert softmax_scale is None
        self.calls.append(("dense", (batch, tokens, heads, size), causal))
        return attention(qkv, "math", causal=causal)

    def flash_attn_varlen_qkvpacked_func(
        self, qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        total, three, heads, size = qkv.shape
        assert three == 3
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == total
        assert cu_seqlens.diff().max() <= max_seqlen
        self.calls.append(("varlen", (total, heads, size), causal))
        return packed_attention(qkv, Sequences(cu_seqlens, max_seqlen), "math", causal=causal)

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(self, query, key, value, attn_bias=None):
        causal = isinstance(attn_bias, self.LowerTriangularMask)
        self.calls.append(("xformers", tuple(query.shape), causal))
        return attention(torch.stack([query, key, value], dim=2), "math", causal=causal)


@pytest.fixture
def kernels(monkeypatch):
    """The optional libraries as if they were installed, and as if this CPU were a device they serve."""
    import sys
    from types import SimpleNamespace

    found = Kernels()
    monkeypatch.setitem(sys.modules, "flash_attn", found)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=found))
    monkeypatch.setattr(attention_module, "why_not", lambda *arguments: None)
    return found


@pytest.mark.parametrize("config", [SMALL, SMALL_BPE], ids=["wordpiece", "bpe"])
@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_what_the_other_kernels_are_called_with(config, name, kernels):
    inputs = (patchify(small_images()), all_positions(), captions())
    inputs[2].remainder_(90)[:, 3:] = 0
    inputs[2][:, 2] = 99
    with torch.no_grad():
        features = small_model(config, attention=name)(*inputs)
        expected = small_model(config, attention="math")(*inputs)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    causal, kind = config.text.causal, "dense" if name == "flash" else name
    image, text = (kind, (4, 16, 3, 16), False), (kind, (4, TEXT_TOKENS, 2, 16), causal)
    if name == "flash" and causal:
        text = ("varlen", (12, 2, 16), True)
    # Where one token is pooled, the last block has one query, which needs no kernel; the images' mean is over all.
    assert kernels.calls == [image] * 2 + [text] * (2 if name == "flash" and causal else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["sdpa", "flash", "xformers"])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(17, 64), (50, 80), (197, 64), (257, 104)])
def test_kernels_on_a_gpu_equal_math(name, causal, num_tokens, head_dim):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := attention_module.why_not(name, "cuda", torch.bfloat16, head_dim):
        pytest.skip(reason)
    torch.manual_seed(0)
    shape = (3, num_tokens, 3, 4, head_dim)
    qkv = torch.randn(shape, dtype=torch.bfloat16, device="cuda").requires_grad_()
    outputs, gradients = outputs_and_gradients(qkv, (name, "math"), causal=causal)
    torch.testing.assert_close(*outputs, rtol=0, atol=3e-2)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-1)
    if name == "flash":
        offsets = torch.arange(4, dtype=torch.int32, device="cuda") * num_tokens
        packed = packed_attention(qkv.flatten(0, 1), Sequences(offsets, num_tokens), name, causal=causal)
        torch.testing.assert_close(packed.unflatten(0, (3, -1)), outputs[0], rtol=0, atol=3e-2)


def test_auto_goes_by_device_dtype_and_length(monkeypatch):
    def chosen(num_tokens, device="cuda", dtype=torch.bfloat16, head_dim=64):
        return choose("auto", num_tokens, device=device, dtype=dtype, head_dim=head_dim)

    monkeypatch.setitem(attention_module._INSTALLED, "flash", False)
    assert chosen(257) == "sdpa"
    monkeypatch.setitem(attention_module._INSTALLED, "flash", True)
    assert [chosen(17), chosen(127), chosen(128), chosen(257)] == ["sdpa", "sdpa", "flash", "flash"]
    assert chosen(257, dtype=torch.float32) == "sdpa"
    assert chosen(257, device="cpu") == "sdpa"
    assert chosen(257, head_dim=260) == "sdpa"
    found = attention_choices(model_config("ViT-L-14"), "auto", 256, 32, device="cuda", dtype=torch.bfloat16)
    assert found == {"image": "flash", "text": "sdpa"}


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "message"),
    [
        ("flash", "cpu", torch.float32, 64, r"it runs on CUDA alone, and this is cpu"),
        ("xformers", "cpu", torch.float32, 64, r"it runs on CUDA alone, and this is cpu"),
        ("flash", "cuda", torch.float32, 64, r"bf16 or fp16 alone, not in float32 \(--precision bf16\)"),
        ("flash", "cuda", torch.bfloat16, 260, r"heads of 260 are no multiple of 8 up to 256"),
        ("xformers", "cuda", torch.bfloat16, 12, r"heads of 12 are no multiple of 8 up to 256"),
    ],
)
def test_a_named_kernel_that_cannot_serve_says_why(monkeypatch, name, device, dtype, head_dim, message):
    monkeypatch.setitem(attention_module._INSTALLED, name, True)
    with pytest.raises(ValueError, match=rf"^--attention {name} cannot serve: .*{message}; use --attention auto") as e:
        choose(name, 17, device=device, dtype=dtype, head_dim=head_dim)
    assert "\n" not in str(e.value)


def test_a_kernel_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(attention_module._INSTALLED, "flash", False)
    with pytest.raises(ValueError, match=r"flash-attn is not installed \(pip install '\.\[cuda\]'\)"):
        choose("flash", 17, device="cuda", dtype=torch.bfloat16, head_dim=64)


def test_a_model_refuses_a_named_kernel_at_its_first_batch():
    with pytest.raises(ValueError, match=r"^--attention flash cannot serve"):
        small_model(attention="flash").encode_text(captions())


def test_unknown_attention_names_the_closest():
    with pytest.raises(ValueError, match=r"^--attention spda is not known; did you mean sdpa\?$"):
        CLIP(SMALL, grid=GRID, text_tokens=2, attention="spda")


@pytest.mark.parametrize("formula", ["moco", "mae"])
@pytest.mark.parametrize(("width", "grid"), [(48, (3, 5)), (8, (1, 1)), (192, (14, 14))])
def test_position_table_is_the_formula(width, grid, formula):
    num_frequencies = width // 4
    expected = np.zeros((grid[0] * grid[1], width))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(num_frequencies):
                frequency = 10000 ** (-i / (num_frequencies - (formula == "moco")))
                line = expected[row * grid[1] + column]
                line[i], line[num_frequencies + i] = np.sin(column * frequency), np.cos(column * frequency)
                line[2 * num_frequencies + i], line[3 * num_frequencies + i] = (
                    np.sin(row * frequency),
                    np.cos(row * frequency),
                )
    table = sincos_2d(width, grid, formula)
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


def test_computed_positions_have_the_scale_that_the_config_asks_for():
    image = dataclasses.replace(SMALL.image, position_scale=10.0)
    assert torch.equal(computed_positions(image, GRID), 10 * sincos_2d(48, GRID))
    model = small_model(dataclasses.replace(SMALL, image=image))
    assert torch.equal(model.image.position_table_GD, computed_positions(image, GRID))
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^image position_scale {scale} is no finite number above 0$"):
            dataclasses.replace(SMALL.image, position_scale=scale)


@pytest.mark.parametrize("kind", ["stored", "learned"])
def test_positions_that_are_stored_or_learned_travel_with_the_weights(kind):
    config = dataclasses.replace(SMALL, image=dataclasses.replace(SMALL.image, positions=kind))
    model = small_model(config)
    assert isinstance(model.image.position_table_GD, torch.nn.Parameter) == (kind == "learned")
    torch.testing.assert_close(model.image.position_table_GD.detach(), sincos_2d(48, GRID))
    with torch.no_grad():
        model.image.position_table_GD.mul_(2)
    other = CLIP(config, grid=GRID, text_tokens=TEXT_TOKENS)
    other.load_state_dict(model.state_dict())
    inputs = patchify(small_images()), all_positions()
    with torch.no_grad():
        assert torch.equal(other.encode_image(*inputs), model.encode_image(*inputs))
        assert not torch.allclose(small_model().encode_image(*inputs), model.encode_image(*inputs), atol=1e-4)
    if kind == "learned":
        model.encode_image(*inputs).sum().backward()
        assert model.image.position_table_GD.grad.abs().amax(dim=1).min() > 0


def test_resampled_positions_follow_a_smooth_table_and_keep_its_order():
    # A ramp is what linear and cubic kernels give back, save near the borders.
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    table = torch.stack([x.flatten(), y.flatten()], dim=1)
    resized = resized_grid(table, (6, 6), (12, 12)).unflatten(0, (12, 12))
    ramp = (torch.arange(12) + 0.5) / 2 - 0.5
    torch.testing.assert_close(resized[5, 3:9, 0], ramp[3:9])
    torch.testing.assert_close(resized[3:9, 5, 1], ramp[3:9])
    assert resized_grid(table, (6, 6), (6, 6)) is table
    text = resized_text(torch.arange(8.0)[:, None].repeat(1, 3), 32)
    torch.testing.assert_close(text[2:30, 1], ((torch.arange(32) + 0.5) / 4 - 0.5)[2:30])
    assert text.shape == (32, 3)


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


# As open_clip counts them, with 257 image positions that are no parameters here.
COUNTED = {"ViT-L-14": 414.21, "ViT-H-14": 968.24, "ViT-bigG-14": 2517.22}


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_counts_are_open_clips(name):
    config = model_config(name)
    with torch.device("meta"):
        total = CLIP(config, grid=(16, 16), text_tokens=32).num_parameters()["total"]
    assert round((total + 257 * config.image.width) / 1e6, 2) == COUNTED[name]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-bpe")])
def test_the_dialects_differ_in_this_and_in_nothing_else(name):
    config, other = model_config(name), model_config(name.removesuffix("-bpe"))
    assert (other.activation, other.norm_eps, other.max_logit_scale) == ("gelu_tanh", 1e-6, None)
    assert (config.activation, config.norm_eps, config.max_logit_scale) == ("gelu", 1e-5, 100.0)
    assert (other.adam_eps, config.adam_eps) == (1e-8, 1e-6)
    assert config.pixel_mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.pixel_std == (0.26862954, 0.26130258, 0.27577711)
    changed = {"pooling", "pre_norm", "sincos", "block_init", "patch_init", "class_init", "vocabulary", "tokenizer"}
    changed |= {"causal"}
    for ours, theirs in ((config.image, other.image), (config.text, other.text)):
        for field in dataclasses.fields(ours):
            if field.name not in changed:
                assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert (config.text.vocabulary, config.text.tokenizer, config.text.pooling) == (49_408, "bpe", "end")
    assert config.text.causal
    assert config.image.pre_norm


def test_the_logit_scale_is_clamped_in_the_dialect_that_does():
    for config, expected in ((SMALL, (200.0, 0.5)), (SMALL_BPE, (100.0, 1.0))):
        model = small_model(config)
        for value, after in zip((200.0, 0.5), expected, strict=True):
            with torch.no_grad():
                model.logit_scale.fill_(math.log(value))
            model.clamp_logit_scale()
            assert model.logit_scale.exp().item() == pytest.approx(after, rel=1e-5)


def test_flops_are_open_clips_for_l_14():
    l_14 = model_config("ViT-L-14")
    image, text = gflops_per_pair(l_14, 256, 32)
    assert image + text == pytest.approx(167.5, abs=0.05)
    assert gflops_per_pair(l_14, 576, 32)[0] + text == pytest.approx(387, abs=0.5)


def every_token(forward):
    """Returns the plain way of a block: every token is computed, and one is taken after."""

    def plain(self, x_BND, sequences=None, only=None):
        x_BND = forward(self, x_BND, sequences)
        return x_BND if only is None else token_at(x_BND, only)

    return plain


@DIALECTS
def test_a_last_block_of_one_token_has_the_gradients_of_a_whole_one(config, monkeypatch):
    found = []
    for way in (Block.forward, every_token(Block.forward)):
        monkeypatch.setattr(Block, "forward", way)
        model = small_model(config).double()
        features = model(patchify(small_images()), all_positions(), captions())
        contrastive_loss(features, torch.ones(4, dtype=torch.bool), kind="infonce").backward()
        found.append([features[0].detach(), features[1].detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_flops_are_what_torch_counts(monkeypatch):
    """Of a step that computes every token in every block, which is what the formula counts."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(Block, "forward", every_token(Block.forward))
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


def test_text_embeddings_begin_as_small_as_the_config_asks_for():
    torch.manual_seed(0)
    text = CLIP(model_config("ViT-256x2-8"), grid=(4, 4), text_tokens=64).text
    assert text.token_embedding.weight.std().item() == pytest.approx(0.005, rel=0.01)
    assert text.positions_LD.std().item() == pytest.approx(0.0025, rel=0.05)
    for std in (0.0, -0.02, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^text embedding_std {std} is no finite number above 0$"):
            dataclasses.replace(SMALL.text, embedding_std=std)


def test_initialisation_of_the_bpe_dialect_is_torchs():
    torch.manual_seed(0)
    config = model_config("ViT-Ti-16-bpe")
    model = CLIP(config, grid=(4, 4), text_tokens=8)
    image, text, width = model.image, model.text, config.image.width
    block, text_block = image.blocks[0], text.blocks[0]
    for each in (block, text_block):
        assert not each.attention.qkv.bias.any()
        assert not each.attention.out.bias.any()
    text_width, depth = config.text.width, config.text.layers
    # Of a uniform distribution the largest value, of a normal one the deviation.
    bounds = {
        block.attention.qkv.weight: math.sqrt(6 / (4 * width)),  # Xavier over query, key and value as one matrix
        block.attention.out.weight: width**-0.5,
        block.mlp_in.weight: width**-0.5,
        block.mlp_in.bias: width**-0.5,
        block.mlp_out.weight: config.image.mlp_width**-0.5,
        image.patch_embedding.weight: 768**-0.5,
        text_block.mlp_in.bias: text_width**-0.5,
    }
    for parameter, bound in bounds.items():
        assert parameter.abs().max().item() == pytest.approx(bound, rel=0.03)
    deviations = {
        image.class_token_D: width**-0.5,
        image.projection.weight: width**-0.5,
        text.token_embedding.weight: 0.02,
        text.positions_LD: 0.01,
        text_block.attention.qkv.weight: text_width**-0.5,
        text_block.attention.out.weight: text_width**-0.5 * (2 * depth) ** -0.5,
        text_block.mlp_in.weight: (2 * text_width) ** -0.5,
        text.projection.weight: text_width**-0.5,
    }
    for parameter, std in deviations.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.15 if parameter.ndim == 1 else 0.05)


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
        (lambda values: values.update(adam_eps=0.0), r"model adam_eps 0.0 is not above 0"),
        (lambda values: values["image"].update(dropout=0.1), r"unknown field image\.dropout"),
        (lambda values: values["text"].pop("width"), r"lacks the field text\.width"),
        (lambda values: values.pop("image"), r"lacks the field image\.heads"),
        (lambda values: values["image"].update(pooling="max"), r"image pooling 'max'.*patch_mean, class, token_mean"),
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
    del values["norm_eps"], values["adam_eps"], values["text"]["pooling"]
    assert from_json(values) == model_config("ViT-Ti-16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit-b16", r"^--model vit-b16 is not known; did you mean ViT-B-16"),
        ("resnet", r"^--model resnet is not known; choose from ViT-Ti-16, .*, ViT-S-16, .*, ViT-bigG-14-bpe$"),
    ],
)
def test_unknown_model_names_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        model_config(name)
