import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.captions import TextReduction
from pipeline.colour import ColourJitter
from pipeline.index import open_index
from pipeline.loader import DecoderName, Loader, Settings
from pipeline.order import Order
from pipeline.read import ReadFailed
from pipeline.tokens import ImageReduction, token_geometry

BATCH_SIZE = 32


def new_loader(
    folder: Path, *, decoder: DecoderName = "turbo", rank: int = 0, world_size: int = 1, seed: int = 3
) -> Loader:
    index = open_index([folder])
    order = Order(index.shard_sizes, batch_size=BATCH_SIZE, seed=seed, lanes=8)
    return Loader(index, order, Settings(token_geometry(16), 8, decoder, seed=seed), rank=rank, world_size=world_size)


IMAGE_REDUCTIONS: list[ImageReduction] = ["resize", "random", "grid", "block"]
TEXT_REDUCTIONS: list[TextReduction] = ["truncate", "random", "block", "syntax"]


def reducing_loader(
    folder: Path,
    image: ImageReduction,
    text: TextReduction,
    decoder: DecoderName = "turbo",
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """A loader of short sequences by any reduction, with augmentation."""
    index = open_index([folder])
    order = Order(index.shard_sizes, batch_size=BATCH_SIZE, seed=3, lanes=8)
    geometry = token_geometry(16, image_reduction=image, image_size=None if image == "resize" else 128)
    colour = ColourJitter(jitter=0.8, greyscale=0.2)
    settings = Settings(geometry, 4, decoder, colour=colour, text_reduction=text, seed=3)
    return Loader(index, order, settings, rank=rank, world_size=world_size)


TENSORS = ("patches", "positions", "caption_ids", "valid", "sample_ids")


def same(one: object, other: object, names: tuple[str, ...] = TENSORS) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_batch_is_what_the_contract_says(shards: Path) -> None:
    batch = new_loader(shards).batch(0)
    kinds = {name: (getattr(batch, name).dtype, tuple(getattr(batch, name).shape)) for name in TENSORS}
    assert kinds == {
        "patches": (torch.uint8, (BATCH_SIZE, 16, 768)),
        "positions": (torch.int16, (BATCH_SIZE, 16)),
        "caption_ids": (torch.int32, (BATCH_SIZE, 8)),
        "valid": (torch.bool, (BATCH_SIZE,)),
        "sample_ids": (torch.int64, (BATCH_SIZE,)),
    }
    assert batch.grid == (4, 4)
    assert batch.valid.all()
    assert batch.rejected == ()
    assert all(getattr(batch, name).is_contiguous() for name in TENSORS)


def test_an_epoch_shows_every_sample_once_but_the_remainder(shards: Path) -> None:
    loader = new_loader(shards)
    num_samples = loader.index.num_usable // 8 * 8
    ids = torch.cat([batch.sample_ids for batch in loader.batches(0, -(-num_samples // BATCH_SIZE))])
    # Lanes go on into the next epoch without a gap, so the first epoch of each lane is its first lane_length slots.
    by_lane = ids.view(-1, 8, BATCH_SIZE // 8).transpose(0, 1).reshape(8, -1)[:, : loader.order.lane_length]
    assert len(set(by_lane.flatten().tolist())) == num_samples


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_threads_and_prefetch_change_nothing(shards: Path, threads: int, prefetch: int) -> None:
    loader = new_loader(shards)
    expected = [loader.batch(step) for step in range(4, 13)]
    found = list(new_loader(shards).batches(4, 13, threads=threads, prefetch=prefetch))
    assert len(found) == len(expected)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_a_run_shorter_than_the_queue(shards: Path) -> None:
    assert len(list(new_loader(shards).batches(0, 2, threads=2, prefetch=8))) == 2
    assert list(new_loader(shards).batches(5, 5)) == []


def test_leaving_early_ends_the_threads(shards: Path) -> None:
    import threading

    batches = new_loader(shards).batches(0, 1000, threads=2)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_same_global_batches(shards: Path, world_size: int) -> None:
    whole = new_loader(shards)
    ranks = [new_loader(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 5, 11):
        expected = whole.batch(step)
        parts = [loader.batch(step) for loader in ranks]
        for name in TENSORS:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))


def test_decoders_agree_on_everything_but_the_last_bits_of_pixels(shards: Path) -> None:
    turbo, dali = new_loader(shards), new_loader(shards, decoder="dali")
    for step in (0, 7):
        one, other = turbo.batch(step), dali.batch(step)
        assert same(one, other, ("positions", "caption_ids", "valid", "sample_ids"))
        difference = (one.patches.float() - other.patches.float()).abs()
        assert difference.mean() < 4


@pytest.mark.parametrize(("image", "text"), list(zip(IMAGE_REDUCTIONS, TEXT_REDUCTIONS, strict=True)))
def test_no_reduction_depends_on_threads_decoder_or_ranks(
    shards: Path, image: ImageReduction, text: TextReduction
) -> None:
    plan = ("positions", "caption_ids", "valid", "sample_ids")
    one = reducing_loader(shards, image, text)
    batches = [one.batch(step) for step in range(6, 11)]
    assert batches[0].patches.shape == (BATCH_SIZE, 16, 768)
    assert batches[0].caption_ids.shape == (BATCH_SIZE, 4)
    # From the middle of a run on, on other threads, as a resumed run goes on.
    resumed = reducing_loader(shards, image, text).batches(6, 11, threads=2, prefetch=2)
    assert all(same(expected, found) for expected, found in zip(batches, resumed, strict=True))
    dali = reducing_loader(shards, image, text, "dali")
    assert all(same(dali.batch(step), batch, plan) for step, batch in zip(range(6, 11), batches, strict=True))
    ranks = [reducing_loader(shards, image, text, rank=rank, world_size=4).batch(6) for rank in range(4)]
    for name in TENSORS:
        assert torch.equal(torch.cat([getattr(part, name) for part in ranks]), getattr(batches[0], name))


@pytest.mark.parametrize("image", IMAGE_REDUCTIONS)
def test_evaluation_sees_whole_images_unmasked_and_in_their_colours(shards: Path, image: ImageReduction) -> None:
    masked = reducing_loader(shards, image, "random")
    loader = Loader(masked.index, None, masked.settings)
    plain = Loader(masked.index, None, Settings(masked.settings.geometry.unmasked(), 4, "turbo"))
    ids = masked.index.usable_ids()[:40]
    found, expected = next(loader.evaluation_batches(ids)), next(plain.evaluation_batches(ids))
    assert same(found, expected)
    assert found.patches.shape[1] == found.grid[0] * found.grid[1]


def test_epochs_and_seeds_give_other_crops_and_captions(shards: Path) -> None:
    loader = new_loader(shards)
    steps = range(3 * loader.order.lane_length // 4)
    seen: dict[int, set[bytes]] = {}
    captions: dict[int, set[bytes]] = {}
    for batch in map(loader.batch, steps):
        for i, sample in enumerate(batch.sample_ids.tolist()):
            seen.setdefault(sample, set()).add(batch.patches[i].numpy().tobytes())
            captions.setdefault(sample, set()).add(batch.caption_ids[i].numpy().tobytes())
    assert np.mean([len(crops) for crops in seen.values()]) > 2
    assert 1.2 < np.mean([len(texts) for texts in captions.values()]) <= 2
    other = new_loader(shards, seed=4).batch(0)
    assert not torch.equal(other.sample_ids, loader.batch(0).sample_ids)


def damage(folder: Path, shard: str, key: str) -> None:
    """Makes one indexed JPEG ask for a quantisation table that it does not have: only a decoder can tell."""
    open_index([folder])
    times = (folder / shard).stat()
    with tarfile.open(folder / shard) as tar:
        info = tar.getmember(f"{key}.jpg")
        stream = tar.extractfile(info)
        assert stream is not None
        content = stream.read()
    with (folder / shard).open("r+b") as file:
        file.seek(info.offset_data + content.index(b"\xff\xc0") + 12)
        file.write(b"\x03")
    os.utime(folder / shard, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("decoder", ["turbo", "dali"])
def test_a_damaged_image_costs_its_slot_and_is_named(tmp_path: Path, shards: Path, decoder: DecoderName) -> None:
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    damage(folder, "00003.tar", "000000090")
    good, hurt = new_loader(shards, decoder=decoder), new_loader(folder, decoder=decoder)
    named = set()
    for step in range(14):
        one, other = good.batch(step), hurt.batch(step)
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert other.valid.tolist() == [sample != 90 for sample in other.sample_ids.tolist()]
        assert torch.equal(one.patches[other.valid], other.patches[other.valid])
        named |= set(other.rejected)
    assert [(item.sample_id, Path(item.shard).name, item.key) for item in named] == [(90, "00003.tar", "000000090")]
    assert hurt.known_bad == {90: "JPEG cannot be decoded"}


def test_evicting_an_open_shard_never_gives_another_shards_bytes(shards: Path) -> None:
    import sys
    from concurrent.futures import ThreadPoolExecutor

    from pipeline.read import Reader

    index = open_index([shards])
    reader = Reader(index, max_open=1)
    ids = np.random.default_rng(0).permutation(index.usable_ids())
    expected = dict(zip(ids.tolist(), reader.images(reader.locate_ids(ids)), strict=True))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            parts = [np.roll(ids, 50 * turn) for turn in range(60)]
            for part, found in zip(
                parts, pool.map(lambda part: reader.images(reader.locate_ids(part)), parts), strict=True
            ):
                assert all(expected[sample] == jpeg for sample, jpeg in zip(part.tolist(), found, strict=True))
    finally:
        sys.setswitchinterval(before)


def test_a_shard_that_shrank_costs_its_tail_and_one_that_went_away_stops_the_run(tmp_path: Path, shards: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    loader = new_loader(folder)
    loader.index.rows(5)
    size = (folder / "00005.tar").stat().st_size
    with (folder / "00005.tar").open("r+b") as file:
        file.truncate(size // 2)
    reasons = {item.reason for step in range(12) for item in loader.batch(step).rejected}
    assert reasons == {"shard shorter than its index"}
    (folder / "00000.tar").unlink()
    fresh = Loader(loader.index, loader.order, loader.settings)
    with pytest.raises(ReadFailed, match=r"00000\.tar: cannot be read .*; bring it back"):
        list(fresh.batches(0, 12))
