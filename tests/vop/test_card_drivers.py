"""What goes wrong in one driver of the card stays there: the card goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mic_emu._native import ffi
from mic_emu.card.os import disk
from mic_emu.card.os.disk import BlockDriver
from mic_emu.card.os.drivers import Environment
from mic_emu.card.os.pydriver import PythonDriver
from mic_emu.card.os.vop import VirtioDevice
from mic_emu.vop.driver import Driver


class Log:
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def error(self, text: str, **_: object) -> None:
        self.said.append(text)

    info = error


def device(log: Log) -> VirtioDevice:
    """As much of a device as these need."""
    known: dict[str, Any] = {
        "bus": None, "vdrv": None, "features": 0, "read_config": lambda off, length: bytes(length), "log": log,
        "alloc": lambda size: 0, "page": SimpleNamespace(pointer=ffi.NULL), "slot": SimpleNamespace(off=0),
    }  # fmt: skip
    return cast(VirtioDevice, SimpleNamespace(**known))


class Clumsy(Driver):
    """A user's driver with a mistake everywhere."""

    device_type = 63
    fails_at_once = True

    def __init__(self, *args: Any) -> None:
        if self.fails_at_once:
            raise KeyError("start")

    def run(self) -> None:
        raise KeyError("run")

    def config_changed(self) -> None:
        raise KeyError("change")

    def close(self) -> None:
        raise KeyError("close")


def test_mistakes_of_a_users_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is told in the log; one at the start fails the device, as the kernel's probe does."""
    log = Log()
    driver = PythonDriver(Clumsy, cast(Environment, SimpleNamespace(boot={"dir": str(tmp_path)})))
    driver.dev = device(log)
    with pytest.raises(OSError, match="Clumsy cannot start: KeyError"):
        driver.create(driver.dev)
    driver.destroy()
    monkeypatch.setattr(Clumsy, "fails_at_once", False)
    driver.create(driver.dev)
    driver.config_changed()
    assert driver.loop() == 0
    driver.destroy()
    assert log.said == [
        "Clumsy cannot start: KeyError: 'start'",
        "Clumsy does not take the new configuration: KeyError: 'change'",
        "Clumsy ended: KeyError: 'run'",
        "Clumsy cannot close: KeyError: 'close'",
    ]


def test_a_disk_whose_socket_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is given back, and the failed probe can be cleaned up."""
    names: set[str] = set()
    env = cast(
        Environment,
        SimpleNamespace(
            boot={"dir": str(tmp_path)},
            free_name=lambda kind: names.add(kind + "a") or kind + "a",  # type: ignore[func-returns-value]
            release_name=names.discard,
        ),
    )
    monkeypatch.setattr(disk, "lib", SimpleNamespace(mic_blk_drv_create=lambda *_: ffi.NULL))
    monkeypatch.setattr(disk, "created", lambda made, _: made)

    def full(_: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "listen_unix", full)
    driver = BlockDriver(env)
    with pytest.raises(OSError, match="No space left"):
        driver.create(device(Log()))
    driver.destroy()
    assert not names
