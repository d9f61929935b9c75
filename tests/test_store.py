import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from conftest import CrowdServer, write_tar
from fsspec.implementations.local import LocalFileSystem

from pipeline import transfer
from pipeline.cache import CacheFull, FileCache
from pipeline.index import Index, open_index
from pipeline.loader import Loader, Settings
from pipeline.order import Order
from pipeline.read import Reader, ReadFailed
from pipeline.store import Limits, Store
from pipeline.tokens import token_geometry

Make = Callable[[int], dict[str, Any]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


quick = partial(Limits, attempts=3, first_wait_s=0.01)


class Faults(http.server.SimpleHTTPRequestHandler):
    """A file server that misbehaves as `faults` says: path -> (fault, how many more times; -1 for ever)."""

    faults: dict[str, tuple[str, int]]
    gets: list[str]
    redirects: dict[str, str]
    dated = True

    def send_head(self) -> Any:
        if self.path not in type(self).redirects:
            return super().send_head()
        self.send_response(302)
        self.send_header("Location", type(self).redirects[self.path])
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send_header(self, keyword: str, value: str) -> None:
        if self.dated or keyword != "Last-Modified":
            super().send_header(keyword, value)

    def do_GET(self) -> None:
        type(self).gets.append(self.path)
        fault, times = type(self).faults.get(self.path, ("", 0))
        if times == 0:
            super().do_GET()
            return
        type(self).faults[self.path] = (fault, times - 1)
        content = Path(self.translate_path(self.path)).read_bytes()
        if fault == "503":
            self.send_error(503, "slow down")
            return
        body = {"short": content[:-1000], "long": content * 3}.get(fault, content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "drops":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "crawls":
            try:
                for i in range(200):
                    self.wfile.write(body[i : i + 1])
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:  # the client has had enough
                self.close_connection = True
        elif fault == "silent":
            time.sleep(3)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, shards: Path) -> Iterator[tuple[str, type[Faults], Path]]:
    """(URL, its handler, its folder) of a server of the six shards."""
    folder = tmp_path / "served"
    shutil.copytree(shards, folder, ignore=shutil.ignore_patterns("*.parquet"))
    handler = type("Handler", (Faults,), {"faults": {}, "gets": [], "redirects": {}})
    server = CrowdServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler, folder
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """An S3 server, and a client of its empty bucket `data`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        made = boto3.resource("s3").create_bucket(Bucket="data")
        yield made
    server.stop()


def upload(bucket: Any, folder: Path, prefix: str) -> None:
    for path in sorted(folder.glob("*.tar")):
        bucket.upload_file(str(path), f"{prefix}/{path.name}")


Contents = list[list[bytes | str]]


def batches(index: Index, steps: int, threads: int = 1) -> list[Contents]:
    """The images and captions of the first batches of 32, read as a loader's threads do."""
    order = Order(index.shard_sizes, batch_size=32, seed=3, lanes=8)
    reader = Reader(index)

    def read(step: int) -> Contents:
        rows = reader.locate(order.slots(step))
        return [reader.images(rows), reader.captions(rows, rows.num_captions - 1)]

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(read, range(steps)))


