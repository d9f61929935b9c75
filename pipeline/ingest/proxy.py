"""A forward proxy that stands in front of a downloader of unknown URLs and lets through what is safe and small enough.

    python -m pipeline.ingest.proxy --port 0 --log refused.jsonl

prints `listening on 127.0.0.1:PORT`, and ends when its stdin closes or by SIGTERM with one JSON line of totals.
`environment(port)` is what a program needs that honours the usual variables, as urllib does.

It looks names up itself and connects to the public address that it judged; bounds bytes, time and connections; and
answers what it refuses by a status with the reason (`403 private address`, `413 too large`, `504 too slow`), which the
downloader records. A body that grows too large or too slow once it is under way ends in a reset. Redirects go back to
the client, whose next request is judged like any other. https is a tunnel (CONNECT, port 443): its address, bytes and
time are bounded, what is said inside is not seen.
"""

import argparse
import asyncio
import contextlib
import errno
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from .addresses import Lookup, Resolver, lookup
from .bounds import Limits, Turns
from .exchange import RELAYED, Exchange

_ACCEPTED_AT_ONCE = 64
_LOGGED_CHARACTERS = 2000


def environment(port: int) -> dict[str, str]:
    """Returns the variables that send all of a program's web requests through the proxy, whatever was set before."""
    proxy = f"http://127.0.0.1:{port}"
    variables = {f"{scheme}_proxy": proxy for scheme in ("http", "https", "ftp", "all")} | {"no_proxy": ""}
    return variables | {name.upper(): value for name, value in variables.items()}


class Proxy:
    """Accepts on a loopback port and counts how each request ended. Runs in the event loop that `start` finds."""

    def __init__(
        self, limits: Limits, connections: int = 512, log: TextIO | None = None, lookup: Lookup = lookup
    ) -> None:
        if connections < 1:
            raise ValueError(f"connections = {connections}; give 1 or more")
        self.limits = limits
        self.reasons: Counter[str] = Counter()
        """How requests ended: "relayed", or why not."""
        self.body_bytes = 0
        self.port = 0
        self._connections = connections
        self._log = log
        self._resolver = Resolver(limits.allow_loopback, lookup)
        self._turns = Turns(limits.per_host)
        self._exchanges: set[Exchange] = set()
        self._is_accepting = False
        self._is_stopping = False
        self._started_s = time.monotonic()

    @property
    def num_open(self) -> int:
        """Connections of clients."""
        return len(self._exchanges)

    def start(self, port: int = 0) -> None:
        """Listens. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("127.0.0.1", port))
            self._socket.listen(4096)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        self._resume()
        self._checking = asyncio.create_task(self._check())

    async def stop(self) -> None:
        """Ends what is under way."""
        self._is_stopping = True
        self._checking.cancel()
        self._pause()
        self._socket.close()
        for exchange in list(self._exchanges):
            exchange.abort()
        self._resolver.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._checking
        self._write(json.dumps(self.totals()) + "\n")
        self._write(None)

    def totals(self) -> dict[str, Any]:
        return {
            "totals": dict(self.reasons.most_common()),
            "requests": self.reasons.total(),
            "bytes": self.body_bytes,
            "seconds": round(time.monotonic() - self._started_s, 3),
            "cpu_seconds": round(time.process_time(), 3),
        }

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            # What is above the limit waits in the system's queue.
            if len(self._exchanges) >= self._connections:
                self._pause()
                return
            try:
                client, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._pause()
                return
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._exchanges.add(
                Exchange(self._loop, self.limits, self._resolver, self._turns, client, self._exchange_ended)
            )

    def _pause(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._is_accepting = False

    def _resume(self) -> None:
        self._loop.add_reader(self._socket.fileno(), self._accept)
        self._is_accepting = True

    def _exchange_ended(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)
        self.reasons[exchange.reason] += 1
        self.body_bytes += exchange.body_bytes
        if exchange.reason != RELAYED:
            name = "host" if exchange.is_tunnel else "url"
            seconds = round(self._loop.time() - exchange.started_s, 3)
            target = exchange.target[:_LOGGED_CHARACTERS]
            line = {name: target, "reason": exchange.reason, "bytes": exchange.body_bytes, "seconds": seconds}
            self._write(json.dumps(line) + "\n")
        if not self._is_accepting and not self._is_stopping:
            self._resume()

    async def _check(self) -> None:
        """One clock for all: timers of their own would cost each request."""
        period_s = min(0.25, self.limits.timeout_s / 4, self.limits.deadline_s / 4)
        while True:
            await asyncio.sleep(period_s)
            now_s = self._loop.time()
            for exchange in list(self._exchanges):
                exchange.check(now_s)
            # Where it was other programs that had used up the system's sockets.
            if not self._is_accepting and len(self._exchanges) < self._connections:
                self._resume()
            self._write(None)

    def _write(self, line: str | None) -> None:
        """Adds a line to the log; None writes to the disk what there is."""
        if self._log is None:
            return
        try:
            if line is None:
                self._log.flush()
            else:
                self._log.write(line)
        except OSError as error:
            # A full disk is no reason to let requests hang.
            print(f"the log of refused requests ends here: {error.strerror}", file=sys.stderr)
            self._log = None


async def _serve(proxy: Proxy, port: int) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    proxy.start(port)

    def watch() -> None:
        # Not a reader of the loop: stdin may be a file.
        while os.read(0, 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, daemon=True).start()
    print(f"listening on 127.0.0.1:{proxy.port}", flush=True)
    await stop.wait()
    await proxy.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="a proxy for unknown URLs, on loopback", allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--allow-loopback", action="store_true", help="let requests reach this machine's loopback")
    parser.add_argument("--max-bytes", type=int, default=Limits.max_bytes, help="of a body")
    parser.add_argument("--deadline", type=float, default=Limits.deadline_s, help="seconds for all of a request")
    parser.add_argument("--timeout", type=float, default=Limits.timeout_s, help="seconds without a byte")
    parser.add_argument("--per-host", type=int, default=Limits.per_host, help="connections to a host; 0: any number")
    parser.add_argument("--connections", type=int, default=512, help="clients served at once; others wait")
    parser.add_argument("--log", type=Path, help="JSON lines of what was refused or failed are added to this file")
    given = parser.parse_args()
    # Two sockets a client.
    wanted, (soft, hard) = 2 * given.connections + 128, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        limits = Limits(
            given.max_bytes, given.deadline, given.timeout, given.per_host, allow_loopback=given.allow_loopback
        )
        log = given.log.open("a", encoding="utf-8") if given.log else None
        proxy = Proxy(limits, given.connections, log)
        asyncio.run(_serve(proxy, given.port))
    except (OSError, ValueError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(proxy.totals()), flush=True)
    # Threads may still wait for dead name servers, and Python would wait for them.
    os._exit(0)


if __name__ == "__main__":
    main()
