"""virtio-blk: the backend's C loop in a process of its own, driven through real rings."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.testing.disk import BLK_FEATURES, MODERN, SECTOR, Disk
from mic_emu.testing.machine import eventually
from mic_emu.testing.rings import EVENT_IDX, INDIRECT_DESC, NEEDS_RESET
from mic_emu.virtio.block import CardDisk

C = layout.CONSTANTS
IN, OUT, FLUSH, GET_ID = (C[f"VIRTIO_BLK_T_{n}"] for n in ("IN", "OUT", "FLUSH", "GET_ID"))
DISCARD, WRITE_ZEROES = C["VIRTIO_BLK_T_DISCARD"], C["VIRTIO_BLK_T_WRITE_ZEROES"]
OK, IOERR, UNSUPP = (C[f"VIRTIO_BLK_S_{n}"] for n in ("OK", "IOERR", "UNSUPP"))
SECTORS = 4096


@pytest.fixture
def image() -> Iterator[int]:
    """A 2 MiB image whose every sector says its number."""
    fd = os.memfd_create("disk")
    os.pwrite(fd, b"".join(n.to_bytes(4, "little") * 128 for n in range(SECTORS)), 0)
    yield fd
    os.close(fd)


@pytest.fixture(params=[MODERN, BLK_FEATURES], ids=["modern", "plain"])
def disk(image: int, request: pytest.FixtureRequest) -> Iterator[Disk]:
    with Disk(image, SECTORS, features=request.param) as d:
        yield d


def sector(n: int) -> bytes:
    return n.to_bytes(4, "little") * 128


def raw(disk: Disk, readable: list[bytes], writable: list[int]) -> tuple[int | None, list[bytes], int]:
    """One chain of exactly these segments: (status byte, writable bytes, used.len)."""
    gddr = disk.rig.bus.gddr
    base = disk.pool + (8 << 20)
    out, at = [], base
    for data in readable:
        gddr.write(at, data)
        out.append((at, len(data)))
        at += len(data)
    back = []
    for n in writable:
        gddr.write(at, b"\xee" * n)
        back.append((at, n))
        at += n
    disk.drv.add(out, back, token=99)
    disk.drv.kick()
    done: list[tuple[int, int]] = []

    def finished() -> bool:
        got = disk.drv.get()
        if got:
            done.append(got)
        return bool(done)

    eventually(finished, 20, "the chain to come back")
    got = [gddr.read(a, n) for a, n in back]
    return (got[-1][-1] if got else None), got, done[0][1]


def header(kind: int, at: int = 0) -> bytes:
    return layout.BLK_REQ.pack(type=kind, sector=at)


def test_vop_61_first_and_last_sector(disk: Disk, image: int) -> None:
    """VOP-61: reads and writes at both ends of the disk are byte exact and reach the image."""
    assert disk.read(0, SECTOR) == sector(0)
    assert disk.read(SECTORS - 1, SECTOR) == sector(SECTORS - 1)
    for at in (0, SECTORS - 1):
        disk.write(at, b"\xa5" * SECTOR)
        assert disk.read(at, SECTOR) == b"\xa5" * SECTOR
        assert os.pread(image, SECTOR, at * SECTOR) == b"\xa5" * SECTOR
    assert os.pread(image, SECTOR, SECTOR) == sector(1)


@pytest.mark.parametrize(("at", "n"), [(SECTORS, 1), (SECTORS - 1, 2), ((1 << 64) - 1, 1), (1 << 55, 1)])
def test_vop_61_beyond_capacity(disk: Disk, image: int, at: int, n: int) -> None:
    """VOP-61: beyond the capacity is status 1 for reads and writes; nothing is written."""
    before = os.pread(image, SECTORS * SECTOR, 0)
    with pytest.raises(OSError) as e:
        disk.read(at, n * SECTOR)
    assert e.value.errno == errno.EIO
    with pytest.raises(OSError) as e:
        disk.write(at, b"x" * n * SECTOR)
    assert e.value.errno == errno.EIO
    assert os.pread(image, SECTORS * SECTOR, 0) == before
    assert os.fstat(image).st_size == SECTORS * SECTOR


@pytest.mark.parametrize("kind", [2, 5, 9, 10, 14, 0x80000000, 0xFFFFFFFF])
def test_vop_61_unknown_type(disk: Disk, kind: int) -> None:
    """VOP-61: a type that nobody knows is status 2 in the last writable byte, whatever the layout."""
    for readable, writable in (([header(kind)], [1]), ([header(kind), b"x" * 512], [512, 1])):
        status, back, used = raw(disk, readable, writable)
        assert (status, used) == (UNSUPP, 1)
        assert back[0][:-1] == b"\xee" * (len(back[0]) - 1)


@pytest.mark.parametrize("length", [1, 8, 15])
def test_vop_61_short_header(disk: Disk, length: int) -> None:
    """VOP-61: a header of the wrong length is status 1, and no crash."""
    status, back, _ = raw(disk, [header(IN)[:length]], [512, 1])
    assert status == IOERR
    assert back[0] == b"\xee" * 512
    assert disk.read(3, SECTOR) == sector(3)


def test_vop_61_read_with_surplus_readable_bytes(disk: Disk) -> None:
    """VOP-61: a header that is too long is status 1."""
    assert raw(disk, [header(IN) + b"x"], [512, 1])[0] == IOERR


def test_vop_61_length_not_in_sectors(disk: Disk) -> None:
    """VOP-61: data that is no whole number of sectors is status 1, both ways."""
    assert raw(disk, [header(IN)], [511, 1])[0] == IOERR
    assert raw(disk, [header(OUT), b"x" * 513], [1])[0] == IOERR


def test_no_room_for_a_status(disk: Disk) -> None:
    """A chain without a writable byte comes back with length 0 and changes nothing."""
    assert raw(disk, [header(OUT, 5), b"x" * 512], [])[2] == 0
    assert disk.read(5, SECTOR) == sector(5)


@pytest.mark.parametrize("cut", [[16], [1, 15], [8, 4, 4]])
@pytest.mark.parametrize("data", [[1024], [1, 511, 512], [100, 900, 24]])
def test_vop_61_any_layout(disk: Disk, cut: list[int], data: list[int]) -> None:
    """VOP-61: header, data and status may be cut anywhere; the status may share a segment with data."""
    head, parts, at = header(IN, 7), [], 0
    for n in cut:
        parts.append(head[at : at + n])
        at += n
    status, back, used = raw(disk, parts, [*data[:-1], data[-1] + 1])
    assert (status, used) == (OK, 1025)
    assert b"".join(back)[:-1] == sector(7) + sector(8)
    body = bytes(range(256)) * 4
    out, at = [header(OUT, 9) + body[: data[0]]], data[0]
    for n in data[1:]:
        out.append(body[at : at + n])
        at += n
    assert raw(disk, out, [1])[0] == OK
    assert disk.read(9, 1024) == body


def test_multi_segment_of_every_size(disk: Disk) -> None:
    """Requests of 512 bytes to 1 MiB are byte exact."""
    for n in (1, 2, 7, 8, 9, 255, 1000, 2048):
        data = os.urandom(n * SECTOR)
        disk.write(11, data)
        assert disk.read(11, n * SECTOR) == data


def test_get_id(disk: Disk) -> None:
    """GET_ID gives 20 bytes of serial number, zero padded; less room gets less."""
    status, back, used = raw(disk, [header(GET_ID)], [20, 1])
    assert (status, used) == (OK, 21)
    assert back[0] == b"micemu-disk".ljust(20, b"\0")
    assert raw(disk, [header(GET_ID)], [4, 1])[1][0] == b"mice"


def test_flush(disk: Disk, image: int) -> None:
    """FLUSH succeeds when it was offered and is unsupported otherwise."""
    assert disk.execute(FLUSH, 0, 0, 0) == 0
    with Disk(image, SECTORS, features=1 << C["VIRTIO_BLK_F_SEG_MAX"]) as compat:
        assert compat.execute(FLUSH, 0, 0, 0) == -errno.EOPNOTSUPP
        with pytest.raises(OSError) as e:
            compat.send(DISCARD, 0, layout.BLK_RANGE.pack(sector=0, num_sectors=1))
        assert e.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("unmap", [0, 1])
def test_write_zeroes(disk: Disk, image: int, unmap: int) -> None:
    """WRITE_ZEROES clears exactly its ranges, with and without unmap, on any file system."""
    ranges = [(10, 3), (100, 1), (SECTORS - 2, 2)]
    disk.send(
        WRITE_ZEROES,
        0,
        b"".join(layout.BLK_RANGE.pack(sector=s, num_sectors=n, flags=unmap) for s, n in ranges),
    )
    zero = {s + k for s, n in ranges for k in range(n)}
    for n in range(SECTORS):
        assert os.pread(image, SECTOR, n * SECTOR) == (bytes(SECTOR) if n in zero else sector(n))


def test_discard_keeps_the_rest(disk: Disk, image: int) -> None:
    """DISCARD succeeds and touches nothing outside its ranges; the image keeps its size."""
    disk.send(DISCARD, 0, layout.BLK_RANGE.pack(sector=8, num_sectors=16))
    assert disk.read(7, SECTOR) == sector(7)
    assert disk.read(24, SECTOR) == sector(24)
    assert os.fstat(image).st_size == SECTORS * SECTOR


@pytest.mark.parametrize(
    ("kind", "sector_no", "count", "flags", "want"),
    [
        (DISCARD, SECTORS, 1, 0, errno.EIO),
        (DISCARD, SECTORS - 1, 2, 0, errno.EIO),
        (DISCARD, (1 << 64) - 1, 2, 0, errno.EIO),
        (DISCARD, 0, 1, 1, errno.EOPNOTSUPP),
        (DISCARD, 0, 1, 2, errno.EOPNOTSUPP),
        (WRITE_ZEROES, SECTORS, 1, 0, errno.EIO),
        (WRITE_ZEROES, 0, 0xFFFFFFFF, 0, errno.EIO),
        (WRITE_ZEROES, 0, 1, 2, errno.EOPNOTSUPP),
    ],
)
def test_bad_ranges(
    disk: Disk, image: int, kind: int, sector_no: int, count: int, flags: int, want: int
) -> None:
    """Ranges outside the disk are status 1, unknown flags status 2; the image stays as it is."""
    before = os.pread(image, SECTORS * SECTOR, 0)
    with pytest.raises(OSError) as e:
        disk.send(kind, 0, layout.BLK_RANGE.pack(sector=sector_no, num_sectors=count, flags=flags))
    assert e.value.errno == want
    assert os.pread(image, SECTORS * SECTOR, 0) == before


@pytest.mark.parametrize("size", [1, 15, 17, 16 * 17])
def test_range_list_of_the_wrong_size(disk: Disk, size: int) -> None:
    """A segment list that is no whole number of segments, or too long, is status 1."""
    with pytest.raises(OSError) as e:
        disk.send(WRITE_ZEROES, 0, bytes(size))
    assert e.value.errno == errno.EIO


def test_read_only(image: int) -> None:
    """A read-only disk reads, and fails everything that would write."""
    before = os.pread(image, SECTORS * SECTOR, 0)
    with Disk(image, SECTORS, read_only=True) as d:
        assert d.read(1, SECTOR) == sector(1)
        for kind, data in ((OUT, bytes(512)), (WRITE_ZEROES, layout.BLK_RANGE.pack(sector=0, num_sectors=1))):
            with pytest.raises(OSError) as e:
                d.send(kind, 0, data)
            assert e.value.errno == errno.EIO
    assert os.pread(image, SECTORS * SECTOR, 0) == before


def test_image_shorter_than_the_disk(image: int) -> None:
    """What the image lacks reads as zeros; a write extends it."""
    os.ftruncate(image, 10 * SECTOR + 100)
    with Disk(image, SECTORS) as d:
        assert d.read(9, 4 * SECTOR) == sector(9) + sector(10)[:100] + bytes(SECTOR - 100) + bytes(2 * SECTOR)
        d.write(100, b"z" * SECTOR)
        assert d.read(100, SECTOR) == b"z" * SECTOR


def test_full_file_system_is_an_io_error(tmp_path: Path) -> None:
    """ENOSPC of the image's file system is status 1; the loop and what was written before survive."""
    fd = os.open("/dev/full", os.O_RDWR)
    with Disk(fd, SECTORS) as d:
        for _ in range(3):
            with pytest.raises(OSError) as e:
                d.write(0, bytes(SECTOR))
            assert e.value.errno == errno.EIO
        assert d.read(0, SECTOR) == bytes(SECTOR)
    os.close(fd)


