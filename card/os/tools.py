"""What administrators' tools ask a card over SCIF: systoolsd on port 130, RAS on port 100 (COSM 13).

Kernel clients of the card's node. Data that the emulator does not model (temperatures, power, fans) is
refused as unsupported, which the tools show as not available.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from mic_emu.cosm import tools_proto as P
from mic_emu.log import Log
from mic_emu.scif.errors import ScifError
from mic_emu.scif.kernel import POLLHUP, POLLIN, POLLOUT, KernelEndpoint
from mic_emu.scif.node import Node

BACKLOG = 32
IDLE_S = 60.0
Answer = Callable[[], bytes]


class Refused(Exception):
    """The error code for the client."""

    def __init__(self, code: int) -> None:
        super().__init__(f"error {code}")
        self.code = code


def meminfo() -> dict[str, int]:
    """The kernel's memory statistics in kB."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1}


def cpu_times() -> Iterator[tuple[int, int, int, int]]:
    """(user, nice, system, idle) ticks: all CPUs together first, then each."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("cpu"):
            user, nice, system, idle = map(int, line.split()[1:5])
            yield user, nice, system, idle


class Settings:
    """Bits that tools may set; they live as long as the card OS."""

    def __init__(self) -> None:
        self.led = 0
        self.turbo = 0
        self.ecc = 1


class Systools:
    """One request of 26 bytes, one response."""

    port = P.SYSTOOLS_PORT
    size = P.SYSTOOLS_HEADER.size

    def __init__(self, facts: P.Facts, settings: Settings) -> None:
        self.facts = facts
        self.settings = settings
        self._get: dict[int, Answer] = {
            P.INFO: lambda: bytes(P.SYSTOOLS_VERSION),
            P.MEMORY_USE: self._memory_use,
            P.DEVICE_INFO: self._device_info,
            P.DIAGNOSTICS: lambda: struct.pack("<I", settings.led),
            P.MEMORY_INFO: self._memory_info,
            P.PROCESSOR: self._processor,
            P.CORES: self._cores,
            P.CORE_USE: self._core_use,
            P.TURBO: lambda: struct.pack("<BB", settings.turbo, 0),
        }

    def answer(self, request: bytes, client_port: int) -> bytes:
        """The response to one request."""
        if len(request) < self.size:
            return P.SYSTOOLS_HEADER.pack(0, 0, P.E_STRUCTURE, 0, bytes(16))
        kind, _, _, extra, data = P.SYSTOOLS_HEADER.unpack(request)
        try:
            payload = self._set(kind, data, client_port) if kind >= P.FIRST_SET else self._find(kind)()
        except Refused as e:
            return P.SYSTOOLS_HEADER.pack(kind, 0, e.code, extra, data)
        return P.SYSTOOLS_HEADER.pack(kind, len(payload), 0, extra, data) + payload

    def _find(self, kind: int) -> Answer:
        if kind not in self._get:
            raise Refused(P.E_UNSUPPORTED)
        return self._get[kind]

    def _set(self, kind: int, data: bytes, client_port: int) -> bytes:
        if client_port >= P.PRIVILEGED_END:
            raise Refused(P.E_PRIVILEGE)
        (value,) = struct.unpack_from("<I", data)
        if kind == P.SET_LED:
            self.settings.led = int(bool(value))
        elif kind == P.SET_TURBO:
            self.settings.turbo = int(bool(value))
        else:
            raise Refused(P.E_UNSUPPORTED)
        return b""

    def _memory_use(self) -> bytes:
        m = meminfo()
        total, free = m["MemTotal"], m["MemFree"]
        row = (total, total - free, free, m.get("Buffers", 0), m.get("Cached", 0))
        return P.MEMORY_USE_BODY.pack(*(min(v, 0xFFFFFFFF) for v in row))

    def _device_info(self) -> bytes:
        f = self.facts
        return P.DEVICE_INFO_BODY.pack(
            225, 0, 0, 0, 0, 0, 0, 0, 0, P.text(f.os_version, 64), P.text(f.flash_version, 64), bytes(64),
            bytes(16), P.text(f.part_number, 16), bytes(6), f.serial.encode()[:12].ljust(12, b"\0"),
        )  # fmt: skip

    def _memory_info(self) -> bytes:
        f = self.facts
        size, speed = f.memory_bytes >> 20, f.memory_kt_per_s // 1000
        return P.MEMORY_INFO_BODY.pack(
            size, speed, speed // 2, f.memory_type, self.settings.ecc, P.text(f.memory_vendor, 64), 1500
        )

    def _processor(self) -> bytes:
        return P.PROCESSOR_BODY.pack(
            3, 1, 11, 0, self.facts.threads_per_core, P.text(self.facts.stepping, 16)
        )

    def _cores(self) -> bytes:
        f = self.facts
        return P.CORES_BODY.pack(
            f.cores, f.frequency_khz // 1000, os.sysconf("SC_CLK_TCK"), f.threads_per_core, 0
        )

    def _core_use(self) -> bytes:
        f, hz = self.facts, os.sysconf("SC_CLK_TCK")
        head = P.CORE_USE_HEAD.pack(
            hz, int(time.monotonic() * hz), f.cores, f.threads_per_core, f.frequency_khz // 1000
        )
        return head + b"".join(P.CORE_USE_ROW.pack(*row, sum(row)) for row in cpu_times())


class Ras:
    """Header of 24 bytes plus ``len`` bytes; the response has the request's number with a bit set."""

    port = P.RAS_PORT
    size = P.RAS_HEADER.size

    def __init__(self, facts: P.Facts, settings: Settings) -> None:
        self.facts = facts
        self.settings = settings
        self._get: dict[int, Answer] = {
            P.RAS_HARDWARE: self._hardware,
            P.RAS_VERSIONS: self._versions,
            P.RAS_CORES: lambda: struct.pack("<HH", facts.cores, facts.cores * facts.threads_per_core),
            P.RAS_MEMORY_DEVICE: self._memory_device,
            P.RAS_MEMORY: self._memory,
            P.RAS_API: lambda: P.text("1.0", 8),
            21: lambda: bytes((0, settings.ecc, 1, 0)),
            25: lambda: bytes((settings.turbo, settings.turbo, 0, 0)),
            40: lambda: struct.pack("<I", settings.led),
        }
        self._settable = {22: "ecc", 26: "turbo", 41: "led"}

    def answer(self, request: bytes, client_port: int) -> bytes:
        """The response to one request."""
        op, _, parm, stamp, _ = P.RAS_HEADER.unpack(request[: self.size].ljust(self.size, b"\0"))
        began = time.monotonic_ns()
        try:
            if len(request) < self.size:
                raise Refused(P.RAS_BAD_LENGTH)
            body, bits = self._serve(op, parm, client_port), P.RAS_RESPONSE
        except Refused as e:
            body, bits = P.RAS_ERROR_BODY.pack(e.code, 0), P.RAS_RESPONSE | P.RAS_ERROR
        spent = (time.monotonic_ns() - began) // 1000
        return P.RAS_HEADER.pack(op | bits, len(body), parm, stamp, spent) + body

    def _serve(self, op: int, parm: int, client_port: int) -> bytes:
        if op in self._settable:
            if client_port >= P.PRIVILEGED_END:
                raise Refused(P.RAS_PERMISSION)
            setattr(self.settings, self._settable[op], int(bool(parm)))
            return b""
        if op in self._get:
            return self._get[op]()
        raise Refused(P.RAS_NO_VALUE if op in P.RAS_OPS else P.RAS_BAD_OP)

    def _hardware(self) -> bytes:
        return P.RAS_HARDWARE_BODY.pack(
            bytes(16), 0, 0, 0, 0, 0, 3, 0, self.facts.serial.encode()[:12].ljust(12)
        )

    def _versions(self) -> bytes:
        f = self.facts
        words = (
            f.flash_version,
            f.flash_version,
            f.flash_version,
            f.flash_version,
            f.flash_version,
            f.os_version,
            "",
        )
        return b"".join(bytes((len(w),)) + P.text(w, 119) for w in words)

    def _memory_device(self) -> bytes:
        f = self.facts
        return struct.pack(
            "<16sHxxII", P.text(f.memory_vendor, 16), 1, f.memory_bytes >> 17, f.memory_kt_per_s
        )

    def _memory(self) -> bytes:
        m = meminfo()
        return struct.pack(
            "<3I", *(min(v, 0xFFFFFFFF) for v in (m["MemTotal"], m["MemFree"], m.get("Buffers", 0)))
        )


