"""virtio-blk: a C loop on the card's side of the driver, and the NBD socket, beside pread and other servers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mic_emu.cli import client
from mic_emu.testing.machine import Machine, eventually
from mic_emu.wire import Channel, connect_unix

Row = dict[str, Any]
SIZE = 256 << 20
CASES = (
    ("4 KiB random read, QD 1", 4096, 1, True),
    ("4 KiB random read, QD 32", 4096, 32, True),
    ("1 MiB read, QD 4", 1 << 20, 4, False),
)


def _ours(card: dict[str, Any], block: int, depth: int, random: bool, seconds: float, spin_us: int) -> float:
    with Channel(connect_unix(f"{card['run_dir']}/os.sock")) as channel:
        channel.send({
            "op": "bench", "block": block, "depth": depth, "random": random, "write": False, "seconds": seconds,
            "spin_us": spin_us,
        })  # fmt: skip
        answer: client.Message = channel.recv(seconds + 30, "the card's bench")[0]
    return float(answer["result"]["iops"])


def _pread(path: Path, block: int, random: bool, seconds: float) -> float:
    """The limit: the same reads by one thread from the image itself (Python's preadv into one buffer)."""
    fd = os.open(path, os.O_RDONLY)
    buffer = bytearray(block)
    blocks = SIZE // block
    count, at, end = 0, 12345, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(64):
            at = (at * 1103515245 + 12345) % (1 << 31) if random else at + 1
            os.preadv(fd, [buffer], at % blocks * block)
        count += 64
    os.close(fd)
    return count / seconds


def _fio(uri: str, block: int, depth: int, random: bool, seconds: float) -> float:
    argv = [
        "fio", "--name=b", "--ioengine=nbd", f"--uri={uri}", f"--rw={'randread' if random else 'read'}", f"--bs={block}",
        f"--iodepth={depth}", f"--size={SIZE}", "--time_based", f"--runtime={seconds}", "--randrepeat=0", "--norandommap",
        "--output-format=json",
    ]  # fmt: skip
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return float(json.loads(out[out.index("{") :])["jobs"][0]["read"]["iops"])


@contextlib.contextmanager
def _peer(image: Path, where: Path) -> Iterator[str | None]:
    """qemu-nbd over the same image, the peer of our NBD server; None when it is not installed."""
    if not shutil.which("qemu-nbd"):
        yield None
        return
    sock = where / "qemu.sock"
    server = subprocess.Popen(
        [
            "qemu-nbd",
            "-k",
            str(sock),
            "-f",
            "raw",
            "--persistent",
            "--shared=4",
            "--aio=threads",
            "-r",
            str(image),
        ]
    )
    try:
        eventually(sock.exists, 10, "qemu-nbd's socket")
        yield f"nbd+unix:///?socket={sock}"
    finally:
        server.kill()
        server.wait()


def rows(scale: float = 1.0) -> list[Row]:
    """IOPS; more is better. Limit: pread on the image; for NBD, qemu-nbd where it is installed."""
    seconds = max(0.5, 1.0 * scale)
    out: list[Row] = []
    with Machine() as m:
        image = m.home / "bench.img"
        with image.open("wb") as f:
            for _ in range(SIZE >> 20):
                f.write(os.urandom(1 << 20))
        card = m.boot("--disk", str(image), "--net", "none")["cards"][0]
        for name, block, depth, random in CASES:
            limit = _pread(image, block, random, seconds)
            for how, spin in (("spinning", 50), ("sleeping", 0)):
                ours = _ours(card, block, depth, random, seconds, spin)
                out.append(
                    {
                        "name": f"virtio-blk {name}, {how}",
                        "value": ours,
                        "unit": "IOPS",
                        "limit": limit,
                        "ratio": ours / limit,
                    }
                )
        if shutil.which("fio"):
            uri = f"nbd+unix:///vda?socket={card['run_dir']}/vda.nbd"
            with _peer(image, m.home) as peer:
                for name, block, depth, random in CASES:
                    ours = _fio(uri, block, depth, random, seconds)
                    limit = (
                        _fio(peer, block, depth, random, seconds)
                        if peer
                        else _pread(image, block, random, seconds)
                    )
                    what = "qemu-nbd" if peer else "pread"
                    out.append(
                        {
                            "name": f"NBD {name} (beside {what})",
                            "value": ours,
                            "unit": "IOPS",
                            "limit": limit,
                            "ratio": ours / limit,
                        }
                    )
    return out
