"""Every process of a launch hears of one that died or fell silent, within seconds, and ends.

Each process keeps a connection to the first one and sends a byte over it now and then from a thread
of its own, so that a rank which compiles, loads or waits inside a collective is alive. The first
process tells all others what it finds. Three things are told apart: a connection that closes (a
process died: the kernel of its host says so at once), one that is silent (a host, a link or a
stopped process: nothing was heard for `seconds`), and a process that says it failed, whose
sentence then ends the others unless they end by themselves.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from .. import ending
from ..config.base import UserError

_BEAT, _LEFT, _STOPPED, _VERDICT = b".", b"l", b"s", b"v"
_HELLO = struct.Struct("!16siH")  # token, rank, bytes of the host's name
_HEAD = struct.Struct("!cI")  # kind, bytes of the sentence behind it
# After one process has failed with a sentence of its own, the others may be about to end with the
# same; after one was stopped by a signal, they may still be writing the checkpoint that they stop
# with; and one that met a broken connection waits for the sentence that explains it.
_FAILED_GRACE_S, _STOPPED_GRACE_S, _PATIENCE_S = 2.0, 120.0, 5.0


class _Peer:
    """The other end of a connection."""

    def __init__(self, connection: socket.socket, rank: int, host: str) -> None:
        self.connection, self.rank, self.host = connection, rank, host
        self.heard = time.monotonic()
        self.left = False
        self._got = b""

    def send(self, kind: bytes, sentence: str = "") -> None:
        """Sends a message; what cannot be sent shows when the connection is read."""
        told = sentence.encode(errors="backslashreplace")[:60_000]
        with suppress(OSError):
            self.connection.send(_HEAD.pack(kind, len(told)) + told)

    def messages(self) -> Iterator[tuple[bytes, str]]:
        """What came since. Raises OSError where the connection is closed."""
        with suppress(BlockingIOError):
            data = self.connection.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            self.heard = time.monotonic()
            self._got += data
        while len(self._got) >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self._got)
            end = _HEAD.size + size
            if len(self._got) < end:
                return
            told, self._got = self._got[_HEAD.size : end], self._got[end:]
            yield kind, told.decode(errors="replace")

    @property
    def name(self) -> str:
        """Which process it is, for people."""
        return f"process {self.rank} on host {self.host}"


class Heartbeat:
    """One process's part; see the module. `end` is given the sentence that the launch ends with."""

    def __init__(
        self,
        rank: int,
        seconds: float,  # of silence after which a process is taken for gone
        end: Callable[[str], None],
    ) -> None:
        self.rank, self.seconds, self._end = rank, seconds, end
        self.peers: dict[int, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        # Written to by `leave`, so that the thread hears of it at once.
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ)
        self._leaves: tuple[bytes, str] | None = None
        # How another process ended, and when this one has to.
        self._failed: tuple[float, str] | None = None
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def add(self, connection: socket.socket, rank: int, host: str) -> None:
        """A connection to watch; before `start`."""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peers[rank] = _Peer(connection, rank, host)
        self._selector.register(connection, selectors.EVENT_READ, self.peers[rank])

    def start(self) -> None:
        """Begins to beat and to watch."""
        self._thread.start()

    def leave(self, sentence: str = "", *, stopped: bool = False) -> None:
        """Says goodbye: from here on no silence of this process means anything. A sentence tells
        the others that it failed, or was stopped by a signal, and how."""
        self._leaves = (_STOPPED if stopped else _LEFT, sentence)
        with suppress(OSError):
            self._wake.send(b"!")
        if threading.current_thread() is not self._thread:
            self._thread.join(2.0)

    def _watch(self) -> None:
        interval, looked, beaten = self.seconds / 9, time.monotonic(), 0.0
        while self._leaves is None:
            ready = self._selector.select(min(interval, 0.5))
            now = time.monotonic()
            if now - looked > self.seconds / 3:
                # This process itself was held up, with all that the others may have said meanwhile.
                for peer in self.peers.values():
                    peer.heard = now
            looked = now
            for peer in [key.data for key, _ in ready if key.data is not None]:
                self._hear(peer)
            if now - beaten >= interval:
                beaten = now
                for peer in self._present():
                    peer.send(_BEAT)
            self._judge(now)
        for peer in self._present():
            peer.send(*self._leaves)

    def _present(self) -> list[_Peer]:
        return [peer for peer in self.peers.values() if not peer.left]

    def _gone(self, peer: _Peer) -> None:
        peer.left = True
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _hear(self, peer: _Peer) -> None:
        try:
            for kind, sentence in peer.messages():
                if kind == _VERDICT:
                    self._end(sentence)
                elif kind in (_LEFT, _STOPPED):
                    if sentence:
                        self._has_ended(peer, sentence, stopped=kind == _STOPPED)
                    self._gone(peer)
                    return
        except OSError:
            self._gone(peer)
            if self._leaves is None and self._failed is None:
                self._verdict(f"{peer.name} died: it closed its connection without a word")

    def _has_ended(self, peer: _Peer, sentence: str, *, stopped: bool) -> None:
        ends = time.monotonic() + (_STOPPED_GRACE_S if stopped else _FAILED_GRACE_S)
        if self._failed is None or ends < self._failed[0]:
            what = "was stopped" if stopped else "failed"
            self._failed = (ends, f"{peer.name} {what}: {sentence}")

    def _judge(self, now: float) -> None:
        if self._failed is not None and now > self._failed[0]:
            self._verdict(self._failed[1])
        for peer in self._present():
            if now - peer.heard > self.seconds:
                self._verdict(
                    f"{peer.name} has not been heard of for {self.seconds:g} s (train.heartbeat_s):"
                    " its host, the link to it or the process stands still"
                )

    def _verdict(self, sentence: str) -> None:
        if self._leaves is not None:
            return
        for peer in self._present():
            peer.send(_VERDICT, sentence)
        self._end(sentence)


