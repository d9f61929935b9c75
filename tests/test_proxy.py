import asyncio
import contextlib
import datetime
import io
import ipaddress
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually
from hypothesis import given
from hypothesis import strategies as st
from trouble_server import Connection, Row, Web, answer, drip, picture, serving

from pipeline.ingest import addresses
from pipeline.ingest.addresses import is_allowed, lookup
from pipeline.ingest.bounds import Limits, Turns
from pipeline.ingest.messages import Refused, read_request, read_response
from pipeline.ingest.proxy import Proxy, environment

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def web() -> Generator[Web]:
    with serving(pictures=40) as web:
        yield web


PATIENCE_S = 60.0
"""For a machine that does much else. A test of a time gives its own, a short one only to what can never be quick."""


def limits(**changes: Any) -> Limits:
    values: dict[str, Any] = {"deadline_s": PATIENCE_S, "timeout_s": PATIENCE_S, "allow_loopback": True}
    return Limits(**({"max_bytes": 1_000_000} | values | changes))


@contextlib.contextmanager
def running(limits: Limits, **options: Any) -> Generator[Proxy]:
    """A proxy in a thread of its own."""
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    proxies: list[Proxy] = []

    async def main() -> None:
        proxies.append(Proxy(limits, **options))
        proxies[0].start()
        ready.set()
        await stop.wait()
        await proxies[0].stop()

    def run() -> None:
        loop.run_until_complete(main())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(PATIENCE_S)
    try:
        yield proxies[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def fetch(port: int, url: str | None) -> bytes:
    """What urllib gets, as a downloader asks it."""
    proxy = f"http://127.0.0.1:{port}"
    proxies: dict[str, str] = {"http": proxy, "https": proxy, "ftp": proxy}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    request = urllib.request.Request(url)  # pyright: ignore[reportArgumentType]
    with opener.open(request, timeout=2 * PATIENCE_S) as response:
        return response.read()


def failure(port: int, url: str) -> str:
    with pytest.raises(OSError, match=r".") as error:
        fetch(port, url)
    if isinstance(error.value, urllib.error.HTTPError):
        error.value.close()
    return str(error.value)


def send(port: int, data: bytes) -> bytes:
    """All that the proxy answers to some bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(data)
        return b"".join(iter(lambda: client.recv(65536), b""))


def wait_until(holds: Callable[[], bool]) -> None:
    assert eventually(holds)


# Addresses


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "172.16.5.5", "192.168.0.1", "127.0.0.1", "127.9.9.9", "::1", "169.254.169.254", "fe80::1", "fd00::1",
     "0.0.0.0", "::", "100.64.0.1", "224.0.0.1", "239.1.1.1", "ff02::1", "ff0e::1", "240.0.0.1", "255.255.255.255",
     "192.0.2.1", "198.51.100.7", "198.18.0.1", "2001:db8::1", "fec0::1", "::ffff:10.0.0.1", "::ffff:8.8.8.8",
     "::ffff:127.0.0.1", "::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:1::1",
     "fd00:ec2::254"],
)  # fmt: skip
def test_what_is_not_public_is_not_allowed(address: str) -> None:
    assert not is_allowed(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "185.199.108.153", "2606:4700:4700::1111", "2a00:1450::1"])
def test_what_is_public_is_allowed(address: str) -> None:
    assert is_allowed(address)
    assert is_allowed(address, allow_loopback=True)


@given(st.ip_addresses(v=4))
def test_no_private_address_passes_in_another_form(address: ipaddress.IPv4Address) -> None:
    assert is_allowed(str(address)) == (address.is_global and not address.is_multicast and not address.is_reserved)
    number = int(address)
    for prefix in ("::", "::ffff:0:0", "64:ff9b::", "::ffff:0:0:0"):
        assert not is_allowed(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + number)))
    assert not is_allowed(str(ipaddress.IPv6Address((0x2002 << 112) + (number << 80) + 1)))


def test_loopback_is_allowed_where_it_is_asked_for_and_nothing_else_is() -> None:
    assert is_allowed("127.0.0.1", allow_loopback=True)
    assert is_allowed("::1", allow_loopback=True)
    for address in ("10.0.0.1", "0.0.0.0", "169.254.169.254", "::ffff:127.0.0.1"):
        assert not is_allowed(address, allow_loopback=True)


def names(**table: list[str]) -> tuple[Callable[[str], list[str]], list[str]]:
    """A lookup that knows these names, and what it was asked. Each of a name's answers is given once, then the last."""
    asked: list[str] = []

    def look(host: str) -> list[str]:
        asked.append(host)
        if host not in table:
            raise OSError("unknown")
        found = table[host]
        return (found.pop(0) if len(found) > 1 else found[0]).split()

    return look, asked


def test_the_address_that_was_judged_is_the_one_connected_to(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    port = web.url.rpartition(":")[2]
    look, asked = names(rebinding=["127.0.0.1", "10.0.0.1"], mixed=["10.0.0.1 169.254.169.254 127.0.0.1"],
                        inside=["10.0.0.1 fd00::1"], dead=["::1 127.0.0.1"])  # fmt: skip
    with running(limits(), lookup=look) as proxy:
        for _ in range(3):
            assert fetch(proxy.port, f"http://rebinding:{port}/pictures/1.jpg") == picture(1)
        assert asked == ["rebinding"]
        monkeypatch.setattr(addresses, "_KEPT_S", -1.0)
        assert fetch(proxy.port, f"http://dead:{port}/pictures/1.jpg") == picture(1)  # on to the next address
        assert fetch(proxy.port, f"http://mixed:{port}/pictures/1.jpg") == picture(1)
        assert "403: private address" in failure(proxy.port, f"http://inside:{port}/pictures/1.jpg")
        assert "502: name not found" in failure(proxy.port, f"http://nobody:{port}/")
    with running(limits(), lookup=look) as proxy:
        assert "403: private address" in failure(proxy.port, f"http://rebinding:{port}/pictures/1.jpg")


def test_loopback_is_refused_by_default(web: Web) -> None:
    with running(limits(allow_loopback=False)) as proxy:
        web.requests.clear()
        for url in (web.url, web.url.replace("127.0.0.1", "localhost"), web.url.replace("127.0.0.1", "2130706433")):
            assert "403: private address" in failure(proxy.port, f"{url}/pictures/1.jpg")
        assert web.requests == []


def test_a_public_address_of_this_machine_is_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_public(address: str, allow_loopback: bool) -> bool:
        return True

    monkeypatch.setattr(addresses, "is_allowed", all_public)
    web.requests.clear()
    with running(limits(allow_loopback=False)) as proxy:
        assert "403: private address" in failure(proxy.port, f"{web.url}/pictures/1.jpg")
    assert web.requests == []


def test_odd_spellings_of_addresses_are_read_by_the_system() -> None:
    assert set(lookup("0x7f.1")) == set(lookup("2130706433")) == {"127.0.0.1"}
    with pytest.raises(OSError, match=r"."):
        lookup("nobody.invalid")


# Heads


def test_a_request_goes_on_without_what_was_meant_for_the_proxy() -> None:
    head = (
        b"GET http://me:secret@Example.org:8080?x=1#part HTTP/1.1\r\nHost: other\r\nUser-Agent: u\r\n"
        b"Proxy-Authorization: Basic x\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\nContent-Length: 5\r\n"
        b"Accept: a\r\n\r\n"
    )
    request = read_request(head)
    assert (request.host, request.port, request.is_tunnel, request.is_head) == ("example.org", 8080, False, False)
    lines = (b"GET /?x=1 HTTP/1.1", b"Host: Example.org:8080", b"User-Agent: u", b"Accept: a", b"Connection: close")
    assert request.head == b"\r\n".join((*lines, b"", b""))
    tunnel = read_request(b"CONNECT [2606:4700::1]:443 HTTP/1.1\r\n\r\n")
    assert (tunnel.host, tunnel.port, tunnel.is_tunnel) == ("2606:4700::1", 443, True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"GET /a.jpg HTTP/1.1", "bad request"),
        (b"GET http://h/a b HTTP/1.1", "bad request"),
        (b"GET http://h/ HTTP/2.0", "bad request"),
        (b"\x16\x03\x01\x02", "bad request"),
        (b"GET http:///a HTTP/1.1", "bad host"),
        (b"GET http://h\\@10.0.0.1/ HTTP/1.1", "bad request"),
        (b"GET http://h%00.org/ HTTP/1.1", "bad host"),
        (b"GET http://[::1%25lo]/ HTTP/1.1", "bad host"),
        (b"GET http://h:99999/ HTTP/1.1", "port not allowed"),
        (b"GET http://h:0/ HTTP/1.1", "port not allowed"),
        (b"GET ftp://h/a HTTP/1.1", "scheme not allowed"),
        (b"GET file:///etc/passwd HTTP/1.1", "scheme not allowed"),
        (b"POST http://h/ HTTP/1.1", "method not allowed"),
        (b"CONNECT h:x HTTP/1.1", "bad host"),
    ],
)
def test_a_request_that_is_not_plain_is_refused(line: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=f"^{reason}$"):
        read_request(line + b"\r\n\r\n")


