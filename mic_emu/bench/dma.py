"""DMA throughput and latency beside memcpy on the same pages in the same run (issue: DMA engine).

``rows()`` needs no running card: it builds the hardware of one in this process. Every figure
alternates with its limit, so that a busy machine slows both.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mic_emu import bar, memory
from mic_emu._native import lib
from mic_emu.bar import Bus
from mic_emu.dma import DmaChannel, DmaMemory
from mic_emu.layout import CONSTANTS as C

MiB = 1 << 20
AREA = 32 * MiB  # larger than the caches of one core
RINGS = 8 * MiB
SMPT = C["SMPT_BASE"]
Row = dict[str, Any]


@dataclass
class _Rig:
    """A card's memories with an engine, and the host's side of it."""

    bus: Bus
    memory: DmaMemory

    def channel(self, c: int) -> DmaChannel:
        return DmaChannel(self.bus, c, self.memory)


@contextlib.contextmanager
def _rig() -> Iterator[_Rig]:
    # Imported here: bench drives both sides, the rest of mic_emu imports neither.
    from mic_emu.card.board.dma import DmaEngine
    from mic_emu.host.smpt import Smpt

    host_fd = memory.create_shm("bench-host", 2 * AREA + RINGS)
    try:
        fds = bar.create_slot("bench", 2 * AREA, host_fd)
    finally:
        os.close(host_fd)
    with Bus(fds) as bus:
        bus.hw_reset()
        for fd in (fds[lib.MIC_FD_GDDR], fds[lib.MIC_FD_HOST]):
            rc = lib.mic_reserve(fd, 0, 2 * AREA)
            if rc < 0:
                raise OSError(-rc, f"bench: /dev/shm has no room for {2 * AREA} bytes")
        smpt = Smpt(bus, logging.getLogger("micemu.bench"))
        smpt.init()
        pages = memory.PageAllocator(fds[lib.MIC_FD_HOST], 2 * AREA, 2 * AREA + RINGS)
        with DmaEngine(bus):
            yield _Rig(bus, DmaMemory(pages, smpt.map, smpt.unmap))


def _dma(ch: DmaChannel, base: int, length: int, count: int, area: int = AREA) -> float:
    """Seconds for ``count`` copies of ``length`` bytes from GDDR to host memory, walking ``area``."""
    start = time.perf_counter()
    cookie = 0
    for i in range(count):
        off = base + i * length % area
        tx = ch.prep_memcpy(SMPT + off, off, length)
        if tx is None:
            raise RuntimeError("the bench is larger than the ring")
        cookie = tx.submit()
    ch.sync_wait(cookie, timeout_s=60)
    return time.perf_counter() - start


def _copy(rig: _Rig, base: int, length: int, count: int, area: int = AREA) -> float:
    """The same by memcpy in one C loop."""
    ns = lib.mic_bench_memcpy(rig.bus.host.pointer + base, rig.bus.gddr.pointer + base, length, area, count)
    return float(ns) / 1e9


def _both(work: Callable[[int], float]) -> float:
    """Seconds until two threads have both done their half."""
    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return time.perf_counter() - start


def _best(rounds: int, ours: Callable[[], float], limit: Callable[[], float]) -> tuple[float, float]:
    """Best times of both, measured in turns; the first round only warms up."""
    times = [(ours(), limit()) for _ in range(rounds + 1)][1:]
    return min(t[0] for t in times), min(t[1] for t in times)


def _row(name: str, value: float, unit: str, limit: float) -> Row:
    return {"name": name, "value": value, "unit": unit, "limit": limit, "ratio": value / limit}


def _throughput(rig: _Rig, ch: DmaChannel, length: int, total: int, rounds: int) -> Row:
    count = total // length
    ours, limit = _best(rounds, lambda: _dma(ch, 0, length, count), lambda: _copy(rig, 0, length, count))
    moved = length * count
    return _row(f"dma copy, chains of {length // 1024} KiB", moved / ours / 1e9, "GB/s", moved / limit / 1e9)


def _scaling(rig: _Rig, channels: list[DmaChannel], area: int, total: int, rounds: int) -> Row:
    """Two channels at once beside two threads that copy. A small area stays in each core's cache."""
    length = C["DMA_HOST_MAX"]
    count = total // length
    ours, limit = _best(
        rounds,
        lambda: _both(lambda i: _dma(channels[i], i * AREA, length, count, area)),
        lambda: _both(lambda i: _copy(rig, i * AREA, length, count, area)),
    )
    moved = 2 * length * count
    name = f"dma copy, two channels, over {area // 1024} KiB"
    return _row(name, moved / ours / 1e9, "GB/s", moved / limit / 1e9)


def _latency(rig: _Rig, ch: DmaChannel, length: int, rounds: int) -> Row:
    """Median of prepare + submit + wait, one at a time; the limit is the copy alone."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        tx = ch.prep_memcpy(SMPT, 0, length)
        if tx is None:
            raise RuntimeError("the ring is full in an idle channel")
        ch.sync_wait(tx.submit())
        times.append(time.perf_counter() - start)
    copy = _copy(rig, 0, length, rounds) / rounds
    return _row(
        f"dma copy, {length // 1024} KiB, one at a time", sorted(times)[rounds // 2] * 1e6, "us", copy * 1e6
    )


def rows(scale: float = 1.0) -> list[Row]:
    """All DMA figures as {name, value, unit, limit, ratio}. ``scale`` 1 takes about two seconds.

    GB/s: more is better, ratio 1 = memcpy. us: less is better.
    """
    total = max(int(256 * scale), 16) * MiB
    rounds = 4
    with _rig() as rig, rig.channel(0) as first, rig.channel(1) as second:
        out = [_throughput(rig, first, n, total, rounds) for n in (64 * 1024, 256 * 1024, MiB, 4 * MiB)]
        out += [_scaling(rig, [first, second], area, total, rounds) for area in (MiB // 2, AREA)]
        out += [_latency(rig, first, n, max(int(2000 * scale), 100)) for n in (4096, 64 * 1024)]
    return out
