"""train.py on a disk that is full from a step on, for test_resume_faults.py: `torchrun ... limited_train.py STEP ...`.

From the checkpoint of that step on, no file of this process can grow over 64 kB.
"""

import resource
import signal
import sys
from typing import Any

import train
from training.checkpoint_writer import CheckpointWriter


class Limited(CheckpointWriter):
    """Lowers the limit before the save, and after the one before it, which goes on in the background."""

    def save(self, step: int, *arguments: Any, **more: Any) -> None:
        if step >= int(sys.argv[1]):
            self.close()
            # Without it, the write that passes the limit fails with an error, as on a full disk.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        super().save(step, *arguments, **more)


if __name__ == "__main__":
    train.CheckpointWriter = Limited
    sys.exit(train.main(sys.argv[2:]))
