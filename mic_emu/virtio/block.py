"""The card's disk for Python: a file object over the block driver, and its load generator (VOP 9.4)."""

from __future__ import annotations

import errno
import io
import os
import threading
from typing import Any

from mic_emu import layout
from mic_emu._native import ffi, lib
from mic_emu.virtio.features import bits

C = layout.CONSTANTS
SECTOR: int = lib.MIC_BLK_SECTOR
BUFFER = 256 << 10  # bytes of GDDR that one open disk moves at a time


def bench(
    driver: Any,
    block: int,
    depth: int,
    ms: int,
    *,
    spin_us: int,
    stop_fd: int,
    random: bool = True,
    write: bool = False,
) -> dict[str, float]:
    """Load a disk for ``ms`` milliseconds with ``depth`` requests (1..64) of ``block`` bytes in flight.

    driver: ``struct mic_blk_drv *``. ``spin_us``: the longest spin, 0 always sleeps. Returns iops,
    mb_per_s, p50_us, p99_us. Raises OSError (ESHUTDOWN when ``stop_fd`` became readable).
    """
    b = ffi.new("struct mic_blk_bench *")
    b.block, b.depth, b.runtime_ms, b.random, b.write = block, depth, ms, random, write
    rc = lib.mic_blk_bench(driver, b, spin_us, stop_fd)
    if rc < 0:
        raise OSError(-rc, f"disk benchmark: {os.strerror(-rc)}")
    return {"iops": b.iops, "mb_per_s": b.mb_per_s, "p50_us": b.p50_us, "p99_us": b.p99_us}


