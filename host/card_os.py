"""What the host process asks a running card OS, through ``micN/os.sock`` (``card/os/agent.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mic_emu.wire import connect_unix
from mic_emu.wire_aio import AsyncChannel


async def ask_os(folder: Path, op: str, limit_s: float | None = None, **words: Any) -> dict[str, Any]:
    """The answer to one request. Raises OSError: ENOENT, ECONNREFUSED (no card OS runs), WireTimeout after ``limit_s``
    seconds (a card OS that hangs), or what it says itself."""
    async with AsyncChannel(connect_unix(str(folder / "os.sock"), wait=False)) as channel:
        await channel.send({"op": op, **words})
        answer = await channel.recv_words(limit_s, f"the card OS's answer to {op}")
    if "error" in answer:
        raise OSError(answer["errno"], answer["error"])
    return answer
