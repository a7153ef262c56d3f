"""The card's virtio drivers: Python brings a device up, a C loop in a thread moves its bytes."""

from __future__ import annotations

import errno
import ipaddress
import os
import string
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mic_emu import layout as L
from mic_emu import netif
from mic_emu._native import ffi
from mic_emu.bar import Bus
from mic_emu.card.os.userland import Userland
from mic_emu.card.os.vop import VirtioDevice, VirtioDriver
from mic_emu.log import Log
from mic_emu.virtio import console, net

C = L.CONSTANTS
STOP_LIMIT_S = 5.0
INTERFACE = "mic0"  # on every card, as the real ones name it


def bits(*names: str) -> int:
    """Feature bits by name."""
    return sum(1 << C[name] for name in names)


RING = bits("VIRTIO_F_EVENT_IDX", "VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_VERSION_1")


@dataclass
class Environment:
    """What drivers need of the card OS."""

    boot: dict[str, Any]
    params: dict[str, str]
    bus: Bus
    userland: Userland
    log: Log
    names: set[str] = field(default_factory=set)
    drivers: list[LoopDriver] = field(default_factory=list)  # those that run now
    registry: dict[int, Callable[[], VirtioDriver]] = field(default_factory=dict)  # by device type

    def free_name(self, prefix: str) -> str:
        """The first free of vda, vdb, ... Raises OSError ENOSPC."""
        for letter in string.ascii_lowercase:
            name = prefix + letter
            if name not in self.names:
                self.names.add(name)
                return name
        raise OSError(errno.ENOSPC, f"all names {prefix}a to {prefix}z are taken")

    def release_name(self, name: str) -> None:
        self.names.discard(name)


class LoopDriver(ABC):
    """Life of a driver whose work is one blocking C call in a thread."""

    features = RING
    rings = 1

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.dev: VirtioDevice | None = None
        self._thread: threading.Thread | None = None

    async def probe(self, dev: VirtioDevice) -> None:
        """Rings, then the subclass's buffers."""
        self.dev = dev
        await dev.setup_rings(self.rings)
        self.create(dev)

    @abstractmethod
    def create(self, dev: VirtioDevice) -> None:
        """Buffers and the C object. Raises OSError."""

    @abstractmethod
    def loop(self) -> int:
        """The blocking C call."""

    def destroy(self) -> None:
        """Free the C object; the loop has ended."""

    def config_changed(self) -> None:
        """Nothing to do for most devices."""

    def start(self) -> None:
        assert self.dev
        self.env.drivers.append(self)
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self.dev
        rc = self.loop()
        if rc < 0:
            self.dev.log.error(f"the driver's loop ended: {os.strerror(-rc)}")

    def remove(self) -> bool:
        """End the loop, wait for it, free everything; may be called after a failed probe."""
        if self.dev is None:
            return True
        if self in self.env.drivers:
            self.env.drivers.remove(self)
        os.write(self.dev.stop_fd, (1).to_bytes(8, "little"))
        if self._thread:
            self._thread.join(STOP_LIMIT_S)
            if self._thread.is_alive():
                self.dev.log.error("the driver's loop does not end; its memory stays")
                return False
        self.destroy()
        self.dev = None
        return True


def ended(run: Callable[[], int]) -> int:
    """What a loop object's ``run`` returned, or the errno that it raised, negative."""
    try:
        return run()
    except OSError as e:
        return -(e.errno or errno.EIO)


def created(obj: Any, what: str) -> Any:
    """A C object, or the errno that it left. Raises OSError."""
    if obj == ffi.NULL:
        raise OSError(ffi.errno or errno.ENOMEM, f"{what}: {os.strerror(ffi.errno or errno.ENOMEM)}")
    return obj


class ConsoleDriver(LoopDriver):
    """hvc0: the rings <-> the master of the console's pty, on whose slave init runs a shell."""

    features = RING | bits("VIRTIO_CONSOLE_F_SIZE")
    rings = 2

    def __init__(self, env: Environment) -> None:
        super().__init__(env)
        self._obj: console.ConsoleDriver | None = None

    def create(self, dev: VirtioDevice) -> None:
        size = console.driver_area()
        self._obj = console.ConsoleDriver(dev.vdrv, self.env.userland.console, dev.alloc(size), size)

    def loop(self) -> int:
        assert self._obj
        return ended(self._obj.run)

    def destroy(self) -> None:
        if self._obj:
            self._obj.close()
            self._obj = None

    def config_changed(self) -> None:
        """A new window size: the line discipline tells the foreground programs."""
        if self.dev is None or not self.dev.features & bits("VIRTIO_CONSOLE_F_SIZE"):
            return
        cols, rows = struct.unpack("<HH", self.dev.read_config(0, 4))
        console.set_window_size(self.env.userland.console, cols, rows)


class NetworkDriver(LoopDriver):
    """mic0: a TAP in the card's own network namespace, or a responder where none may be had."""

    features = RING | net.COMPAT_FEATURES | net.MODERN_FEATURES
    rings = 2

    def __init__(self, env: Environment) -> None:
        super().__init__(env)
        self._tap: netif.Tap | None = None
        self._responder: net.Responder | None = None
        self._obj: net.NetDriver | None = None

    async def probe(self, dev: VirtioDevice) -> None:
        dev.features = net.accepted_features(dev.features)
        dev.write_features()
        await super().probe(dev)

    def create(self, dev: VirtioDevice) -> None:
        mac = netif.random_mac()
        if dev.features & net.bit("NET_F_MAC"):
            mac = netif.format_mac(dev.read_config(0, 6))
        local = self._local_end(dev, mac, self._address())
        size = net.driver_area(dev.features)
        self._obj = net.NetDriver(dev.vdrv, local, dev.alloc(size), size)

    def _address(self) -> str:
        """From the kernel command line: ``ifcfg=static;address,A;netmask,M`` (COSM-66)."""
        words = dict(w.split(",", 1) for w in self.env.params.get("ifcfg", "").split(";") if "," in w)
        fallback = net.card_address(self.env.boot["index"]).split("/")
        return f"{words.get('address', fallback[0])}/{words.get('netmask', '255.255.255.0')}"

    def _local_end(self, dev: VirtioDevice, mac: str, address: str) -> int | net.Responder:
        if self.env.boot["contained"]:
            try:
                self._tap = netif.open_tap(INTERFACE)
                net.prepare_tap(self._tap, dev.features, card=True)
                netif.configure(INTERFACE, address=str(ipaddress.IPv4Interface(address)), mac=mac)
                try:
                    netif.add_default_route(net.host_address(self.env.boot["index"]).split("/")[0])
                except OSError as e:
                    dev.log.warning(f"no route beyond the host: {e}")
                return self._tap.fd
            except OSError as e:
                dev.log.info(f"no TAP on the card, a responder takes its place: {e.strerror}")
        self._responder = net.Responder(mac, str(ipaddress.IPv4Interface(address)))
        return self._responder

    def loop(self) -> int:
        assert self._obj
        return ended(self._obj.run)

    def ping(self, target: str, count: int, interval_s: float, timeout_s: float) -> net.PingResult:
        """From the responder. Raises OSError EOPNOTSUPP when mic0 is a real interface."""
        if self._responder is None:
            raise OSError(errno.EOPNOTSUPP, "mic0 is an interface of the card: use its own ping")
        return self._responder.ping(target, count, interval_s=interval_s, timeout_s=timeout_s)

    def destroy(self) -> None:
        for obj in (self._obj, self._responder, self._tap):
            if obj:
                obj.close()
        self._obj = self._responder = self._tap = None
