"""UCX over shared memory, measured by its own ``ucx_perftest`` between two processes of this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence

PROGRAM = "ucx_perftest"
MISSING = f"{PROGRAM} is not installed, so there is no figure of UCX: apt-get install ucx-utils"
TRIES = 50


def available() -> bool:
    """Is the program there?"""
    return shutil.which(PROGRAM) is not None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(test: str, size: int, count: int, cpus: Sequence[int]) -> tuple[float, float]:
    """Median latency in microseconds and bandwidth in GB/s of a test such as ``tag_lat``.

    Raises OSError when the program fails or prints no figures.
    """
    env = {**os.environ, "UCX_TLS": "posix,cma,self", "UCX_LOG_LEVEL": "error"}
    port = _free_port()
    words = [PROGRAM, "-p", str(port), "-t", test, "-s", str(size), "-n", str(count), "-w", "200", "-f"]
    quiet = {"env": env, "stderr": subprocess.DEVNULL, "text": True, "stdin": subprocess.DEVNULL}
    server = subprocess.Popen([*words, "-c", str(cpus[1])], stdout=subprocess.DEVNULL, **quiet)  # type: ignore[call-overload]
    try:
        for _ in range(TRIES):  # the first ones may come before the server listens
            done = subprocess.run(
                [*words, "-c", str(cpus[0]), "127.0.0.1"],
                stdout=subprocess.PIPE,
                timeout=60,
                check=False,
                **quiet,
            )  # type: ignore[call-overload]
            if done.returncode == 0 or server.poll() is not None:
                break
    except subprocess.TimeoutExpired as e:
        raise OSError(f"{PROGRAM} -t {test}: no end within {e.timeout:g} s") from None
    finally:
        server.kill()
        server.wait()
    # The last line: iterations, median, average and overall microseconds, MiB/s average and overall, ...
    lines = [line.split() for line in done.stdout.splitlines()]
    figures = [words for words in lines if len(words) >= 6 and words[0].isdigit()]
    if done.returncode or not figures:
        raise OSError(
            f"{PROGRAM} -t {test} failed with status {done.returncode}: {done.stdout[-200:].strip()}"
        )
    last = figures[-1]
    return float(last[1]), float(last[5]) * (1 << 20) / 1e9
