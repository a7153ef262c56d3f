"""Node memory: what is handed out is reserved (mic_emu/memory.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INTERRUPTED = """
#define _GNU_SOURCE
#include <errno.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

int fallocate(int fd, int mode, off_t off, off_t len)
{
	static unsigned calls;

	if (calls++ % 2 == 0) {
		errno = EINTR;
		return -1;
	}
	return (int)syscall(SYS_fallocate, fd, mode, off, len);
}
"""
ALLOCATE = """
import os
from mic_emu.memory import PageAllocator

fd = os.memfd_create("memory")
os.ftruncate(fd, 4 << 20)
pages = PageAllocator(fd, 0, 4 << 20)
assert pages.alloc(3 << 20) == 0
assert os.fstat(fd).st_blocks * 512 == 3 << 20
"""


def test_pages_are_reserved_under_signals(tmp_path: Path) -> None:
    """fallocate(2) that a signal interrupts is no lack of memory."""
    shim = tmp_path / "interrupted.so"
    subprocess.run(
        ["cc", "-x", "c", "-shared", "-fPIC", "-o", shim, "-"], input=INTERRUPTED, text=True, check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE], env={**os.environ, "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {shim}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