@pytest.mark.parametrize("features", [MODERN, BLK_FEATURES])
def test_vop_44_broken_ring_and_reset(image: int, features: int) -> None:
    """VOP-44: a loop in a chain flags the device; requests end with EIO; a reset makes it work again."""
    with Disk(image, SECTORS, features=features) as d:
        assert d.read(1, SECTOR) == sector(1)
        d.drv.desc(5, 0x1000, 16, 1, 5)
        d.drv.offer(5)
        d.rig.bus.ring_host(0)
        eventually(lambda: bool(d.rig.status & NEEDS_RESET), 20, "NEEDS_RESET")
        assert d.execute(IN, 0, d.pool, 512) == -errno.EIO
        d.reset()
        assert raw(d, [header(IN, 2)], [512, 1])[1][0] == sector(2)


def test_device_gone_ends_every_request(image: int) -> None:
    """A stopped driver ends requests in flight, and later ones, with ESHUTDOWN; nothing hangs."""
    with Disk(image, SECTORS) as d:
        d.backend.kill()
        results: list[int] = []

        def reader() -> None:
            user = lib.mic_blk_user_open(d.ptr)
            results.append(lib.mic_blk_execute(user, IN, 0, d.pool + (1 << 20), 512))
            lib.mic_blk_user_close(user)

        threads = [threading.Thread(target=reader) for _ in range(4)]
        for t in threads:
            t.start()
        eventually(lambda: d.drv.dq[0].avail_idx == 4, 20, "four requests in the ring")
        os.eventfd_write(d.stop_fd, 1)
        for t in threads:
            t.join(20)
        assert results == [-errno.ESHUTDOWN] * 4
        assert d.execute(IN, 0, d.pool, 512) == -errno.ESHUTDOWN


