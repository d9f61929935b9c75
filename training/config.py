"""The command line in, a checked frozen Config out; and a run folder's config.json, which resume compares with it.

A preset (TOML) becomes flags that stand before the user's own, so both are checked alike and the user's win.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from model.attention import AttentionName
from model.clip import attention_choices
from model.presets import model_config
from model.weights import OnResize, Positions
from pipeline.captions import TextReduction
from pipeline.colour import ColourJitter
from pipeline.mixture import split_weights
from pipeline.order import default_lanes
from pipeline.plan import CropRange
from pipeline.tokens import Geometry, ImageReduction, token_geometry

STARTER = "data/emoji/train"
"""What --data is when nobody says: made on first use."""

MAY_DIFFER = frozenset(
    {"data", "out", "preset", "resume", "steps", "samples", "threads", "prefetch", "decoder", "device", "vocabulary"}
    | {"log_every", "checkpoint_every", "keep_checkpoints", "ledger", "eval_data", "eval_every", "max_bad_fraction"}
)
"""What may be another when a run is resumed. The data itself is held to the index's digest, not to its path; its
weights may not differ."""


@dataclass(frozen=True)
class Config:
    """Train a CLIP on short token sequences. The same command run again resumes."""

    data: tuple[str, ...] = (STARTER,)
    """Folders or URLs of shards (NNNNN.tar). Several without weights are one set; SRC=WEIGHT ... draws from each in
    fixed shares, whatever its size. By default the starter, made on first use."""
    resampled: bool = False
    """Draw an epoch's shards with replacement, instead of each once."""
    out: Path | None = None
    """The run folder; by default runs/MODEL-TOKENS."""
    preset: Path | None = None
    """A TOML file of values for these flags; flags on the command line win."""
    model: str = "ViT-B-16"
    """Which encoders, by name."""
    init: Path | None = None
    """Weights to start from: a run folder of this program, or open_clip's or CLIPA's .safetensors or .pt file."""
    image_positions: Positions = "fixed"
    """Whether the image's position embeddings are trained. They begin as sines and cosines, or as --init has them."""
    on_resize: OnResize = "auto"
    """With --init from another grid: compute image positions anew or resample the old ones. auto: anew if they are
    fixed sines and cosines, else resampled."""
    tokens: int = 16
    """Image tokens kept per image; the class token is not counted."""
    image_reduction: ImageReduction = "resize"
    """How image tokens are thrown away before the encoder: a smaller image, or some patches of one at --image-size."""
    image_size: int | None = None
    """Side of the square image, in pixels. By resize it follows from --tokens; else it is 224 by default."""
    grid_jitter: bool = False
    """Grid reduction only: draw which patches of each 2 x 2 window are kept, instead of the same everywhere."""
    text_tokens: int = 16
    """Text tokens per caption, special tokens counted."""
    captions: Literal["any", "first"] = "any"
    """Where a sample has several captions: one of them drawn each epoch, or always the first (KEY.txt)."""
    text_reduction: TextReduction = "truncate"
    """How text tokens are thrown away: all but the first, or a drawn window, or drawn ones, or the least telling."""
    vocabulary: Path | None = None
    """The tokenizer's vocabulary file; by default that of an installed package."""
    crop_area: tuple[float, float] = (0.4, 1.0)
    """Random crop: smallest and largest share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random crop: smallest and largest width/height."""
    colour_jitter: float = 0.0
    """Share of the images whose colours are jittered; CLIPA's larger models use 0.8."""
    colour_strength: tuple[float, float, float, float] = (0.32, 0.32, 0.32, 0.08)
    """By how much: brightness, contrast, saturation (factors 1 - x to 1 + x), hue (share of a full turn)."""
    greyscale: float = 0.0
    """Share of the images that lose their colour; CLIPA's larger models use 0.2."""
    batch_size: int = 1024
    """Global batch, in image-text pairs."""
    lanes: int | None = None
    """Equal parts of the data that are read side by side; ranks share them evenly. By default up to 64."""
    steps: int | None = None
    """Length of the run in steps; or give --samples."""
    samples: int | None = None
    """Length of the run in image-text pairs."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_samples: int | None = None
    """Pairs over which the learning rate rises from 0; then it follows a cosine to 0. By default 50,000, or a tenth of
    a shorter run."""
    weight_decay: float = 0.2
    """On weight matrices of linear layers."""
    beta2: float = 0.95
    """Of AdamW; beta1 is 0.9."""
    seed: int = 0
    """Of the order, the crops and the initial weights."""
    decoder: Literal["auto", "dali", "turbo"] = "auto"
    """auto: dali on CUDA, turbo on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    attention: AttentionName = "auto"
    """auto: sdpa, or flash-attn for long sequences on CUDA. math is the slow reference."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 on a CPU."""
    compile: bool = False
    """torch.compile the encoders."""
    threads: int = 1
    """Threads that make batches."""
    prefetch: int = 3
    """Batches made ahead, beside one per thread."""
    log_every: int = 20
    """Steps between log lines."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    eval_data: str | None = None
    """A shard set with classes: zero-shot accuracy is measured on it during training."""
    eval_every: int = 0
    """Steps between such measurements; 0: never."""
    max_bad_fraction: float = 0.01
    """A larger share of bad samples, over the last 10,000, stops the run."""
    ledger: bool = False
    """Also write every step's sample ids, to ledger.jsonl."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the run folder's newest checkpoint. never: start anew, deleting that run."""

    @property
    def run_folder(self) -> Path:
        return self.out or Path("runs") / f"{self.model}-{self.tokens}"

    @property
    def sources(self) -> tuple[list[str], list[float] | None]:
        """What --data names, and the shares drawn from each, if it gives weights."""
        return split_weights(self.data)

    @property
    def total_steps(self) -> int:
        """Whole batches only: what is left of --samples over a multiple of the batch is not trained on."""
        return self.steps if self.steps is not None else (self.samples or 0) // self.batch_size

    @property
    def geometry(self) -> Geometry:
        patch = model_config(self.model).image.patch
        return token_geometry(
            self.tokens,
            image_reduction=self.image_reduction,
            image_size=self.image_size,
            patch=patch,
            grid_jitter=self.grid_jitter,
        )

    @property
    def crop(self) -> CropRange:
        return CropRange(self.crop_area, self.crop_ratio)

    @property
    def colour(self) -> ColourJitter:
        return ColourJitter(self.colour_jitter, *self.colour_strength, greyscale=self.greyscale)

    def check(self) -> None:
        """Raises ValueError, in one line, for values that cannot be or do not go together; touches no data."""
        model_config(self.model)
        _ = self.geometry, self.crop, self.colour, self.sources
        if (self.steps is None) == (self.samples is None):
            given = "neither --steps nor --samples is given" if self.steps is None else "both --steps and --samples"
            raise ValueError(f"{given}; give one of them: how long to train")
        least = {
            "batch_size": 2, "threads": 1, "prefetch": 0, "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1,
            "eval_every": 0, "warmup_samples": 0, "seed": 0, "text_tokens": 2, "lanes": 1,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{flag(name)} {value} is below {low}; give at least {low}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed} is not below 2**63; give a smaller one")
        if self.total_steps < 1:
            length = f"--steps {self.steps}" if self.steps is not None else f"--samples {self.samples}"
            raise ValueError(
                f"{length} is less than one batch of {self.batch_size}; give more, or a smaller --batch-size"
            )
        if not 0 < self.lr < 1:
            raise ValueError(f"--lr {self.lr} is outside 0 to 1; 1e-3 is usual")
        if self.warmup_samples is not None and self.warmup_samples >= self.total_steps * self.batch_size:
            raise ValueError(
                f"--warmup-samples {self.warmup_samples} is not below the run's {self.total_steps * self.batch_size} "
                "pairs, so its peak rate would never come; lower it or train longer"
            )
        if bool(self.eval_every) != bool(self.eval_data):
            raise ValueError("--eval-data and --eval-every go together: which shard set with classes, and how often")
        if self.on_resize != "auto" and self.init is None:
            raise ValueError(f"--on-resize {self.on_resize} is for weights of another grid; give them with --init")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction {self.max_bad_fraction} is outside 0 to 1")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(arguments: Sequence[str], description: str) -> Config:
    """Returns the checked config of a command line. Raises ValueError; for an unknown flag tyro prints and exits."""
    config = tyro.cli(
        Annotated[Config, tyro.conf.OmitArgPrefixes], args=_with_preset(arguments), description=description
    )
    config.check()
    return config


def _with_preset(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of the preset before them; `--preset` may stand anywhere, the last one counts."""
    path: str | None = None
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            path = arguments[i + 1]
        elif argument.startswith("--preset="):
            path = argument.partition("=")[2]
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    # The length is one value with two names: giving it by either replaces the preset's.
    replaced = {"steps", "samples"} if given & {"--steps", "--samples"} else set[str]()
    return [*(_preset_flags(Path(path), replaced) if path else []), *arguments]


