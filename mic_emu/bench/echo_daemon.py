"""A yardstick: a daemon in Python that answers one byte on every connection to a Unix socket.

usage: python -m mic_emu.bench.echo_daemon PATH. Prints a line when it listens; ends when it is killed.
"""

from __future__ import annotations

import asyncio
import sys


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read(1))
    writer.close()


async def _main(path: str) -> None:
    server = await asyncio.start_unix_server(_answer, path)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
