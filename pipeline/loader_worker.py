"""One worker process of the loader: steps come in by a socket, batches go into slots of a slab, word of them back.

Run by processes.py as `python -m pipeline.loader_worker SOCKET STATE SLAB PARENT` (descriptors, and the parent's id).
It ends at once when its parent closes the socket or dies in any way, and by nothing else: signals that a terminal or
a scheduler sends to all processes of a run are for the parent to answer.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

_LOOK_S = 1.0
"""How often to look whether the parent is there; the socket tells sooner unless a fork of the parent holds it too."""
_IDLE_S = 1.0
"""Without work for so long, files of the cache are let go, so that other workers can evict them."""


def main(descriptors: list[int], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Where memory is short, a worker goes before the training: it can be replaced.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    socket, state, slab = descriptors
    connection = Connection(socket)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # Before the imports below, which take seconds, and beside every batch: whoever listens always knows of an end.
    # It also empties the socket, so that the parent never waits to be heard while this process waits for it.
    threading.Thread(target=_listen, args=(connection, messages, parent), daemon=True).start()
    # What it cannot tell a parent that is gone is no error; the listener ends this process meanwhile.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _work(connection, messages, state, slab)


def _listen(connection: Connection, messages: "queue.SimpleQueue[bytes]", parent: int) -> None:
    try:
        while True:
            if connection.poll(_LOOK_S):
                messages.put(connection.recv_bytes())
            elif os.getppid() != parent:
                break
    except (EOFError, OSError):
        pass
    os._exit(0)


def _work(connection: Connection, messages: "queue.SimpleQueue[bytes]", state: int, slab: int) -> None:
    import torch

    from .batch_maker import BatchMaker

    torch.set_num_threads(1)
    try:
        maker = BatchMaker(state, slab)
    except Exception as error:
        connection.send_bytes(BatchMaker.failure(error))
        return
    while True:
        try:
            message = messages.get(timeout=_IDLE_S)
        except queue.Empty:
            maker.idle()
            continue
        connection.send_bytes(maker.answer(message))


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:4]], int(sys.argv[4]))
