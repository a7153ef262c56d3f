"""Host and card ends as packet sockets, joined by both native loops in threads of this process."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mic_emu._native import lib
from mic_emu.testing.netpair import NetRig, eventfd
from mic_emu.testing.rings import FakeDevice, FakeDriver
from mic_emu.virtio import net

BIG = 65536 + 14


def eventually(check: Callable[[], Any], what: str, within_s: float = 20.0) -> Any:
    """Wait for a condition without sleeping blindly; returns its value."""
    deadline = time.monotonic() + within_s
    while not (value := check()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        select.select([], [], [], 0.001)
    return value


def packet_pair() -> tuple[socket.socket, socket.socket]:
    """A SEQPACKET pair that holds large frames: one end for the loop, one for the test."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for s in (a, b):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        s.setblocking(False)
    b.settimeout(20)
    return a, b


class Loop:
    """A native loop in a thread; ``results`` collects what it returned."""

    def __init__(self, run: Callable[[], int], stop_fd: int, again: Callable[[int], bool]) -> None:
        self.results: list[int] = []
        self.error: OSError | None = None
        self.stop_fd = stop_fd
        self._run, self._again = run, again
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        try:
            while True:
                self.results.append(self._run())
                if not self._again(self.results[-1]):
                    return
        except OSError as e:
            self.error = e

    def join(self, within_s: float = 20.0) -> None:
        """Wait until the loop has returned by itself."""
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"the loop did not end within {within_s} s"

    def stop(self) -> None:
        """Make stop_fd readable and wait."""
        os.write(self.stop_fd, (1).to_bytes(8, "little"))
        self.join()
        os.close(self.stop_fd)


class Wire:
    """``host`` and ``card`` are the test's sockets; frames carry a vnet header of ``hdr`` bytes.

    ``card=False`` leaves the driver half to the test (``fake``), ``host=False`` the device half.
    """

    def __init__(
        self, features: int, num: int = 128, *, card: bool = True, host: bool = True, area: int | None = None
    ) -> None:
        self.rig = NetRig(features, num, area=area)
        self.hdr = net.header_length(features)
        self.host_loop_end, self.host = packet_pair()
        self.card_loop_end, self.card = packet_pair()
        self.loops: list[Loop] = []
        self.stop_fds = [eventfd(), eventfd()]
        self.fake = FakeDriver(self.rig.rig, stop_fd=self.stop_fds[1])
        self.device: FakeDevice = self.rig.device(self.stop_fds[0])
        self.nd = net.NetDevice(self.device.vdev, self.host_loop_end.fileno())
        self.drv: net.NetDriver | None = None
        if card:
            self.drv = net.NetDriver(
                self.fake.vdrv, self.card_loop_end.fileno(), self.rig.area, self.rig.area_len, self.rig.mtu
            )
            self.loops.append(Loop(self.drv.run, self.stop_fds[1], lambda why: False))
        if host:
            self.host_loop = Loop(self.nd.run, self.stop_fds[0], self._again)
            self.loops.append(self.host_loop)

    @staticmethod
    def _again(why: int) -> bool:
        return why in (lib.MIC_RUN_HANDSHAKE, lib.MIC_RUN_SIGNAL)

    def header(self, flags: int = 0) -> bytes:
        """A vnet header without segmentation."""
        return bytes([flags]) + bytes(self.hdr - 1)

    def send(self, side: str, frame: bytes, flags: int = 0) -> None:
        """Send from ``host`` or ``card``."""
        (self.host if side == "host" else self.card).send(self.header(flags) + frame)

    def recv(self, side: str) -> bytes:
        """Next frame that arrived at ``host`` or ``card``, without its header."""
        return (self.host if side == "host" else self.card).recv(BIG + 64)[self.hdr :]

    def capture(self, cap: net.Capture | None) -> None:
        """Attach or detach a capture as a backend does: the loop comes back, and runs again."""
        os.write(self.stop_fds[0], (1).to_bytes(8, "little"))
        self.host_loop.join()
        os.read(self.stop_fds[0], 8)
        self.nd.capture(cap)
        self.loops.remove(self.host_loop)
        self.host_loop = Loop(self.nd.run, self.stop_fds[0], self._again)
        self.loops.append(self.host_loop)

    def stats(self) -> net.NetStats:
        """The device's counters."""
        return self.nd.stats()

    def close(self) -> None:
        """Stop the loops, free everything."""
        for loop in self.loops:
            loop.stop()
        for obj in (self.nd, self.drv, self.device, self.fake, self.rig):
            if obj is not None:
                obj.close()
        for s in (self.host_loop_end, self.host, self.card_loop_end, self.card):
            s.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def frames(sizes: list[int], seed: int = 1) -> Iterator[bytes]:
    """Ethernet frames of these sizes with distinct bytes."""
    for i, size in enumerate(sizes):
        unit = (seed * 1000003 + i * 7919).to_bytes(8, "little")
        yield (b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02\x88\xb5" + unit * (size // 8 + 1))[:size]
