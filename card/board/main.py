"""The board: registers, bootstrap, reset and DMA engine of one card, as silicon does it.

It outlives the card OS: whatever happens to that, registers and GDDR stay as they are until the
host resets the card. The loop waits on the reset and boot lines, on the card OS process and on the
host's channel; nothing runs in between.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from typing import Any

from mic_emu import layout as L
from mic_emu._native import ffi, lib
from mic_emu.bar import FD_COUNT, Bus, drain
from mic_emu.card.board.bootstrap import BootRefused, Bootstrap
from mic_emu.card.board.dma import DmaEngine
from mic_emu.log import Log
from mic_emu.memory import create_gddr, retire_gddr
from mic_emu.proc import kill_descendants
from mic_emu.wire import Channel, PeerClosed

C = L.CONSTANTS
APIC_ID = 4

# POST codes: what the host's debug file and `micemu dump` show (two characters, HW 6.2).
POST_MEMORY, POST_READY = "09", "12"
POST_NO_MEMORY = "F1"
POST_BOOTING, POST_OS, POST_REFUSED, POST_OS_DEAD = "30", "FF", "F2", "F4"


def download_address(gddr_size: int) -> int:
    """Where the image goes: 64 MiB, lower on a small card, so that the ramdisk at twice that fits."""
    return min(64 << 20, (gddr_size // 4) & ~0xFFFFF)


class Board:
    """One card's hardware."""

    def __init__(self, bus: Bus, host: Channel, args: dict[str, Any], log: Log) -> None:
        self.bus = bus
        self.host = host
        self.args = args
        self.log = log
        self.bootstrap = Bootstrap(bus, args, log)
        self.os_pid = 0
        self.os_fd = -1
        self.generation = 0  # of GDDR: one per reset
        self.announced = False
        self.poller = select.poll()
        for fd in (bus.fds[lib.MIC_FD_RESET], bus.fds[lib.MIC_FD_BOOT], host.fileno()):
            self.poller.register(fd, select.POLLIN)
        self.dma = DmaEngine(bus)
        self.late_doorbells = lib.mic_fault_clock_start(bus.ptr)
        if self.late_doorbells == ffi.NULL:
            raise OSError(ffi.errno, f"the thread for late doorbells: {os.strerror(ffi.errno)}")

    def close(self) -> None:
        """End the threads."""
        lib.mic_fault_clock_stop(self.late_doorbells)
        self.dma.close()

    def post(self, code: str) -> None:
        """Show a POST code."""
        self.bus.hw_store("postcode", ord(code[0]) | ord(code[1]) << 8)

    def power_on(self) -> None:
        """Reset everything and let the bootstrap get ready for a download (HW 6.2)."""
        self.kill_os()
        self.dma.reset()
        lib.mic_hw_reset(self.bus.ptr)
        self.post(POST_MEMORY)
        self.new_memory()

    def new_memory(self) -> None:
        """GDDR comes up zeroed: it is another object after each reset, and the old one is emptied.

        Whatever still maps the old one (a stopped program, a backend) cannot reach the next card OS, and
        its windows fault. The bootstrap asks for an image only when the host has the new one, too.
        """
        self.generation += 1
        old = os.dup(self.bus.fds[lib.MIC_FD_GDDR])
        try:
            fresh = create_gddr(f"{self.args['name']}-gddr", self.bus.gddr.size)
            self.bus.replace_gddr(fresh)
        except OSError as e:
            self.post(POST_NO_MEMORY)
            self.log.error(f"no card memory after the reset: {e}", event="no_memory")
            self.host.send({"event": "no_memory", "errno": e.errno, "why": str(e)})
            return
        finally:
            retire_gddr(old)
            os.close(old)
        self.host.send({"event": "memory", "generation": self.generation}, [self.bus.fds[lib.MIC_FD_GDDR]])

    def ask_for_image(self) -> None:
        """The bootstrap waits for a download (HW 6.2)."""
        base = download_address(self.bus.gddr.size)
        self.post(POST_READY)
        self.bus.hw_store(
            "spad", base | APIC_ID << C["DOWNLOAD_APIC_SHIFT"] | C["DOWNLOAD_READY"], C["SPAD_DOWNLOAD"]
        )
        if not self.announced:
            self.announced = True
            self.host.send({"event": "power_on"})

    def serve_host(self) -> None:
        """What the host process said. Raises PeerClosed when it switches the power off."""
        while got := self.host.try_recv():
            if got[0].get("generation") == self.generation:
                self.ask_for_image()

    def kill_os(self) -> None:
        """Drop all card CPUs: the OS process, and with it everything that runs on the card."""
        if not self.os_pid:
            return
        self.reap_os(expected=True)

    def reap_os(self, expected: bool) -> None:
        """The OS process has ended, or ends now: collect it with all it started, tell the host."""
        if expected:
            os.kill(self.os_pid, signal.SIGKILL)
        _, status = os.waitpid(self.os_pid, 0)
        # No card CPU may write to memory once a reset goes on: wait for everything it had started.
        kill_descendants()
        self.poller.unregister(self.os_fd)
        os.close(self.os_fd)
        pid, self.os_pid, self.os_fd = self.os_pid, 0, -1
        code = os.waitstatus_to_exitcode(status)
        if not expected and code != 0:
            self.post(POST_OS_DEAD)
        self.host.send({"event": "os_exit", "pid": pid, "status": code, "reset": expected})

    def boot(self) -> None:
        """The bootstrap interrupt: start what was downloaded, or refuse it with a POST code."""
        spad = self.bus.read("spad", C["SPAD_DOWNLOAD"])
        if not spad & C["DOWNLOAD_READY"] or self.os_pid:
            self.log.warning("boot interrupt ignored: not waiting for a download")
            return
        self.bus.hw_store("spad", spad & ~C["DOWNLOAD_READY"], C["SPAD_DOWNLOAD"])
        self.post(POST_BOOTING)
        base, size = spad & C["DOWNLOAD_ADDR_MASK"], self.bus.read("spad", C["SPAD_FW_SIZE"])
        try:
            self.os_pid = self.bootstrap.start(base, size)
        except (BootRefused, OSError) as e:
            self.post(POST_REFUSED)
            self.log.error(f"the bootstrap refuses the image: {e}", event="bootstrap_refused")
            self.host.send({"event": "refused", "why": str(e)})
            return
        self.os_fd = os.pidfd_open(self.os_pid)
        self.poller.register(self.os_fd, select.POLLIN)
        self.post(POST_OS)
        # People look at, stop and kill the card OS itself, not the shim that stands for it in its pid namespace.
        self.host.send(
            {"event": "os_start", "pid": self.bootstrap.inner_pid, "contained": self.bootstrap.contained}
        )

    def run(self) -> None:
        """Until the host closes its channel: power off."""
        reset, boot = self.bus.fds[lib.MIC_FD_RESET], self.bus.fds[lib.MIC_FD_BOOT]
        self.power_on()
        while True:
            ready = {fd for fd, _ in self.poller.poll()}
            if reset in ready:
                drain(reset)
                self.power_on()
                continue
            if self.os_fd in ready:
                self.reap_os(expected=False)
            if boot in ready:
                drain(boot)
                self.boot()
            if self.host.fileno() in ready:
                try:
                    self.serve_host()
                except PeerClosed:
                    self.kill_os()
                    return


def main(args: dict[str, Any], fds: list[int]) -> int:
    """Entry point in the process that init forked. fds: host channel, then the card's descriptors."""
    log = Log(args["log_fd"], process="board", card=args["name"])
    lib.mic_proc_adopt_orphans()
    with Bus(fds[1 : 1 + FD_COUNT]) as bus:
        board = Board(bus, Channel(socket.socket(fileno=fds[0])), args, log)
        try:
            board.run()
        except OSError as e:
            log.warning(f"the host is gone: {e}")
        finally:
            board.close()
    return 0
