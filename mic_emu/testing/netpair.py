"""A host and a card joined by a real virtio-net device, each half in a process of its own.

No boot, no host process: rings built by hand, TAPs in two namespace pairs. For tests and benchmarks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from mic_emu import layout, netif, netns
from mic_emu._native import ffi, lib
from mic_emu.testing.rings import DRIVER_OK, FakeDevice, FakeDriver, Rig
from mic_emu.virtio import net

NAME = "mic0"


def eventfd() -> int:
    """A new eventfd at 0."""
    fd: int = lib.mic_eventfd(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd))
    return fd


class Child:
    """A forked process that runs ``call``; ``stop_fd`` asks it to end."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self.stop_fd = eventfd()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                call(self.stop_fd)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def stop(self) -> None:
        """Ask, wait, and raise RuntimeError when it did not end well."""
        os.eventfd_write(self.stop_fd, 1) if hasattr(os, "eventfd_write") else os.write(
            self.stop_fd, (1).to_bytes(8, "little")
        )
        _, status = os.waitpid(self.pid, 0)
        os.close(self.stop_fd)
        if status:
            raise RuntimeError(f"a process of the pair ended with status {status}")


class NetRig:
    """A rig with one net device and both loops, in threads or processes of the caller's choice."""

    def __init__(self, features: int, num: int = 128, *, mtu: int = net.MTU, area: int | None = None) -> None:
        self.features, self.mtu = features, mtu
        self.rig = Rig(
            num,
            num_vq=2,
            features=features,
            device_type=layout.CONSTANTS["VIRTIO_ID_NET"],
            config=net.pack_config("02:00:00:00:00:01"),
        )
        self.area_len = area or net.driver_area(features, num, mtu)
        self.area = self.rig.alloc(self.area_len)
        # Rings exist before either half runs, as after the used-ring hand-over.
        FakeDriver(self.rig).close()
        self.rig.status = DRIVER_OK

    def device(self, control_fd: int) -> FakeDevice:
        """The backend half."""
        dev = FakeDevice(self.rig, control_fd=control_fd)
        dev.vdev.status = self.rig.status
        return dev

    def serve_host(
        self,
        stop_fd: int,
        local: int | net.Responder,
        before: Callable[[net.NetDevice], None] | None = None,
        after: Callable[[net.NetDevice], None] | None = None,
    ) -> None:
        """The backend's loop until ``stop_fd``; ``before`` and ``after`` may look at the device."""
        dev = self.device(stop_fd)
        with net.NetDevice(dev.vdev, local) as nd:
            if before:
                before(nd)
            while (why := nd.run()) != lib.MIC_RUN_CONTROL:
                if why == lib.MIC_RUN_LOCAL:
                    raise OSError(nd.error, "the host's local end is gone")
            if after:
                after(nd)
        dev.close()

    def serve_card(self, stop_fd: int, local: int | net.Responder) -> None:
        """The card driver's loop until ``stop_fd``."""
        drv = FakeDriver(self.rig, stop_fd=stop_fd)
        with net.NetDriver(drv.vdrv, local, self.area, self.area_len, self.mtu) as nd:
            while nd.run() != lib.MIC_RUN_CONTROL:
                pass
        drv.close()

    def close(self) -> None:
        """Free the memories."""
        self.rig.close()

    def __enter__(self) -> NetRig:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Ends:
    """Two namespace pairs with a configured TAP ``mic0`` in each: host .254, card .1 (VOP-59)."""

    def __init__(self, features: int, *, mtu: int = net.MTU) -> None:
        self._stack = ExitStack()
        self.host_ip = net.host_address(0).split("/")[0]
        self.card_ip = net.card_address(0).split("/")[0]
        try:
            self.host, self.host_tap = self._end(net.host_address(0), mtu)
            self.card, self.card_tap = self._end(net.card_address(0), mtu)
            net.prepare_tap(self.host_tap, features, card=False)
            net.prepare_tap(self.card_tap, features, card=True)
        except BaseException:
            self.close()
            raise

    def _end(self, address: str, mtu: int) -> tuple[netns.Namespaces, netif.Tap]:
        ns = self._stack.enter_context(netns.create())
        tap = self._stack.enter_context(ns.open_tap(NAME))

        def configure() -> None:
            netif.loopback_up()
            netif.configure(NAME, address=address, mtu=mtu)

        ns.run(configure)
        return ns, tap

    def popen(self, side: str, argv: Sequence[str], **kw: Any) -> subprocess.Popen[str]:
        """Start a program in the namespaces of ``host`` or ``card``."""
        ns = self.host if side == "host" else self.card
        return subprocess.Popen(argv, preexec_fn=ns.enter, pass_fds=(ns.user_fd, ns.net_fd), text=True, **kw)

    def run(self, side: str, argv: Sequence[str], timeout_s: float = 30) -> str:
        """Run a program there; returns its output. Raises CalledProcessError, TimeoutExpired."""
        with self.popen(side, argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as p:
            try:
                out, _ = p.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                p.kill()
                raise
        if p.returncode:
            raise subprocess.CalledProcessError(p.returncode, argv, out)
        return str(out)

    def close(self) -> None:
        """Interfaces and namespaces disappear."""
        self._stack.close()

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class NetPair(Ends):
    """Two ends joined by virtio-net: the backend and the card driver each run in a process."""

    def __init__(
        self,
        features: int,
        *,
        num: int = 128,
        mtu: int = net.MTU,
        area: int | None = None,
        before: Callable[[net.NetDevice], None] | None = None,
        after: Callable[[net.NetDevice], None] | None = None,
    ) -> None:
        super().__init__(features, mtu=mtu)
        self.rig = self._stack.enter_context(NetRig(features, num, mtu=mtu, area=area))
        host_fd, card_fd = self.host_tap.fd, self.card_tap.fd
        self.children = [
            Child(lambda stop: self.rig.serve_card(stop, card_fd)),
            Child(lambda stop: self.rig.serve_host(stop, host_fd, before, after)),
        ]

    def close(self) -> None:
        """Stop both processes; raises RuntimeError when one had failed."""
        children, self.children = getattr(self, "children", []), []
        try:
            for c in children:
                c.stop()
        finally:
            super().close()


class BridgedEnds(Ends):
    """The yardstick: the same two TAPs joined by a plain copier with one thread and one buffer."""

    def __init__(self, *, gso: bool = True, mtu: int = net.MTU) -> None:
        super().__init__(0, mtu=mtu)
        flags = netif.TUN_F_CSUM | netif.TUN_F_TSO4 | netif.TUN_F_TSO6 if gso else 0
        for tap in (self.host_tap, self.card_tap):
            tap.set_header(10)
            tap.set_offload(flags)
        fds = (self.host_tap.fd, self.card_tap.fd)
        self.child = Child(lambda stop: self._bridge(*fds, stop))

    @staticmethod
    def _bridge(a: int, b: int, stop: int) -> None:
        rc = lib.mic_net_bridge(a, b, stop)
        if rc < 0:
            raise OSError(-rc, os.strerror(-rc))

    def close(self) -> None:
        """Stop the copier."""
        child = self.__dict__.pop("child", None)
        try:
            if child:
                child.stop()
        finally:
            super().close()


__all__ = ["NAME", "BridgedEnds", "Child", "Ends", "NetPair", "NetRig", "eventfd", "ffi"]