def test_an_answer_has_one_length() -> None:
    def read(*lines: bytes, is_head: bool = False) -> Any:
        return read_response(b"\r\n".join((b"HTTP/1.1 200 OK", *lines, b"", b"")), is_head)

    assert read(b"Content-Length: 7", b"content-length: 7").body_bytes == 7
    both = read(b"Content-Length: 7", b"Transfer-Encoding: Chunked", b"Keep-Alive: 5")
    assert (both.body_bytes, both.is_chunked) == (None, True)
    assert both.head == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert read().body_bytes is None
    assert read(b"Content-Length: 7", is_head=True).body_bytes == 0
    for lines in ((b"Content-Length: 7", b"Content-Length: 8"), (b"Content-Length: -1",), (b"Content-Length: 0x7",)):
        with pytest.raises(Refused, match="bad length"):
            read(*lines)
    with pytest.raises(Refused, match="unknown coding"):
        read(b"Transfer-Encoding: gzip, chunked")
    assert read_response(b"HTTP/1.1 103 Early Hints\r\n\r\n", False) is None
    # An opt-out is not lost with an old server's way to write it.
    old = read_response(b"HTTP/1.0 200\nX-Robots-Tag: all,\n  noai\nno field\n\n", False)
    assert old is not None
    assert old.head == b"HTTP/1.0 200\r\nX-Robots-Tag: all, noai\r\nConnection: close\r\n\r\n"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    for start in (b"", b"GET http://", b"HTTP/1.1 200 OK\r\n"):
        head = start + data + b"\r\n\r\n"
        with contextlib.suppress(Refused):
            read_request(head)
        with contextlib.suppress(Refused):
            read_response(head, False)


