"""Disk images: open or create them, with errors that a person understands."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from mic_emu.config import CardConfig
from mic_emu.errors import MicemuError
from mic_emu.sizes import format_size


def open_image(config: CardConfig, path: str, name: str) -> int:
    """Descriptor of the raw image of card ``name``; created (sparse) when it does not exist.

    The image is locked for as long as the descriptor is open, so that two cards never write to one.
    Raises MicemuError with the path and the fix.
    """
    flags = (os.O_RDONLY if config.read_only else os.O_RDWR) | os.O_CLOEXEC
    created = False
    try:
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            if config.read_only:
                raise MicemuError(f"{name}: the read-only disk {path} does not exist", errno.ENOENT) from None
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            created = True
    except IsADirectoryError as e:
        raise MicemuError(f"{name}: the disk {path} is a directory: name a file", errno.EISDIR) from e
    except OSError as e:
        raise MicemuError(f"{name}: cannot open the disk {path}: {e.strerror}", e.errno or errno.EIO) from e
    try:
        st = os.fstat(fd)
        if stat.S_ISDIR(st.st_mode):
            raise MicemuError(f"{name}: the disk {path} is a directory: name a file", errno.EISDIR)
        if not stat.S_ISREG(st.st_mode) and not stat.S_ISBLK(st.st_mode):
            raise MicemuError(f"{name}: the disk {path} is neither a file nor a block device", errno.EINVAL)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if config.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MicemuError(f"{name}: the disk {path} is in use by another card", errno.EBUSY) from None
        if created:
            os.ftruncate(fd, config.disk_size)
        elif os.lseek(fd, 0, os.SEEK_END) < 512:
            raise MicemuError(
                f"{name}: the disk {path} is smaller than one sector: make it at least 512 bytes"
            )
    except OSError as e:
        os.close(fd)
        if created:
            os.unlink(path)
        raise MicemuError(
            f"{name}: cannot make a disk of {format_size(config.disk_size)} at {path}: {e.strerror}",
            e.errno or errno.EIO,
        ) from e
    except MicemuError:
        os.close(fd)
        raise
    return fd