def _preset_flags(path: Path, replaced: set[str]) -> list[str]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--preset {path}: no such file; the presets are in training/presets/") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--preset {path}: cannot be read as TOML ({error})") from None
    known = {field.name for field in fields(Config)} - {"preset"}
    arguments: list[str] = []
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f'did you mean "{near[0]}"?' if near else "`python train.py --help` lists the keys"
            raise ValueError(f'--preset {path}: unknown key "{key}"; {advice}')
        if name in replaced:
            continue
        if isinstance(value, bool):
            arguments.append(flag(name) if value else "--no-" + flag(name)[2:])
        elif isinstance(value, list):
            arguments += [flag(name), *map(str, value)]
        else:
            arguments += [flag(name), str(value)]
    return arguments


def resolved_device(device: str, *, cuda: bool) -> Literal["cuda", "cpu"]:
    """Returns what --device comes to. cuda: whether this machine has a CUDA device. Raises ValueError if it must."""
    if device == "cuda" and not cuda:
        raise ValueError("--device cuda: no CUDA device is here, or this torch has none built in; use --device cpu")
    return "cuda" if cuda and device != "cpu" else "cpu"


def resolved(config: Config, *, cuda: bool) -> Config:
    """Returns the config with every value that follows from others filled in: nothing is None or `auto`, save what
    is decided for each tower (--attention) or by the weights (--on-resize).

    cuda: whether this machine has a CUDA device. Raises ValueError where the values ask for what is not there.
    """
    device = resolved_device(config.device, cuda=cuda)
    on_cuda = device == "cuda"
    if config.precision == "bf16" and not on_cuda:
        raise ValueError("--precision bf16 is for CUDA: most CPUs are slower with it; use --precision fp32")
    samples = config.total_steps * config.batch_size
    automatic = {
        "precision": "bf16" if on_cuda else "fp32",
        "decoder": "dali" if on_cuda else "turbo",
    }
    filled = dataclasses.replace(
        config,
        out=config.run_folder,
        device=device,
        image_size=config.geometry.image_size,
        lanes=config.lanes or default_lanes(config.batch_size),
        steps=config.total_steps,
        samples=samples,
        warmup_samples=min(50_000, samples // 10) if config.warmup_samples is None else config.warmup_samples,
        **{name: value for name, value in automatic.items() if getattr(config, name) == "auto"},
    )
    attention_backends(filled)
    return filled


def attention_backends(config: Config) -> dict[str, str]:
    """Returns what a resolved config's --attention comes to for each tower. Raises ValueError where it cannot serve."""
    return attention_choices(
        model_config(config.model),
        config.attention,
        config.tokens,
        config.text_tokens,
        device=config.device,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
    )


def record(config: Config) -> dict[str, Any]:
    """Returns every value of a config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _weights(shares: Sequence[float] | None) -> str:
    return "the weights " + " ".join(f"{share:.9g}" for share in shares) if shares else "no weights"


def refuse_other_run(old: Mapping[str, Any], config: Config, run: Path) -> None:
    """Raises ValueError, naming the flags, where a run folder was made with values that resuming may not change."""
    new = record(config)
    # Of --data only the weights are part of the order; where the shards lie is not.
    old_shares, new_shares = split_weights(old.get("data", ()))[1], config.sources[1]
    phrases = [
        f"{flag(name)} is {json.dumps(old.get(name))} there and {json.dumps(new[name])} here"
        for name in new
        if name not in MAY_DIFFER and old.get(name) != new[name]
    ]
    if old_shares != new_shares:
        phrases.append(f"--data has {_weights(old_shares)} there and {_weights(new_shares)} here")
    if phrases:
        raise ValueError(f"{run} holds another run: {'; '.join(phrases)}; use another --out, or --resume never")
