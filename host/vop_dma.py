"""Host DMA channel 0 for programs that move their device's bytes with COPY_DESC (VOP 7).

The channel belongs to the host process. A program that wants it gets a bounce buffer in host memory and a socket: the copy
engine in its process sends each copy between that buffer and card memory, and hears when it is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct

from mic_emu._native import ffi, lib
from mic_emu.clock import Clock, wait_for
from mic_emu.dma import DRAIN_S, INTERRUPT, DmaChannel, DmaError
from mic_emu.host.smpt import Smpt
from mic_emu.memory import PageAllocator

BOUNCE = int(lib.MIC_COPY_BOUNCE)
ALIGN = 64
LOOK_S = 0.1  # an interrupt may be lost, or the mode may have none for DMA (HW-15)
_JOB, _DONE = struct.Struct("<QQQQ"), struct.Struct("<Qq")
assert (_JOB.size, _DONE.size) == (ffi.sizeof("struct mic_copy_job"), ffi.sizeof("struct mic_copy_done"))


class ProgramDma:
    """One program's bounce buffer and its copies, one after the other. Raises OSError ENOMEM."""

    def __init__(
        self, channel: DmaChannel, memory: PageAllocator, smpt: Smpt, gddr: int, clock: Clock
    ) -> None:
        self._channel, self._memory, self._smpt, self._gddr, self._clock = channel, memory, smpt, gddr, clock
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.offset = memory.alloc(BOUNCE)
        self.address = smpt.map(self.offset, BOUNCE)
        if not self.address:
            memory.free(self.offset)
            raise OSError(errno.ENOMEM, "no SMPT entry for a bounce buffer")
        self._ours.setblocking(False)
        self.stuck = False  # a copy did not end: the engine may still write to the buffer
        self._task = asyncio.ensure_future(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while len(job := await loop.sock_recv(self._ours, _JOB.size)) == _JOB.size:
            ident, dst, src, length = _JOB.unpack(job)
            try:
                await self._copy(dst, src, length)
                result = 0
            except OSError as e:
                result = -(e.errno or errno.ETIMEDOUT)
            try:
                await loop.sock_sendall(self._ours, _DONE.pack(ident, result))
            except OSError:
                return  # the program has gone

    def _ours_and_the_cards(self, dst: int, src: int, length: int) -> bool:
        """One end in the bounce buffer, the other in GDDR, whole lines: a program may ask for anything."""
        if dst % ALIGN or src % ALIGN or length % ALIGN or not 0 < length <= BOUNCE:
            return False
        bounce, card = (dst, src) if dst >= self.address else (src, dst)
        return self.address <= bounce <= self.address + BOUNCE - length and card <= self._gddr - length

    async def _copy(self, dst: int, src: int, length: int) -> None:
        """Raises OSError: EINVAL, ENOMEM (ring full), EIO (halted), ETIMEDOUT."""
        if self.stuck:
            raise OSError(errno.EIO, "an earlier copy did not end")
        if not self._ours_and_the_cards(dst, src, length):
            raise OSError(errno.EINVAL, "not between the bounce buffer and card memory")
        tx = self._channel.prep_memcpy(dst, src, length, INTERRUPT)
        if tx is None:
            raise OSError(errno.ENOMEM, "the ring is full")
        done = asyncio.Event()
        tx.submit(done.set)
        self._channel.issue_pending()
        try:
            await self._clock.within(self._end(done), DRAIN_S, "a copy of a device file")
        except (TimeoutError, DmaError):
            self.stuck = True
            raise

    async def _end(self, done: asyncio.Event) -> None:
        while not done.is_set():
            try:
                await wait_for(done.wait(), LOOK_S)
            except asyncio.TimeoutError:
                self._channel.poll()
                if self._channel.halted and not done.is_set():
                    raise DmaError(errno.EIO, os.strerror(errno.EIO)) from None

    def free(self) -> None:
        """Give the buffer back: nothing writes to it any more."""
        self._smpt.unmap(self.address, BOUNCE)
        self._memory.free(self.offset)

    async def close(self) -> bool:
        """The copy that runs is the last one, and nobody waits for a program to take its answer. False when it did not end,
        so that the engine may still write to the buffer: ``free`` is for after the card's reset then."""
        self.theirs.close()
        with contextlib.suppress(OSError):  # its end was closed with answers in it
            self._ours.shutdown(socket.SHUT_RDWR)
        await asyncio.gather(self._task, return_exceptions=True)
        self._ours.close()
        return not self.stuck
