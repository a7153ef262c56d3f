"""virtio-console: configuration space, host pty, client messages, the native loops (VOP 8.6, 9.3)."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import struct
import termios
import tty
from types import TracebackType
from typing import Any

from mic_emu import layout
from mic_emu._native import ffi, lib

COMPAT_FEATURES = 0
"""The stock backend offered nothing."""
MODERN_FEATURES: int = sum(
    1 << layout.CONSTANTS[f"VIRTIO_{name}"]
    for name in ("CONSOLE_F_SIZE", "F_INDIRECT_DESC", "F_EVENT_IDX", "F_VERSION_1")
)

MSG_INPUT: int = lib.MIC_CON_MSG_INPUT
MSG_SIZE: int = lib.MIC_CON_MSG_SIZE
MSG_MAX = 0xFFFF
BUFFER = 4096
"""Bytes of one buffer of the card driver."""


def offered_features(personality: str) -> int:
    """Host feature bits of ``personality``: ``compat`` or ``modern``."""
    return COMPAT_FEATURES if personality == "compat" else MODERN_FEATURES


def pack_config(cols: int = 80, rows: int = 24) -> bytes:
    """The 12-byte configuration space."""
    return layout.CONSOLE_CONFIG.pack(cols=cols, rows=rows, max_nr_ports=1, emerg_wr=0)


def input_message(data: bytes) -> bytes:
    """What a client sends for typed bytes; long input becomes several messages."""
    parts = (data[i : i + MSG_MAX] for i in range(0, len(data), MSG_MAX))
    return b"".join(struct.pack("<BH", MSG_INPUT, len(p)) + p for p in parts)


def size_message(cols: int, rows: int) -> bytes:
    """What a client sends when its window has changed."""
    return struct.pack("<BHHH", MSG_SIZE, 4, cols, rows)


def set_window_size(fd: int, cols: int, rows: int) -> None:
    """TIOCSWINSZ on a terminal or pty master: programs get SIGWINCH."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, cols, 0, 0))


class HostPty:
    """The host's end of the console: a raw pty. ``slave`` is the name to open (VOP-60).

    The slave is not kept open, so that the loop sees whether somebody listens. Context manager.
    """

    def __init__(self) -> None:
        self.fd, slave = pty.openpty()
        try:
            tty.setraw(slave)
            self.slave = os.ttyname(slave)
            os.set_blocking(self.fd, False)
            os.set_inheritable(self.fd, False)
        finally:
            os.close(slave)

    def resize(self, cols: int, rows: int) -> None:
        """Pass a window size on to whoever has the slave open."""
        set_window_size(self.fd, cols, rows)

    def close(self) -> None:
        """Hang up."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> HostPty:
        return self

    def __exit__(
        self, t: type[BaseException] | None, v: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _stats(call: Any, ptr: Any) -> dict[str, int]:
    s = ffi.new("struct mic_con_stats *")
    call(ptr, s)
    return {name: int(getattr(s, name)) for name, _ in ffi.typeof("struct mic_con_stats").fields}


def _created(ptr: Any, what: str) -> Any:
    if not ptr:
        err = ffi.errno
        raise OSError(err, f"{what}: {os.strerror(err)}")
    return ptr


class ConsoleDevice:
    """Device half, in a backend process. ``vdev`` is a ``struct mic_vdev *`` with two rings.

    ``pty_fd``: HostPty.fd; ``log_fd``: opened for appending; ``listen_fd``: non-blocking listening Unix
    socket for clients. Each may be -1 and stays the caller's. ``group``: whose members are welcome beside our
    user and root. Context manager.
    """

    def __init__(
        self, vdev: Any, *, pty_fd: int = -1, log_fd: int = -1, listen_fd: int = -1, group: int | None = None
    ) -> None:
        self._keep = vdev
        self.ptr = _created(lib.mic_con_dev_create(vdev, pty_fd, log_fd, listen_fd), "console device")
        if group is not None:
            lib.mic_con_dev_admit(self.ptr, group)

    def run(self) -> int:
        """Serve until a decision is needed: a MIC_RUN_* number; MIC_RUN_RESIZE: look at ``window_size``."""
        return int(lib.mic_con_dev_run(self.ptr))

    @property
    def window_size(self) -> tuple[int, int]:
        """(columns, rows) that the last client sent."""
        size = int(lib.mic_con_dev_size(self.ptr))
        return size >> 16, size & 0xFFFF

    def stats(self) -> dict[str, int]:
        """Counters by name."""
        return _stats(lib.mic_con_dev_stats, self.ptr)

    def close(self) -> None:
        """Drop all clients and free."""
        if self.ptr:
            lib.mic_con_dev_destroy(self.ptr)
            self.ptr = ffi.NULL

    def __enter__(self) -> ConsoleDevice:
        return self

    def __exit__(
        self, t: type[BaseException] | None, v: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def driver_area(buffers: int = 16) -> int:
    """Bytes of GDDR for ``buffers`` buffers per direction."""
    return 2 * buffers * BUFFER


class ConsoleDriver:
    """Driver half, in the card OS: rings <-> ``local_fd``, a non-blocking pty master of the card."""

    def __init__(self, vdrv: Any, local_fd: int, area: int, length: int) -> None:
        self._keep = vdrv
        self.ptr = _created(lib.mic_con_drv_create(vdrv, local_fd, area, length), "console driver")

    def run(self) -> int:
        """Run until stopped (MIC_RUN_CONTROL) or the local end is closed (MIC_RUN_LOCAL).

        Raises OSError EIO when the device broke a ring.
        """
        rc: int = lib.mic_con_drv_run(self.ptr)
        if rc < 0:
            raise OSError(
                -rc, "console driver: the device broke a ring" if rc == -errno.EIO else "console driver"
            )
        return rc

    def stats(self) -> dict[str, int]:
        """Counters by name."""
        return _stats(lib.mic_con_drv_stats, self.ptr)

    def close(self) -> None:
        """Free."""
        if self.ptr:
            lib.mic_con_drv_destroy(self.ptr)
            self.ptr = ffi.NULL

    def __enter__(self) -> ConsoleDriver:
        return self

    def __exit__(
        self, t: type[BaseException] | None, v: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
