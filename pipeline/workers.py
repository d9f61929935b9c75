"""What a spawned worker process does first."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def start_worker() -> None:
    """Makes a worker end with its parent, even one that was killed, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
