"""Your backend in a test: real rings in real card memory, the card's driver played by the test.

::

    with BackendRig(Echo()) as rig:
        assert rig.request(b"abc", room=16) == b"cba"
"""

from __future__ import annotations

import os
import threading
import time

from mic_emu._native import ffi, lib
from mic_emu.bar import drain, eventfd
from mic_emu.testing.rings import DRIVER_OK, NEEDS_RESET, FakeDevice, FakeDriver, Rig
from mic_emu.vop.backend import Backend, DeviceLoop

PAGE = 4096


class BackendRig:
    """Runs ``backend`` in a thread. Context manager; an exception of the backend is raised at its end.

    ``rig`` and ``driver`` are the parts of ``mic_emu.testing.rings``, for tests that break the rules.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.rig = Rig(
            backend.num, num_vq=backend.num_vq, features=backend.features, device_type=backend.device_type or 42,
            config=backend.config,
        )  # fmt: skip
        self.configs: list[bytes] = []
        backend.announce = self.configs.append
        self._control = eventfd()
        self._device = FakeDevice(self.rig, control_fd=self._control)
        self.driver = FakeDriver(self.rig)
        self.loop = DeviceLoop(backend, self._device.vdev)
        self._answers: dict[int, bytes] = {}
        self._rooms: dict[int, tuple[int, int]] = {}
        self._tokens = 0
        self._failure: BaseException | None = None
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.rig.status = DRIVER_OK
            self.backend.driver_ok()
            while not self._ending:
                rc = self.loop.run()
                if rc == lib.MIC_RUN_CONTROL:
                    drain(self._control)
        except BaseException as e:
            self._failure = e

    def __enter__(self) -> BackendRig:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._stop()
        self.backend.close()
        self.driver.close()
        self._device.close()
        self.rig.close()
        os.close(self._control)
        if self._failure and kind is None:
            raise self._failure

    def _stop(self) -> None:
        self._ending = True
        os.write(self._control, (1).to_bytes(8, "little"))
        self._thread.join(10)
        if self._thread.is_alive():
            raise AssertionError("the backend does not come back from process()")

    @property
    def broken(self) -> bool:
        """Has the backend's side set NEEDS_RESET?"""
        return bool(self.rig.status & NEEDS_RESET)

    def submit(self, data: bytes = b"", room: int = 0, queue: int = 0) -> int:
        """Send a request; returns its token."""
        self._tokens += 1
        out, back = [], []
        if data:
            at = self.rig.alloc(len(data))
            self.rig.bus.gddr.write(at, data)
            out = [(at, len(data))]
        if room:
            back = [(self.rig.alloc(room), room)]
            self._rooms[self._tokens] = back[0]
        self.driver.add(out, back, self._tokens, queue)
        self.driver.kick(queue)
        return self._tokens

    def answer(self, token: int, queue: int = 0, within_s: float = 5.0) -> bytes:
        """Wait for the answer to ``token``: what the backend wrote."""
        deadline = time.monotonic() + within_s
        while token not in self._answers:
            if self._failure:
                raise self._failure
            assert time.monotonic() < deadline, f"no answer within {within_s} s"
            self._collect(queue)
        return self._answers.pop(token)

    def _collect(self, queue: int) -> None:
        while got := self.driver.get(queue):
            token, length = got
            at, _ = self._rooms.pop(token, (0, 0))
            self._answers[token] = self.rig.bus.gddr.read(at, length)
        if not lib.mic_dq_enable_interrupt(self.driver.dq[queue]):
            lib.mic_vdrv_sleep(self.driver.vdrv, ffi.new("int[]", [-1]), 0, 100)

    def request(self, data: bytes = b"", room: int = 0, queue: int = 0, within_s: float = 5.0) -> bytes:
        """Send and wait for the answer."""
        return self.answer(self.submit(data, room, queue), queue, within_s)

    def reset(self) -> None:
        """The card resets the device: the backend loses the chains that it kept."""
        self._stop()
        self.loop.reset()
        self._device.reset()
        self.driver.reset()
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
