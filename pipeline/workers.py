"""How worker processes begin and end: Ctrl-C is their parent's to answer, and they end with it, whatever ends it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def ctrl_c_blocked() -> Generator[None]:
    """Blocks Ctrl-C for this thread, and for the processes that it starts meanwhile until they lift it.

    A worker that is still importing would answer it with a traceback.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class WorkerPool(ProcessPoolExecutor):
    """A pool whose workers leave Ctrl-C to this process, and end with it, even when it is killed."""

    def __init__(self, workers: int, initializer: Callable[..., object] | None = None, *arguments: Any) -> None:
        """initializer: called in each worker, with the arguments."""
        # spawn, not fork: the caller may hold threads and locks (a training process does).
        super().__init__(workers, multiprocessing.get_context("spawn"), _start_worker, (initializer, arguments))
        # A process of multiprocessing's own, which would lift the block where its start fell inside.
        resource_tracker.ensure_running()

    def submit(
        self, fn: Callable[Arguments, Result], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Result]:
        """See ProcessPoolExecutor, which starts its processes as work comes."""
        with ctrl_c_blocked():
            return super().submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See ProcessPoolExecutor. cancel_futures: also ends what the workers are doing, without waiting for it."""
        workers = [*(self._processes or {}).values()]
        super().shutdown(wait, cancel_futures=cancel_futures)
        if cancel_futures:
            # Not by Ctrl-C themselves: this process could take their death for a crash before its own signal comes.
            for worker in workers:
                worker.terminate()


def _start_worker(initializer: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
