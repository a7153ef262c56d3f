"""``/dev/vop_virtioN`` as an object: ADD_DEVICE, COPY_DESC, CONFIG_CHANGE, poll and mmap (VOP 5, 6).

For backends that were written for the real character device. The host process owns the page and the
life of the device; rings and buffers are used from this process. The arguments are the real
structures, as a buffer of this process or as its address. When the process ends, its device goes.

The CPU copies, or with ``dma=True`` the host's DMA channel 0, which belongs to the host process and is asked for each piece:
as the real driver does it, with its alignment rules and counters, not for speed. All rings of a device have the same number
of entries (EINVAL otherwise), because that is what the host announces.
"""

from __future__ import annotations

import errno
import os
import queue
import select
import threading
import time
from pathlib import Path
from typing import Any

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.bar import FD_COUNT, Bus, drain, eventfd
from mic_emu.vop.bottom_half import BottomHalf, DeviceSlot
from mic_emu.vop.mapping import ReadOnlyMapping
from mic_emu.wire import Channel, PeerClosed, WireError, connect_unix

C = L.CONSTANTS
DESC, CTRL, VQ, COPY = L.DEVICE_DESC, L.DEVICE_CTRL, L.VQCONFIG, L.COPY_DESC
ADD_DEVICE, COPY_DESC, CONFIG_CHANGE = (
    C[f"VIRTIO_{n}"] for n in ("ADD_DEVICE", "COPY_DESC", "CONFIG_CHANGE")
)
REPLY_LIMIT_S = 30.0  # the host's own limits are shorter
DMA_TIMEOUT_MS = 5000
COUNTERS = ("in_bytes", "in_bytes_dma", "out_bytes", "out_bytes_dma", "tx_dst_unaligned", "tx_len_unaligned")

Argument = bytearray | memoryview | bytes | int


def _fail(code: int, what: str) -> OSError:
    return OSError(code, f"{what}: {os.strerror(code)}")