# The whole, through real sockets


def test_each_trouble_ends_as_it_should(web: Web) -> None:
    web.reset()
    log = io.StringIO()

    def outcome(row: Row) -> str:
        try:
            return f"{len(fetch(proxy.port, row.url))} bytes"
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            return f"error: {error}"

    # By themselves, what never comes to an end: only that is to meet a deadline.
    endless = [row for row in web.rows() if row.outcome == {"too slow"}]
    others = [row for row in web.rows() if row not in endless]
    for rows, few in ((others, limits()), (endless, limits(deadline_s=2.0, timeout_s=1.0))):
        with running(few, log=log) as proxy, ThreadPoolExecutor(100) as pool:
            for row, found in zip(rows, pool.map(outcome, rows), strict=True):
                expected = rf"error: .*({row.error})" if row.error else r"\d+ bytes"
                assert re.match(expected, found, re.DOTALL), (row.name, found)
            if rows is others:
                # What was there at the second try.
                assert len(fetch(proxy.port, f"{web.url}/trouble/503-once")) > 1000
    told = [json.loads(line) for line in log.getvalue().splitlines()]
    lines, totals = [line for line in told if "reason" in line], [line for line in told if "totals" in line]
    reasons = {line.get("url", line.get("host")).rpartition("/trouble/")[2]: line["reason"] for line in lines}
    assert reasons["drip"] == reasons["drip-of-header"] == reasons["silent"] == "too slow"
    assert reasons["endless"] == reasons["endless-chunks"] == reasons["length-of-10-gb"] == "too large"
    assert reasons["reset"] == reasons["chunks-cut"] == reasons["length-too-long"] == "cut off"
    assert reasons["10.1.2.3:443"] == reasons["http://169.254.169.254/latest/meta-data/"] == "private address"
    assert not {"plain", "404", "chunked", "no-length", "redirect", "204", "empty", "bomb"} & set(reasons)
    assert all(line["bytes"] <= 1_000_000 + 65_536 for line in lines)
    # To the end of their bytes they would take minutes, and an hour.
    assert all(line["seconds"] < 20 for line in lines if line["reason"] == "too slow")
    assert all(sum(total["totals"].values()) == total["requests"] for total in totals)
    assert sum(total["requests"] for total in totals) == sum(t["totals"].get("relayed", 0) for t in totals) + len(lines)


