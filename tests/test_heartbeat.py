"""One process of a launch hears of another that died, failed or fell silent."""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Iterator

import pytest

from flash_sae_dist.parallel import heartbeat
from flash_sae_dist.parallel.heartbeat import Heartbeat

SECONDS = 1.5


class Launch:
    """Heartbeats of several processes in one, each with the sentence that it ended with."""

    def __init__(self, world: int) -> None:
        self.ends: list[queue.Queue[str]] = [queue.Queue() for _ in range(world)]
        self.beats = [Heartbeat(r, SECONDS, self.ends[r].put) for r in range(world)]
        self.lines = []
        for rank in range(1, world):
            with socket.create_server(("127.0.0.1", 0)) as server:
                own = socket.create_connection(server.getsockname())
                first = server.accept()[0]
            self.beats[0].add(first, rank, f"host{rank}")
            self.beats[rank].add(own, 0, "host0")
            self.lines.append(own)

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.beats[rank].start()


@pytest.fixture
def three() -> Iterator[Launch]:
    launch = Launch(3)
    yield launch
    for beat in launch.beats:
        if beat._thread.is_alive():
            beat.leave()


def test_all_are_alive_while_their_main_threads_do_other_things(three: Launch) -> None:
    three.start(0, 1, 2)
    ends = time.monotonic() + 2 * SECONDS
    while time.monotonic() < ends:
        sum(range(100_000))
    assert all(end.empty() for end in three.ends)
    # Each goes when it is done; nobody minds.
    for beat in three.beats[1:]:
        beat.leave()
    time.sleep(0.2)
    three.beats[0].leave()
    assert all(end.empty() for end in three.ends)


def test_a_process_that_dies_ends_all_others_at_once(three: Launch) -> None:
    three.start(0, 2)
    began = time.monotonic()
    three.lines[0].shutdown(socket.SHUT_RDWR)  # as the kernel of a dead process's host does
    for rank in (0, 2):
        sentence = three.ends[rank].get(timeout=SECONDS)
        assert "process 1 on host host1 died" in sentence
    assert time.monotonic() - began < SECONDS


def test_a_silent_process_ends_all_others_in_time(three: Launch) -> None:
    began = time.monotonic()
    three.start(0, 2)  # 1 is connected and never says a word
    for rank in (0, 2):
        sentence = three.ends[rank].get(timeout=3 * SECONDS)
        assert "process 1 on host host1 has not been heard of for 1.5 s" in sentence
        assert "train.heartbeat_s" in sentence
    assert SECONDS <= time.monotonic() - began < 2 * SECONDS


def test_the_first_process_may_be_the_one(three: Launch) -> None:
    three.start(1, 2)
    for rank in (1, 2):
        assert "process 0 on host host0 has not been heard" in three.ends[rank].get(timeout=5)


def test_a_failed_process_ends_others_with_its_sentence_unless_they_end_too(three: Launch) -> None:
    three.start(0, 1, 2)
    three.beats[1].leave("the disk is full; free space there")
    three.beats[2].leave("the disk is full; free space there")
    wanted = "process 1 on host host1 failed: the disk is full; free space there"
    sentence = three.ends[0].get(timeout=5)
    assert sentence in (wanted, wanted.replace("1", "2"))
    assert three.ends[1].empty()
    assert three.ends[2].empty(), "it had left by then"


def test_after_a_signal_the_others_have_time_for_their_checkpoints(
    three: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_FAILED_GRACE_S", 0.2)
    monkeypatch.setattr(heartbeat, "_STOPPED_GRACE_S", 2.0)
    three.start(0, 1, 2)
    three.beats[1].leave("stopped by SIGTERM before step 7", stopped=True)
    time.sleep(1)
    assert three.ends[0].empty()
    assert three.ends[2].empty()
    wanted = "process 1 on host host1 was stopped: stopped by SIGTERM before step 7"
    assert [three.ends[rank].get(timeout=5) for rank in (0, 2)] == [wanted, wanted]


def test_a_sentence_that_is_no_text_is_told_all_the_same(three: Launch) -> None:
    three.start(0, 1, 2)
    three.beats[1].leave("a path \udcff")
    assert three.ends[0].get(timeout=5).endswith("a path \\udcff")


def test_a_process_that_was_stopped_itself_blames_nobody(
    three: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = iter([False] * 3 + [True])
    select = three.beats[0]._selector.select

    def stopped(timeout: float | None = None) -> object:
        if next(slept, False):
            time.sleep(2 * SECONDS)
        return select(timeout)

    monkeypatch.setattr(three.beats[0]._selector, "select", stopped)
    three.beats[0].start()
    time.sleep(2.2 * SECONDS)
    assert three.ends[0].empty()
    assert "has not been heard of" in three.ends[0].get(timeout=3 * SECONDS)


def test_a_long_message_comes_in_parts(three: Launch) -> None:
    three.start(0, 2)
    told = "ü" * 20_000
    peer = three.beats[1].peers[0]
    peer.connection.setblocking(True)
    peer.send(b"l", told)
    assert three.ends[0].get(timeout=10).endswith(told)
