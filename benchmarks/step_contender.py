"""open_clip's training step as a contender of ours: a process of its own environment, idle between its turns."""

import os
from pathlib import Path

from model.openclip_config import openclip_config
from model.presets import ModelConfig
from pipeline.tokens import Geometry

from .peer_process import PEERS_PYTHON, PeerProcess, Skipped
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
        self._peer = PeerProcess(
            # -P: the folder of the script holds modules of ours, which it must not see.
            [str(python), "-P", str(Path(__file__).with_name("step_peer.py"))],
            # As train.py sets it for itself: threads that wait do not spin, so that CPU time is work.
            {**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        settings = {"model_cfg": model_cfg, "batch_size": batch_size, "tokens": geometry.tokens, "threads": threads}
        # Which of its architectures this is: ours, as our export describes it to open_clip.
        self.about = {**self._peer.ask(settings), "model_cfg": model_cfg}
        self.square_gflop_per_s: list[float] = []
        """Of a big square product in that process, after each of its turns."""

    def run(self, steps: int) -> Turn:
        answer = self._peer.ask(steps)
        self.square_gflop_per_s.append(answer["gemm_gflop_per_s"])
        return Turn(answer["images"], answer["wall_s"], answer["cpu_s"])

    def close(self) -> None:
        self._peer.close()
