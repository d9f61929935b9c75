"""Presets as flags: what wins over what, stages, and what is refused."""

import tomllib
from pathlib import Path

import pytest

from training.preset import Stage, expand, flags, read

KNOWN = {"model", "tokens", "steps", "samples", "lr", "base_lr", "compile", "data", "out", "init", "preset", "stage"}
PRESETS = sorted((Path(__file__).parents[1] / "training" / "presets").glob("*.toml"))


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    path = tmp_path / "staged.toml"
    path.write_text(
        'model = "m"\ntokens = 16\nsamples = 1000\nbase_lr = 8e-6\ncompile = true\n'
        "[stages.pretrain]\n[stages.finetune]\ntokens = 196\nsamples = 100\nbase_lr = 8e-7\n"
    )
    return path


def values(stage: Stage) -> dict[str, list[str]]:
    """What a parser for which the last one counts makes of the flags."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for argument in stage.flags:
        if argument.startswith("--"):
            name, separator, value = argument.partition("=")
            current = found[name] = [value] if separator else []
        else:
            current.append(argument)
    return found


def stages(path: Path, *arguments: str) -> list[Stage]:
    return expand(["--preset", str(path), *arguments], KNOWN)


def test_without_stages_the_users_flags_come_last(tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text('model = "m"\ndata = ["a", "b"]\ncompile = false\n')
    (only,) = stages(path, "--model", "n")
    assert only.name is None
    assert only.before is None
    assert values(only) == {"--model": ["n"], "--data": ["a", "b"], "--no-compile": [], "--preset": [str(path)]}


def test_a_stage_is_the_common_values_and_its_own(staged: Path) -> None:
    first, second = stages(staged)
    assert (first.name, first.before) == ("pretrain", None)
    assert (second.name, second.before) == ("finetune", "pretrain")
    assert values(first)["--tokens"] == ["16"]
    assert values(first)["--samples"] == ["1000"]
    assert values(second)["--tokens"] == ["196"]
    assert values(second)["--model"] == ["m"]
    assert "--compile" in values(second)


def test_a_flag_replaces_common_values_and_leaves_a_stages_own(staged: Path) -> None:
    first, second = stages(staged, "--tokens", "49", "--model=n")
    assert [values(stage)["--tokens"] for stage in (first, second)] == [["49"], ["196"]]
    assert [values(stage)["--model"] for stage in (first, second)] == [["n"], ["n"]]


def test_with_stage_named_a_flag_wins_over_that_stages_own(staged: Path) -> None:
    (only,) = stages(staged, "--stage", "finetune", "--tokens", "49")
    assert (only.name, only.before) == ("finetune", "pretrain")
    assert values(only)["--tokens"] == ["49"]
    assert values(only)["--samples"] == ["100"]


@pytest.mark.parametrize("form", [["--steps", "5"], ["--steps=5"]])
def test_one_value_with_two_names_is_given_once(staged: Path, form: list[str]) -> None:
    """steps and samples, lr and base_lr: neither layer may leave the other's name beside its own."""
    first, second = stages(staged, *form, "--lr", "0.1")
    assert values(first)["--steps"] == ["5"]
    assert values(first)["--lr"] == ["0.1"]
    assert not {"--samples", "--base-lr"} & set(values(first))
    assert values(second)["--samples"] == ["100"]
    assert values(second)["--base-lr"] == ["8e-07"]
    assert not {"--steps", "--lr"} & set(values(second))
    (only,) = stages(staged, "--stage=finetune", *form)
    assert values(only)["--steps"] == ["5"]
    assert "--samples" not in values(only)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokns = 16", 'unknown key "tokns"; did you mean "tokens"?'),
        ("[stages.a]\ntokns = 16", 'unknown key "stages.a.tokns"; did you mean "tokens"?'),
        ("preset = 'x'", 'unknown key "preset"'),
        ("stages = 3", "stages is not a group of tables"),
        ("[stages.'../x']", "names a folder"),
        ("[stages.a]\nout = 'x'", "stages.a.out cannot be set"),
        ("tokens = ", "cannot be read as TOML"),
    ],
)
def test_what_a_preset_cannot_say(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="--preset") as refused:
        read(path, KNOWN)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_stage_that_is_not_there(staged: Path) -> None:
    with pytest.raises(ValueError, match="--stage tune: its stages are pretrain, finetune"):
        stages(staged, "--stage", "tune")
    with pytest.raises(ValueError, match="--stage tune: there are no stages without a --preset"):
        expand(["--stage", "tune"], KNOWN)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_follow_the_base_rate_rule_and_open_with_their_command(path: Path) -> None:
    text = path.read_text()
    head = text[: text.index("\n\n") if "\n\n" in text else None]
    assert "train.py --preset training/presets/" + path.name in head
    assert "Hardware: " in head
    table = tomllib.loads(text)
    if path.stem.startswith(("clipa", "sweep")):
        merged = [{**table, **stage} for stage in table["stages"].values()]
        assert all("base_lr" in stage and "warmup_samples" in stage for stage in merged)
        assert all(stage["warmup_samples"] < stage["samples"] for stage in merged)
        assert [stage["samples"] for stage in merged] == sorted((s["samples"] for s in merged), reverse=True)


def test_flags_and_toml_say_the_same() -> None:
    assert flags({"grad_clip": 1.0, "compile": True, "shard": False, "data": ["a=0.5", "b=0.5"]}) == [
        "--grad-clip", "1.0", "--compile", "--no-shard", "--data", "a=0.5", "b=0.5",
    ]  # fmt: skip
