import numpy as np
import pytest

from pipeline.philox import Stream, philox_4x32, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers for philox4x32, 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    low, high = words(key)
    assert philox_4x32(np.array(words(counter), np.uint32), (low, high)).tolist() == words(expected)


def test_numbers_belong_to_the_sample_not_to_its_batch() -> None:
    epoch, ids = np.repeat(np.arange(3), 100), np.tile(np.arange(100) + 2**33, 3)
    whole = uniform(7, Stream.CROP, epoch, ids, 9)
    assert whole.shape == (300, 9)
    assert (whole >= 0).all()
    assert (whole < 1).all()
    shuffled = np.random.default_rng(0).permutation(300)
    assert (uniform(7, Stream.CROP, epoch[shuffled], ids[shuffled], 9) == whole[shuffled]).all()
    assert (uniform(7, Stream.CROP, epoch, ids, 3) == whole[:, :3]).all()
    for other in (uniform(8, Stream.CROP, epoch, ids, 9), uniform(7, Stream.CAPTION, epoch, ids, 9)):
        assert (other != whole).mean() > 0.99
    assert len(np.unique(whole)) > 0.99 * whole.size


def test_numbers_are_even() -> None:
    draws = uniform(3, Stream.CROP, np.zeros(20_000, np.int64), np.arange(20_000), 2)
    for column in draws.T:
        counts = np.histogram(column, bins=10, range=(0, 1))[0]
        assert abs(counts - 2000).max() < 250  # standard deviation 42
    covariance = ((draws[:, 0] - 0.5) * (draws[:, 1] - 0.5)).mean()
    assert abs(covariance) < 0.0025  # a correlation of 0.03; standard deviation 0.007
