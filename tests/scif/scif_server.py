"""A fabric process for tests of programs, and what it still holds afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mic_emu

HERE = Path(__file__).parent
PACKAGE = Path(mic_emu.__file__).parent


class Server:
    """A running fabric: node sockets in ``where``, commands over its standard input."""

    def __init__(self, where: Path, cards: int, **env: str) -> None:
        self.where = where
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fabric_server.py"), str(where), str(cards)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.idle = self.ask("state")

    def ask(self, command: str) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def env(self, route: str = "0-0") -> dict[str, str]:
        a, b = route.split("-")
        sockets = {f"NODE{i}": str(self.where / f"node{i}.sock") for i in range(4)}
        return {**os.environ, **sockets, "A": a, "B": b, "LD_LIBRARY_PATH": str(PACKAGE / "lib")}

    def stop(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(30)


def settled(server: Server) -> object:
    """The state of the nodes once every release has ended (asking again is the wait)."""
    end = time.monotonic() + 30
    while (state := server.ask("state")) != server.idle and time.monotonic() < end:
        pass
    return state