def _hub(world: int) -> tuple[socket.socket, tuple[int, bytes]]:
    """The first process's listening socket, and what the others need to find it."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    server = socket.create_server(
        ("", 0), family=family, backlog=max(128, world), dualstack_ipv6=dual
    )
    return server, (server.getsockname()[1], secrets.token_bytes(16))


def _answer(
    server: socket.socket, token: bytes, beat: Heartbeat, others: int, seconds: float
) -> None:
    """Takes the connections of all others; one that does not know the token is nobody's. Raises
    OSError where not all come in time.
    """
    ends = time.monotonic() + seconds
    server.settimeout(min(1.0, beat.seconds / 9))
    while len(beat.peers) < others:
        # Those that are there wait for this process already.
        for peer in beat.peers.values():
            peer.send(_BEAT)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            if time.monotonic() > ends:
                raise
            continue
        connection.settimeout(10)
        with suppress(OSError):
            hello = _HELLO.unpack(_exactly(connection, _HELLO.size))
            if hello[0] == token:
                beat.add(connection, hello[1], _exactly(connection, hello[2]).decode())
                continue
        connection.close()


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return data


def connect(seconds: float, rendezvous_s: float, end: Callable[[str], None]) -> Heartbeat:
    """This process's heartbeat, connected and begun. Raises UserError where the first process
    cannot be reached. Collective over all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    beat, host = Heartbeat(rank, seconds, end), socket.gethostname()
    server, told = _hub(world) if rank == 0 else (None, (0, b""))
    found = [(*told, host)]
    dist.broadcast_object_list(found, src=0)
    port, token, first = found[0]
    try:
        if server is not None:
            _answer(server, token, beat, world - 1, rendezvous_s)
            server.close()
        else:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
            connection = socket.create_connection((address, port), timeout=rendezvous_s)
            name = host.encode()
            connection.sendall(_HELLO.pack(token, rank, len(name)) + name)
            beat.add(connection, 0, first)
    except OSError as e:
        raise UserError(
            f"process {rank} of {world} cannot be connected with the first one's host at port "
            f"{port} ({e}); processes of a launch need free ports between their hosts"
        ) from e
    beat.start()
    return beat


@contextmanager
def beating(seconds: float, rendezvous_s: float) -> Iterator[None]:
    """Inside, a process of the launch that dies or falls silent ends this one with a sentence and
    exit code 1. Does nothing for one process. Collective over all processes.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return

    def end(sentence: str) -> None:
        kept = ending.kept()
        ending.end_now(f"error: {sentence}{kept and f'; {kept}'}", 1)

    beat = connect(seconds, rendezvous_s, end)
    # Codes of signals are 128 and more.
    ending.before_end(lambda sentence, code: beat.leave(sentence, stopped=code > 128))
    try:
        yield
    except BaseException as e:
        if ending.is_of_group(e):
            # It only says that a connection broke; the one who knows why has it told to all.
            time.sleep(_PATIENCE_S)
        told = ending.sentence_of(e) or f"{type(e).__name__}: {e}"
        beat.leave(told, stopped=isinstance(e, ending.StopRequested))
        raise
    finally:
        ending.before_end(lambda sentence, code: None)
    beat.leave()
