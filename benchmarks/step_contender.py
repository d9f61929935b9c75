"""open_clip's training step as a contender of ours: a process of its own environment, idle between its turns."""

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from model.openclip import openclip_config
from model.presets import ModelConfig
from pipeline.tokens import Geometry

from .contenders import PEERS_PYTHON, Skipped
from .step_model import Turn


class OpenClipStep:
    """open_clip's model, loss and optimiser at the sizes and in the dialect of ours; see step_peer.py."""

    def __init__(
        self,
        config: ModelConfig,
        geometry: Geometry,
        batch_size: int,
        text_tokens: int,
        threads: int,
        python: Path = PEERS_PYTHON,
    ) -> None:
        """Raises Skipped where open_clip is missing or cannot start, ValueError for a model that it cannot compute."""
        if not python.exists():
            raise Skipped(f"{python.parents[1]} is missing; `make peers` makes it")
        model_cfg = openclip_config(config, geometry.grid, text_tokens)["model_cfg"]
        # Not a pipe, which nobody would empty while it runs: once full, it would stop the peer.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with the peer
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            # -P: the folder of the script holds modules of ours, which it must not see.
            [str(python), "-P", str(Path(__file__).with_name("step_peer.py"))],
            stdin=pipe,
            stdout=pipe,
            stderr=self._errors,
            text=True,
            # As train.py sets it for itself: threads that wait do not spin, so that CPU time is work.
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        settings = {"model_cfg": model_cfg, "batch_size": batch_size, "tokens": geometry.tokens, "threads": threads}
        try:
            # Which of its architectures this is: ours, as our export describes it to open_clip.
            self.about = {**self._answer(settings), "model_cfg": model_cfg}
        except Skipped:
            self.close()
            raise
        self.square_gflop_per_s: list[float] = []
        """Of a big square product in that process, after each of its turns."""

    def run(self, steps: int) -> Turn:
        answer = self._answer(steps)
        self.square_gflop_per_s.append(answer["gemm_gflop_per_s"])
        return Turn(answer["images"], answer["wall_s"], answer["cpu_s"])

    def close(self) -> None:
        # Its input ends, and so does it.
        self._process.communicate()
        self._errors.close()

    def _answer(self, question: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it died: its answer, which does not come, says why
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # half a line is what a peer that was killed leaves
            self._process.communicate()
            self._errors.seek(0)
            words = self._errors.read().split("\n")
            last = next((word.strip() for word in reversed(words) if word.strip()), "it said nothing")
            raise Skipped(f"{last} (exit status {self._process.returncode})")
        return json.loads(line)