class CardDisk(io.RawIOBase):
    """A disk as a raw file object: any offset and length, safe to use from several threads.

    driver: ``struct mic_blk_drv *``, which must outlive this object.
    Errors are OSError with EIO, EROFS, ENOSPC (beyond the end), EOPNOTSUPP, ESHUTDOWN (device gone).
    Unaligned writes read the sectors at their edges first, and are not atomic against other writers.
    """

    def __init__(self, driver: Any) -> None:
        self._ptr = ffi.NULL
        self._driver = driver
        self.features = int(lib.mic_blk_drv_features(driver))
        self._lock = threading.RLock()
        self._pos = 0
        self._ptr = lib.mic_blk_user_open(driver)
        if self._ptr == ffi.NULL:
            raise OSError(ffi.errno, f"disk: {os.strerror(ffi.errno)}")
        self._room = BUFFER
        while not (addr := lib.mic_blk_alloc(driver, self._room)) and self._room > 4096:
            self._room //= 2
        if not addr:
            lib.mic_blk_user_close(self._ptr)
            self._ptr = ffi.NULL
            raise OSError(errno.ENOMEM, "disk: the driver's pool is used up")
        self._addr = addr
        self._mem = ffi.buffer(lib.mic_blk_at(driver, addr, self._room), self._room)

    @property
    def read_only(self) -> bool:
        """The disk refuses writes."""
        return bool(self.features & bits("BLK", "RO"))

    @property
    def size(self) -> int:
        """Bytes."""
        return int(lib.mic_blk_drv_capacity(self._driver)) * SECTOR

    def _execute(self, kind: str, sector: int, length: int) -> None:
        rc = lib.mic_blk_execute(self._ptr, C[f"VIRTIO_BLK_T_{kind}"], sector, self._addr, length)
        if rc < 0:
            raise OSError(-rc, f"disk: {kind} of {length} bytes at sector {sector}: {os.strerror(-rc)}")

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on a closed disk")

    def _span(self, off: int, length: int) -> tuple[int, int, int]:
        """(first sector, bytes of whole sectors, bytes in front of ``off``), at most one buffer."""
        lead = off % SECTOR
        whole = min((lead + length + SECTOR - 1) // SECTOR * SECTOR, self._room)
        return off // SECTOR, whole, lead

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return not self.read_only

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        with self._lock:
            base = {os.SEEK_SET: 0, os.SEEK_CUR: self._pos, os.SEEK_END: self.size}[whence]
            if base + offset < 0:
                raise OSError(errno.EINVAL, "disk: negative position")
            self._pos = base + offset
            return self._pos

    def tell(self) -> int:
        return self._pos

    def readinto(self, buffer: Any, /) -> int:
        with self._lock:
            n = self.pread_into(buffer, self._pos)
            self._pos += n
            return n

    def write(self, data: Any, /) -> int:
        with self._lock:
            n = self.pwrite(data, self._pos)
            self._pos += n
            return n

    def pread_into(self, buffer: Any, off: int) -> int:
        """Fill ``buffer`` from byte ``off``; returns the bytes read (fewer at the end of the disk)."""
        self._check_open()
        view = memoryview(buffer).cast("B")
        want = max(0, min(len(view), self.size - off))
        done = 0
        with self._lock:
            while done < want:
                sector, whole, lead = self._span(off + done, want - done)
                self._execute("IN", sector, whole)
                n = min(whole - lead, want - done)
                view[done : done + n] = self._mem[lead : lead + n]
                done += n
        return done

    def pwrite(self, data: Any, off: int) -> int:
        """Write all of ``data`` at byte ``off``. Raises OSError ENOSPC when it does not fit."""
        self._check_open()
        view = memoryview(data).cast("B")
        if self.read_only:
            raise OSError(errno.EROFS, "disk: read-only")
        if off + len(view) > self.size:
            raise OSError(errno.ENOSPC, f"disk: {len(view)} bytes at {off} do not fit its {self.size} bytes")
        done = 0
        with self._lock:
            while done < len(view):
                sector, whole, lead = self._span(off + done, len(view) - done)
                n = min(whole - lead, len(view) - done)
                if n < whole:
                    self._execute("IN", sector, whole)
                self._mem[lead : lead + n] = view[done : done + n]
                self._execute("OUT", sector, whole)
                done += n
        return done

    def sync(self) -> None:
        """Everything written so far is on the host's disk (FLUSH). Without the feature, nothing to do."""
        self._check_open()
        if self.features & bits("BLK", "FLUSH"):
            with self._lock:
                self._execute("FLUSH", 0, 0)

    def _ranges(self, kind: str, off: int, length: int, most: int, flags: int) -> None:
        self._check_open()
        if off % SECTOR or length % SECTOR:
            raise OSError(errno.EINVAL, f"disk: {kind} works on whole sectors")
        with self._lock:
            at, end = off // SECTOR, (off + length) // SECTOR
            while at < end:
                n = min(most, end - at)
                self._mem[0:16] = layout.BLK_RANGE.pack(sector=at, num_sectors=n, flags=flags)
                self._execute(kind, 0, 16)
                at += n

    def discard(self, off: int, length: int) -> None:
        """The bytes are not needed any more (whole sectors)."""
        self._ranges("DISCARD", off, length, lib.MIC_BLK_MAX_DISCARD, 0)

    def write_zeroes(self, off: int, length: int, *, unmap: bool = True) -> None:
        """The bytes read as zeros from now on (whole sectors); ``unmap`` may free the host's space."""
        self._ranges("WRITE_ZEROES", off, length, lib.MIC_BLK_MAX_ZEROES, int(unmap))

    def serial(self) -> str:
        """The disk's id string."""
        self._check_open()
        with self._lock:
            self._mem[0:20] = bytes(20)
            self._execute("GET_ID", 0, C["VIRTIO_BLK_ID_LEN"])
            return bytes(self._mem[0:20]).rstrip(b"\0").decode("ascii", "replace")

    def close(self) -> None:
        if self._ptr != ffi.NULL:
            with self._lock:
                lib.mic_blk_user_close(self._ptr)
                lib.mic_blk_free(self._driver, self._addr, self._room)
                self._ptr = ffi.NULL
        super().close()