def test_200_at_once_get_what_is_theirs(web: Web) -> None:
    with running(limits()) as proxy, ThreadPoolExecutor(200) as pool:
        numbers = [i for i in range(40) if i % 10 < 8] * 10
        urls = [f"{web.url}/pictures/{i}.jpg" for i in numbers]
        found = list(pool.map(fetch, repeat(proxy.port), urls))
        assert found == [picture(i) for i in numbers]
        wait_until(lambda: proxy.reasons == {"relayed": 320})  # a client has its last byte before it is counted


def test_a_server_hears_the_clients_own_header(web: Web) -> None:
    heard: list[bytes] = []

    async def hear(connection: Connection) -> None:
        heard.append(connection.request)
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n")
        await connection.send(answer(b"heard") + b"and more than was said")

    web.answers["/hear"] = hear
    with running(limits()) as proxy:
        request = urllib.request.Request(f"{web.url}/hear", headers={"User-Agent": "picture-lover"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": f"http://127.0.0.1:{proxy.port}"}))
        with opener.open(request, timeout=PATIENCE_S) as response:
            assert response.read() == b"heard"
        assert b"User-Agent: picture-lover\r\n" in heard[0]
        assert heard[0].startswith(b"GET /hear HTTP/1.1\r\nHost: " + web.url[7:].encode() + b"\r\n")
        head = send(proxy.port, f"HEAD {web.url}/pictures/1.jpg HTTP/1.1\r\n\r\n".encode())
        assert f"Content-Length: {len(picture(1))}".encode() in head
        assert head.endswith(b"\r\n\r\n")
        assert b" 431 header too large" in send(proxy.port, b"GET " + b"x" * 65_600)
        assert send(proxy.port, f"GET {web.url}/pictures/1.jpg HTTP/1.0\r\n\r\n".encode()).endswith(picture(1))


def test_a_client_that_goes_away_costs_nothing_more(web: Web) -> None:
    web.requests.clear()
    with running(limits()) as proxy:
        for path in ("/trouble/drip", "/trouble/silent", "/trouble/endless"):
            with socket.create_connection(("127.0.0.1", proxy.port)) as client:
                client.sendall(f"GET {web.url}{path} HTTP/1.1\r\n\r\n".encode())
                wait_until(lambda path=path: path in web.requests)
                time.sleep(0.1)  # for some of the answer
            wait_until(lambda: proxy.num_open == 0)
        wait_until(lambda: proxy.reasons.total() == 3)
        assert set(proxy.reasons) <= {"client left", "too large"}


def test_a_client_that_says_nothing_or_reads_nothing_is_let_go(web: Web) -> None:
    with running(limits(timeout_s=1.0, max_bytes=10**9)) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as deaf:
            deaf.sendall(f"GET {web.url}/trouble/endless HTTP/1.1\r\n\r\n".encode())
            with socket.create_connection(("127.0.0.1", proxy.port)):
                wait_until(lambda: proxy.reasons.total() == 2)
        assert proxy.reasons == {"client left": 1, "too slow": 1}


def crowd(web: Web, most: int) -> list[int]:
    """Adds /crowd, which lets nobody go before `most` are in it, then takes a moment in which one too many would come;
    returns how many were in it each time that one came."""
    inside, seen, full = [0], list[int](), asyncio.Event()

    async def come(connection: Connection) -> None:
        inside[0] += 1
        seen.append(inside[0])
        if inside[0] == most:
            full.set()
        await full.wait()
        await asyncio.sleep(0.05)
        inside[0] -= 1
        await connection.send(answer(b"come"))

    web.answers["/crowd"] = come
    return seen


def test_a_host_is_not_crowded(web: Web) -> None:
    seen = crowd(web, 3)
    with running(limits(per_host=3)) as proxy, ThreadPoolExecutor(20) as pool:
        assert set(pool.map(fetch, [proxy.port] * 30, repeat(f"{web.url}/crowd"))) == {b"come"}
        assert max(seen) == 3
    web.answers["/hold"] = drip(bytes(10_000), 0.02, b"HTTP/1.1 200 OK\r\n\r\n")
    web.requests.clear()
    with running(limits(per_host=1, timeout_s=1.0)) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(f"GET {web.url}/hold HTTP/1.1\r\n\r\n".encode())
            wait_until(lambda: "/hold" in web.requests)
            assert "503: host busy" in failure(proxy.port, f"{web.url}/crowd")
            # Another name, another line.
            assert fetch(proxy.port, f"{web.url}/crowd".replace("127.0.0.1", "localhost")) == b"come"
        wait_until(lambda: proxy.num_open == 0)
        assert fetch(proxy.port, f"{web.url}/crowd") == b"come"


def test_a_long_line_before_a_host_that_is_refused_is_answered_to_the_last() -> None:
    def slowly(host: str) -> list[str]:
        time.sleep(0.3)
        return ["10.0.0.1"]

    with running(limits(per_host=1), lookup=slowly) as proxy, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port))) for _ in range(400)]
        for client in clients:
            client.sendall(b"GET http://slow/ HTTP/1.1\r\n\r\n")
        assert {client.recv(100)[:28] for client in clients} == {b"HTTP/1.1 403 private address"}


