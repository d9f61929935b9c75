"""Which encoders there are: frozen configs by name, and their way through JSON, since a checkpoint carries its config.

CLIPA has two dialects of different architecture: `NAME` is the JAX one (WordPiece captions; the sweep and the record
models), `NAME-bpe` the torch one (CLIP's BPE). What sets them apart is data here, never a branch elsewhere.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Activation = Literal["gelu_tanh", "gelu"]
BlockInit = Literal["xavier", "scaled_normal", "torch", "torch_scaled_normal"]
PatchInit = Literal["lecun_normal", "torch"]
ClassInit = Literal["zeros", "normal"]
ImagePooling = Literal["patch_mean", "class", "token_mean"]
ImagePositions = Literal["computed", "stored", "learned"]
SinCos = Literal["moco", "mae"]
TextPooling = Literal["last", "end"]
Tokenizer = Literal["wordpiece", "bpe"]
Decayed = Literal["kernels", "matrices"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    """A vision transformer over flattened patches. Its class token is always there, whether it is pooled or not."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch: int
    """Side of a patch, in pixels."""
    pooling: ImagePooling
    """`class`: the class token. `patch_mean`: the mean over the patch tokens alone. `token_mean`: over them and the
    class token. The final norm comes after."""
    pre_norm: bool = False
    """A norm between the position embeddings and the first block."""
    positions: ImagePositions = "computed"
    """`computed`: the fixed sin-cos table of whatever grid comes. `stored`: a fixed table that came with weights.
    `learned`: a trained table, which begins as the sin-cos one."""
    sincos: SinCos = "moco"
    """Whose frequencies the sin-cos table has."""
    position_scale: float = 1.0
    """What the sin-cos table is multiplied by, whether it is trained or not. Above 1 a token begins as its place with a
    little of its pixels, and the tower as one that is nearly linear in them: a run of minutes fits less of what does
    not carry over."""
    block_init: BlockInit = "xavier"
    patch_init: PatchInit = "lecun_normal"
    class_init: ClassInit = "zeros"
    """`normal`: with standard deviation width**-0.5."""

    def __post_init__(self) -> None:
        _check_tower("image", self)
        if self.width % 4 or self.width < 8:
            raise ValueError(
                f"image width {self.width} must be 8 or more and a multiple of 4 for 2-D sin-cos positions"
            )

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: row, column, channel."""
        return self.patch * self.patch * 3


@dataclass(frozen=True)
class TextConfig:
    """A transformer over token ids; padding is not masked."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int = 32_000
    """Rows of the embedding table. BERT's WordPiece uses 30,522 of them."""
    tokenizer: Tokenizer = "wordpiece"
    pooling: TextPooling = "last"
    """`last`: the last position, often padding. Odd, but it is what the published weights were trained with.
    `end`: the position of the end token, the highest id."""
    causal: bool = False
    """A token attends to itself and those before it, so what follows the end token changes nothing."""
    block_init: BlockInit = "scaled_normal"
    embedding_std: float = 0.02
    """Standard deviation that token embeddings begin with; positions begin with half of it. A norm follows, so that it
    sets no size, but how fast the first steps turn an embedding round."""

    def __post_init__(self) -> None:
        _check_tower("text", self)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the parameters' shapes and meaning, save the text length."""

    name: str
    image: ImageConfig
    text: TextConfig
    embed_dim: int
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of pixels scaled to 0-1; red, green, blue."""
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    max_logit_scale: float | None = None
    """After each step the logit scale is put back between 1 and this; None: it is left alone."""
    decayed: Decayed = "kernels"
    """What weight decay acts on. `kernels`: the weights of linear layers. `matrices`: all that has two dimensions, so
    also the token embedding and learned positions."""
    adam_eps: float = 1e-8
    """Epsilon of AdamW."""

    def __post_init__(self) -> None:
        _check_choices("model", self)
        if self.embed_dim < 1:
            raise ValueError(f"model embed_dim {self.embed_dim} is below 1")
        if self.max_logit_scale is not None and self.max_logit_scale <= 1:
            raise ValueError(f"model max_logit_scale {self.max_logit_scale} is not above 1")
        if self.adam_eps <= 0:
            raise ValueError(f"model adam_eps {self.adam_eps} is not above 0")
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or min(self.pixel_std) <= 0:
            raise ValueError(
                f"model pixel_mean {self.pixel_mean} and pixel_std {self.pixel_std} need 3 values each, std above 0"
            )


def _check_tower(kind: str, tower: ImageConfig | TextConfig) -> None:
    _check_choices(kind, tower)
    for field in dataclasses.fields(tower):
        value = getattr(tower, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"{kind} {field.name} {value} is below 1")
        if isinstance(value, float) and not 0 < value < math.inf:
            raise ValueError(f"{kind} {field.name} {value} is no finite number above 0")
    if tower.width % tower.heads:
        raise ValueError(f"{kind} width {tower.width} is no multiple of its {tower.heads} heads")


def _check_choices(kind: str, config: object) -> None:
    for name, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), get_args(hint)
        if get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{kind} {name} {value!r} is not known; choose from {', '.join(choices)}")


# Sizes: CLIPA, NeurIPS 2023 (arXiv 2305.07017). The published S, B and L/16 of the sweep pool the class token.
_WORDPIECE = (
    ModelConfig(
        "ViT-Ti-16",  # ours, for laptops: not in the paper
        ImageConfig(width=128, layers=2, heads=2, mlp_width=512, patch=16, pooling="class"),
        TextConfig(width=128, layers=1, heads=2, mlp_width=512),
        embed_dim=128,
    ),
    ModelConfig(  # ours, for the demo: what a run of minutes learns in it carries over to another style
        "ViT-256x2-8",
        ImageConfig(width=256, layers=2, heads=16, mlp_width=1024, patch=8, pooling="class", position_scale=10.0),
        TextConfig(width=128, layers=1, heads=2, mlp_width=512, embedding_std=0.005),
        embed_dim=128,
    ),
    *(
        ModelConfig(  # ours, for sweeps on a CPU
            f"ViT-{width}x6-16",
            ImageConfig(width=width, layers=6, heads=width // 32, mlp_width=4 * width, patch=16, pooling="class"),
            TextConfig(width=width, layers=2, heads=width // 32, mlp_width=4 * width),
            embed_dim=width,
        )
        for width in (96, 192, 384)
    ),
    ModelConfig(
        "ViT-S-16",
        ImageConfig(width=384, layers=12, heads=6, mlp_width=1536, patch=16, pooling="class"),
        TextConfig(width=384, layers=12, heads=6, mlp_width=1536),
        embed_dim=384,
    ),
    ModelConfig(
        "ViT-B-16",
        ImageConfig(width=768, layers=12, heads=12, mlp_width=3072, patch=16, pooling="class"),
        TextConfig(width=512, layers=12, heads=8, mlp_width=2048),
        embed_dim=512,
    ),
    ModelConfig(
        "ViT-L-16",
        ImageConfig(width=1024, layers=24, heads=16, mlp_width=4096, patch=16, pooling="class"),
        TextConfig(width=768, layers=12, heads=12, mlp_width=3072),
        embed_dim=768,
    ),
    ModelConfig(
        "ViT-L-14",
        ImageConfig(width=1024, layers=24, heads=16, mlp_width=4096, patch=14, pooling="patch_mean"),
        TextConfig(width=768, layers=12, heads=12, mlp_width=3072),
        embed_dim=768,
    ),
    ModelConfig(
        "ViT-H-14",
        ImageConfig(width=1280, layers=32, heads=16, mlp_width=5120, patch=14, pooling="patch_mean"),
        TextConfig(width=1024, layers=24, heads=16, mlp_width=4096),
        embed_dim=1024,
    ),
    ModelConfig(
        "ViT-bigG-14",
        ImageConfig(width=1664, layers=48, heads=16, mlp_width=8192, patch=14, pooling="patch_mean"),
        TextConfig(width=1280, layers=32, heads=20, mlp_width=5120),
        embed_dim=1280,
    ),
)


def _bpe(config: ModelConfig) -> ModelConfig:
    """Returns the same sizes in the torch dialect."""
    # The one published model that pools otherwise: L/16 averages all tokens.
    pooling: ImagePooling = "token_mean" if config.name == "ViT-L-16" else config.image.pooling
    image = replace(
        config.image,
        pooling=pooling,
        pre_norm=True,
        sincos="mae",
        block_init="torch",
        patch_init="torch",
        class_init="normal",
    )
    text = replace(
        config.text,
        vocabulary=49_408,
        tokenizer="bpe",
        pooling="end",
        causal=True,
        block_init="torch_scaled_normal",
    )
    return replace(
        config,
        name=f"{config.name}-bpe",
        image=image,
        text=text,
        activation="gelu",
        norm_eps=1e-5,
        pixel_mean=OPENAI_MEAN,
        pixel_std=OPENAI_STD,
        max_logit_scale=100.0,
        decayed="matrices",
        adam_eps=1e-6,
    )


_CONFIGS = (*_WORDPIECE, *(_bpe(config) for config in _WORDPIECE))

PRESETS: dict[str, ModelConfig] = {config.name: config for config in _CONFIGS}


def model_config(name: str) -> ModelConfig:
    """Returns the preset of that name. Raises ValueError, naming the closest there are, for any other."""
    if name in PRESETS:
        return PRESETS[name]
    folded = {preset.lower(): preset for preset in PRESETS}
    close = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.6)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(PRESETS)}"
    raise ValueError(f"--model {name} is not known; {hint}")


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the config as JSON values: objects, lists, numbers and strings."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def from_json(values: Mapping[str, Any]) -> ModelConfig:
    """Returns the config that `to_json` wrote. A field left out takes its default; an unknown one raises ValueError."""
    fields = dict(values)
    image = _construct(ImageConfig, "image.", fields.pop("image", {}))
    text = _construct(TextConfig, "text.", fields.pop("text", {}))
    for key in ("pixel_mean", "pixel_std"):
        if key in fields:
            fields[key] = tuple(fields[key])
    return _construct(ModelConfig, "", {**fields, "image": image, "text": text})


_Config = TypeVar("_Config", ModelConfig, ImageConfig, TextConfig)


def _construct(kind: type[_Config], where: str, values: Mapping[str, Any]) -> _Config:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if unknown or missing:
        wrong = f"has an unknown field {where}{unknown[0]}" if unknown else f"lacks the field {where}{missing[0]}"
        raise ValueError(f"the model's config {wrong}; was it written by another version of this program?")
    return kind(**values)