class DeviceFile:
    """One open file, at most one device. Threads may share it: one call at a time, as the real one."""

    def __init__(self, channel: Channel, dma: bool = False) -> None:
        hello, fds = channel.recv(10.0, "the host's greeting")
        self._channel = channel
        self._compat = hello["personality"] == "compat"
        self._page_off: int = hello["page"]
        self._bus = Bus(fds[:FD_COUNT])
        self._calls = threading.Condition(threading.Lock())  # vdev_mutex: one ioctl, poll or close at a time
        self._pollers = 0  # threads that sleep at the wake descriptor
        self._rings = threading.Lock()  # vr_mutex: a copy, or the bottom half at the rings
        self._sending = threading.Lock()
        self._replies: queue.Queue[tuple[dict[str, Any], list[int]]] = queue.Queue()
        self._wake, self._stop = eventfd(), eventfd()
        self._slot: DeviceSlot | None = None
        self._removed = self._closing = self._closed = False
        self._vdev = ffi.new("struct mic_vdev *", {"line_fd": -1})
        self._kick = self._owner = -1
        self._dma = dma
        self._copies: list[Any] = []
        self._thread = threading.Thread(target=self._serve, name="vop-file", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: str | Path, dma: bool = False) -> DeviceFile:
        """``<run dir>/micN/vop.sock``. ``dma``: COPY_DESC uses the host's DMA channel where the rules let it; when the
        host has none to give, the CPU copies. Raises OSError: ENOENT while the card is not up."""
        return cls(Channel(connect_unix(str(path))), dma)

    # --- the four operations --------------------------------------------------------------------

    def ioctl(self, command: int, arg: Argument) -> int:
        """The real numbers, structures and results. Raises OSError."""
        calls = {ADD_DEVICE: self._add, COPY_DESC: self._copy, CONFIG_CHANGE: self._config}
        if command not in calls:
            raise _fail(errno.ENOTTY, f"ioctl {command:#x}")
        with self._calls:
            return calls[command](arg)

    def poll(self, timeout_s: float | None = 0) -> int:
        """POLLIN | POLLOUT once per wake; POLLERR without a device, every time; 0 on time-out (VOP-29)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._calls:
                if self._slot is None or self._removed:
                    return select.POLLERR
                if self._take_wake():
                    return select.POLLIN | select.POLLOUT
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return 0
                self._pollers += 1
            try:
                select.select([self._wake], [], [], left)
            finally:
                with self._calls:
                    self._pollers -= 1
                    self._calls.notify_all()

    def fileno(self) -> int:
        """Readable when ``poll`` would not wait, for select and epoll."""
        return self._wake

    def mmap(self, offset: int, length: int, writable: bool = False) -> ReadOnlyMapping:
        """The device page at 0, ring block i at 4096 + 8192 i; whole regions only (VOP-42).

        Raises OSError: EACCES, EINVAL, ENODEV.
        """
        with self._calls:
            if writable:
                raise _fail(errno.EACCES, "mmap")
            slot = self._device("mmap")
            size = lib.mic_vring_block_size(slot.num)
            regions = [(self._page_off, 4096), *((block, size) for block in slot.blocks)]
            chosen, at = [], 0
            for off, n in regions:
                if at >= offset and at < offset + length:
                    chosen.append((off, n))
                at += n
            starts = [sum(n for _, n in regions[:i]) for i in range(len(regions))]
            if offset not in starts or sum(n for _, n in chosen) != length:
                raise _fail(errno.EINVAL, "mmap")
            return ReadOnlyMapping(self._bus.fds[lib.MIC_FD_HOST], chosen)

    def close(self) -> None:
        """The device is removed from the card; back when it has left it, as the real close. May be repeated."""
        with self._calls:
            if self._closed:
                return
            self._closed = self._closing = True
            os.write(self._stop, (1).to_bytes(8, "little"))
            self._thread.join(REPLY_LIMIT_S)
            self._await_removal()
            self._removed = True
            self._set_wake()
            self._calls.wait_for(lambda: self._pollers == 0, REPLY_LIMIT_S)
            self._channel.close()
            for copy in self._copies:
                lib.mic_copy_destroy(copy)
            lib.mic_vdev_fini(self._vdev)
            for fd in (self._wake, self._stop, self._kick, self._owner):
                if fd >= 0:
                    os.close(fd)
            self._wake = self._stop = self._kick = self._owner = -1
            self._bus.close()

    def _await_removal(self) -> None:
        """What the device held is free afterwards; the host answers the card's hand-shakes meanwhile (VOP 4.7)."""
        if self._slot is None:
            return
        try:
            self._send({"op": "close"})
            while self._channel.recv(REPLY_LIMIT_S, "the removal of the device")[0].get("op") != "closed":
                pass
        except (PeerClosed, WireError, OSError):
            pass  # the host has gone, or takes longer than any limit of its own

    def __enter__(self) -> DeviceFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- inspection -----------------------------------------------------------------------------

    def counters(self, ring: int) -> dict[str, int]:
        """Bytes moved by a ring (VOP-31). Raises OSError EINVAL, ENODEV."""
        self._device("counters")
        return self._count(self._copies[ring])

    @staticmethod
    def _count(copy: Any) -> dict[str, int]:
        s = ffi.new("struct mic_copy_stats *")
        lib.mic_copy_stats(copy, s)
        return {name: int(getattr(s, name)) for name in COUNTERS}

    @property
    def slot_offset(self) -> int:
        """Where the device's slot lies in the mapped page. Raises OSError EINVAL, ENODEV."""
        return self._device("slot_offset").off

    # --- ioctls ---------------------------------------------------------------------------------

    def _device(self, what: str) -> DeviceSlot:
        if self._slot is None:
            raise _fail(errno.EINVAL, what)  # mainline would follow a null pointer here
        if self._removed:
            raise _fail(errno.ENODEV, what)
        return self._slot

    def _add(self, arg: Argument) -> int:
        if self._slot is not None:
            raise _fail(errno.EBUSY, "ADD_DEVICE")
        header = _fetch(arg, DESC.size)
        desc = DESC.unpack(header)
        n, f, c = desc["num_vq"], desc["feature_len"], desc["config_len"]
        size = DESC.size + VQ.size * n + 2 * f + c
        if n > C["MAX_VRINGS"] or (size + 7) & ~7 > C["MAX_DESC_BLK"]:
            raise _fail(errno.EINVAL, "ADD_DEVICE")
        block = _fetch(arg, size)
        if block[: DESC.size] != header:
            raise _fail(errno.EINVAL, "ADD_DEVICE: the header changed meanwhile")
        nums = {VQ.unpack(block[DESC.size + VQ.size * i :][: VQ.size])["num"] for i in range(n)}
        if len(nums) > 1:
            raise _fail(errno.EINVAL, "ADD_DEVICE: rings of different size")
        at = DESC.size + VQ.size * n
        features = int.from_bytes(block[at : at + f], "little")
        reply, fds = self._ask(
            op="add", type=desc["type"], num_vq=n, num=nums.pop() if nums else 0, features=features, feature_len=f,
            config=block[at + 2 * f :].hex(), dma=self._dma,
        )  # fmt: skip
        if "errno" in reply:
            raise OSError(reply["errno"], reply["error"])
        self._kick, *owner = fds
        setup = {"compat": self._compat, "dma_timeout_ms": DMA_TIMEOUT_MS}
        if owner:
            (self._owner,), (offset, address) = owner, reply["bounce"]
            setup |= {"owner": self._owner, "bounce_off": offset, "bounce_addr": address}
        self._opened(
            DeviceSlot.from_dict(reply["slot"]), self._kick, ffi.new("struct mic_copy_setup *", setup)
        )
        return 0

    def _opened(self, slot: DeviceSlot, kick: int, setup: Any) -> None:
        lib.mic_vdev_init(self._vdev, self._bus.ptr, slot.desc, slot.ctrl, kick, -1, slot.shape.num_vq)
        self._vdev.fault_target = slot.off
        self._copies = [lib.mic_copy_create(self._vdev, i, setup) for i in range(slot.shape.num_vq)]
        if ffi.NULL in self._copies:
            raise _fail(errno.ENOMEM, "ADD_DEVICE")
        self._slot = slot
        os.write(self._stop, (1).to_bytes(8, "little"))  # the bottom half looks at the doorbell from now on

    def _copy(self, arg: Argument) -> int:
        slot = self._device("COPY_DESC")
        ring = COPY.unpack(_fetch(arg, COPY.size))["vr_idx"]
        if ring >= slot.shape.num_vq:
            raise _fail(errno.EINVAL, "COPY_DESC")
        try:
            pointer = (
                ffi.cast("void *", arg) if isinstance(arg, int) else ffi.from_buffer("char[]", arg, True)
            )
        except BufferError as e:  # out_len cannot be stored there
            raise _fail(errno.EFAULT, "COPY_DESC") from e
        with self._rings:
            rc = int(lib.mic_copy_desc_run(self._copies[ring], pointer))
        if rc < 0:
            raise _fail(-rc, "COPY_DESC")
        return rc

    def _config(self, arg: Argument) -> int:
        slot = self._device("CONFIG_CHANGE")
        reply, _ = self._ask(op="config", config=_fetch(arg, slot.shape.config_len).hex())
        if "errno" in reply:
            raise OSError(reply["errno"], reply["error"])
        return int(reply["acked"])

    def _ask(self, **msg: Any) -> tuple[dict[str, Any], list[int]]:
        try:
            self._send(msg)
            return self._replies.get(timeout=REPLY_LIMIT_S)
        except (OSError, queue.Empty) as e:
            raise _fail(errno.ENODEV, f"the host does not answer {msg['op']}") from e

    def _send(self, msg: dict[str, Any]) -> None:
        with self._sending:
            self._channel.send(msg)

    # --- the bottom half (VOP 4.3 step 11, 4.5) ---------------------------------------------------

    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._channel.fileno(), select.POLLIN)
        poller.register(self._stop, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poller.poll()}
                if self._kick in ready:
                    drain(self._kick)
                    self._handshake()
                    self._set_wake()
                if self._stop in ready:
                    drain(self._stop)
                    if self._closing:
                        return
                    poller.register(self._kick, select.POLLIN)
                    self._handshake()
                if self._channel.fileno() in ready and not self._messages():
                    return
        except (PeerClosed, WireError, OSError):
            return
        finally:
            self._remove()
            self._replies.put(({"errno": errno.ENODEV, "error": "the card was stopped"}, []))

    def _messages(self) -> bool:
        while got := self._channel.try_recv():
            msg, fds = got
            if msg.get("op") == "removed":
                self._remove()
                self._send({"op": "released"})
                return False
            if msg.get("op") == "counters":
                rows = [self._count(copy) for copy in self._copies]
                self._send({"op": "counters", "counters": {n: sum(row[n] for row in rows) for n in COUNTERS}})
                continue
            self._replies.put((msg, fds))
        return True

    def _handshake(self) -> None:
        assert self._slot
        half = BottomHalf(self._bus, self._slot)
        with self._rings:  # waits for a running copy
            if half.rings_offered:
                self._take_rings(half)
            if half.reset_wanted:
                for i, copy in enumerate(self._copies):
                    lib.mic_copy_reset(copy)
                    # What the card handed over is void: nothing looks at it until it hands over again.
                    self._vdev.vq[i].broken, self._vdev.vq[i].error = True, errno.ENXIO
                half.acknowledge_reset()
        if CTRL.get(self._bus.host, self._slot.ctrl, "guest_ack"):
            CTRL.put(self._bus.host, self._slot.ctrl, "config_change", 0)
            CTRL.put(self._bus.host, self._slot.ctrl, "guest_ack", 0)
            self._send({"op": "guest_ack"})

    def _take_rings(self, half: BottomHalf) -> None:
        assert self._slot
        for i, (block, addr) in enumerate(zip(self._slot.blocks, half.used_addresses(), strict=True)):
            lib.mic_copy_reset(self._copies[i])
            vq = ffi.addressof(self._vdev.vq, i)
            lib.mic_vq_init(vq, self._bus.ptr, block, addr, self._slot.num, self._slot.features)
        half.acknowledge_rings()

    def _remove(self) -> None:
        with self._rings:
            for copy in self._copies:
                lib.mic_copy_remove(copy)
            self._removed = True
        self._set_wake()

    def _set_wake(self) -> None:
        os.write(self._wake, (1).to_bytes(8, "little"))

    def _take_wake(self) -> bool:
        try:
            return bool(os.read(self._wake, 8))
        except BlockingIOError:
            return False


def _fetch(arg: Argument, length: int) -> bytes:
    """``length`` bytes of a buffer, or at an address of this process. Raises OSError EFAULT."""
    if isinstance(arg, int):
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            try:
                data = os.pread(memory.fileno(), length, arg)
            except (OSError, OverflowError, ValueError):
                data = b""
    else:
        data = bytes(memoryview(arg)[:length])
    if len(data) < length:
        raise _fail(errno.EFAULT, "argument")
    return data
