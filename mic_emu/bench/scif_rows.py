"""The figures of SCIF over one connection, each beside its limit, in turns in one run (``micemu scif perf``).

Times: less is better; rates: more is better. The limit of messages is what two processes do with a bare
cache line, a futex or a Unix stream socket; of RMA and registration, memcpy of as many bytes.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mic_emu import scif
from mic_emu._native import ffi, lib
from mic_emu.bench import ucx
from mic_emu.bench.scif_peer import Client, Order, nanoseconds, together

Row = dict[str, Any]
KiB, MiB = 1 << 10, 1 << 20
ROUNDS = 5
PAUSE_NS = 500_000  # longer than any spinning
PAIRS = 2


def medians(rounds: int, *work: Callable[[], float]) -> list[float]:
    """Medians of measurements taken in turns, after one round to warm up."""
    for w in work:
        w()
    return [
        statistics.median(times) for times in zip(*([w() for w in work] for _ in range(rounds)), strict=True)
    ]


def _row(name: str, value: float, unit: str, limit: float, bar: str = "") -> Row:
    row = {"name": name, "value": value, "unit": unit, "limit": limit, "ratio": value / limit}
    return {**row, "bar": bar} if bar else row


def cpus() -> list[int]:
    """A CPU for each side. Raises OSError when this process may use one only."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise OSError("SCIF is measured between two CPUs, and there is one")
    return usable[:2]


