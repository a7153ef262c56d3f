"""The node's socket: where programs (libscif.so.0 and the Python API) find their node.

Every endpoint of a program is a connection to it, kept open for as long as any descriptor of the
endpoint exists; requests come on control connections, a few per process. Nothing here runs per
message: the data path is the program's own (design section 6).
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import select
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mic_emu._native import ffi, lib
from mic_emu.bar import close_all
from mic_emu.clock import settle
from mic_emu.memory import Mapping, gddr_size
from mic_emu.peers import restrict
from mic_emu.scif.control import Answer, Call, Control, Reply, caller_is_privileged
from mic_emu.scif.errors import ScifError
from mic_emu.scif.inspect import tables
from mic_emu.scif.memory_requests import MemoryRequests
from mic_emu.scif.ports import ADMIN_END
from mic_emu.scif.session import Session
from mic_emu.scif.state import State

if TYPE_CHECKING:
    from mic_emu.clock import Alarm
    from mic_emu.scif.node import Node

BACKLOG = 512
RETRY_S = 0.5  # no descriptor for a program: one may be free again without our having closed it
RESERVE = 64  # descriptors; of small limits an eighth
_WATCH_SESSION = select.EPOLLET | select.EPOLLRDHUP
_WATCH_INPUT = select.EPOLLIN | select.EPOLLRDHUP

Handler = Callable[[Control, Session, "list[int]", bytes], Answer]


def listen_at(path: str | os.PathLike[str]) -> socket.socket:
    """A listening socket for a node at ``path``, for whom ``peers`` names; replaces a stale one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.bind(os.fspath(path))
    restrict(path)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def _taken(control: Control) -> Call:
    """The request that is being served; who takes it answers it."""
    assert control.call is not None
    return control.call