class ToolServers:
    """Both services on a node."""

    def __init__(self, node: Node, facts: P.Facts, log: Log) -> None:
        self._node = node
        self._log = log
        self._settings = Settings()
        self._services: list[Systools | Ras] = [Systools(facts, self._settings), Ras(facts, self._settings)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: dict[int, int] = {}

    def start(self) -> None:
        """Bind, listen, serve. A port that somebody has is left to him."""
        for service in self._services:
            listener = self._node.open()
            try:
                listener.bind(service.port)
                listener.listen(BACKLOG)
            except ScifError as e:
                self._log.warning(f"tools: port {service.port}: {e}")
                continue
            self._spawn(self._accept(listener, service))

    async def close(self) -> None:
        """End every connection and stop listening."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: KernelEndpoint, service: Systools | Ras) -> None:
        while await listener.poll(POLLIN) == POLLIN:
            try:
                client = await listener.accept(sync=False)
            except ScifError:
                continue
            if self._clients.get(service.port, 0) >= BACKLOG:
                self._spawn(client.close())
                continue
            self._spawn(self._serve(client, service))

    async def _serve(self, client: KernelEndpoint, service: Systools | Ras) -> None:
        """Requests of one client, until it closes, is silent or takes nothing for long, or sends two at a time."""
        self._clients[service.port] = self._clients.get(service.port, 0) + 1
        try:
            while True:
                revents = await client.poll(POLLIN, IDLE_S)
                if not revents & POLLIN:
                    return
                request = client.recv_nowait(service.size)
                if isinstance(service, Systools) and client.mask() & POLLIN:
                    return  # extra bytes behind a request
                if isinstance(service, Ras):
                    self._body(client, request)
                await self._send(client, service.answer(request, client.peer[1]))
                if revents & POLLHUP:
                    return
        except ScifError:
            return
        finally:
            self._clients[service.port] -= 1
            await client.close()

    async def _send(self, client: KernelEndpoint, answer: bytes) -> None:
        """Raises ScifError when the client has gone, ETIMEDOUT when it takes nothing for long."""
        while answer := answer[client.send_nowait(answer) :]:
            if not await client.poll(POLLOUT, IDLE_S):
                raise ScifError(errno.ETIMEDOUT, "the client takes no answer")

    def _body(self, client: KernelEndpoint, request: bytes) -> None:
        """Take a RAS request's body out of the way; none of those we serve has one."""
        if len(request) == P.RAS_HEADER.size and (length := P.RAS_HEADER.unpack(request)[1]):
            client.recv_nowait(min(length, 4096))
