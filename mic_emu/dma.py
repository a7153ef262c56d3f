"""DMA channels with the vocabulary of the kernel's dmaengine (HW 5.4 - 5.6, HW-22..35).

::

    with DmaChannel(bus, 0, memory, log=log) as ch:
        tx = ch.prep_memcpy(dst, src, length, INTERRUPT)   # None: the ring is full
        cookie = tx.submit(callback)
        ch.issue_pending()
        ch.sync_wait(cookie, timeout_s=5)

Addresses are card addresses: GDDR offsets for card memory, SMPT addresses for host memory.
Submission and completion are C; Python runs once per transaction, never per descriptor.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

from mic_emu._native import ffi, lib
from mic_emu.bar import Bus, drain
from mic_emu.fields import decode
from mic_emu.layout import CONSTANTS as C
from mic_emu.log import Logger
from mic_emu.memory import PAGE, PageAllocator

INTERRUPT = int(lib.MIC_DMA_PREP_INTERRUPT)
FENCE = int(lib.MIC_DMA_PREP_FENCE)
RING_SIZE = C["DMA_RING_SIZE"]
HOST_CHANNELS = C["DMA_HOST_CHANNELS"]
DRAIN_S = 5.0  # the DMA core's limit for a synchronous wait and for the drain (HW 10)
_LET_GO_MS = 1000  # how long one descriptor may still run after its channel was disabled

Callback = Callable[[], None]


class Status(Enum):
    """What ``tx_status`` says about a cookie."""

    IN_PROGRESS = 0
    COMPLETE = 1
    TERMINATED = 2


class DmaError(OSError):
    """EBUSY (channel broken at set-up, or held by another prep), EINVAL (an address or length that
    cannot be encoded), EIO (channel halted), ETIMEDOUT, ECANCELED (terminated)."""


def _error(code: int, what: str) -> DmaError:
    return DmaError(code, f"{what}: {os.strerror(code)}")


@dataclass(frozen=True)
class DmaMemory:
    """Where a channel's ring lives: the allocator of its side, and its way to card addresses.

    ``map(offset, size)`` gives the card address of memory at ``offset`` (0 = failure): ``Smpt.map``
    on the host, the identity on the card. ``unmap`` takes that address back.
    """

    pages: PageAllocator
    map: Callable[[int, int], int] = lambda off, size: off
    unmap: Callable[[int, int], None] = lambda addr, size: None


@dataclass(frozen=True)
class DmaCounters:
    """What one channel's driver did: submitted transactions with their descriptors and bytes,
    completed ones, DHPR writes, preps that found the ring full, impossible counts in DSTAT."""

    transactions: int
    descriptors: int
    bytes: int
    completed: int
    kicks: int
    ring_full: int
    bad_status: int


class Transaction:
    """Prepared descriptors. Must be submitted or discarded: until then nobody else can prepare."""

    def __init__(self, channel: DmaChannel) -> None:
        self._channel = channel
        self._open = True

    def submit(self, callback: Callback | None = None) -> int:
        """Hand it to the channel; returns its cookie. ``callback`` runs once, when it is complete."""
        self._close()
        return self._channel._submit(callback)

    def discard(self) -> None:
        """Take the descriptors back (ours: the kernel's drivers have no such call)."""
        self._close()
        lib.mic_dma_discard(self._channel._ptr)

    def _close(self) -> None:
        if not self._open:
            raise RuntimeError("this transaction was submitted or discarded before")
        self._open = False


class DmaChannel:
    """The owner of channel ``index``: 0-3 on the host, 4-7 on the card.

    ``irq_fd`` is the line that its interrupts signal (None: polling only) and ``ack`` the bus's
    acknowledge operation. ``ring_size`` may be smaller than the real ring to save memory (2 MiB).
    Callbacks run in the thread that finds the completion: whoever calls ``on_interrupt``,
    ``tx_status``, ``sync_wait``, ``poll`` or a prep that needed room. Raises DmaError EBUSY (HW-33),
    OSError ENOMEM.
    """

    def __init__(
        self,
        bus: Bus,
        index: int,
        memory: DmaMemory,
        *,
        irq_fd: int | None = None,
        ack: Callable[[], None] | None = None,
        ring_size: int = RING_SIZE,
        log: Logger | None = None,
    ) -> None:
        self.index = index
        self.irq_fd = irq_fd
        self._ack = ack
        self._bus = bus
        self._memory = memory
        self._log: Logger = log or logging.getLogger("micemu.dma")
        self._callbacks: dict[int, Callback] = {}
        self._tokens = itertools.count(1)
        self._running = threading.Lock()  # held while callbacks run: one at a time, in order
        self._ring_bytes = ring_size * C["DMA_DESC_SIZE"]
        self._ptr = ffi.NULL
        self._acquire(ring_size)

    @property
    def max_bytes(self) -> int:
        """Longest copy of one descriptor (HW 5.1); longer requests are split."""
        return C["DMA_HOST_MAX"] if self.index < HOST_CHANNELS else C["DMA_CARD_MAX"]

    # --- life cycle

    def _acquire(self, ring_size: int) -> None:
        # One block: the ring, then the status line on a page of its own.
        self._block_bytes = self._ring_bytes + PAGE
        self._block = self._memory.pages.alloc(self._block_bytes)
        self._addr = self._memory.map(self._block, self._block_bytes)
        try:
            if not self._addr and self.index < HOST_CHANNELS:
                raise _error(errno.ENOMEM, f"DMA channel {self.index}: the ring cannot be mapped")
            status = (self._addr + self._ring_bytes + 63) & ~63
            setup = ffi.new(
                "struct mic_dma_setup *",
                (self._addr, self._block, status, ring_size, self.max_bytes, self.index, 0),
            )
            self._ptr = lib.mic_dma_chan_create(self._bus.ptr, setup)
            if self._ptr == ffi.NULL:
                raise _error(ffi.errno, f"DMA channel {self.index}")
        except BaseException:
            self._release_memory()
            raise

    def _release_memory(self) -> None:
        if self._addr:
            self._memory.unmap(self._addr, self._block_bytes)
        self._memory.pages.free(self._block)

    def free(self, timeout_s: float = DRAIN_S) -> bool:
        """Drain, stop, give the memory back. Always returns; False when the drain timed out, which
        is logged (HW-34). Callbacks of transactions that never completed do not run."""
        if self._ptr == ffi.NULL:
            return True
        drained = self._drain(timeout_s)
        if lib.mic_dma_chan_stop(self._ptr, _LET_GO_MS) == 0:
            self._run_callbacks()
            self._release_memory()
        else:
            # The engine still writes somewhere: better a leak until the reset than reused memory.
            self._log.warning(f"DMA channel {self.index}: the engine does not let go of the ring")
        lib.mic_dma_chan_destroy(self._ptr)
        self._ptr = ffi.NULL
        self._callbacks.clear()
        return drained

    def _drain(self, timeout_s: float) -> bool:
        rc = lib.mic_dma_prep_memcpy(self._ptr, 0, 0, 0, FENCE)
        if rc == 0:
            rc = lib.mic_dma_wait(self._ptr, lib.mic_dma_submit(self._ptr, 0), int(timeout_s * 1000), False)
        if rc < 0:
            why = (
                "a transaction is prepared, and neither submitted nor discarded"
                if rc == -errno.EBUSY
                else f"{os.strerror(-rc)} within {timeout_s:g} s, {self._why()}"
            )
            self._log.warning(f"DMA channel {self.index}: not drained: {why}")
        return bool(rc == 0)

    def __enter__(self) -> DmaChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.free()

    # --- preparing: None means "no room now" (HW-29) or "nothing to do" (HW-30)

    def prep_memcpy(self, dst: int, src: int, length: int, flags: int = 0) -> Transaction | None:
        """Copy ``length`` bytes between card addresses, all multiples of 64.

        None when the ring is full or there is nothing to do. Raises DmaError EINVAL for what the
        hardware could not encode (the real driver drops low length bits instead), EBUSY.
        """
        if not length and not flags:
            return None
        return self._prepared(lib.mic_dma_prep_memcpy(self._ptr, dst, src, length, flags), "prep_memcpy")

    def prep_memcpy_sg(self, pieces: Sequence[tuple[int, int, int]], flags: int = 0) -> Transaction | None:
        """Several copies (dst, src, length) as one transaction, carried out in their order; the rest as
        ``prep_memcpy``."""
        array = ffi.new("struct mic_dma_piece[]", list(pieces))
        return self._prepared(lib.mic_dma_prep_sg(self._ptr, array, len(pieces), flags), "prep_memcpy_sg")

    def prep_imm_data(self, dst: int, value: int, flags: int = 0) -> Transaction | None:
        """Store the 64-bit ``value`` at card address ``dst``, a multiple of 8, after all before it."""
        return self._prepared(lib.mic_dma_prep_imm(self._ptr, dst, value, flags), "prep_imm_data")

    def prep_interrupt(self, flags: int = INTERRUPT) -> Transaction | None:
        """Only the flags' descriptors: an interrupt or fence after everything before it."""
        return self._prepared(lib.mic_dma_prep_interrupt(self._ptr, flags), "prep_interrupt")

    def _prepared(self, rc: int, what: str) -> Transaction | None:
        self._run_callbacks()  # a prep that needed room has cleaned up
        if rc == -errno.ENOMEM:
            return None
        if rc < 0:
            raise _error(-rc, f"DMA channel {self.index}: {what}")
        return Transaction(self)

    def _submit(self, callback: Callback | None) -> int:
        token = 0
        if callback:
            token = next(self._tokens)
            self._callbacks[token] = callback
        return int(lib.mic_dma_submit(self._ptr, token))

    def issue_pending(self) -> None:
        """Start everything that is submitted (HW-27)."""
        lib.mic_dma_issue_pending(self._ptr)

    # --- completion

    def tx_status(self, cookie: int) -> Status:
        """Where the transaction is; looks at the channel when it is not known to be complete."""
        rc = lib.mic_dma_tx_status(self._ptr, cookie)
        self._run_callbacks()
        if rc == -errno.ECANCELED:
            return Status.TERMINATED
        if rc < 0:
            raise _error(-rc, f"DMA channel {self.index}: cookie {cookie}")
        return Status.COMPLETE if rc else Status.IN_PROGRESS

    def poll(self) -> None:
        """Retire what is complete and run its callbacks."""
        lib.mic_dma_cleanup(self._ptr)
        self._run_callbacks()

    def sync_wait(self, cookie: int, timeout_s: float = DRAIN_S) -> None:
        """Issue, then wait for a cookie. Raises DmaError: ETIMEDOUT, ECANCELED, and EIO as soon as
        the channel has halted (the real driver never looks and would sit out the time)."""
        rc = lib.mic_dma_wait(self._ptr, cookie, int(timeout_s * 1000), True)
        self._run_callbacks()
        if rc < 0:
            raise _error(-rc, f"DMA channel {self.index}: cookie {cookie} ({self._why()})")

    def on_interrupt(self) -> None:
        """The handler: call it when ``irq_fd`` is readable."""
        if self.irq_fd is not None:
            drain(self.irq_fd)
        lib.mic_dma_ack_interrupt(self._ptr)
        if self._ack:
            self._ack()
        self.poll()

    def terminate_all(self, timeout_s: float = _LET_GO_MS / 1000) -> None:
        """Drop everything that is not complete; its callbacks never run. The channel goes on.

        Raises DmaError ETIMEDOUT when the engine does not let go within ``timeout_s`` seconds, EIO when
        its tail register is no slot of the ring; then the channel stays disabled.
        """
        rc = lib.mic_dma_terminate(self._ptr, int(timeout_s * 1000))
        self._run_callbacks()
        if rc < 0:
            raise _error(-rc, f"DMA channel {self.index}: terminate_all")

    def pause(self) -> None:
        """Stand still after the descriptor in progress; nothing is lost (the X100 driver has no such
        operation, but the enable bit is one). Raises DmaError ETIMEDOUT."""
        rc = lib.mic_dma_pause(self._ptr, _LET_GO_MS)
        if rc < 0:
            raise _error(-rc, f"DMA channel {self.index}: pause")

    def resume(self) -> None:
        """Go on after ``pause``."""
        lib.mic_dma_resume(self._ptr)

    def _run_callbacks(self) -> None:
        # Not blocking: the thread (or the callback further up this stack) that runs callbacks now
        # looks again after it let go, so nothing is left behind and nothing runs out of order.
        while lib.mic_dma_done_pending(self._ptr) and self._running.acquire(blocking=False):
            try:
                token = ffi.new("uint64_t *")
                while lib.mic_dma_take_done(self._ptr, token, 1):
                    callback = self._callbacks.pop(token[0] & ~lib.MIC_DMA_TOKEN_DROPPED)
                    if not token[0] & lib.MIC_DMA_TOKEN_DROPPED:
                        callback()
            finally:
                self._running.release()

    # --- inspection

    @property
    def position(self) -> int:
        """How far it got: the count of DSTAT, modulo the ring."""
        return self._bus.read("dstat", self.index) & int(C["DMA_DSTAT_COUNT"])

    def _why(self) -> str:
        """DCHERR with its bits in words."""
        causes = decode("dcherr", self.error)["errors"]
        return f"DCHERR {self.error:#x} {causes}".rstrip()

    @property
    def error(self) -> int:
        """DCHERR: 0, or why the channel halted."""
        return self._bus.read("dcherr", self.index)

    @property
    def halted(self) -> bool:
        """Has an error stopped the channel until the next card reset?"""
        return bool(lib.mic_dma_halted(self._ptr))

    def counters(self) -> DmaCounters:
        """The driver's counters."""
        c = ffi.new("struct mic_dma_counters *")
        lib.mic_dma_count(self._ptr, c)
        return DmaCounters(
            c.transactions, c.descriptors, c.bytes, c.completed, c.kicks, c.ring_full, c.bad_status
        )
