"""What every backend process does around its C loop: open the device, hand-shakes, requests."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.bar import FD_COUNT, Bus, drain
from mic_emu.log import Log
from mic_emu.vop.bottom_half import BottomHalf, DeviceSlot
from mic_emu.wire import Channel, PeerClosed, WireError

C = L.CONSTANTS
CTRL = L.DEVICE_CTRL


class OpenFailed(Exception):
    """The host process refused the device."""


class BackendProcess(ABC):
    """One device in one process. Subclasses give the device's shape and its C loop.

    ``fds`` beyond the channel and the card's descriptors are the subclass's own (``self.extra``).
    """

    kind: int
    num_vq: int
    num = C["VRING_ENTRIES"]

    def __init__(self, args: dict[str, Any], fds: list[int]) -> None:
        self.args = args
        self.log = Log(args["log_fd"], process="backend", card=args["card"], device=args["device"])
        self.channel = Channel(socket.socket(fileno=fds[0]))
        self.bus = Bus(fds[1 : 1 + FD_COUNT])
        self.extra = fds[1 + FD_COUNT :]
        self.vdev = ffi.new("struct mic_vdev *")
        self.kick_fd = -1
        self.rings_ready = False
        self.announced = False
        self.driver_failed = False
        self.found = False
        self.done = False

    # --- the subclass ---------------------------------------------------------------------------

    @abstractmethod
    def features(self) -> int:
        """Feature bits that the device offers."""

    @abstractmethod
    def config(self) -> bytes:
        """The device's configuration space."""

    def opened(self) -> None:
        """The device is announced: create the C side of it over ``self.vdev``."""

    @abstractmethod
    def loop(self) -> int:
        """Run the C loop until it wants Python; returns ``enum mic_run`` or -errno."""

    def driver_ready(self) -> None:
        """The card's driver has set DRIVER_OK."""

    def returned(self, rc: int) -> None:
        """A loop result that is the device's own (above MIC_RUN_LOCAL, or an errno)."""

    def stats(self) -> dict[str, Any]:
        """Counters for ``micemu status`` and ``top``."""
        return {}

    def request(self, op: str, msg: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """A request of the host process that only this device knows."""
        return {"error": f"unknown request {op!r}"}

    def close(self) -> None:
        """Free the C side."""

    # --- life -------------------------------------------------------------------------------

    def open(self) -> None:
        """ADD_DEVICE. Raises OpenFailed."""
        config = self.config()
        self.channel.send({
            "op": "add", "type": self.kind, "num_vq": self.num_vq, "num": self.num,
            "features": self.features(), "config": config.hex(),
            "feature_len": 4 if self.args.get("personality") == "compat" else 8,
        })  # fmt: skip
        reply, fds = self.channel.recv(10.0, "the host's answer to ADD_DEVICE")
        if "error" in reply:
            raise OpenFailed(reply["error"])
        self.kick_fd = fds[0]
        self.slot = DeviceSlot.from_dict(reply["slot"])
        self.bottom = BottomHalf(self.bus, self.slot)
        lib.mic_vdev_init(
            self.vdev,
            self.bus.ptr,
            self.slot.desc,
            self.slot.ctrl,
            self.kick_fd,
            self.channel.fileno(),
            self.num_vq,
        )
        self.vdev.fault_target = self.slot.off
        self.opened()

    def facts(self, **facts: Any) -> None:
        """Tell the host process something that ``status`` shows."""
        self.channel.send({"op": "facts", "facts": facts})

    def event(self, message: str, **fields: Any) -> None:
        """An entry in the event stream."""
        self.channel.send({"op": "event", "message": message, "fields": fields})

    def init_rings(self, used: list[int]) -> bool:
        """Set the rings up over what the card offered; a bad offer leaves them unusable (VOP-47).

        Both halves follow the features that the card accepted: a driver without EVENT_IDX must be kicked
        by flags, whatever was offered.
        """
        features = self.bottom.accepted_features()
        for i, (block, addr) in enumerate(zip(self.slot.blocks, used, strict=True)):
            rc = lib.mic_vq_init(
                ffi.addressof(self.vdev.vq[i]), self.bus.ptr, block, addr, self.slot.num, features
            )
            if rc < 0:
                self.event(
                    f"ring {i}: the card's used ring at {addr:#x} is refused: {os.strerror(-rc)}", ring=i
                )
                return False
        return True

    def handshake(self) -> None:
        """Whatever the card asked for in the control block."""
        if self.bottom.rings_offered:
            self.rings_ready = self.init_rings(self.bottom.used_addresses())
            if self.rings_ready:
                self.bottom.acknowledge_rings()
            else:
                CTRL.put(self.bus.host, self.slot.ctrl, "used_address_updated", 0)
        if self.bottom.reset_wanted:
            self.rings_ready = False
            self.reset()
            self.bottom.acknowledge_reset()
        if CTRL.get(self.bus.host, self.slot.ctrl, "guest_ack"):
            # In this order: a scan of the card in between must not take the old change for a new one.
            CTRL.put(self.bus.host, self.slot.ctrl, "config_change", 0)
            CTRL.put(self.bus.host, self.slot.ctrl, "guest_ack", 0)
            self.channel.send({"op": "guest_ack"})

    def reset(self) -> None:
        """The card resets the device: forget half-done work (VOP-57)."""

    def run(self) -> None:
        """Serve the device until the host says stop or is gone."""
        poller = select.poll()
        poller.register(self.kick_fd, select.POLLIN)
        poller.register(self.channel.fileno(), select.POLLIN)
        while not self.done:
            self.handshake()
            if self.rings_ready and lib.mic_vdev_driver_ok(self.vdev):
                if not self.announced:
                    self.announced = True
                    self.channel.send({"op": "driver_ok"})
                    self.driver_ready()
                rc = self.loop()
                if rc > lib.MIC_RUN_SIGNAL or rc < 0:
                    self.returned(rc)
            else:
                if self.announced:
                    self.announced = False
                    self.channel.send({"op": "driver_lost"})
                self.notice_status()
                poller.poll()
                drain(self.kick_fd)
            self.serve_requests()

    def notice_status(self) -> None:
        """Whoever waits for the device learns that the card's driver gave up (FAILED in the status byte), and that
        the card has found the device (ACKNOWLEDGE) and so far no driver for it."""
        status = self.bottom.status()
        failed = bool(status & C["VIRTIO_FAILED"])
        if failed != self.driver_failed:
            self.driver_failed = failed
            self.channel.send({"op": "driver_failed", "failed": failed})
        found = status == C["VIRTIO_ACKNOWLEDGE"]
        if found and not self.found:
            self.channel.send({"op": "found"})
        self.found = found

    def serve_requests(self) -> None:
        """Requests of the host process that are here already."""
        while not self.done and (got := self.channel.try_recv()):
            msg, fds = got
            op = msg.get("op", "")
            if op == "stop":
                self.done = True
                continue
            try:
                reply = {"stats": self.stats()} if op == "stats" else self.request(op, msg, fds)
            except OSError as e:
                reply = {"error": f"{op}: {e}"}
            if "id" in msg:
                self.channel.send({"reply": msg["id"], **reply})


def serve(
    make: Callable[[dict[str, Any], list[int]], BackendProcess], args: dict[str, Any], fds: list[int]
) -> int:
    """Entry point of a backend process."""
    process = make(args, fds)
    try:
        with contextlib.closing(process):
            process.open()
            process.run()
        if threading.active_count() == 1:  # else a thread of a user's backend may still look at the rings
            process.channel.send({"op": "done"})  # the card lets go of the device while this process ends
    except OpenFailed as e:
        process.facts(fatal=f"the device cannot be added: {e}")
    except (PeerClosed, WireError):
        return 0  # the host has gone; init ends us anyway
    return 0