def test_many_threads_share_the_driver(disk: Disk) -> None:
    """Eight threads with an own CardDisk each keep their own data, sleeping and waking."""
    errors: list[BaseException] = []

    def worker(k: int) -> None:
        try:
            with CardDisk(disk.ptr) as f:
                for i in range(100):
                    data = bytes([k, i & 0xFF]) * 1024
                    f.pwrite(data, k * 65536 + i % 16 * 2048)
                    back = bytearray(2048)
                    assert f.pread_into(back, k * 65536 + i % 16 * 2048) == 2048
                    assert back == data
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=worker, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert not errors
    assert not any(t.is_alive() for t in threads)


def test_card_disk_is_a_file(disk: Disk, image: int) -> None:
    """CardDisk: seek, read and write at any offset, discard, zeroes, sync, serial, end of disk."""
    with CardDisk(disk.ptr) as f:
        assert (f.size, f.serial(), f.read_only) == (SECTORS * SECTOR, "micemu-disk", False)
        f.seek(SECTOR * 3 + 1)
        assert f.read(5) == (sector(3) + sector(4))[1:6]
        f.seek(1000)
        assert f.write(b"hello") == 5
        f.sync()
        assert os.pread(image, 7, 999)[1:6] == b"hello"
        big = os.urandom(1 << 20)
        f.pwrite(big, 12345)
        assert os.pread(image, 1 << 20, 12345) == big
        f.seek(-10, os.SEEK_END)
        assert len(f.read(100) or b"") == 10
        assert f.read(1) == b""
        f.write_zeroes(0, 4096)
        assert os.pread(image, 4096, 0) == bytes(4096)
        f.discard(8192, 4096)
        with pytest.raises(OSError) as e:
            f.pwrite(b"xx", f.size - 1)
        assert e.value.errno == errno.ENOSPC
    with pytest.raises(ValueError):
        f.pread_into(bytearray(1), 0)


