"""How programs on the card ask it to go down: ``poweroff``, ``halt``, ``reboot``, ``shutdown`` (COSM-32).

Small scripts of these names come first in every program's PATH, so that on a card without namespaces,
too, they mean the card and never the machine below. They write a word into a named pipe. Programs that
bypass PATH, such as ``/sbin/poweroff`` of systemd or sysvinit, find the classic ``/run/initctl``.
"""

from __future__ import annotations

import os
import shlex
import struct
from collections.abc import Iterator

WORDS = ("poweroff", "halt", "restart")
PIPE = "power.ctl"
_BIN = "bin"
_ACTIONS = {"poweroff": "poweroff", "halt": "halt", "reboot": "restart"}
_INIT_MAGIC, _RUNLEVEL = 0x03091969, 1
_INIT_REQUEST = struct.Struct("=4i368x")  # magic, command, run level, sleep time, data
_RUNLEVELS = {ord("0"): "poweroff", ord("6"): "restart"}

_SCRIPT = """#!/bin/sh
# {name} of this card, not of the machine that emulates it (micemu)
trap '' HUP TERM # the card can go down faster than this script: it ends with 0 all the same
echo {word} > {pipe}
"""
_SHUTDOWN = """#!/bin/sh
# shutdown of this card, not of the machine that emulates it (micemu); takes -r, -H, -h, -P
trap '' HUP TERM # as in poweroff
word=poweroff
for arg; do
	case "$arg" in
	-r | --reboot) word=restart ;;
	-H | --halt) word=halt ;;
	-c) exit 0 ;;
	esac
done
echo "$word" > {pipe}
"""


def install(folder: str) -> None:
    """Make the scripts and the pipe in ``folder``, which programs see under the same path."""
    pipe = os.path.join(folder, PIPE)
    commands = os.path.join(folder, _BIN)
    os.makedirs(commands, 0o755, exist_ok=True)
    there = shlex.quote(pipe)  # a run directory has whatever name its owner gave it
    texts = {name: _SCRIPT.format(name=name, word=word, pipe=there) for name, word in _ACTIONS.items()}
    for name, text in {**texts, "shutdown": _SHUTDOWN.format(pipe=there)}.items():
        path = os.path.join(commands, name)
        with open(path, "w", errors="surrogateescape") as f:
            f.write(text)
        os.chmod(path, 0o755)
    make_pipe(pipe)


def make_pipe(path: str) -> None:
    """A fresh named pipe for the owner."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    os.mkfifo(path, 0o600)


def search_path(folder: str, path: str) -> str:
    """PATH with the scripts first."""
    return f"{os.path.join(folder, _BIN)}:{path}"


def open_pipe(path: str) -> int:
    """Descriptor to read requests from; held for writing too, so that it never ends."""
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def requests(fd: int) -> Iterator[str]:
    """The words that are in the pipe now; anything else is ignored."""
    try:
        text = os.read(fd, 4096)
    except BlockingIOError:
        return
    while len(text) >= _INIT_REQUEST.size and text.startswith(struct.pack("=i", _INIT_MAGIC)):
        _, command, level, _ = _INIT_REQUEST.unpack_from(text)
        text = text[_INIT_REQUEST.size :]
        if command == _RUNLEVEL and level in _RUNLEVELS:
            yield _RUNLEVELS[level]
    for word in text.decode("ascii", "replace").split():
        if word in WORDS:
            yield word
