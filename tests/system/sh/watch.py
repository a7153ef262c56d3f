"""watch.py select|poll FILE WORD...: wait until the attribute FILE holds a word, as tools of the real stack wait."""

import os
import select
import sys

how, path, *words = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
while os.pread(fd, 64, 0).decode().strip() not in words:
    if how == "select":
        woken = any(select.select([], [], [fd], 30))
    else:
        poller = select.poll()
        poller.register(fd, select.POLLPRI | select.POLLERR)
        woken = bool(poller.poll(30_000))
    if not woken:
        sys.exit(f"{path}: no wake-up within 30 s")
