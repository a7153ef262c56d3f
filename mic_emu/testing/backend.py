"""Your backend in a test: real rings in real card memory, the card's driver played by the test.

::

    with BackendRig(Echo()) as driver:
        assert driver.request(b"abc", room=16) == b"cba"

The fixture ``fake_driver`` of the pytest plugin makes one and closes it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.bar import drain, eventfd
from mic_emu.memory import page_align
from mic_emu.testing.rings import DRIVER_OK, NEEDS_RESET, FakeDevice, FakeDriver, Rig
from mic_emu.vop.backend import Backend, DeviceLoop, Place
from mic_emu.vop.bottom_half import BottomHalf, DeviceSlot
from mic_emu.vop.device_page import SlotShape

STOP_LIMIT_S = 10.0
ANSWER_S = 20.0
FEATURE_LEN = 8


@dataclass
class Request:
    """Buffers of a chain in flight: card addresses and lengths in bytes (0: none)."""

    queue: int
    at: int
    data: bytes
    room_at: int
    room: int


class BackendRig:
    """Runs ``backend`` in a thread as its process would, hand-shakes included; this object is the card's driver.

    ``accept``: bits that the driver takes of what the backend offers. ``folder``: the card's run directory, for a
    backend that has sockets there. Context manager; an exception of the
    backend, and memory that it had no right to touch, are raised at its end. ``rig`` and ``driver`` are the
    parts of ``mic_emu.testing.rings``, for tests that break the rules.
    """

    def __init__(self, backend: Backend, folder: str | Path = "", *, accept: int = ~0) -> None:
        self.backend = backend
        backend.place = Place(folder=Path(folder))
        backend.open()
        self.rig = Rig(
            backend.num, num_vq=backend.num_vq, features=backend.features & accept,
            device_type=backend.device_type or 42, config=backend.config,
        )  # fmt: skip
        self.configs: list[bytes] = []
        backend.announce = self.configs.append
        self._control = eventfd()
        self._device = FakeDevice(self.rig, control_fd=self._control)
        self.driver = FakeDriver(self.rig)
        self.loop = DeviceLoop(backend, self._device.vdev)
        shape = SlotShape(backend.num_vq, FEATURE_LEN, len(backend.config))
        slot = DeviceSlot(0, self.rig.slot_off, backend.device_type, shape, backend.num, backend.features,
                          list(self.rig.blocks))  # fmt: skip
        self._bottom = BottomHalf(self.rig.bus, slot)
        self._rings_ready = False
        self._answers: dict[int, bytes] = {}
        self._pending: dict[int, Request] = {}
        self._dead: list[tuple[int, bytes]] = []  # what the device must not touch any more: address, content
        self._tokens = 0
        self._failure: BaseException | None = None
        self._ending = False
        self._closed = False
        self._last_words = ""
        self._thread = threading.Thread(target=self._run, name="backend", daemon=True)
        at, bits = slot.desc + shape.features_off, backend.features.to_bytes(FEATURE_LEN, "little")
        self.rig.bus.host.write(at, bits)

    # --- the backend's side -------------------------------------------------------------------------

    def _run(self) -> None:
        kick = self.rig.bus.vector_fd(0)
        try:
            ready = False
            while not self._ending:
                self._handshake()
                if self._rings_ready and lib.mic_vdev_driver_ok(self._device.vdev):
                    if not ready:
                        ready = True
                        self.backend.driver_ok()
                    self.loop.run()
                else:
                    ready = False
                    lib.mic_wait_fds(ffi.new("int[]", [kick, self._control]), 2, -1)
                    drain(kick)
                drain(self._control)
        except BaseException as e:
            self._failure = e

    def _handshake(self) -> None:
        """What ``BackendProcess`` of the host answers (VOP 4.3 step 11, 4.5)."""
        if self._bottom.rings_offered:
            used, features = self._bottom.used_addresses(), self._bottom.accepted_features()
            self._rings_ready = all(
                lib.mic_vq_init(vq, self.rig.bus.ptr, block, at, self.rig.num, features) == 0
                for vq, block, at in zip(self._device.vq, self.rig.blocks, used, strict=True)
            )
            self._bottom.acknowledge_rings()
        if self._bottom.reset_wanted:
            self._rings_ready = False
            self.loop.reset()
            self._bottom.acknowledge_reset()

    # --- life -----------------------------------------------------------------------------------

    def __enter__(self) -> BackendRig:
        self._thread.start()
        try:
            self.bring_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self.stop()
            if kind is None:
                self.check()
        finally:
            self.close()
        if self._failure and kind is None:
            raise self._failure

    def bring_up(self) -> None:
        """The driver accepts features, hands its used rings over and sets DRIVER_OK (VOP 4.3)."""
        slot = self._bottom.slot
        accepted = self.rig.features.to_bytes(FEATURE_LEN, "little")
        self.rig.bus.host.write(slot.desc + slot.shape.accepted_off, accepted)
        self.offer_rings(self.rig.used)
        self.rig.status = DRIVER_OK
        self.rig.bus.ring_host(0)

    def offer_rings(self, used: list[int]) -> None:
        """The hand-over of used rings at ``used``, waited for; a card may name any address."""
        slot = self._bottom.slot
        for i, at in enumerate(used):
            L.VQCONFIG.put(self.rig.bus.host, slot.desc + slot.shape.vq_off(i), "used_address", at)
        self.rig.put_ctrl("used_address_updated", 1)
        self.rig.bus.ring_host(0)
        self.until(lambda: not self.rig.ctrl("used_address_updated"), "the backend takes the used rings")

    def reset(self) -> None:
        """The card resets the device and brings it up again; chains in flight are lost (VOP 4.5)."""
        self.rig.put_ctrl("h2c_vdev_db", 0)
        self.rig.put_ctrl("host_ack", 0)
        self.rig.put_ctrl("vdev_reset", 1)
        self.rig.bus.ring_host(0)
        self.until(lambda: self.rig.ctrl("host_ack"), "the backend answers the reset")
        self.forget()
        self.driver.reset()
        self.bring_up()

    def forget(self) -> None:
        """Buffers in flight belong to the card again; ``check`` sees whether the device touches them (VOP-57)."""
        for request in self._pending.values():
            for at, length in ((request.at, len(request.data)), (request.room_at, request.room)):
                if length:
                    size = page_align(length)
                    self.rig.bus.gddr.write(at, b"\xa5" * size)
                    self._dead.append((at, b"\xa5" * size))
        self._pending.clear()

    def stop(self) -> None:
        """The device goes while the card may be anywhere: the backend's thread ends. May be repeated."""
        self._ending = True
        if not self._thread.is_alive():
            return
        os.write(self._control, (1).to_bytes(8, "little"))
        self._thread.join(STOP_LIMIT_S)
        if self._thread.is_alive():
            raise AssertionError(f"the backend does not come back from process() within {STOP_LIMIT_S:g} s")

    def close(self) -> None:
        """Stop and free everything. May be repeated."""
        if self._closed:
            return
        self._last_words = self.report()
        self.stop()
        self._closed = True
        self.backend.close()
        self.driver.close()
        self._device.close()
        self.rig.close()
        os.close(self._control)

    # --- requests -------------------------------------------------------------------------------

    @property
    def broken(self) -> bool:
        """Has the backend's side set NEEDS_RESET?"""
        return bool(self.rig.status & NEEDS_RESET)

    @property
    def in_flight(self) -> int:
        """Requests that are not answered yet."""
        return len(self._pending)

    def submit(self, data: bytes = b"", room: int = 0, queue: int = 0) -> int:
        """Make a chain available and kick; returns its token. Raises OSError ENOSPC: the ring is full."""
        at, room_at = (self.rig.alloc(n) if n else 0 for n in (len(data), room))
        out, back = ([(at, len(data))] if data else []), ([(room_at, room)] if room else [])
        if data:
            self.rig.bus.gddr.write(at, data)
        try:
            self.driver.add(out, back, self._tokens + 1, queue)
        except OSError:
            self._free(at, room_at)
            raise
        self._tokens += 1
        self._pending[self._tokens] = Request(queue, at, data, room_at, room)
        self.driver.kick(queue)
        return self._tokens

    def answer(self, token: int, queue: int = 0, within_s: float = ANSWER_S) -> bytes:
        """Wait for the answer to ``token``: what the backend wrote."""

        def answered() -> bool:
            self.collect(queue)
            return token in self._answers

        self.until(answered, "an answer", within_s)
        return self._answers.pop(token)

    def request(self, data: bytes = b"", room: int = 0, queue: int = 0, within_s: float = ANSWER_S) -> bytes:
        """Send and wait for the answer."""
        return self.answer(self.submit(data, room, queue), queue, within_s)

    def collect(self, queue: int = 0) -> list[int]:
        """Take what the device has used, check it, free its buffers; returns the tokens. Does not wait."""
        found = []
        dq = self.driver.dq[queue]
        while self.driver_sees(queue):
            elem = self.rig.used[queue] + 4 + L.VRING_USED_ELEM.size * (dq.last_used & (self.rig.num - 1))
            claimed = L.VRING_USED_ELEM.get(self.rig.bus.gddr, elem, "len")
            got = self.driver.get(queue)
            if got is None:
                break
            token, length = got
            request = self._pending.pop(token)
            # VOP-25: a compat device counts the readable bytes as well.
            limit = request.room + len(request.data)
            assert claimed <= limit, f"the device says it wrote {claimed} bytes to a chain of {limit}"
            self._check_request(request)
            self._answers[token] = self.rig.bus.gddr.read(request.room_at, length)
            self._free(request.at, request.room_at)
            found.append(token)
        return found

    def driver_sees(self, queue: int = 0) -> bool:
        """Is there a completion to collect?"""
        return bool(lib.mic_dq_has_completion(self.driver.dq[queue]))

    def until(self, condition: Callable[[], object], what: str, within_s: float = ANSWER_S) -> None:
        """Wait, awake at each interrupt of the device, until ``condition()`` is true.

        Raises AssertionError naming ``what``, or the exception with which the backend ended.
        """
        deadline = time.monotonic() + within_s
        while not condition():
            if self._failure:
                raise self._failure
            left = deadline - time.monotonic()
            assert left > 0, f"{what}: not within {within_s:g} s"
            if not any(lib.mic_dq_enable_interrupt(dq) for dq in self.driver.dq):
                lib.mic_vdrv_sleep(
                    self.driver.vdrv, ffi.new("int[]", [-1]), 0, min(100, int(left * 1000) + 1)
                )

    # --- what must hold -----------------------------------------------------------------------------

    def check(self) -> None:
        """Every request in flight is as the driver made it, and memory that the device lost is untouched."""
        if self._failure:
            raise self._failure
        for request in self._pending.values():
            self._check_request(request)
        for at, content in self._dead:
            now = self.rig.bus.gddr.read(at, len(content))
            assert now == content, f"the device wrote to {at:#x}, which it had lost with the reset (VOP-57)"

    def _check_request(self, r: Request) -> None:
        if r.data:
            assert self.rig.bus.gddr.read(r.at, len(r.data)) == r.data, (
                "the device wrote to a readable buffer"
            )
        behind = page_align(r.room) - r.room
        if behind:
            tail = self.rig.bus.gddr.read(r.room_at + r.room, behind)
            assert not any(tail), f"the device wrote behind the {r.room} bytes of a writable buffer"

    def _free(self, *addresses: int) -> None:
        for at in filter(None, addresses):
            self.rig.gddr_pages.free(at)

    def report(self) -> str:
        """The rings, for a failing test; as they were last when all is closed."""
        if self._closed:
            return self._last_words
        lines = [f"{type(self.backend).__name__}: status {self.rig.status:#x}, {self.loop.processed} chains processed, "
                 f"{len(self._pending)} in flight"]  # fmt: skip
        for i, (block, used) in enumerate(zip(self.rig.blocks, self.rig.used, strict=True)):
            avail, vq = block + 16 * self.rig.num, self._device.vq[i]
            state = f"broken ({os.strerror(vq.error)})" if vq.broken else "good"
            lines.append(f"ring {i}: num {self.rig.num}, avail {self.rig.bus.host.load(avail + 2, 2)}, "
                         f"used {self.rig.bus.gddr.load(used + 2, 2)}, taken {vq.last_avail}, {state}")  # fmt: skip
            for k in range(min(self.rig.num, 8)):
                d = L.VRING_DESC.unpack(self.rig.bus.host.read(block + 16 * k, 16))
                lines.append(f"  [{k}] {d['addr']:#x}+{d['len']} flags {d['flags']:#x} next {d['next']}")
        return "\n".join(lines)
