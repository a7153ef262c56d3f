"""Control connections: requests of programs, one at a time on each, answered in order."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mic_emu._native import ffi, lib

if TYPE_CHECKING:
    from mic_emu.scif.service import ScifService

REQUEST = struct.Struct("<IIQ5QQ")
_NO_VALUES = (0,) * 8
_HEAD = ffi.new("struct mic_scif_reply *")  # the loop sends one at a time


@dataclass
class Reply:
    """What a request gives back besides its status."""

    values: Sequence[int] = ()
    fds: Sequence[int] = ()
    data: bytes = b""


# What a handler gives back. Nothing: it has taken ``control.call`` and will answer through that.
Answer = Reply | Coroutine[Any, Any, Reply] | None


class Call:
    """A request until it is answered. ``on_cancel``: what to do when its caller stops waiting."""

    __slots__ = ("_control", "on_cancel")

    def __init__(self, control: Control) -> None:
        self._control = control
        self.on_cancel: Callable[[], object] | None = None

    def done(self, reply: Reply) -> None:
        """Answer; nothing when the caller no longer waits."""
        if self._control.call is self:
            self._control.call = None
            self._control.answer(0, reply)

    def fail(self, error: OSError, reply: Reply | None = None) -> None:
        """Answer with the error's errno."""
        if self._control.call is self:
            self._control.call = None
            self._control.answer(-(error.errno or errno.EIO), reply)

    def end(self, error: OSError | None) -> None:
        """Answer without values."""
        if error is None:
            self.done(Reply())
        else:
            self.fail(error)


class Control:
    """A control connection of a process."""

    __slots__ = ("call", "fd", "pid", "process", "service", "uid")

    def __init__(self, service: ScifService, fd: int, pid: int, uid: int, process: int) -> None:
        self.service = service
        self.fd = fd
        self.pid, self.uid = pid, uid
        self.process = process  # the pid as the program itself sees it
        self.call: Call | None = None

    def on_packet(self, packet: memoryview, length: int) -> bool:
        """Serve the request in ``packet``, ``length`` bytes; False when it makes no sense."""
        if length < REQUEST.size:
            return False
        op, ndata, sid, *args, _ = REQUEST.unpack_from(packet)
        if op == lib.MIC_SCIF_CANCEL:
            self._cancel()
            return True
        if self.call is not None or ndata != length - REQUEST.size:
            return False
        call = self.call = Call(self)
        try:
            result = self.service.serve(
                self, op, sid, args, bytes(packet[REQUEST.size : length]) if ndata else b""
            )
        except OSError as e:
            call.fail(e)
            return True
        except Exception as e:  # a defect of ours: its program does not wait for ever
            node = self.service.node
            node.log.error("node %d: request %d of process %d failed: %r", node.id, op, self.pid, e)
            call.fail(OSError(errno.EIO, ""))
            return True
        if result is None:
            return True
        if isinstance(result, Reply):
            call.done(result)
        else:
            self._run(call, result)
        return True

    def _run(self, call: Call, work: Coroutine[Any, Any, Reply]) -> None:
        """A request that takes a coroutine."""

        def ended(task: asyncio.Task[Reply]) -> None:
            work.close()  # cancelled before it began
            error = None if task.cancelled() else task.exception()
            if task.cancelled():
                call.fail(OSError(errno.EINTR, ""))
            elif error is not None:
                call.fail(error if isinstance(error, OSError) else OSError(errno.EIO, ""))
            else:
                call.done(task.result())

        task = self.service.node.spawn(work, "a program's request")
        call.on_cancel = task.cancel
        task.add_done_callback(ended)

    def _cancel(self) -> None:
        """The program has got a signal, or is gone: what it waited for is over."""
        call = self.call
        if call is None:
            return
        call.fail(OSError(errno.EINTR, ""))
        if call.on_cancel is not None:
            call.on_cancel()

    def answer(self, status: int, reply: Reply | None = None) -> None:
        """Send the answer; a process that is gone does not get it."""
        head = _HEAD
        head.status = status
        if reply is None:
            head.v, head.ndata = _NO_VALUES, 0
            lib.mic_scif_answer(self.fd, head, ffi.NULL, ffi.NULL, 0)
            return
        head.v = (*reply.values, *_NO_VALUES[len(reply.values) :])
        head.ndata = len(reply.data)
        lib.mic_scif_answer(self.fd, head, reply.data, reply.fds, len(reply.fds))

    def close(self) -> None:
        """The process closed it or died: what it waited for is over."""
        call, self.call = self.call, None
        if call is not None and call.on_cancel is not None:
            call.on_cancel()
        os.close(self.fd)


def caller_is_privileged(pid: int, uid: int) -> bool:
    """Effective uid 0, or CAP_SYS_ADMIN (SCIF 6, D14), as seen from this node's namespaces."""
    if uid == 0:
        return True
    try:
        with open(f"/proc/{pid}/status", "rb") as f:  # its name may be no text
            for line in f:
                if line.startswith(b"CapEff:"):
                    return bool(int(line.split()[1], 16) >> 21 & 1)
    except OSError:
        pass
    return False
