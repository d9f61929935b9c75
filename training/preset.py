"""Presets: TOML files of values for train.py's flags, with stages where a run has several; they become flags.

    model = "ViT-L-16"            common to all stages
    tokens = 16
    [stages.pretrain]             what only this stage sets
    [stages.finetune]
    tokens = 196

As flags, both are checked alike. A flag of the command line replaces a common value; what a stage sets itself stays,
unless --stage names that stage. Each stage starts from the weights of the one before and has a run folder of its own.
"""

import difflib
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.command import did_you_mean

# One value with two names: who gives it by either replaces both.
_SYNONYMS = (frozenset({"steps", "samples"}), frozenset({"lr", "base_lr"}))


@dataclass(frozen=True)
class Preset:
    """What a preset file says."""

    path: Path
    common: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    """By name, in the order of the file; empty where the run has one stage."""


@dataclass(frozen=True)
class Stage:
    """One stage of a command line."""

    name: str | None
    """None: the run has one stage, and no preset that names it."""
    before: str | None
    """The stage whose weights it starts from; None where --init or nothing gives them."""
    flags: list[str]
    """All its flags, without --out and --init of the stage."""


def expand(arguments: Sequence[str], known: Collection[str]) -> list[Stage]:
    """Returns the stages that a command line asks for, in order; one without a name where no preset has stages.

    known: names of the flags, as in a preset. `--preset` may stand anywhere; the last one counts.
    Raises ValueError, in one line, for an unknown flag, a preset that cannot be read and a key or stage that it cannot
    have.
    """
    _refuse_unknown(arguments, known)
    path, wanted = _value(arguments, "preset"), _value(arguments, "stage")
    preset = read(Path(path), known) if path else Preset(Path(), {}, {})
    if wanted is not None and wanted not in preset.stages:
        there = f"its stages are {', '.join(preset.stages)}" if preset.stages else "there are no stages"
        raise ValueError(f"--stage {wanted}: {there}{f' in {path}' if path else ' without a --preset'}")
    given = _given(arguments)
    common = flags({name: value for name, value in preset.common.items() if name not in given})
    if not preset.stages:
        return [Stage(None, None, [*common, *arguments])]
    if wanted is not None:
        own = {name: value for name, value in preset.stages[wanted].items() if name not in given}
        before = None if _value(arguments, "init") else _before(preset, wanted)
        kept = {name: value for name, value in preset.common.items() if name not in given | _with_synonyms(own)}
        stages = [Stage(wanted, before, [*flags(kept), *flags(own), *arguments])]
    else:
        _refuse_without_effect(path, preset, arguments)
        stages = []
        for name, own in preset.stages.items():
            covered = _with_synonyms(own)
            kept = {key: value for key, value in preset.common.items() if key not in given | covered}
            stages.append(
                Stage(name, _before(preset, name), [*flags(kept), *_without(arguments, covered), *flags(own)])
            )
    return stages


def read(path: Path, known: Collection[str]) -> Preset:
    """Returns a preset. Raises ValueError, in one line, where it cannot be read or has a key that is not known."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--preset {path}: no such file; the presets are in training/presets/") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--preset {path}: cannot be read as TOML ({error})") from None
    stages = table.pop("stages", {})
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ValueError(f"--preset {path}: stages is not a group of tables; write each as [stages.NAME]")
    for name in stages:
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f'--preset {path}: the stage "{name}" names a folder; use letters, digits and dashes')
    checked = {name: _checked(path, stage, known, f"stages.{name}.") for name, stage in stages.items()}
    for name, stage in checked.items():
        if "init" in stage and _before(Preset(path, {}, checked), name):
            raise ValueError(f"--preset {path}: stages.{name}.init cannot be set; it starts from the stage before")
        if "out" in stage:
            raise ValueError(f"--preset {path}: stages.{name}.out cannot be set; a stage's folder is OUT/{name}")
    return Preset(path, _checked(path, table, known, ""), checked)


def flags(values: dict[str, Any]) -> list[str]:
    """Returns values as the flags of a command line."""
    arguments: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments += [flag, str(value)]
    return arguments


def _checked(path: Path, table: dict[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    named = {key.replace("-", "_"): key for key in table}
    for name, key in named.items():
        if name not in known or name in ("preset", "stage"):
            advice = did_you_mean(name, known, "`python train.py --help` lists the keys")
            raise ValueError(f'--preset {path}: unknown key "{where}{key}"; {advice}')
    return {name: table[key] for name, key in named.items()}


def _refuse_unknown(arguments: Sequence[str], known: Collection[str]) -> None:
    for argument in arguments:
        name = _name(argument)
        # Those of tyro itself.
        if name is None or name in known or name == "help" or name.startswith("tyro_"):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        advice = f"did you mean --{near[0].replace('_', '-')}?" if near else "`python train.py --help` lists the flags"
        raise ValueError(f"unknown flag {argument.partition('=')[0]}; {advice}")


def _before(preset: Preset, name: str) -> str | None:
    names = list(preset.stages)
    return names[names.index(name) - 1] if names.index(name) else None


def _refuse_without_effect(path: str | None, preset: Preset, arguments: Sequence[str]) -> None:
    """Raises ValueError for a flag of the command line that every stage sets itself."""
    for name in sorted({name for argument in arguments if (name := _name(argument))}):
        if all(name in _with_synonyms(own) for own in preset.stages.values()):
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect: each stage of {path} sets its own; name the stage that it "
                f"is for, such as --stage {next(iter(preset.stages))}"
            )


def _with_synonyms(names: Collection[str]) -> set[str]:
    return set(names).union(*(group for group in _SYNONYMS if group & set(names)))


def _name(argument: str) -> str | None:
    """Returns the preset's name of a flag, None for a value."""
    if not argument.startswith("--"):
        return None
    name = argument[2:].partition("=")[0].replace("-", "_")
    return name.removeprefix("no_")


def _given(arguments: Sequence[str]) -> set[str]:
    """Returns the names that a command line gives by a synonym: their values replace the preset's of either name."""
    given = {name for argument in arguments if (name := _name(argument))}
    return set[str]().union(*(group for group in _SYNONYMS if group & given))


def _without(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """Returns a command line without the flags of these names and what belongs to them."""
    kept: list[str] = []
    dropping = False
    for argument in arguments:
        name = _name(argument)
        if name is not None:
            dropping = name in names
        if not dropping:
            kept.append(argument)
    return kept


def _value(arguments: Sequence[str], name: str) -> str | None:
    """Returns the last value that a command line gives to a flag."""
    value: str | None = None
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value
