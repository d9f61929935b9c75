"""A peer to compare with: a process of another environment that answers in lines of JSON, idle between its turns."""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PEERS_PYTHON = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"


class Skipped(Exception):
    """A contender that this machine does not have, or that died; says why, in one line."""


class PeerProcess:
    """A question, one JSON value a line, goes in; an answer comes out. It ends when its input does."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """environment: of the process; None for that of this one."""
        # Not a pipe, which nobody would empty while it runs: once full, it would stop the peer.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with the peer
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, env=environment
        )

    def ask(self, question: object) -> dict[str, Any]:
        """Returns the answer to a question. Raises Skipped, with the peer's last words, where none comes."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died: its answer, which does not come, says why
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Returns what the peer says next. Raises Skipped, with its last words, where it says nothing."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
        # Nothing, or the half line that a peer which was killed leaves.
        self._process.communicate()
        self._errors.seek(0)
        words = self._errors.read().split("\n")
        last = next((word.strip() for word in reversed(words) if word.strip()), "it said nothing")
        self._errors.close()
        raise Skipped(f"{last} (exit status {self._process.returncode})")

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()
