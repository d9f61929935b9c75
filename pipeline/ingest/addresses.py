"""A host's name in, the public addresses behind it out: what a list of URLs may make this machine connect to.

The address that was judged is the one to connect to. A name that is looked up a second time may answer otherwise.
"""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_EMBEDDING = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "::/96",  # IPv4-compatible
        "::ffff:0:0/96",  # IPv4-mapped
        "::ffff:0:0:0/96",  # IPv4-translated
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64 of a local network
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
    )
)
"""An IPv4 address, which may be private, in the clothes of a public IPv6 address."""

_KEPT_S = 60.0
_KEPT_NAMES = 100_000

Lookup = Callable[[str], list[str]]


def is_allowed(address: str, allow_loopback: bool = False) -> bool:
    """Whether an IP address is one host on the public internet; or, where that is allowed, this machine's loopback.

    Private, link-local (a cloud's metadata), shared (carriers), multicast, reserved and documentation addresses are
    not, nor IPv6 addresses that carry an IPv4 address. Text that is no address raises ValueError.
    """
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback:
        return allow_loopback
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed.is_site_local or any(parsed in network for network in _EMBEDDING)
    ):
        return False
    special = parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified or parsed.is_link_local
    return parsed.is_global and not special


def is_web_port(port: int, is_tunnel: bool, allow_loopback: bool = False) -> bool:
    """Whether a port is one of the web's: to ports of mail and the like, even a GET may be a command."""
    if is_tunnel:
        return port == 443 or (allow_loopback and port >= 1024)
    return port == 80 or port >= 1024


def lookup(host: str) -> list[str]:
    """Returns a host's addresses in the system's order; the odd spellings of IPv4 (0x7f.1) are read as it reads them.

    Raises OSError or UnicodeError where there are none.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Resolver:
    """Looks names up in threads of its own, and remembers for a minute what was found: allowed addresses only."""

    def __init__(self, allow_loopback: bool, lookup: Lookup = lookup, threads: int = 64) -> None:
        self._allow_loopback = allow_loopback
        self._lookup = lookup
        # The loop's own pool is a few threads, which as many dead name servers would fill.
        self._pool = ThreadPoolExecutor(threads, "lookup")
        self._known: dict[str, tuple[float, asyncio.Future[list[str]]]] = {}

    def addresses(self, host: str) -> "asyncio.Future[list[str]]":
        """Returns a future of a host's allowed addresses, none where it has only others. Fails as the lookup does."""
        now = time.monotonic()
        known = self._known.get(host)
        if known and known[0] > now:
            return known[1]
        loop = asyncio.get_running_loop()
        found = loop.run_in_executor(self._pool, self._allowed, host)
        found.add_done_callback(_seen)
        if len(self._known) >= _KEPT_NAMES:
            del self._known[next(iter(self._known))]
        self._known.pop(host, None)
        self._known[host] = (now + _KEPT_S, found)
        return found

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _allowed(self, host: str) -> list[str]:
        # A scope (fe80::1%eth0) only ever belongs to an address that is not allowed.
        return [address for address in self._lookup(host) if is_allowed(address, self._allow_loopback)]


def _seen(future: "asyncio.Future[list[str]]") -> None:
    """A lookup that failed after all who asked had gone is no error of the loop's."""
    if not future.cancelled():
        future.exception()