def test_a_full_disk_ends_the_log_and_nothing_else(web: Web, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as log, running(limits(timeout_s=1.0), log=log) as proxy:
        for _ in range(3):
            assert "too slow" in failure(proxy.port, f"{web.url}/trouble/silent")
        assert fetch(proxy.port, f"{web.url}/pictures/1.jpg") == picture(1)
        assert capsys.readouterr().err == "the log of refused requests ends here: No space left on device\n"
        with contextlib.suppress(OSError):
            log.close()


def test_heads_that_announce_others_have_a_limit(web: Web) -> None:
    async def announce(connection: Connection) -> None:
        while True:
            await connection.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)

    web.answers["/announce"] = announce
    with running(limits()) as proxy:
        assert "502: header too large" in failure(proxy.port, f"{web.url}/announce")


def test_clients_above_the_limit_wait(web: Web) -> None:
    seen = crowd(web, 4)
    with running(limits(), connections=4) as proxy, ThreadPoolExecutor(30) as pool:
        assert set(pool.map(fetch, [proxy.port] * 60, repeat(f"{web.url}/crowd"))) == {b"come"}
        assert max(seen) == 4


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=40), st.integers(1, 3))
def test_turns_are_bounded_and_none_is_lost(asked: list[tuple[str, bool]], at_once: int) -> None:
    turns, holding, came = Turns(at_once), list[str](), list[int]()

    def go(number: int) -> bool:
        came.append(number)
        name, wants = asked[number]
        if wants:
            holding.append(name)
            assert holding.count(name) <= at_once
        return wants

    for number, (name, _) in enumerate(asked):
        turns.ask(name, lambda number=number: go(number))
    while holding:
        turns.give_back(holding.pop())
    assert sorted(came) == list(range(len(asked)))


