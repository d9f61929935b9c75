"""A sweep file (TOML) in, its points out: which models are trained at which lengths, and the flags of each stage.

full_tokens = 49                      what all are fine-tuned at, and compared with
models = ["ViT-96x6-16"]              the axes: a point for each combination of models, tokens, image_reductions,
tokens = [4, 49]                      text_tokens and seeds
[train]                               flags of train.py, common to all points
samples = 50_000
[of_model.ViT-96x6-16]                flags of one model, at all lengths and in both stages
lr = 2e-3
[finetune]                            flags that are other ones in the fine-tune at full tokens
samples = 5_000
[evaluation]                          name = shard set
unseen = "data/emoji-scenes/retrieval"
[[also]]                              further points: axes not named here are those above
tokens = [16]
image_reductions = ["random"]
"""

import dataclasses
import functools
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from model.presets import model_config
from pipeline.command import did_you_mean
from training.config import parse
from training.fields import Config
from training.preset import flags

from .published import Stage
from .roofline import training_gflops

_AXES: dict[str, tuple[type, list[Any]]] = {
    "models": (str, []),
    "tokens": (int, []),
    "image_reductions": (str, ["resize"]),
    "text_tokens": (int, [16]),
    "seeds": (int, [0]),
}
_OWN = {"model", "tokens", "image_reduction", "image_size", "text_tokens", "seed", "out", "init", "preset", "stage"}
"""Flags that a point decides."""
STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Point:
    """One model trained at one length, and then fine-tuned at full length."""

    model: str
    tokens: int
    image_reduction: str
    text_tokens: int
    seed: int
    stages: Mapping[str, Mapping[str, Any]]
    """Flags of train.py for `pretrain` and `finetune`, but for --out and --init."""
    gflops: Mapping[str, float]
    """Of each stage as a whole, counted from the layers; a step is three forward passes."""

    @property
    def name(self) -> str:
        return f"{self.model}-{self.image_reduction}-{self.tokens}-text-{self.text_tokens}-seed-{self.seed}"

    @property
    def total_gflops(self) -> float:
        return sum(self.gflops.values())

    def record(self) -> dict[str, Any]:
        """Returns what makes this point this point, as results.jsonl keeps it."""
        return {
            "point": self.name,
            "model": self.model,
            "tokens": self.tokens,
            "image_reduction": self.image_reduction,
            "text_tokens": self.text_tokens,
            "seed": self.seed,
            "stages": {name: dict(values) for name, values in self.stages.items()},
        }


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says."""

    path: Path
    points: tuple[Point, ...]
    """Seed after seed, each from the cheapest point to the dearest, so that a stopped queue can be compared."""
    evaluation: Mapping[str, str]
    """Name -> shard set; the first is the one that fits and plots follow."""
    metrics: tuple[str, ...]
    """Keys of validate.py's JSON; their mean is the accuracy."""
    full_tokens: int