class Bench:
    """One connected client. ``scale``: longer (2) or shorter (0.5) measurements; ``peer_node`` for connects."""

    def __init__(self, client: Client, peer_node: int, scale: float = 1.0) -> None:
        self.client = client
        self.peer_node = peer_node
        self.scale = scale

    def _count(self, n: int) -> int:
        return max(int(n * self.scale), 20)

    def _both(self, what: Order, size: int, count: int, pause_ns: int = 0) -> list[float]:
        c, n = self.client, self._count(count)
        return medians(
            ROUNDS, lambda: c.loop(what, size, n, pause_ns), lambda: c.limit(what, size, n, pause_ns)
        )

    # --- messages ---------------------------------------------------------------------------------

    def latency(self) -> Iterator[Row]:
        """Half round trips of 8 bytes, the peer spinning and asleep, and through mapped memory."""
        ours, line = self._both(Order.PING, 8, 100_000)
        yield _row("8 B half round trip (shared cache line)", ours, "ns", line, "<= 2.5")
        ours, futex = self._both(Order.PACED, 8, 200, PAUSE_NS)
        yield _row("8 B half round trip, sleeping peer (futex)", ours / 1e3, "us", futex / 1e3, "<= 1.15")
        ours, line = self._both(Order.FLAG, 8, 100_000)
        yield _row("scif_mmap store and load (shared cache line)", ours, "ns", line, "<= 1.1")

    def streams(self) -> Iterator[Row]:
        """Messages one way."""
        ours, unix = self._both(Order.STREAM, 64 * KiB, 6_000)
        yield _row("64 KiB sends (Unix stream)", 65536 / ours, "GB/s", 65536 / unix, ">= 1.3")
        ours, unix = self._both(Order.STREAM, 8, 200_000)
        yield _row("8 B messages (Unix stream)", 1e3 / ours, "M/s", 1e3 / unix)

    def four_processes(self) -> Iterator[Row]:
        """8-byte messages of two pairs of processes at once."""
        c, n = self.client, self._count(100_000)

        def pair(i: int, port: int) -> Callable[[], float]:
            ep = scif.Endpoint()
            ep.connect((self.peer_node, port))
            one = Client(ep, [c.cpus[i % 2], c.cpus[(i + 1) % 2]])
            return lambda: one.loop(Order.STREAM, 8, n)

        def sockets(i: int) -> Callable[[], float]:
            os.sched_setaffinity(0, {c.cpus[i % 2]})
            one = [c.cpus[i % 2], c.cpus[(i + 1) % 2]]
            b = ffi.new("struct mic_bench *", (int(Order.STREAM), 8, n, 0))
            return lambda: nanoseconds(lib.mic_bench_limit(b, one[1]), "Unix stream")

        def ours() -> float:
            c.order(Order.SERVE, count=PAIRS)
            port = c.port()
            return sum(1e3 / ns for ns in together(PAIRS, lambda i: pair(i, port)))

        value, limit = medians(3, ours, lambda: sum(1e3 / ns for ns in together(PAIRS, sockets)))
        yield _row("8 B messages, four processes (Unix streams)", value, "M/s", limit)

    def python(self) -> Iterator[Row]:
        """``Endpoint.send`` beside the same loop in C."""
        c, n = self.client, self._count(50_000)
        message = bytes(8)

        def send() -> float:
            c.order(Order.STREAM, 8, n)
            call = c.ep.send
            start = time.perf_counter()
            for _ in itertools.repeat(None, n):
                call(message)
            c.ep.recv(1)
            return (time.perf_counter() - start) / n * 1e9

        ours, plain = medians(ROUNDS, send, lambda: c.loop(Order.STREAM, 8, n))
        yield _row("Python send of 8 B (C)", ours, "ns", plain, "<= + 250 ns")

    # --- memory -----------------------------------------------------------------------------------

    def rma(self) -> Iterator[Row]:
        """Copies between windows beside memcpy on the same pages."""
        c = self.client
        for write, size in itertools.product((True, False), (4 * KiB, 64 * KiB, MiB, 4 * MiB)):
            area = max(256 * KiB, 2 * size)
            n = max(int(128 * MiB * self.scale) // size, 4)
            to, source = (c.pages.peer, c.pages.own) if write else (c.pages.own, c.pages.peer)

            def ours(size: int = size, area: int = area, n: int = n, write: bool = write) -> float:
                at = (c.ep.fileno(), c.pages.window.offset, c.pages.peer_offset)
                return nanoseconds(lib.mic_bench_rma(*at, size, area, n, write), "RMA")

            def plain(
                size: int = size, area: int = area, n: int = n, to: Any = to, source: Any = source
            ) -> float:
                return float(lib.mic_bench_memcpy(to, source, size, area, n)) / n

            value, limit = medians(ROUNDS, ours, plain)
            name = f"RMA {'write' if write else 'read'} {size // KiB} KiB (memcpy)"
            if size == 4 * KiB:
                yield _row(name, value, "ns", limit, "<= + 300 ns")
            else:
                yield _row(name, size / value, "GB/s", size / limit, ">= 0.8" if size < MiB else ">= 0.9")

    def registration(self) -> Iterator[Row]:
        """Register and unregister beside memcpy of as many bytes."""
        fd = self.client.ep.fileno()
        for size, count in ((4 * KiB, 200), (64 * MiB, 2)):
            a, b = bytearray(size), bytearray(size)
            n = max(int(count * min(self.scale, 1)), 1)
            to, source = ffi.from_buffer(a), ffi.from_buffer(b)

            def once(fresh: int, size: int = size, n: int = n) -> float:
                return nanoseconds(lib.mic_bench_register(fd, size, n, fresh), "register") / 1e3

            def copy(size: int = size, n: int = n, to: Any = to, source: Any = source) -> float:
                return float(lib.mic_bench_memcpy(to, source, size, size, n)) / n / 1e3

            fresh, again, plain = medians(3, lambda f=once: f(1), lambda f=once: f(0), copy)  # type: ignore[misc]
            label = f"{size // KiB} KiB" if size < MiB else f"{size // MiB} MiB"
            yield _row(f"register + unregister {label}, fresh memory (memcpy)", fresh, "us", plain)
            yield _row(f"register + unregister {label}, again (memcpy)", again, "us", plain)

    # --- connections ------------------------------------------------------------------------------

    def connections(self) -> Iterator[Row]:
        """Connect, accept and close beside a connection to a daemon in Python on a Unix socket."""
        c, n = self.client, self._count(300)

        def ours() -> float:
            c.order(Order.ACCEPT, count=n)
            return 1e9 / nanoseconds(lib.mic_bench_connect(self.peer_node, c.port(), n), "connect")

        with tempfile.TemporaryDirectory(prefix="micemu-bench-") as where:
            path = Path(where) / "sock"
            daemon = subprocess.Popen(
                [sys.executable, "-m", "mic_emu.bench.echo_daemon", str(path)], stdout=subprocess.PIPE
            )
            try:
                assert daemon.stdout is not None
                if not daemon.stdout.readline():
                    raise OSError("the yardstick's daemon did not start")
                name = os.fsencode(path)
                rates = medians(
                    3, ours, lambda: 1e9 / nanoseconds(lib.mic_bench_connect_limit(name, n), "socket")
                )
            finally:
                daemon.kill()
                daemon.communicate()
        yield _row("connect + accept + close (Python daemon)", rates[0], "/s", rates[1], ">= 0.3, >= 1500 /s")

    # --- beside UCX -------------------------------------------------------------------------------

    def beside_ucx(self) -> Iterator[Row]:
        """The same with ``ucx_perftest``; nothing without it."""
        if not ucx.available():
            return
        c = self.client
        at = (c.ep.fileno(), c.pages.window.offset, c.pages.peer_offset)

        def put(size: int, n: int) -> float:
            return size / nanoseconds(lib.mic_bench_rma(*at, size, size, n, 1), "RMA")

        n = self._count(100_000)
        ours, peer = medians(
            3, lambda: c.loop(Order.PING, 8, n), lambda: ucx.run("tag_lat", 8, n, c.cpus)[0] * 1e3
        )
        yield _row("8 B half round trip (UCX tag)", ours, "ns", peer)
        n = self._count(6_000)
        for test in ("stream_bw", "tag_bw"):
            ours, peer = medians(
                3,
                lambda n=n: 65536 / c.loop(Order.STREAM, 65536, n),  # type: ignore[misc]
                lambda n=n, test=test: ucx.run(test, 65536, n, c.cpus)[1],  # type: ignore[misc]
            )
            yield _row(f"64 KiB sends (UCX {test.split('_')[0]})", ours, "GB/s", peer)
        for size, count in ((64 * KiB, 6_000), (MiB, 400)):
            n = self._count(count)
            ours, peer = medians(
                3,
                lambda s=size, n=n: put(s, n),  # type: ignore[misc]
                lambda s=size, n=n: ucx.run("ucp_put_bw", s, n, c.cpus)[1],  # type: ignore[misc]
            )
            yield _row(f"RMA write {size // KiB} KiB (UCX put)", ours, "GB/s", peer)

    def rows(self) -> Iterator[Row]:
        """All of them."""
        parts = (
            self.latency,
            self.streams,
            self.four_processes,
            self.python,
            self.rma,
            self.registration,
            self.connections,
            self.beside_ucx,
        )
        for part in parts:
            yield from part()
