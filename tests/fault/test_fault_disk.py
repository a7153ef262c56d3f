"""A disk that fails, is slow or tears writes: the backend's loop in a process of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.faults import FaultTable, parse
from mic_emu.testing.disk import SECTOR, Disk

C = layout.CONSTANTS
OUT, FLUSH = C["VIRTIO_BLK_T_OUT"], C["VIRTIO_BLK_T_FLUSH"]
SECTORS = 4096


@pytest.fixture
def image() -> Iterator[int]:
    """2 MiB of 0x11."""
    fd = os.memfd_create("disk")
    os.pwrite(fd, b"\x11" * (SECTORS * SECTOR), 0)
    yield fd
    os.close(fd)


@pytest.fixture
def disk(image: int) -> Iterator[Disk]:
    with Disk(image, SECTORS) as d:
        yield d


@pytest.fixture
def faults(disk: Disk) -> FaultTable:
    return FaultTable(disk.rig.bus.faults)


def add(faults: FaultTable, kind: str, target: int = C["FAULT_ANY"], **words: object) -> int:
    return faults.install(parse({"kind": kind, **words}), target)


def outcome(disk: Disk, kind: int, sector: int, data: bytes = b"") -> int:
    """0 or errno of one request."""
    try:
        if kind == OUT:
            disk.write(sector, data)
        elif kind == FLUSH:
            return -disk.execute(FLUSH, 0, 0, 0)
        else:
            disk.read(sector, SECTOR)
    except OSError as e:
        return e.errno or -1
    return 0


def test_errors_hit_their_operation_and_change_nothing(disk: Disk, image: int, faults: FaultTable) -> None:
    """EIO for writes only; the image is as before; the filter goes, the disk is well."""
    number = add(faults, "disk-error", op="write", errno="EIO")
    assert outcome(disk, OUT, 5, b"\x22" * SECTOR) == 5
    assert os.pread(image, SECTOR, 5 * SECTOR) == b"\x11" * SECTOR
    assert (outcome(disk, 0, 5), outcome(disk, FLUSH, 0)) == (0, 0)
    faults.remove(number)
    assert outcome(disk, OUT, 5, b"\x22" * SECTOR) == 0
    add(faults, "disk-error", op="flush", errno="EOPNOTSUPP")
    assert (outcome(disk, FLUSH, 0), outcome(disk, 0, 5)) == (95, 0)


def test_only_the_device_that_is_meant(disk: Disk, faults: FaultTable) -> None:
    """A filter of another device passes."""
    number = add(faults, "disk-error", target=999)
    assert outcome(disk, 0, 0) == 0
    faults.aim(number, C["DP_FIRST_SLOT"])
    assert outcome(disk, 0, 0) == 5


def test_errors_repeat_with_the_seed(disk: Disk, faults: FaultTable) -> None:
    """Two runs with one seed fail the same requests; rate and counts agree with what was seen."""
    runs = []
    for seed in (9, 9, 10):
        number = add(faults, "disk-error", rate=0.25, seed=seed)
        runs.append([outcome(disk, 0, n % 100) for n in range(200)])
        counts = faults.remove(number)
        assert (counts.seen, counts.hits) == (200, sum(1 for e in runs[-1] if e))
    assert runs[0] == runs[1] != runs[2]
    assert 25 < sum(1 for e in runs[0] if e == 5) < 80


@pytest.mark.parametrize(("report", "errno"), [("error", 5), ("success", 0)])
@pytest.mark.parametrize("keep", [0, 1, 5, 8, 100])
def test_torn_write_ends_exactly_at_a_sector(
    disk: Disk, image: int, faults: FaultTable, keep: int, report: str, errno: int
) -> None:
    """The first ``keep`` sectors are new, the rest is old, and the writer is told what was asked for."""
    add(faults, "disk-torn", keep=keep, report=report)
    assert outcome(disk, OUT, 10, b"\x33" * (8 * SECTOR)) == errno
    new = min(keep, 8) * SECTOR
    assert os.pread(image, 8 * SECTOR, 10 * SECTOR) == b"\x33" * new + b"\x11" * (8 * SECTOR - new)
    assert os.pread(image, SECTOR, 18 * SECTOR) == b"\x11" * SECTOR


def test_torn_writes_at_random_places_are_whole_sectors(disk: Disk, image: int, faults: FaultTable) -> None:
    """Without ``keep`` the seed decides: always a prefix, in whole sectors, shorter than the write."""
    add(faults, "disk-torn", seed=3)
    seen = set()
    for n in range(40):
        at = n * 32
        assert outcome(disk, OUT, at, b"\x44" * (32 * SECTOR)) == 5
        data = os.pread(image, 32 * SECTOR, at * SECTOR)
        new = len(data) - len(data.lstrip(b"\x44"))
        assert new % SECTOR == 0
        assert data[new:] == b"\x11" * (32 * SECTOR - new)
        seen.add(new // SECTOR)
    assert len(seen) > 10
    assert max(seen) < 32


def test_a_write_beyond_the_end_still_fails_when_it_would_be_torn(
    disk: Disk, image: int, faults: FaultTable
) -> None:
    """Tearing does not make an illegal request legal."""
    add(faults, "disk-torn", keep=1, report="success")
    assert outcome(disk, OUT, SECTORS - 1, b"\x55" * (2 * SECTOR)) == 5
    assert os.pread(image, SECTOR, (SECTORS - 1) * SECTOR) == b"\x11" * SECTOR


def test_delay_is_latency_not_throughput(disk: Disk, faults: FaultTable) -> None:
    """One read takes 20 ms; 64 in flight together take 20 ms as well, not 64 times that."""
    add(faults, "disk-delay", delay="20ms")
    begin = time.monotonic()
    disk.read(0, SECTOR)
    assert 0.02 <= time.monotonic() - begin < 15
    b = disk.bench(SECTOR, 64, 400)
    assert b.p50_us >= 20_000
    assert b.done >= 64 * 2  # one after the other they would be 20


def test_a_reset_drops_completions_that_were_held(disk: Disk, faults: FaultTable) -> None:
    """VOP-57: after the reset none of them appears in the new rings."""
    number = add(faults, "disk-delay", delay="150ms")
    gddr = disk.rig.bus.gddr
    gddr.write(disk.pool + (8 << 20), layout.BLK_REQ.pack(type=0, sector=0))
    disk.drv.add([(disk.pool + (8 << 20), 16)], [(disk.pool + (8 << 20) + 64, SECTOR + 1)], token=5)
    disk.drv.kick()
    deadline = time.monotonic() + 20
    while faults.counts(number).hits == 0:
        assert time.monotonic() < deadline
        os.sched_yield()
    disk.reset()
    faults.remove(number)
    lib.mic_wait_fds(ffi.NULL, 0, 300)  # past the time when it was due
    assert disk.drv.get() is None
    assert disk.read(3, SECTOR) == b"\x11" * SECTOR


def test_slow_link_limits_the_disk(disk: Disk, faults: FaultTable) -> None:
    """4 MiB/s on the link: 64 requests of 16 KiB take a quarter of a second, whatever the depth."""
    add(faults, "link", bandwidth=4 << 20)
    begin = time.monotonic()
    for n in range(4):
        disk.read(0, 128 << 10)
    assert time.monotonic() - begin >= 4 * (128 << 10) / (4 << 20)
    b = disk.bench(16 << 10, 16, 500)
    assert b.mb_per_s <= 5.5


def test_filters_come_and_go_under_load(disk: Disk, faults: FaultTable, image: int) -> None:
    """Adding and removing delays while 32 requests are in flight loses none and mixes none up."""
    done = threading.Event()
    results = []

    def load() -> None:
        while not done.is_set():
            results.append(disk.bench(4096, 32, 100).done)

    thread = threading.Thread(target=load)
    thread.start()
    for n in range(150):
        number = add(faults, "disk-delay", delay=f"{n % 7 * 300}us", rate=0.5, seed=n)
        os.sched_yield()
        lib.mic_wait_fds(ffi.NULL, 0, 3)
        faults.remove(number)
    done.set()
    thread.join(40)
    assert not thread.is_alive()
    assert sum(results) > 0