def _leaves_room(fd: int) -> bool:
    """Programs do not get the last descriptors: whoever serves this node also boots cards and answers commands."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit == resource.RLIM_INFINITY or fd < limit - min(RESERVE, limit // 8)


class ScifService:
    """Serves programs on ``node`` through ``listener`` (``listen_at``); start it in the node's loop.

    privileged: may this (pid, uid) bind ports below 1024? Default: ``caller_is_privileged`` (D14).
    """

    def __init__(
        self,
        node: Node,
        listener: socket.socket,
        *,
        privileged: Callable[[int, int], bool] = caller_is_privileged,
    ) -> None:
        self.node = node
        self.listener = listener
        self._privileged = privileged
        self._epoll = select.epoll()  # endpoints, and connections that said nothing yet
        self._fresh: dict[int, tuple[int, int]] = {}  # connected, said nothing yet: pid, uid
        self._controls: dict[int, Control] = {}
        self._by_fd: dict[int, Session] = {}
        self.sessions: dict[int, Session] = {}  # by sid
        self._by_cookie: dict[int, Session] = {}
        self._caller = ffi.new("struct mic_scif_caller *")
        self._first = ffi.new("struct mic_scif_request *")
        self._passed = ffi.new("int *")
        self._packet_c = ffi.new("uint8_t[]", lib.MIC_SCIF_PACKET)
        self._packet = memoryview(ffi.buffer(self._packet_c))
        self.steering = ffi.new("struct mic_scif_steer *")  # we follow our programs to their CPU
        self._when_empty: Callable[[], None] | None = None
        self._short: int | None = None  # errno for want of which programs wait to be taken
        self._retry: Alarm | None = None
        self._handlers: dict[int, Handler] = {
            lib.MIC_SCIF_BIND: self._bind,
            lib.MIC_SCIF_LISTEN: self._listen,
            lib.MIC_SCIF_CONNECT: self._connect,
            lib.MIC_SCIF_ACCEPT: self._accept,
            lib.MIC_SCIF_ATTACH: self._attach,
            lib.MIC_SCIF_FLUSH: self._flush,
            lib.MIC_SCIF_MASK: self._mask,
        }
        self._memory = MemoryRequests(self)
        self._handlers.update(self._memory.handlers)

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        self.node.notifier.start()
        self.node.events.add(self.listener.fileno(), self._on_connection)
        self.node.events.add(self._epoll.fileno(), self.look)

    async def close(self) -> None:
        """Stop serving: every endpoint of a program is released, the socket is closed."""
        self._resume()
        self.node.events.remove(self.listener.fileno())
        self.node.events.remove(self._epoll.fileno())
        self.listener.close()
        for control in list(self._controls.values()):
            self._end(control)
        close_all(list(self._fresh))
        for session in list(self.sessions.values()):
            session.release()
        if self.sessions:
            empty = asyncio.get_running_loop().create_future()
            self._when_empty = lambda: settle(empty)
            await empty
        self._epoll.close()

    # --- events -----------------------------------------------------------------------------------

    def _on_connection(self) -> None:
        """Take new connections, at most as many as the socket queues."""
        if self._retry is not None:
            return
        if self._short is not None and not self._has_room():
            self._pause(self._short)
            return
        for _ in range(BACKLOG + 1):
            fd = lib.mic_scif_accept(self.listener.fileno(), self._caller)
            if fd == -errno.ECONNABORTED:
                continue
            if fd == -errno.EAGAIN:
                self._short = None
                return
            if fd < 0:
                self._pause(-fd)
                return
            self._fresh[fd] = (self._caller.pid, self._caller.uid)
            if not self._on_first(fd):  # it has usually spoken already
                self._epoll.register(fd, _WATCH_INPUT)
            if not _leaves_room(fd):
                self._pause(errno.EMFILE)
                return

    def _has_room(self) -> bool:
        try:
            fd = os.dup(self.listener.fileno())
        except OSError:
            return False
        os.close(fd)
        return _leaves_room(fd)

    def _pause(self, why: int) -> None:
        """No descriptor: programs wait in the socket's queue until one is free. Said once per shortage."""
        if self._short is None:
            self.node.log.error(
                "node %d: cannot take another program: %s; it waits until one ends",
                self.node.id,
                os.strerror(why),
            )
        self._short = why
        self.node.events.remove(self.listener.fileno())
        self._retry = self.node.clock.alarm(RETRY_S, self._resume)

    def _resume(self) -> None:
        """A descriptor may be free: try again with the next round of the loop."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
            self.node.events.add(self.listener.fileno(), self._on_connection)

    def look(self) -> None:
        """Handle whatever happened to endpoints up to now; also before a request that depends on it.

        A process that was waited for has closed its endpoints. Nothing in here takes connections or
        serves requests: a descriptor number of this round cannot become another's.
        """
        known = len(self._by_fd) + len(self._fresh)
        for fd, _ in self._epoll.poll(0, known) if known else ():
            if fd in self._by_fd:
                session = self._by_fd[fd]
                if not session.released and session.gone():
                    session.release()
            elif fd in self._fresh:
                self._epoll.unregister(fd)
                if not self._on_first(fd):
                    self._epoll.register(fd, _WATCH_INPUT)

    def _on_first(self, fd: int) -> bool:
        """The first packet of a connection says what it is; False when there is none yet."""
        rc = lib.mic_scif_first(fd, self._first, self._passed)
        if rc == -errno.EAGAIN:
            return False
        first, passed = self._first, self._passed[0]
        pid, uid = self._fresh.pop(fd)
        op, a0, sid = (first.op, first.a[0], first.a[1]) if rc > 0 else (0, 0, 0)
        if op == lib.MIC_SCIF_OPEN and sid and sid not in self.sessions:
            session = Session(self, fd, sid, a0, pid)
            self._by_fd[fd] = self.sessions[sid] = self._by_cookie[a0] = session
            self._epoll.register(fd, _WATCH_SESSION)
        elif op == lib.MIC_SCIF_HELLO:
            control = self._controls[fd] = Control(self, fd, pid, uid, a0)
            self.node.events.add(fd, partial(self._on_control, control))
            control.answer(0)
        else:
            if op == lib.MIC_SCIF_MEMORY and passed >= 0:
                self._take_memory(a0, sid, passed)
                Control(self, fd, pid, uid, 0).answer(0)
            os.close(fd)
        if passed >= 0:
            os.close(passed)
        return True

    def _take_memory(self, node_id: int, size: int, fd: int) -> None:
        """The host hands us the memory of another card, for connections between the two."""
        try:
            if gddr_size(fd) != size:
                raise ValueError(f"{size} bytes announced")
            self.node.members.add_memory(node_id, Mapping(fd, size), fd)
        except (OSError, ValueError) as e:
            self.node.log.warning("node %d: bad memory of node %d: %s", self.node.id, node_id, e)

    def _on_control(self, control: Control) -> None:
        """A request of a program, or its end."""
        length = lib.mic_scif_receive(control.fd, self._packet_c, lib.MIC_SCIF_PACKET, self.steering)
        if length == -errno.EAGAIN:
            return
        if length > 0 and control.on_packet(self._packet, length):
            return
        self._end(control)
        self._resume()
        self.node.look_at_copies()  # its process may have died in the middle of one

    def _end(self, control: Control) -> None:
        self.node.events.remove(control.fd)
        del self._controls[control.fd]
        control.close()

    def session(self, sid: int) -> Session | None:
        """By its name."""
        if sid not in self.sessions:
            self._take_connections()
        return self.sessions.get(sid)

    def _take_connections(self) -> None:
        """What a program opened before it asked is known after this."""
        self._on_connection()
        self.look()

    def living(self) -> set[int]:
        """Processes that are connected."""
        return {c.pid for c in self._controls.values()}

    def forget(self, session: Session) -> None:
        """The session is released."""
        self.sessions.pop(session.sid, None)
        self._memory.forget(session.sid)
        if self._by_cookie.get(session.cookie) is session:
            del self._by_cookie[session.cookie]
        fd = session.fd
        if self._by_fd.get(fd) is session:
            del self._by_fd[fd]
            self._epoll.unregister(fd)
            self._resume()
        if not self.sessions and self._when_empty is not None:
            self._when_empty()

    # --- requests ---------------------------------------------------------------------------------

    def serve(self, control: Control, op: int, sid: int, args: list[int], data: bytes) -> Answer:
        """One request. Raises OSError with the errno for the program."""
        if op == lib.MIC_SCIF_SYNC:
            return self._sync(control, sid)
        if op == lib.MIC_SCIF_TABLES:
            self._tables(control)
            return None
        if op == lib.MIC_SCIF_DROP:
            return self._memory.drop(control, data)
        if op == lib.MIC_SCIF_FIND:
            return self._find(args[0])
        if op == lib.MIC_SCIF_NODES:
            return self._nodes()
        handler = self._handlers.get(op)
        if handler is None:
            raise ScifError(errno.EINVAL, f"unknown request {op}")
        session = self.session(sid)
        if session is None and self._short is not None:
            raise ScifError(errno.ENFILE, "its endpoint waits for a descriptor of ours")
        if session is None or session.released:
            raise ScifError(errno.EBADF, "no such endpoint")
        return handler(control, session, args, data)

    def _tables(self, control: Control) -> None:
        """Live tables in a file of their own: they grow beyond any packet."""
        fd = os.memfd_create("scif-tables", os.MFD_CLOEXEC)
        try:
            with os.fdopen(fd, "wb", closefd=False) as f:
                f.write(json.dumps(tables(self.node, self.sessions.values())).encode())
            _taken(control).done(Reply(fds=[fd]))
        finally:
            os.close(fd)

    def _find(self, cookie: int) -> Reply:
        if cookie not in self._by_cookie:
            self._take_connections()
        session = self._by_cookie.get(cookie)
        if session is None:
            raise ScifError(errno.ENOTTY, "not an endpoint")
        return Reply([session.sid])

    def _sync(self, control: Control, sid: int) -> Answer:
        session = self.session(sid)
        call = _taken(control)
        if session is not None and not session.released:
            self.look()
        if session is None or not session.released or self.sessions.get(sid) is not session:
            return Reply()
        session.on_released.append(lambda: call.done(Reply()))
        return None

    async def _nodes(self) -> Reply:
        await self.node.members.refresh_info()
        ids = self.node.node_ids()
        return Reply([len(ids), self.node.id], data=struct.pack(f"<{len(ids)}H", *ids))

    def _bind(self, control: Control, session: Session, args: list[int], data: bytes) -> Answer:
        port = args[0] & 0xFFFF
        privileged = not 0 < port < ADMIN_END or self._privileged(control.pid, control.uid)
        try:
            return Reply([session.ep.bind(port, privileged=privileged)])
        except ScifError as e:
            if e.errno != errno.EINVAL or session.ep.state is not State.UNBOUND:
                raise
        # Taken, perhaps by one that the same program has just closed, or a program that has just died.
        self.look()
        return self._bind_after(session, port, privileged)

    async def _bind_after(self, session: Session, port: int, privileged: bool) -> Reply:
        """Bind when every endpoint that has the port, and is on its way out, has let go of it."""
        if all(ep.leaving for ep in self.node.endpoints.values() if ep.port == port):
            freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.node.ports.when_free(port, lambda: settle(freed))
            await freed
        if session.released:  # its process has died meanwhile
            raise ScifError(errno.EBADF, "no such endpoint")
        return Reply([session.ep.bind(port, privileged=privileged)])

    def _listen(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        backlog = struct.unpack("<q", struct.pack("<Q", args[0]))[0]
        session.ep.listen(max(backlog, 0))
        return Reply()

    def _connect(self, control: Control, session: Session, args: list[int], data: bytes) -> Answer:
        session.connect((args[0] & 0xFFFF, args[1] & 0xFFFF), bool(args[2]), _taken(control))
        return None

    def _accept(self, control: Control, session: Session, args: list[int], data: bytes) -> Answer:
        fresh = self.session(args[0])
        if fresh is None or fresh is session or not fresh.is_unbound:
            raise ScifError(errno.EINVAL, "no descriptor for the new endpoint")
        if session.ep.state is State.LISTENING and (args[1] or session.ep.pending):
            session.last_acceptor = control.process
        session.accept(fresh, bool(args[1]), control.process, _taken(control))
        return None

    def _attach(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        return session.attach(control.pid)

    def _flush(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        session.flush(control.process)
        return Reply()

    def _mask(self, control: Control, session: Session, args: list[int], data: bytes) -> Reply:
        mask, pending = session.mask()
        return Reply([mask, pending, session.surplus_token()])
