"""CLIPA's runs as presets: what was published of each, number by number, and what each opens with."""

import re
from pathlib import Path

import pytest

from benchmarks.published import RUNS
from training.config import parse
from training.fields import Config

PRESETS = Path(__file__).parents[1] / "training" / "presets"
RUN_OF_PRESET = {
    "clipa-b16-i49": "B/16, 49 tokens, T 16",
    "clipa-l16-i16": "L/16, 16 tokens, T 16",
    "clipa-l16-i36": "L/16, 36 tokens, T 8",
    "clipa-l14": "L/14, 84 px, then 336",
    "clipa-h14": "H/14, 84 px, then 336",
    "clipa-bigg14": "bigG/14, 84 px, then 336",
}
# Of each stage: batch, peak learning rate, steps of warm-up. arXiv 2305.07017, appendix, and the authors' scripts.
RECIPES = {
    "clipa-b16-i49": ((65_536, 2.048e-3, 782), (8_192, 2.56e-5, 3_072)),
    "clipa-l16-i16": ((32_768, 1.024e-3, 1_563), (7_168, 2.24e-5, 3_571)),
    "clipa-l16-i36": ((32_768, 1.024e-3, 1_563), (7_168, 2.24e-5, 3_571)),
    "clipa-l14": ((65_536, 2.048e-3, 800), (32_768, 5.12e-5, 800), (16_384, 6.4e-6, 1_600)),
    "clipa-h14": ((65_536, 2.048e-3, 3_200), (32_768, 5.12e-5, 800), (16_384, 6.4e-6, 1_600)),
    "clipa-bigg14": ((65_536, 1.024e-3, 3_200), (16_384, 2.56e-5, 0), (16_384, 6.4e-6, 1_600)),
    **{f"sweep-{size}16": ((32_768, 1.024e-3, 1_600), (32_768, 1.024e-4, 800)) for size in "sbl"},
}


def stages(name: str) -> list[Config]:
    return parse(["--preset", str(PRESETS / f"{name}.toml")], "")


def test_every_published_preset_is_here() -> None:
    assert {path.stem for path in PRESETS.glob("*.toml")} == RECIPES.keys() | {"demo", "starter-stages"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_stage_has_the_published_batch_rate_and_warm_up(name: str) -> None:
    found = stages(name)
    assert len(found) == len(RECIPES[name])
    for stage, (batch_size, peak, warmup_steps) in zip(found, RECIPES[name], strict=True):
        assert stage.batch_size == batch_size
        assert stage.peak_lr == pytest.approx(peak, rel=1e-9)
        assert stage.warmup_samples == warmup_steps * batch_size
        assert (stage.weight_decay, stage.beta2, stage.grad_clip) == (0.2, 0.95, 0.0)
        assert (stage.crop_area, stage.grad_checkpointing) == ((0.4, 1.0), True)
        # In the papers' larger models, and nowhere else.
        jittered = not name.startswith(("sweep", "clipa-b16"))
        assert (stage.colour_jitter, stage.greyscale) == ((0.8, 0.2) if jittered else (0.0, 0.0))


@pytest.mark.parametrize("name", RUN_OF_PRESET)
def test_a_stage_has_the_published_tokens_and_length(name: str) -> None:
    published = next(run for run in RUNS if run.name == RUN_OF_PRESET[name])
    for number, (stage, wanted) in enumerate(zip(stages(name), published.stages, strict=True)):
        assert stage.model == published.model
        assert (stage.tokens, stage.text_tokens) == (wanted.tokens, wanted.text_tokens)
        assert stage.geometry.image_size == wanted.image_size
        # A table of 12.8 and 512 million stands for 12.81 and 524.
        assert stage.total_steps * stage.batch_size == pytest.approx(wanted.samples, rel=0.03)
        masked = number and stage.model in ("ViT-L-14", "ViT-H-14", "ViT-bigG-14")
        assert stage.image_reduction == ("random" if masked else "resize")
        # Captions that are fine-tuned on are whole, or the first of them.
        first_syntax = name != "clipa-b16-i49"
        assert stage.text_reduction == ("syntax" if first_syntax and not number else "truncate")


@pytest.mark.parametrize("name", RECIPES)
def test_it_opens_with_command_hardware_accuracy_and_hours(name: str) -> None:
    lines = (PRESETS / f"{name}.toml").read_text().splitlines()
    first_value = next(number for number, line in enumerate(lines) if not line.startswith("# "))
    command, head = lines[0], " ".join(line[2:] for line in lines[:first_value])
    assert re.match(
        rf"# torchrun (--nnodes N )?--nproc-per-node 8 train\.py --preset training/presets/{name}\.toml ", command
    )
    assert re.search(r"Hardware: \d+ A100-80GB", head)
    assert "Not run here." in head
    if name not in RUN_OF_PRESET:
        assert "no hours were published" in head
        return
    published = next(run for run in RUNS if run.name == RUN_OF_PRESET[name])
    assert f"{published.imagenet_top1} %" in head
    assert f"{published.a100_hours:,.0f}" in head
    assert ("estimates" in head) == published.estimated
