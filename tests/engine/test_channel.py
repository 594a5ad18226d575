"""Messages arrive whole and in order, arrays without a copy on the way in, and an end is noticed at once."""

import socket
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.channel import Channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(end) for end in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_arrays_cross_unchanged_and_do_not_share_memory(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    sent: dict[str, NDArray[Any]] = {
        "large": np.random.default_rng(0).integers(0, 256, (2000, 1176), dtype=np.uint8),
        "grid": np.array([1, 2, 3], dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "strided": np.arange(20).reshape(4, 5)[:, ::2],
        "readonly": np.broadcast_to(np.arange(3), (2, 3)),
    }
    sender = threading.Thread(target=left.send, args=(sent,))
    sender.start()
    received = right.receive()
    sender.join()
    assert isinstance(received, dict)
    assert list(received) == list(sent)
    for name, array in sent.items():
        assert received[name].dtype == array.dtype
        assert np.array_equal(received[name], array)
    assert received["large"].flags.writeable


def test_a_thousand_arrays_in_one_message(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    sent = [np.full(index % 7 + 1, index) for index in range(1500)]
    sender = threading.Thread(target=left.send, args=(sent,))
    sender.start()
    received = right.receive()
    sender.join()
    assert isinstance(received, list)
    assert all(np.array_equal(got, wanted) for got, wanted in zip(received, sent, strict=True))


def test_messages_of_many_threads_do_not_mix(ends: tuple[Channel, Channel]) -> None:
    left, right = ends

    def send(name: int) -> None:
        for number in range(50):
            left.send((name, number, np.full(3000, name)))

    senders = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for sender in senders:
        sender.start()
    received = [cast(tuple[int, int, NDArray[Any]], right.receive()) for _ in range(200)]
    for sender in senders:
        sender.join()
    for name in range(4):
        assert [number for who, number, _ in received if who == name] == list(range(50))
    assert all((array == who).all() for who, _, array in received)


def test_the_end_of_the_other_side_is_an_eof(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    left.send("last")
    left.close()
    assert right.receive() == "last"
    with pytest.raises(EOFError):
        right.receive()
    with pytest.raises(OSError, match=r"Broken pipe|Bad file"):
        right.send("nobody")


def test_closing_wakes_a_thread_that_receives(ends: tuple[Channel, Channel]) -> None:
    left, _ = ends
    seen: list[type[BaseException]] = []

    def receive() -> None:
        try:
            left.receive()
        except EOFError as error:
            seen.append(type(error))

    receiver = threading.Thread(target=receive)
    receiver.start()
    left.close()
    receiver.join(timeout=10)
    assert seen == [EOFError]
