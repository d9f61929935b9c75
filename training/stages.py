"""A run folder in, the folder that holds its weights out: of a run with stages, that of the last finished one."""

import json
from pathlib import Path
from typing import Any

from . import checkpoint


def weights_folder(run: Path) -> tuple[Path, str | None]:
    """Returns the folder that holds a run's config.json and checkpoints, and what to tell the user of the choice.

    Of stages it is the last that is finished, else the last that has a checkpoint; where there are none, `run` itself.
    """
    if (run / "config.json").exists():
        return run, None
    stages = _in_order({path.parent.name: _recorded(path) for path in run.glob("*/config.json")})
    begun = [name for name in stages if checkpoint.list_steps(run / name)]
    if not begun:
        return run, None
    finished = [name for name in begun if _is_finished(run / name)]
    last = (finished or begun)[-1]
    state = "the last finished one" if finished else "none is finished"
    return run / last, f"{run} holds the stages {', '.join(stages)}: this is {last}, {state}"


def _in_order(stages: dict[str, dict[str, Any]]) -> list[str]:
    """Returns names of stages, each after the one whose weights it starts from."""

    def before(name: str) -> list[str]:
        seen = [name]
        while (start := Path(str(stages[seen[-1]].get("init"))).name) in stages and start not in seen:
            seen.append(start)
        return seen[::-1]

    return sorted(stages, key=lambda name: (len(before(name)), name))


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _is_finished(run: Path) -> bool:
    steps = _recorded(run / "config.json").get("steps")
    return isinstance(steps, int) and checkpoint.step_of(checkpoint.list_steps(run)[-1]) >= steps
