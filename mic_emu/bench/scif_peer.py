"""Two processes that measure SCIF together: one serves, the other gives the orders over the connection.

An order is a few numbers; both then enter the same C loop (native/bench/scif_ops.c). The serving side
registers ``AREA`` bytes and tells their offset; so does the other, for what goes through mapped memory.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

from mic_emu import scif
from mic_emu._native import ffi, lib
from mic_emu.scif.errors import ScifError

AREA = 8 << 20
ORDER = struct.Struct("<IIQQ")  # what, size or CPU, count, pause in ns
WORD = struct.Struct("<Q")


class Order(enum.IntEnum):
    """What the serving side is asked for: first the C loops (``enum mic_bench_op``)."""

    PING = lib.MIC_BENCH_PING
    PACED = lib.MIC_BENCH_PACED
    STREAM = lib.MIC_BENCH_STREAM
    FLAG = lib.MIC_BENCH_FLAG
    CPU = 16  # run on that CPU from now on
    ACCEPT = 17  # listen, tell the port, accept and close ``count`` connections
    SERVE = 18  # listen, tell the port, serve ``count`` connections, each in a process of its own


def nanoseconds(value: float, what: str) -> float:
    """The result of a C loop. Raises OSError."""
    if value < 0:
        raise OSError(int(-value), f"{what}: {os.strerror(int(-value))}")
    return value


def bench(what: Order, size: int, count: int, pause_ns: int = 0) -> Any:
    """``struct mic_bench``."""
    return ffi.new("struct mic_bench *", (int(what), size, count, pause_ns))


class Pages:
    """A connection's registered memory on both sides: ours, and the peer's mapped here."""

    def __init__(self, ep: scif.Endpoint) -> None:
        self.memory = scif.alloc(AREA)
        self.window = ep.register(self.memory)
        ep.send(WORD.pack(self.window.offset))
        (self.peer_offset,) = WORD.unpack(ep.recv(WORD.size))
        self._mapping = ep.mmap(self.peer_offset, AREA)
        self.own = ffi.from_buffer(self.memory)
        self.peer = ffi.from_buffer(self._mapping.view)

    def words(self) -> tuple[Any, Any]:
        """The first word of our memory and of the peer's."""
        return ffi.cast("uint64_t *", self.own), ffi.cast("uint64_t *", self.peer)


def run_loop(ep: scif.Endpoint, b: Any, pages: Pages, *, serve: bool) -> float:
    """One of the C loops, at either side; nanoseconds. Raises OSError."""
    return nanoseconds(lib.mic_bench_scif(ep.fileno(), b, serve, *pages.words()), Order(b.op).name)


def _listen(ep: scif.Endpoint) -> scif.Endpoint:
    listener = scif.Endpoint()
    port = listener.bind()
    listener.listen()
    ep.send(WORD.pack(port))
    return listener


def _serve_many(listener: scif.Endpoint, count: int) -> None:
    """Serve ``count`` connections, each in a child, until all have ended."""
    children = []
    for _ in range(count):
        conn, _peer = listener.accept()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                serve(conn)
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
        conn.close()
    for pid in children:
        os.waitpid(pid, 0)


def serve(ep: scif.Endpoint) -> None:
    """Carry out orders until the peer closes."""
    try:
        pages = Pages(ep)
        while True:
            what, size, count, pause_ns = ORDER.unpack(ep.recv(ORDER.size))
            if what == Order.CPU:
                os.sched_setaffinity(0, {size})
            elif what in (Order.ACCEPT, Order.SERVE):
                with _listen(ep) as listener:
                    if what == Order.SERVE:
                        _serve_many(listener, count)
                    else:
                        nanoseconds(lib.mic_bench_accept(listener.fileno(), count), "accept")
            else:
                run_loop(ep, bench(Order(what), size, count, pause_ns), pages, serve=True)
    except (ScifError, struct.error):  # closed, perhaps between two orders
        return


class Client:
    """The side that measures: connected to ``serve`` at the other end of ``ep``, on CPU ``cpus[0]``.

    The peer runs on ``cpus[1]``. Both stay there.
    """

    def __init__(self, ep: scif.Endpoint, cpus: Sequence[int]) -> None:
        self.ep = ep
        self.cpus = cpus
        self.pages = Pages(ep)
        os.sched_setaffinity(0, {cpus[0]})
        self.order(Order.CPU, cpus[1])

    def order(self, what: Order, size: int = 0, count: int = 0, pause_ns: int = 0) -> None:
        """Tell the serving side."""
        self.ep.send(ORDER.pack(what, size, count, pause_ns))

    def loop(self, what: Order, size: int, count: int, pause_ns: int = 0) -> float:
        """One C loop with the peer: nanoseconds for a half round trip or a message."""
        self.order(what, size, count, pause_ns)
        return run_loop(self.ep, bench(what, size, count, pause_ns), self.pages, serve=False)

    def limit(self, what: Order, size: int, count: int, pause_ns: int = 0) -> float:
        """The same on the bare machine."""
        return nanoseconds(lib.mic_bench_limit(bench(what, size, count, pause_ns), self.cpus[1]), what.name)

    def port(self) -> int:
        """The port that ACCEPT or SERVE tells."""
        return int(WORD.unpack(self.ep.recv(WORD.size))[0])


def together(count: int, prepare: Callable[[int], Callable[[], float]]) -> list[float]:
    """Run ``prepare(i)()`` in ``count`` processes, which begin at the same time; their results.

    Raises OSError when one of them fails.
    """
    ready, go, out = os.pipe(), os.pipe(), os.pipe()
    children = []
    for i in range(count):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(go[1])
                work = prepare(i)
                os.write(ready[1], b"r")
                os.read(go[0], 1)  # until the parent closes it
                os.write(out[1], struct.pack("<d", work()))
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    for fd in (ready[1], out[1], go[0]):
        os.close(fd)
    waiting = sum(len(os.read(ready[0], 1)) for _ in range(count))
    os.close(go[1])
    results = b"".join(os.read(out[0], 8) for _ in range(count))
    for pid in children:
        os.waitpid(pid, 0)
    os.close(ready[0])
    os.close(out[0])
    if waiting < count or len(results) < 8 * count:
        raise OSError("one of the measuring processes failed")
    return [float(v[0]) for v in struct.iter_unpack("<d", results)]
