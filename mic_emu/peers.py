"""Who may use an instance's sockets: its user, root, and the members of its group if it has one.

The permissions of the socket's file say it, and the kernel holds to them at ``connect``. Whoever accepts looks at
the peer once more. On a card, whose user namespace knows no other users and groups, all foreign ones have the
same overflow number: there the file's permissions alone decide.
"""

from __future__ import annotations

import os
import socket
import stat
import struct

_SO_PEERGROUPS = 59  # linux/socket.h; Python has no name for it
_FEW, _MOST = 256, 65536  # groups of a process: usual, and the kernel's NGROUPS_MAX


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the peer; a pid of 0 is one that this pid namespace does not see."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF


def peer_groups(sock: socket.socket) -> set[int]:
    """The peer's supplementary groups."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _FEW)
    except OSError:  # ERANGE
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST)
    return {gid for (gid,) in struct.iter_unpack("I", raw)}


def restrict(path: str | os.PathLike[str]) -> None:
    """Give a fresh socket's file its mode: 0660 in a directory that a group shares (2750), else 0600."""
    folder = os.stat(os.path.dirname(path) or ".").st_mode
    os.chmod(path, 0o660 if folder & stat.S_ISGID and folder & stat.S_IXGRP else 0o600)


def group_of(path: str | os.PathLike[str]) -> int | None:
    """The group that may connect to the socket at ``path``, None when only its user may."""
    found = os.stat(path)
    return found.st_gid if found.st_mode & stat.S_IWGRP else None


def admitted(sock: socket.socket, group: int | None) -> bool:
    """Is the peer our user, root, or a member of ``group``?"""
    _, uid, gid = peer_credentials(sock)
    return uid in (0, os.geteuid()) or (group is not None and (group == gid or group in peer_groups(sock)))
