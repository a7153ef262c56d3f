"""The FUSE server of the sysfs tree: callers that are interrupted, answered over a socket in the kernel's place."""

from __future__ import annotations

import asyncio
import errno
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from mic_emu.cosm import fuse
from mic_emu.cosm.fuse import Server, Stat
from mic_emu.cosm.mount import RemoteTree

HEADER, ANSWER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
REQUEST, INTERRUPT = 2, 3


class Slow:
    """A tree with one file that says nothing before ``go``."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def stat(self, path: str) -> Stat:
        await self.go.wait()
        return Stat(stat.S_IFREG | 0o444)

    async def names(self, path: str) -> dict[str, Stat]:
        return {}

    async def read(self, path: str) -> bytes:
        return b""

    async def write(self, path: str, data: bytes) -> int:
        return 0

    def event(self, path: str) -> int:
        return 0


def packet(opcode: int, unique: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), opcode, unique, fuse.ROOT, 0, 0, 0, 0, 0) + body


async def answer(served: bool) -> int:
    """What a caller gets that is interrupted at once, before the server has read either."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        tree = Slow()
        server = Server(theirs.fileno(), tree)
        ours.send(packet(fuse.GETATTR, REQUEST, bytes(16)))
        ours.send(packet(fuse.INTERRUPT, INTERRUPT, struct.pack("<Q", REQUEST)))
        ours.setblocking(False)
        server.start()
        if served:
            tree.go.set()
        got = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 4096), 20)
        server.close()
    _, error, unique = ANSWER.unpack_from(got)
    assert unique == REQUEST
    return -int(error)


@pytest.mark.parametrize("patience", [0, 0.01])
async def test_interrupted_caller_of_a_host_that_hangs_gets_its_answer(
    monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """EINTR, also where the request had not begun: without an answer not even SIGKILL ends the caller."""
    monkeypatch.setattr(fuse, "INTERRUPT_S", patience)
    assert await answer(served=False) == errno.EINTR


async def test_interrupted_caller_is_served_as_by_sysfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and continued, a program sees no error."""
    monkeypatch.setattr(fuse, "INTERRUPT_S", 10)
    assert await answer(served=True) == 0


async def test_cosm_58_open_file_of_a_card_that_was_removed_is_enodev(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading and writing; a file that is still there has the errno of what was asked of it."""

    async def ask(op: str, **fields: Any) -> dict[str, Any]:
        raise OSError(errno.ENOENT, "there is no such file")

    tree = RemoteTree(Path("control.sock"))
    monkeypatch.setattr(tree, "_ask", ask)
    tree._files = {"class/mic/mic0/state": (0o644, "mic0")}
    gone = "class/mic/mic1/state"
    for use in (tree.read(gone), tree.write(gone, b"boot")):
        with pytest.raises(OSError, match="the card is gone") as e:
            await use
        assert e.value.errno == errno.ENODEV
    with pytest.raises(FileNotFoundError):  # the image that the boot would need
        await tree.write("class/mic/mic0/state", b"boot")