def load(path: Path) -> Sweep:
    """Returns the sweep in a TOML file. Raises ValueError, in one line that starts with the path, for a bad one."""
    try:
        return _sweep(path, tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a sweep ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _sweep(path: Path, table: dict[str, Any]) -> Sweep:
    _known(table, [*_AXES, "full_tokens", "metrics", "train", "of_model", "finetune", "evaluation", "also"], "")
    full = _typed("full_tokens", table.get("full_tokens"), int)
    train, finetune = _table(table, "train"), _table(table, "finetune")
    also = cast("list[dict[str, Any]]", _list("also", table.get("also", []), dict, least=0))
    of_model = {name: _table(_table(table, "of_model"), name) for name in _table(table, "of_model")}
    _known(of_model, [name for axes in [table, *also] for name in axes.get("models", [])], "of_model.")
    flagged = [("train", train), ("finetune", finetune), *((f"of_model.{name}", of_model[name]) for name in of_model)]
    for where, stage in flagged:
        if own := _OWN & {key.replace("-", "_") for key in stage}:
            raise ValueError(f"{where}.{min(own)} is decided by each point; leave it out")
    evaluation = {
        str(name): _typed(f"evaluation.{name}", value, str) for name, value in _table(table, "evaluation").items()
    }
    if not evaluation:
        raise ValueError('evaluation names no shard set; write [evaluation] and NAME = "FOLDER"')
    metrics = _list("metrics", table.get("metrics", ["retrieval_image_r1", "retrieval_text_r1"]), str)
    points: dict[str, Point] = {}
    for number, axes in enumerate([{}, *also]):
        _known(axes, _AXES, f"also[{number - 1}].")
        values = [
            _list(name, axes.get(name, table.get(name, default)), kind) for name, (kind, default) in _AXES.items()
        ]
        for combination in itertools.product(*values):
            point = _point(combination, full, {**train, **of_model.get(combination[0], {})}, finetune)
            points[point.name] = point
    ordered = sorted(points.values(), key=lambda point: (point.seed, point.total_gflops, point.name))
    return Sweep(path, tuple(ordered), evaluation, tuple(metrics), full)


def _point(axes: Sequence[Any], full: int, train: dict[str, Any], finetune: dict[str, Any]) -> Point:
    model, tokens, reduction, text_tokens, seed = axes
    side = math.isqrt(full)
    if side**2 != full:
        raise ValueError(f"full_tokens = {full} is no square, and all are compared on whole square images; 49 is one")
    # A masked model sees patches of the full image.
    size = {} if reduction == "resize" else {"image_size": side * model_config(model).image.patch}
    own = {"model": model, "text_tokens": text_tokens, "seed": seed}
    stages = {
        "pretrain": {**train, **own, "tokens": tokens, "image_reduction": reduction, **size},
        "finetune": {**train, **own, **finetune, "tokens": full, "image_reduction": "resize"},
    }
    if "samples" in finetune or "steps" in finetune:
        stages["finetune"] = {
            key: value for key, value in stages["finetune"].items() if key not in {"samples", "steps"} - finetune.keys()
        }
    return Point(model, tokens, reduction, text_tokens, seed, stages, {k: _gflops(k, v) for k, v in stages.items()})


def _gflops(stage: str, values: Mapping[str, Any]) -> float:
    """Returns a stage's GFLOPs; on the way its flags are judged as train.py would."""
    config = _config(stage, values)
    one = Stage(config.tokens, config.text_tokens, 1, config.geometry.image_size)
    pairs = config.total_steps * config.batch_size
    return training_gflops(config.model, one, config.batch_size) * pairs


def _config(stage: str, values: Mapping[str, Any]) -> Config:
    known = {field.name for field in dataclasses.fields(Config)}
    _known({key.replace("-", "_"): value for key, value in values.items()}, known, f"{stage}.")
    if not 0 <= values["seed"] < 2**63:
        raise ValueError(f"seeds = {values['seed']} is outside 0 to 2**63")
    return _parsed(stage, tuple(flags({key: value for key, value in values.items() if key != "seed"})))


@functools.cache
def _parsed(stage: str, arguments: tuple[str, ...]) -> Config:
    # A tenth of a second each; seeds differ in nothing that is judged.
    try:
        (config,) = parse(arguments, "")
    except SystemExit:
        raise ValueError(f"{stage}: train.py does not take these values; the reason stands above") from None
    return config


def config_of(point: Point, stage: str) -> Config:
    """Returns train.py's config of a point's stage, but for the seed."""
    return _config(stage, point.stages[stage])


def _known(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in table:
        if key not in names:
            raise ValueError(f'unknown key "{where}{key}"; {did_you_mean(key, names, str(names))}')


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    return cast("dict[str, Any]", _typed(key, table.get(key, {}), dict))


def _list(key: str, value: Any, kind: type, least: int = 1) -> list[Any]:
    found = cast("list[Any]", _typed(key, value, list))
    if len(found) < least:
        raise ValueError(f"{key} is empty; give at least one")
    return [_typed(key, item, kind) for item in found]


def _typed(key: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        words = {int: "a whole number", str: "a string", list: "a list", dict: "a table"}
        raise ValueError(f"{key} = {value!r} must be {words[kind]}" if value is not None else f'key "{key}" is missing')
    return value