# Tunnels


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[int, ssl.SSLContext]]:
    """(Port of a TLS server on loopback, a context that trusts it). /endless does not end, /silent says nothing."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(client, server_side=True) as secure:
            path = secure.recv(65536).split(b" ")[1]
            if path == b"/silent":
                secure.recv(1)
            secure.sendall(b"HTTP/1.1 200 OK\r\n\r\n" if path == b"/endless" else answer(picture(1)))
            while path == b"/endless":
                secure.sendall(bytes(65536))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield server.getsockname()[1], ssl.create_default_context(cafile=path)
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def through_tunnels(proxy: Proxy, context: ssl.SSLContext) -> urllib.request.OpenerDirector:
    handlers = (
        urllib.request.ProxyHandler({"https": f"http://127.0.0.1:{proxy.port}"}),
        urllib.request.HTTPSHandler(context=context),
    )
    return urllib.request.build_opener(*handlers)


def test_tls_goes_through_a_tunnel_that_has_a_size(tls: tuple[int, ssl.SSLContext]) -> None:
    port, context = tls
    with running(limits()) as proxy:
        opener = through_tunnels(proxy, context)
        with opener.open(f"https://localhost:{port}/picture", timeout=PATIENCE_S) as response:
            assert response.read() == picture(1)
        wait_until(lambda: proxy.reasons == {"relayed": 1})
        with (
            opener.open(f"https://localhost:{port}/endless", timeout=PATIENCE_S) as response,
            pytest.raises(ssl.SSLError, match=r"bad record mac|wrong version"),
        ):
            response.read()  # a mere reset would be the end of the body to it
        wait_until(lambda: proxy.reasons["too large"] == 1)
        wait_until(lambda: 1_000_000 < proxy.body_bytes < 1_300_000)
        # To send much up is no way to ask for a picture.
        with (
            socket.create_server(("127.0.0.1", 0)) as sink,
            socket.create_connection(("127.0.0.1", proxy.port)) as client,
        ):
            client.sendall(f"CONNECT 127.0.0.1:{sink.getsockname()[1]} HTTP/1.1\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
            client.sendall(bytes(65_536))
            time.sleep(0.1)
            assert proxy.reasons.total() == 2
            client.sendall(b"0")
            wait_until(lambda: proxy.reasons.total() == 3)
        assert proxy.reasons["too large"] == 2


def test_tls_goes_through_a_tunnel_that_has_a_time(tls: tuple[int, ssl.SSLContext]) -> None:
    port, context = tls
    with running(limits(timeout_s=2.0)) as proxy:
        with pytest.raises(OSError, match=r"."):
            through_tunnels(proxy, context).open(f"https://localhost:{port}/silent", timeout=PATIENCE_S)
        wait_until(lambda: proxy.reasons == {"too slow": 1})
        # A client that does not read hears of it when it does.
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(f"CONNECT localhost:{port} HTTP/1.1\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
            secure = context.wrap_socket(client, server_hostname="localhost")
            secure.sendall(b"GET /endless HTTP/1.1\r\n\r\n")
            time.sleep(2.5)
            with secure, pytest.raises(ssl.SSLError, match=r"bad record mac|wrong version"):
                b"".join(iter(lambda: secure.recv(65536), b""))
        wait_until(lambda: proxy.reasons.total() == 2)


def test_tunnels_lead_to_https_only() -> None:
    with running(limits(allow_loopback=False)) as proxy:
        for host, reason in (("8.8.8.8:22", "port not allowed"), ("8.8.8.8:80", "port not allowed"),
                             ("10.0.0.1:443", "private address"), ("[::1]:443", "private address"),
                             ("169.254.169.254:443", "private address"),
                             ("localhost:443", "private address")):  # fmt: skip
            assert send(proxy.port, f"CONNECT {host} HTTP/1.1\r\n\r\n".encode()).startswith(
                f"HTTP/1.1 403 {reason}\r\n".encode()
            )


# The program


@contextlib.contextmanager
def program(*arguments: str) -> Generator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "pipeline.ingest.proxy", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:")
        try:
            yield process, int(line.rpartition(":")[2])
        finally:
            process.kill()


def peak_kib(pid: int) -> int:
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


def test_memory_does_not_grow_with_a_body(web: Web) -> None:
    arguments = ("--allow-loopback", "--max-bytes", "2000000000", "--deadline", "1000", "--per-host", "0")
    with program(*arguments) as (process, port):
        assert fetch(port, f"{web.url}/pictures/1.jpg") == picture(1)
        before = peak_kib(process.pid)
        buffer, received = bytearray(1 << 20), 0
        with socket.create_connection(("127.0.0.1", port)) as client, contextlib.ExitStack() as idle:
            for _ in range(20):  # who ask and do not read
                other = idle.enter_context(socket.create_connection(("127.0.0.1", port)))
                other.sendall(f"GET {web.url}/trouble/endless HTTP/1.1\r\n\r\n".encode())
            client.sendall(f"GET {web.url}/trouble/endless-chunks HTTP/1.1\r\n\r\n".encode())
            while received < 1 << 30:
                length = client.recv_into(buffer)
                assert length > 0
                received += length
        assert peak_kib(process.pid) - before < 10 << 10


def test_it_ends_by_a_signal_or_with_its_parent_and_tells_its_totals(web: Web, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for end in ("signal", "stdin"):
        web.requests.clear()
        with program("--allow-loopback", "--log", str(log)) as (process, port):
            # A program that honours the usual variables, with others set that would lead it round the proxy.
            code = (
                "import sys, urllib.request as u\n"
                "for url in sys.argv[1:]:\n"
                "    try: print(len(u.urlopen(url, timeout=60).read()))\n"
                "    except OSError as error: print(error)\n"
            )
            urls = (f"{web.url}/pictures/1.jpg", "http://10.0.0.1/", "https://10.0.0.1/", "ftp://10.0.0.1/a")
            done = subprocess.run(
                [sys.executable, "-c", code, *urls],
                env=os.environ | {"no_proxy": "*", "NO_PROXY": "127.0.0.1"} | environment(port),
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert done.stdout.splitlines() == [
                str(len(picture(1))),
                "HTTP Error 403: private address",
                "<urlopen error Tunnel connection failed: 403 private address>",
                "HTTP Error 403: scheme not allowed",
            ]
            # One that never ends does not keep it.
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(f"GET {web.url}/trouble/silent HTTP/1.1\r\n\r\n".encode())
                wait_until(lambda: "/trouble/silent" in web.requests)
                assert process.stdin is not None
                assert process.stdout is not None
                if end == "signal":
                    process.send_signal(signal.SIGTERM)
                else:
                    process.stdin.close()
                totals = json.loads(process.stdout.read())
                assert process.wait(PATIENCE_S) == 0
            assert totals["totals"] == {"relayed": 1, "private address": 2, "scheme not allowed": 1, "proxy ended": 1}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 2 * 5
    assert [set(line) for line in lines[:3]] == [{"url", "reason", "bytes", "seconds"}, {"host", "reason", "bytes",
                                                 "seconds"}, {"url", "reason", "bytes", "seconds"}]  # fmt: skip
    assert lines[4]["totals"] == lines[9]["totals"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--deadline", "0"), "error: deadline_s = 0.0; give a number above 0"),
        (("--connections", "0"), "error: connections = 0; give 1 or more"),
        (("--per-host", "-1"), "error: per_host = -1; give 0 (any number) or more"),
        (("--log", "/nowhere/log.jsonl"), "error: [Errno 2] No such file or directory: '/nowhere/log.jsonl'"),
        (("--port", "99999"), "error: bind(): port must be 0-65535."),
    ],
)
def test_bad_values_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-m", "pipeline.ingest.proxy", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")