@pytest.mark.parametrize(
    "features", [MODERN, BLK_FEATURES, BLK_FEATURES | EVENT_IDX, BLK_FEATURES | INDIRECT_DESC]
)
@pytest.mark.parametrize("spin_us", [0, 50])
def test_load_loses_no_wake_up(image: int, features: int, spin_us: int) -> None:
    """Both sides spinning and sleeping, shallow and deep queues: every request comes back."""
    with Disk(image, SECTORS, features=features, spin_us=spin_us) as d:
        for depth in (1, 3, 32):
            b = d.bench(4096, depth, 100, spin_us=spin_us)
            assert b.done > 0
        assert lib.mic_blk_free_pages(d.ptr) * 4096 == (16 << 20) - 8192


def test_idle_disk_uses_no_cpu(image: int) -> None:
    """An idle backend blocks: no CPU time passes while nothing happens."""
    with Disk(image, SECTORS) as d:
        d.read(0, SECTOR)

        def ticks() -> int:
            fields = Path(f"/proc/{d.backend.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        eventually(
            lambda: "S" in Path(f"/proc/{d.backend.pid}/stat").read_text().rsplit(")", 1)[1], 5, "sleep"
        )
        before = ticks()
        assert lib.mic_vdrv_sleep(d.drv.vdrv, ffi.NULL, 0, 0) >= 0
        assert lib.mic_vdrv_sleep(d.drv.vdrv, ffi.NULL, 0, 300) == 0
        assert ticks() - before <= 5  # of 30
