"""What every device of a kernel class has in sysfs beside its own attributes: uevent, subsystem, power/ (COSM 6).

The values are those of a class device without power management of its own, as the kernel's driver core shows
them: there is nothing to suspend.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mic_emu.host.attributes import Refused, invalid

Read = Callable[[], Awaitable[bytes]]
Write = Callable[[bytes], Awaitable[None]]
ACTIONS = ("add", "remove", "change", "move", "online", "offline", "bind", "unbind")
CONTROLS = ("auto", "on")


@dataclass(frozen=True)
class File:
    """One file of the tree, or a symbolic link (``mode`` with its type; what is read is the target).

    ``wakes``: the card whose state changes wake its pollers, or "".
    """

    mode: int
    read: Read
    write: Write | None = None
    wakes: str = ""


def constant(content: bytes) -> Read:
    """Reads ``content``."""

    async def read() -> bytes:
        return content

    return read


async def _uevent(data: bytes) -> None:
    """``udevadm trigger`` writes the event to send. Nobody listens here: the words are checked, no more."""
    word = data.decode("latin-1").removesuffix("\n").partition(" ")[0]
    if word not in ACTIONS:
        raise invalid(word, f"one of {', '.join(ACTIONS)}")


async def _no_autosuspend(data: bytes = b"") -> bytes:
    raise Refused("the device has no autosuspend", errno.EIO)


async def _set_no_autosuspend(data: bytes) -> None:
    await _no_autosuspend(data)


class DeviceClass:
    """The files of class ``mic``; power/control is kept by card and has no effect."""

    def __init__(self) -> None:
        self._control: dict[str, str] = {}

    def files(self, name: str) -> dict[str, File]:
        """Those of card ``name``, by path."""
        base = f"class/mic/{name}"

        async def control() -> bytes:
            return f"{self._control.get(name, CONTROLS[0])}\n".encode()

        async def set_control(data: bytes) -> None:
            word = data.decode("latin-1").removesuffix("\n")
            if word not in CONTROLS:
                raise invalid(word, " or ".join(CONTROLS))
            self._control[name] = word

        return {
            f"{base}/uevent": File(0o644, constant(b""), _uevent),  # major number 0: no device node to name
            f"{base}/subsystem": File(stat.S_IFLNK | 0o777, constant(b"../../../class/mic")),
            f"{base}/power/control": File(0o644, control, set_control),
            f"{base}/power/runtime_status": File(0o444, constant(b"unsupported\n")),
            f"{base}/power/runtime_active_time": File(0o444, constant(b"0\n")),
            f"{base}/power/runtime_suspended_time": File(0o444, constant(b"0\n")),
            f"{base}/power/autosuspend_delay_ms": File(0o644, _no_autosuspend, _set_no_autosuspend),
        }
