"""The host process's side of init: start a process, hear when it ends."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from mic_emu.clock import wait_for
from mic_emu.errors import MicemuError
from mic_emu.wire_aio import AsyncChannel

OnExit = Callable[[int], None]
START_LIMIT_S = 10.0


class Spawner:
    """Asks init to fork boards and backends; ``on_exit(status)`` runs once when one ends.

    ``status`` is the exit status, negative for a signal.
    """

    def __init__(self, channel: AsyncChannel) -> None:
        self._channel = channel
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._exits: dict[int, OnExit] = {}
        self._early: dict[int, int] = {}

    async def serve(self) -> None:
        """Handle init's messages until it is gone (ConnectionError)."""
        while True:
            msg = await self._channel.recv_words(None, "a message of init")
            if "exited" in msg:
                on_exit = self._exits.pop(msg["exited"], None)
                if on_exit:
                    on_exit(msg["status"])
                else:
                    self._early[msg["exited"]] = msg["status"]
            else:
                fut = self._waiting.pop(msg["id"], None)
                if fut is None or fut.done():
                    if "spawned" in msg:  # nobody waits for it any more: it ends with its channel
                        self._exits[msg["spawned"]] = lambda status: None
                elif "spawned" in msg:
                    fut.set_result(msg["spawned"])
                else:
                    fut.set_exception(MicemuError(f"cannot start a process: {msg['error']}"))

    async def start(
        self, kind: str, name: str, args: dict[str, Any], fds: Sequence[int], on_exit: OnExit
    ) -> int:
        """Fork a process of ``kind`` (init's table of targets); returns its pid. Raises MicemuError."""
        ident = next(self._ids)
        fut: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting[ident] = fut
        try:
            await self._channel.send({"id": ident, "kind": kind, "name": name, "args": args}, fds)
            pid = await wait_for(fut, START_LIMIT_S)
        except asyncio.TimeoutError:
            why = f"cannot start {name}: init does not answer within {START_LIMIT_S:g} s"
            raise MicemuError(why, errno.ETIMEDOUT) from None
        except OSError as e:
            raise MicemuError(f"cannot start {name}: {e.strerror or e}", e.errno or errno.EIO) from e
        except asyncio.CancelledError:
            if fut.done() and not fut.cancelled() and fut.exception() is None:
                self._watch(fut.result(), lambda status: None)  # it ends with its channel
            raise
        finally:
            self._waiting.pop(ident, None)
        self._watch(pid, on_exit)
        return pid

    def _watch(self, pid: int, on_exit: OnExit) -> None:
        if pid in self._early:
            on_exit(self._early.pop(pid))
        else:
            self._exits[pid] = on_exit