def test_an_s3_bucket_gives_the_batches_of_the_folder(
    bucket: Any, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(bucket, shards, "set")
    bucket.put_object(Key="set/00000.parquet", Body=b"no shard")
    bucket.put_object(Key="set/deeper/00009.tar", Body=b"not of this folder")
    local = open_index([shards])
    # Room for five of the six: they are evicted and fetched again, and nothing but a line is seen of it.
    limits = quick(cache_bytes=sum(info.shard_bytes for info in local.shards) - 1)
    remote = open_index(["s3://data/set"], limits=limits)
    assert remote.digest == local.digest
    assert [info.path for info in remote.shards] == [f"s3://data/set/{i:05d}.tar" for i in range(6)]
    assert batches(remote, 8, threads=3) == batches(local, 8)
    assert capsys.readouterr().err.count("are fetched again and again; raise SHORTCLIP_CACHE_GB") == 1
    kept = [path.stat().st_size for path in (tmp_path / "cache" / "shortclip" / "shards").glob("*.shard")]
    assert 0 < sum(kept) <= limits.cache_bytes
    assert open_index(["s3://data/set/{00000..00005}.tar"], limits=limits).digest == local.digest


def test_an_s3_shard_that_changes_in_a_run_stops_it_by_name(bucket: Any, shards: Path, tmp_path: Path) -> None:
    upload(bucket, shards, "changing")
    index = open_index(["s3://data/changing"], limits=quick())
    shutil.rmtree(tmp_path / "cache" / "shortclip" / "shards")
    index.store.cache.release()
    # Another shard of the same length, then one of another.
    content = (shards / "00001.tar").read_bytes()
    for body in (bytes(len(content)), content[: len(content) // 1024 * 512]):
        bucket.put_object(Key="changing/00001.tar", Body=body)
        with pytest.raises(ReadFailed, match=r"^s3://data/changing/00001\.tar: changed since it was indexed[^\n]*$"):
            batches(index, 8)
    # Opened again, it is indexed as it is now.
    assert open_index(["s3://data/changing"], limits=quick()).digest != index.digest


def test_what_is_not_in_the_bucket_is_one_line(bucket: Any) -> None:
    for url, message in (
        ("s3://data/nothing", "nothing: not there"),
        ("s3://other/set", "set: not there"),
        ("s3://data/nothing/{00000..00003}.tar", r"nothing/0000\d\.tar: not there"),
    ):
        with pytest.raises(ValueError, match=rf"^--data s3://[^\n]*{message}$"):
            open_index([url], limits=quick())


def test_a_web_server_by_braces_and_by_list(web: tuple[str, type[Faults], Path], shards: Path) -> None:
    url, handler, folder = web
    (folder / "list.txt").write_text(f"# ours\n{{00000..00002}}.tar\n\n/00003.tar\n{url}/00004.tar\n00005.tar\n")
    local = open_index([shards])
    assert open_index([f"{url}/list.txt"], limits=quick()).digest == local.digest
    handler.gets.clear()
    index = open_index([f"{url}/{{00000..00005}}.tar"], limits=quick())
    assert index.digest == local.digest
    assert handler.gets == []  # the shards are in the cache by their own names
    assert batches(index, 4, threads=2) == batches(local, 4)
    # The index is kept too: what is not read is not fetched.
    shutil.rmtree(index.store.limits.cache_folder)
    assert open_index([f"{url}/{{00000..00005}}.tar"], limits=quick()).digest == local.digest
    assert handler.gets == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "HTTP 503"),
        ("drops", "."),
        ("short", r"[\d,]+ bytes came where [\d,]+ are listed"),
        ("long", r"more than the [\d,]+ bytes that are listed"),
        ("crawls", r"[\d,]+ bytes in 1 s"),
        ("silent", r"0 bytes in 1 s"),
    ],
)
def test_a_fault_is_ridden_out_or_stops_the_run(
    web: tuple[str, type[Faults], Path], shards: Path, fault: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url, handler, _ = web
    handler.faults["/00002.tar"] = (fault, 1)
    limits = quick(stall_s=1.0) if fault in ("crawls", "silent") else quick()
    index = open_index([f"{url}/00002.tar"], limits=limits)
    assert index.digest == open_index_of(shards, "00002.tar").digest
    assert f"{url}/00002.tar: " in capsys.readouterr().err
    handler.faults["/00003.tar"] = (fault, -1)
    with pytest.raises(ReadFailed, match=rf"^{url}/00003\.tar: gave up after 3 attempts \({reason}[^\n]*$"):
        open_index([f"{url}/{{00002..00003}}.tar"], limits=limits)
    assert handler.gets.count("/00003.tar") == 3
    cache = index.store.limits.cache_folder
    assert len(list(cache.glob("*.shard"))) == 1
    assert list(cache.glob("*.partial")) == []


def open_index_of(shards: Path, name: str) -> Index:
    folder = shards.parent / f"only-{name}"
    folder.mkdir(exist_ok=True)
    shutil.copy(shards / name, folder)
    return open_index([folder])


def test_a_store_that_goes_away_stops_the_run_and_is_no_bad_sample(
    web: tuple[str, type[Faults], Path], tmp_path: Path
) -> None:
    url, handler, _ = web
    index = open_index([f"{url}/{{00000..00005}}.tar"], limits=quick())
    shutil.rmtree(index.store.limits.cache_folder)
    index.store.cache.release()
    handler.faults |= {f"/{i:05d}.tar": ("503", -1) for i in range(6)}
    with pytest.raises(ReadFailed, match=r"gave up after 3 attempts \(HTTP 503.*run the same command$"):
        batches(index, 1)
    for fetch in index.store.bring(remote_shard(index, shard) for shard in range(6)):
        assert fetch.exception()  # also those that the batch did not wait for
    handler.faults.clear()
    assert all(isinstance(item, bytes) for items in batches(index, 1)[0] for item in items)


def test_what_is_prefetched_is_there(web: tuple[str, type[Faults], Path]) -> None:
    url, handler, _ = web
    index = open_index([f"{url}/{{00000..00005}}.tar"], limits=quick())
    shutil.rmtree(index.store.limits.cache_folder)
    index.store.cache.release()
    handler.gets.clear()
    reader = Reader(index)
    reader.prefetch(np.array([0, 1, 3, 4, 0]))
    rows = reader.locate_ids(index.usable_ids())
    assert all(isinstance(jpeg, bytes) for jpeg in reader.images(rows))
    assert sorted(handler.gets) == [f"/{i:05d}.tar" for i in range(6)]
    # A prefetch that fails is silent: the read that needs the shard says so.
    index.store.cache.release()
    shutil.rmtree(index.store.limits.cache_folder)
    handler.faults["/00002.tar"] = ("503", -1)
    reader.prefetch(np.array([2]))
    with pytest.raises(ReadFailed, match=r"00002\.tar: gave up"):
        reader.images(rows)


def forget(index: Index) -> None:
    """Empties the cache."""
    index.store.cache.release()
    shutil.rmtree(index.store.limits.cache_folder)


def new_loader(index: Index, lanes: int) -> Loader:
    order = Order(index.shard_sizes, batch_size=8, seed=3, lanes=lanes, window_shards=2)
    return Loader(index, order, Settings(token_geometry(16), 8, "turbo", seed=3))


@pytest.mark.parametrize(
    ("lanes", "steps", "room", "warned"),
    [(8, 10, 2, True), (1, 50, 4, False)],
    ids=["a cache below a batch's shards", "a cache below the set"],
)
def test_a_loader_gives_the_batches_of_the_folder_bit_for_bit(
    web: tuple[str, type[Faults], Path],
    shards: Path,
    lanes: int,
    steps: int,
    room: int,
    warned: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, handler, _ = web
    local = open_index([shards])
    cache_bytes = sum(sorted(info.shard_bytes for info in local.shards)[-room:])
    remote = open_index([f"{url}/{{00000..00005}}.tar"], limits=quick(cache_bytes=cache_bytes))
    forget(remote)
    handler.gets.clear()
    found = list(new_loader(remote, lanes).batches(0, steps, threads=2, prefetch=3))
    expected = list(new_loader(local, lanes).batches(0, steps))
    assert len(found) == steps
    for one, other in zip(found, expected, strict=True):
        for name in ("patches", "positions", "caption_ids", "valid", "sample_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.rejected == other.rejected == ()
    assert len(handler.gets) > 6  # some had to go and come again
    errors = capsys.readouterr().err
    assert errors.count("a batch reads from") == warned


def test_a_store_that_stays_away_is_asked_as_often_as_one_read_asks(web: tuple[str, type[Faults], Path]) -> None:
    url, handler, _ = web
    index = open_index([f"{url}/{{00000..00005}}.tar"], limits=quick(first_wait_s=0.3))
    forget(index)
    handler.gets.clear()
    handler.faults |= {f"/{i:05d}.tar": ("503", -1) for i in range(6)}
    with pytest.raises(ReadFailed, match="gave up after 3 attempts"):
        list(new_loader(index, 8).batches(0, 100, threads=2, prefetch=40))
    # Once for the first batch and those ahead of it, once more for what the threads began as it failed, and one spare.
    assert max(handler.gets.count(path) for path in set(handler.gets)) <= 3 * 3
    # One under way is shared; one that failed is begun anew.
    first, again = index.store.bring([remote_shard(index, 0)] * 2)
    assert first is again
    with pytest.raises(ReadFailed):
        first.result()
    handler.faults.clear()
    index.store.bring([remote_shard(index, 0)])[0].result()


def test_a_server_without_dates_is_told_of_once(
    web: tuple[str, type[Faults], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    url, handler, _ = web
    source = f"{url}/{{00000..00001}}.tar"
    open_index([source], limits=quick())
    assert "neither ETag nor date" not in capsys.readouterr().err
    handler.dated = False
    open_index([source, f"{url}/00002.tar"], limits=quick())
    assert capsys.readouterr().err.count("/00000.tar: its server sends neither ETag nor date") == 1


def test_a_public_host_cannot_send_the_reader_to_a_private_one(
    web: tuple[str, type[Faults], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler, _ = web
    port = url.rpartition(":")[2]
    handler.redirects |= {"/own/00000.tar": "/00000.tar", "/away/00000.tar": f"http://127.0.0.2:{port}/00000.tar"}
    # Both are private: a store in one's own network may redirect in it.
    assert len(open_index([f"{url}/own/00000.tar"], limits=quick()).shards) == 1
    with pytest.raises(ReadFailed, match="gave up after 3 attempts"):  # nothing listens there
        open_index([f"{url}/away/00000.tar"], limits=quick())
    monkeypatch.setattr(transfer, "is_allowed", lambda address: address == "127.0.0.1")
    assert len(open_index([f"{url}/own/00000.tar"], limits=quick()).shards) == 1
    with pytest.raises(ReadFailed, match=r"/away/00000.tar: HTTP 403 redirects to 127.0.0.2, a private address$"):
        open_index([f"{url}/away/00000.tar"], limits=quick())


def test_an_address_where_nothing_listens_is_one_line() -> None:
    with pytest.raises(ReadFailed, match=r"^--data http://127\.0\.0\.1:9/0\.tar: gave up after 3 attempts[^\n]*$"):
        open_index(["http://127.0.0.1:9/0.tar"], limits=quick())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("file:///etc", "file: is no store"),
        ("pipe:curl http://host/0.tar", "pipe: is no store"),
        ("memory://shards", "memory: is no store"),
        ("simplecache::s3://data/set", "is no store"),
        ("s3:///set", "no host or bucket"),
        ("nosuch://host/set", "Protocol not known: nosuch"),
        ("http://host/set", "HTTP lists no folders"),
        ("http://host/{0..3.tar", "braces are no range"),
        ("http://host/{0..3}/{b..a}.tar", "braces are no range"),
        ("http://host/{0..99999}/{0..99999999999}.tar", "over 1,000,000 shards"),
        ("http://someone:secret@host/0.tar", "a password in a URL"),
        ("hdfs-is-a-folder-here", "no such folder"),
        ("gs://bucket/set", "gs:// needs a library that is not installed: .*gcsfs"),
    ],
)
def test_what_is_no_store_is_refused_in_one_line(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_index([source], limits=quick())
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("line", ["http://169.254.169.254/0.tar", "file:///etc/passwd", "//elsewhere/0.tar"])
def test_a_list_cannot_send_the_reader_elsewhere(web: tuple[str, type[Faults], Path], line: str) -> None:
    url, _, folder = web
    (folder / "list.txt").write_text(f"00000.tar\n{line}\n")
    with pytest.raises(ValueError, match="not on the list's own host"):
        open_index([f"{url}/list.txt"], limits=quick())


def test_an_empty_list_and_a_bad_cache_size(
    web: tuple[str, type[Faults], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, folder = web
    (folder / "list.txt").write_text("# nothing yet\n")
    with pytest.raises(ValueError, match="names no shards"):
        open_index([f"{url}/list.txt"], limits=quick())
    with pytest.raises(ReadFailed, match="exceed the cache of 1,000; raise SHORTCLIP_CACHE_GB"):
        open_index([f"{url}/00000.tar"], limits=quick(cache_bytes=1000))
    monkeypatch.setenv("SHORTCLIP_CACHE_GB", "plenty")
    with pytest.raises(ValueError, match="SHORTCLIP_CACHE_GB=plenty"):
        Limits()


class Vault(LocalFileSystem):
    """A store whose library is not asynchronous."""

    protocol = "vault"
    stuck = False
    ls_s = 0.0

    def ls(self, path: Any, detail: bool = False, **options: Any) -> Any:
        time.sleep(type(self).ls_s)
        return super().ls(path, detail=detail, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("vault:/"))

    def unstrip_protocol(self, name: str) -> str:
        return f"vault:/{name}"

    def _open(self, path: Any, *args: Any, **options: Any) -> Any:
        if type(self).stuck:
            time.sleep(3)
        return super()._open(path, *args, **options)


def test_a_store_without_asynchronous_calls(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("vault", Vault, clobber=True)
    index = open_index([f"vault:/{shards}"], limits=quick())
    assert index.digest == open_index([shards]).digest
    assert Reader(index).images(Reader(index).locate_ids(index.usable_ids())) == [
        jpeg for jpeg in Reader(index).images(Reader(index).locate_ids(index.usable_ids())) if isinstance(jpeg, bytes)
    ]
    shutil.rmtree(index.store.limits.cache_folder)
    index.store.cache.release()
    monkeypatch.setattr(Vault, "stuck", True)
    with pytest.raises(ReadFailed, match=r"gave up after 3 attempts \(0 bytes in 0.2 s\)"):
        Store(quick(stall_s=0.2)).open(*remote_shard(index, 0))


def test_a_long_listing_has_a_limit_of_its_own(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("vault", Vault, clobber=True)
    monkeypatch.setattr(Vault, "ls_s", 0.5)
    assert len(Store(quick(stall_s=0.2)).shards(f"vault:/{shards}")) == 6
    with pytest.raises(ReadFailed, match=r"gave up after 3 attempts \(no answer in 0.1 s\)"):
        Store(quick(listing_s=0.1)).shards(f"vault:/{shards}")


def remote_shard(index: Index, shard: int) -> tuple[str, int, str]:
    info = index.shards[shard]
    return info.path, info.shard_bytes, info.identity


def writing(content: bytes, calls: list[str] | None = None) -> Callable[[Path], None]:
    def fetch(path: Path) -> None:
        if calls is not None:
            calls.append(path.name)
        path.write_bytes(content)

    return fetch


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.shard"))


def test_the_least_recently_used_goes_and_nothing_in_use_does(tmp_path: Path) -> None:
    cache, other = FileCache(tmp_path, 30), FileCache(tmp_path, 30)
    for name in "abc":
        cache.open(name, 10, writing(b"x" * 10))
        os.utime(tmp_path / f"{name}.shard", ns=(0, ord(name)))
    calls: list[str] = []
    cache.release()
    cache.open("a", 10, writing(b"", calls))  # used again: b is the oldest now
    assert calls == []
    cache.open("d", 10, writing(b"y" * 10))
    assert names(tmp_path) == ["a", "c", "d"]
    # Another's files stay; of its own, what is not being read may go.
    held = other.open("c", 10, writing(b""))
    cache.release()
    other.open("e", 10, writing(b"z" * 10))
    assert "c" in names(tmp_path)
    assert os.pread(held.descriptor, 10, 0) == b"x" * 10


def test_a_full_cache_of_files_in_use_says_so(tmp_path: Path) -> None:
    cache, other = FileCache(tmp_path, 20), FileCache(tmp_path, 20, full_wait_s=0.1)
    held = [cache.open(name, 10, writing(b"x" * 10)) for name in "ab"]
    with pytest.raises(CacheFull, match="all in use"):
        other.open("c", 10, writing(b"x" * 10))
    del held
    cache.release()
    other.open("c", 10, writing(b"x" * 10))
    assert len(names(tmp_path)) == 2


def test_a_fetch_under_way_is_waited_for_and_other_files_are_left_alone(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10, full_wait_s=0.5)
    foreign = [tmp_path / name for name in ("notes.partial", "10.partial", "a.b.partial", "notes.txt")]
    for path in foreign:
        path.write_bytes(b"x" * 100)

    def slowly(path: Path) -> None:
        time.sleep(1.0)
        path.write_bytes(b"x" * 10)

    def contents(name: str) -> bytes:
        return os.pread(cache.open(name, 10, slowly).descriptor, 10, 0)

    # Each needs all the room there is, for longer than another would wait for what is only held.
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(contents, name) for name in "abc"]:
            assert future.result() == b"x" * 10
    assert all(path.exists() for path in foreign)


def test_a_failed_fetch_leaves_nothing_and_a_file_is_fetched_once(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 1000)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.open("a", 10, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    calls: list[str] = []

    def slowly(path: Path) -> None:
        calls.append(path.name)
        time.sleep(0.1)
        path.write_bytes(b"x" * 10)

    caches = [cache, FileCache(tmp_path, 1000)]
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda i: caches[i % 2].open("a", 10, slowly), range(8)))
    assert len(calls) == 1
    assert {os.pread(file.descriptor, 10, 0) for file in opened} == {b"x" * 10}


SHARING = """
import fcntl, os, sys
from pathlib import Path
from pipeline.cache import FileCache
cache = FileCache(Path(sys.argv[1]), 40)
def fetch(path):
    if sys.argv[2] == "die":
        path.write_bytes(b"half")
        print("fetching", flush=True)
        sys.stdin.read()
    path.write_bytes(name.encode() * 10)
for turn in range(int(sys.argv[3])):
    name = "abcdefgh"[(turn * 5 + os.getpid()) % 8]
    assert os.pread(cache.open(name, 10, fetch).descriptor, 10, 0) == name.encode() * 10
    cache.release()
    with open(os.path.join(sys.argv[1], ".lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        counted = {entry.name[0] for entry in os.scandir(sys.argv[1]) if not entry.name.startswith(".")}
        assert len(counted) * 10 <= 40, counted
"""


def sharing(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SHARING, str(folder), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parents[1])


def test_processes_share_a_cache_within_its_bound(tmp_path: Path) -> None:
    processes = [sharing(tmp_path, "live", "150") for _ in range(3)]
    for process in processes:
        process.communicate(timeout=300)
    assert [process.returncode for process in processes] == [0, 0, 0]


def test_what_a_killed_process_left_is_fetched_anew(tmp_path: Path) -> None:
    process = sharing(tmp_path, "die", "1")
    assert process.stdout is not None
    assert process.stdout.readline() == "fetching\n"
    (partial_file,) = tmp_path.glob("*.partial")
    process.kill()
    process.communicate()
    name = partial_file.name.partition(".")[0]
    assert partial_file.exists()
    FileCache(tmp_path, 40).open(name, 10, writing(b"x" * 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", f"{name}.shard"]
    # And one that nobody asks for again makes room like any other.
    partial_file.with_name("z.30.partial").write_bytes(b"half")
    FileCache(tmp_path, 40).open("another", 20, writing(b"x" * 20))
    assert not list(tmp_path.glob("*.partial"))


def test_a_set_of_many_shards_is_built_by_workers_from_a_server(
    web: tuple[str, type[Faults], Path], coloured: Make
) -> None:
    url, _, folder = web
    for i in range(12):
        write_tar(folder / f"w{i:02d}.tar", [coloured(12 * j + i) for j in range(3)])
    source = f"{url}/w{{00..11}}.tar"
    index = open_index([source], limits=quick(), workers=2)
    assert index.num_usable == 36
    with pytest.raises(ReadFailed, match=r"gave up after 3 attempts \(HTTP 503"):
        broken(web, source)


def broken(web: tuple[str, type[Faults], Path], source: str) -> None:
    _, handler, folder = web
    # A change: the index is built anew. Servers give whole seconds, so within one it would not be seen.
    shutil.copy(folder / "w01.tar", folder / "w00.tar")
    os.utime(folder / "w00.tar", (1e9, 1e9))
    handler.faults["/w00.tar"] = ("503", -1)
    open_index([source], limits=quick(), workers=2)


def test_one_file_system_serves_all_fetches_of_a_web_store() -> None:
    """fsspec keeps every one that it makes, with its connections, for as long as the process lives."""
    one, other = (transfer.filesystem(f"http://127.0.0.1:9/{name}.tar")[0] for name in "ab")
    assert one is other
