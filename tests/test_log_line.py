from typing import Any

import pytest

from training.metrics import log_line

VALUES: dict[str, Any] = {
    "step": 250, "samples_seen": 16_000, "loss": 1.23456, "logit_scale": 14.28, "images_per_s": 3200.4,
    "tokens_per_s": 102_412.8, "data_wait_fraction": 0.0123, "memory_gib": 1.26, "mfu": 0.47, "rejected": 0,
    "skipped_steps": 0,
}  # fmt: skip


def test_a_line_says_what_a_step_came_to_and_what_is_left() -> None:
    # 750 steps of 64 pairs at 3,200 a second.
    assert log_line(VALUES, 1000) == (
        "step 250/1000  loss 1.235  scale 14.3  3,200 img/s  102,413 tokens/s  wait 1.2%  mfu 47%  mem 1.3 GiB  eta 15s"
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rejected": 3}, "bad samples 3"),
        ({"skipped_steps": 2}, "skipped steps 2"),
        ({"zero_shot_top1": 0.0397}, "zero-shot 4.0%"),
        ({"images_per_s": 32.0}, "eta 25m"),
        ({"images_per_s": 0.32}, "eta 41.7h"),
    ],
)
def test_what_is_not_always_so_is_said_where_it_is(changed: dict[str, Any], words: str) -> None:
    assert words in log_line(VALUES | changed, 1000)
    assert words not in log_line(VALUES, 1000)


def test_no_mfu_where_the_peak_is_not_known() -> None:
    assert "mfu" not in log_line(VALUES | {"mfu": None}, 1000)
