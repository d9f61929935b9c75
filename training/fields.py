"""What can be said to train.py: the fields of a frozen Config with their help texts, and what follows from them.

training/config.py makes one from a command line and fills in what is left to be decided. Neither loads torch before it
has to: --help and what cannot be are answered without it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.choices import AttentionName, LossKind, OnResize, Positions
from model.presets import model_config
from pipeline.captions import TextReduction
from pipeline.colour import ColourJitter
from pipeline.mixture import split_weights
from pipeline.plan import CropRange
from pipeline.tokens import Geometry, ImageReduction, token_geometry

from .reporters import ReporterName

TILED_ABOVE = 8_192
"""Global pairs above which --tiled-loss auto does without the batch x batch matrix."""
DEFAULT_STEPS = 1_000
"""Length of a run when nobody says."""
STARTER = "data/emoji/train"
"""What --data is when nobody says: made on first use."""


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
    """A TOML file of values for these flags, such as those in training/presets/ (clipa-*, sweep-*, starter-stages and
    demo; docs/training.md lists them); flags on the command line win. One with stages trains them in turn, each in a
    folder of its own under --out, from the weights of the one before."""
    stage: str | None = None
    """Train this stage of the preset only."""
    model: str = "ViT-B-16"
    """Which encoders: ViT-Ti-16, ViT-256x2-8, ViT-96x6-16, ViT-192x6-16, ViT-384x6-16, ViT-S-16, ViT-B-16, ViT-L-16,
    ViT-L-14, ViT-H-14 or ViT-bigG-14, with WordPiece captions; each as NAME-bpe in CLIPA's torch dialect, with CLIP's
    BPE."""
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
    """Length of the run in steps; or give --samples. By default 1,000, or that of the run that is resumed."""
    samples: int | None = None
    """Length of the run in image-text pairs."""
    loss: LossKind = "infonce"
    """infonce: a softmax over the batch, in both directions. sigmoid: each pair of image and caption on its own."""
    tiled_loss: Literal["auto", "on", "off"] = "auto"
    """Compute the loss in blocks, without the batch x batch matrix. auto: above 8,192 pairs."""
    accumulate: int = 1
    """Micro-batches that a rank's part of the batch is cut into, for memory. Exact: the loss still sees the whole
    batch; each micro-batch goes through the encoders twice."""
    grad_checkpointing: bool = False
    """Keep only what goes into each block, and compute the rest again for the gradient."""
    shard: bool = False
    """Under torchrun: cut weights, gradients and optimiser state over the ranks (FSDP2), instead of a copy on each."""
    peer_timeout: float = 60.0
    """Under torchrun: seconds without a sign of life after which a rank is given up and the others end."""
    lr: float | None = None
    """Peak learning rate; by default 1e-3."""
    base_lr: float | None = None
    """Peak learning rate for a batch of 256: --lr is this times --batch-size / 256."""
    warmup_samples: int | None = None
    """Pairs over which the learning rate rises from 0; then it follows a cosine to 0. By default 50,000, or a tenth of
    a shorter run."""
    weight_decay: float = 0.2
    """On weight matrices of linear layers."""
    beta2: float = 0.95
    """Of AdamW; beta1 is 0.9."""
    grad_clip: float = 0.0
    """Largest norm of all gradients together; larger ones are scaled down to it. 0: never."""
    ema: float = 0.0
    """Decay a step of a moving average of the weights, kept in the checkpoint, such as 0.9999. 0: none is kept."""
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
    workers: int = 0
    """Processes that make batches instead of threads, which leaves this one's Python alone. 0: threads do."""
    prefetch: int = 3
    """Batches made ahead, beside one per thread."""
    log_every: int = 20
    """Steps between log lines."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    milestone_every: int = 0
    """Steps between checkpoints that are kept for good; a multiple of --checkpoint-every. 0: none are."""
    eval_data: str | None = None
    """A shard set with classes: zero-shot accuracy is measured on it during training."""
    eval_every: int = 0
    """Steps between such measurements; 0: never."""
    max_bad_fraction: float = 0.01
    """A larger share of bad samples, over the last 10,000, stops the run."""
    ledger: bool = False
    """Also write every step's sample ids, to ledger.jsonl."""
    report_to: tuple[ReporterName, ...] = ()
    """Where the numbers of metrics.jsonl go too."""
    doctor: bool = False
    """Train nothing: say what would hold this run up on this machine, and the change that helps most
    (docs/doctor.md)."""
    profile: int = 0
    """Time each part of so many steps, after the first five of this start, and trace three more: a table, and
    profile.json and trace.json in the run folder. 0: none."""
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
        if self.samples is not None:
            return self.samples // self.batch_size if self.steps is None else self.steps
        return DEFAULT_STEPS if self.steps is None else self.steps

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, by CLIPA's rule where --base-lr gives it."""
        if self.base_lr is not None:
            return self.base_lr * self.batch_size / 256
        return 1e-3 if self.lr is None else self.lr

    @property
    def logit_bias(self) -> float | None:
        """What the model's logit bias begins with; None where the loss has none."""
        from model.clip import SIGMOID_LOGIT_BIAS

        return SIGMOID_LOGIT_BIAS if self.loss == "sigmoid" else None

    @property
    def tiled(self) -> bool:
        """Whether the loss is computed in blocks."""
        return self.tiled_loss == "on" or (self.tiled_loss == "auto" and self.batch_size > TILED_ABOVE)

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
        if self.steps is not None and self.samples is not None:
            raise ValueError(f"both --steps {self.steps} and --samples {self.samples} are given; give one of them")
        least = {
            "batch_size": 2, "threads": 1, "workers": 0, "prefetch": 0, "log_every": 1, "checkpoint_every": 1,
            "keep_checkpoints": 1, "eval_every": 0, "warmup_samples": 0, "seed": 0, "text_tokens": 2, "lanes": 1,
            "accumulate": 1, "milestone_every": 0, "grad_clip": 0, "peer_timeout": 5, "weight_decay": 0,
            "profile": 0,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:  # NaN is not
                raise ValueError(f"{flag(name)} {value} is below {low}; give at least {low}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed} is not below 2**63; give a smaller one")
        if self.total_steps < 1:
            length = f"--steps {self.steps}" if self.steps is not None else f"--samples {self.samples}"
            raise ValueError(
                f"{length} is less than one batch of {self.batch_size}; give more, or a smaller --batch-size"
            )
        if self.lr is not None and self.base_lr is not None:
            raise ValueError(f"both --lr {self.lr:g} and --base-lr {self.base_lr:g} are given; give one of them")
        if not 0 < self.peak_lr < 1:
            name = "--lr" if self.base_lr is None else f"--base-lr {self.base_lr:g} comes to --lr"
            raise ValueError(f"{name} {self.peak_lr:g}, which is outside 0 to 1; 1e-3 is usual")
        if self.warmup_samples is not None and self.warmup_samples >= self.total_steps * self.batch_size:
            raise ValueError(
                f"--warmup-samples {self.warmup_samples} is not below the run's {self.total_steps * self.batch_size} "
                "pairs, so its peak rate would never come; lower it or train longer"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema} is outside 0 to 1; 0.9999 is usual, 0 keeps none")
        if self.milestone_every % self.checkpoint_every:
            raise ValueError(
                f"--milestone-every {self.milestone_every} is not a multiple of --checkpoint-every "
                f"{self.checkpoint_every}; change one of them"
            )
        if bool(self.eval_every) != bool(self.eval_data):
            raise ValueError("--eval-data and --eval-every go together: which shard set with classes, and how often")
        if self.on_resize != "auto" and self.init is None:
            raise ValueError(f"--on-resize {self.on_resize} is for weights of another grid; give them with --init")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction {self.max_bad_fraction} is outside 0 to 1")


def flag(name: str) -> str:
    """Returns the command line's name of a field."""
    return "--" + name.replace("_", "-")
