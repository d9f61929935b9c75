"""What the proxy hands on of a server's answer, without a socket: however it is cut into pieces."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.answer import Answer, TooLarge
from pipeline.ingest.bounds import Limits
from pipeline.ingest.messages import Refused

LIMITS = Limits(max_bytes=200, header_bytes=400)
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bytes(range(100))
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 150
EARLY = b"HTTP/1.1 100 Continue\r\n\r\n" * 2 + LENGTH


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    return [data[low:high] for low, high in pairwise(edges)]


def fed(data: bytes, cuts: Sequence[int] = (), is_head: bool = False) -> tuple[Answer, bytes]:
    answer = Answer(LIMITS, is_head, is_tunnel=False)
    return answer, b"".join(answer.take(piece) for piece in pieces(data, cuts))


cut_anywhere = st.lists(st.integers(1, 400), max_size=30)


@pytest.mark.parametrize(
    ("data", "body_bytes"), [(LENGTH, 100), (CHUNKS, 15), (UNTIL_CLOSED, 150), (EARLY, 100)]
)  # fmt: skip
@given(cuts=cut_anywhere)
def test_the_pieces_that_an_answer_comes_in_change_nothing(data: bytes, body_bytes: int, cuts: list[int]) -> None:
    (whole, expected), (answer, got) = fed(data), fed(data, cuts)
    assert got == expected
    for name in ("body_bytes", "has_begun", "is_complete", "has_last_chunk", "is_whole_if_closed"):
        assert getattr(answer, name) == getattr(whole, name), name
    assert answer.is_whole_if_closed
    assert got.endswith(data[-body_bytes:])
    assert answer.body_bytes == body_bytes
    assert answer.is_complete == (data in (LENGTH, EARLY))


@given(st.integers(1, 99), cut_anywhere)
def test_nothing_beyond_the_stated_length_is_handed_on_and_less_is_not_whole(missing: int, cuts: list[int]) -> None:
    _, whole = fed(LENGTH)
    answer, got = fed(LENGTH + b"more", cuts)
    assert got == whole
    assert answer.is_complete
    answer, got = fed(LENGTH[:-missing], cuts)
    assert got == whole[:-missing]
    assert not answer.is_whole_if_closed


@given(st.integers(1, 4))
def test_chunks_without_their_last_are_not_whole(missing: int) -> None:
    assert not fed(CHUNKS[:-missing])[0].is_whole_if_closed


def test_a_head_alone_is_the_answer_to_head() -> None:
    answer, _ = fed(LENGTH[:-100], is_head=True)
    assert answer.is_complete
    assert not fed(LENGTH[:-100])[0].is_complete


@given(cut_anywhere)
def test_what_is_too_large_is_refused_while_nothing_was_handed_on_and_cut_off_after(cuts: list[int]) -> None:
    stated = LENGTH.replace(b"100\r", b"201\r")
    with pytest.raises(Refused, match="too large"):
        fed(stated, cuts)
    with pytest.raises(TooLarge):
        fed(UNTIL_CLOSED + b"x" * 51, cuts)
    assert fed(UNTIL_CLOSED + b"x" * 50, cuts)[0].body_bytes == LIMITS.max_bytes
    with pytest.raises(Refused, match="header too large"):
        fed(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 80, cuts)
    # Many heads that announce another count together.
    with pytest.raises(Refused, match="header too large"):
        fed(b"HTTP/1.1 100 Continue\r\n\r\n" * 20 + LENGTH, cuts)


def test_a_tunnel_has_no_head_and_ends_with_its_connection() -> None:
    answer = Answer(LIMITS, is_head=False, is_tunnel=True)
    assert answer.take(b"\x16\x03\x01") == b"\x16\x03\x01"
    assert (answer.body_bytes, answer.has_begun, answer.is_complete) == (3, True, False)
    assert answer.is_whole_if_closed
    with pytest.raises(TooLarge):
        answer.take(bytes(LIMITS.max_bytes + (64 << 10)))
