"""Messages between ``micemu run`` and the init of a card, over ``wire``.

===================  =====================================================================
client               ``{"run": 1, "argv", "env", "cwd", "umask", "limits", "tty", "rows",
                     "cols"}``, with stdin, stdout and stderr when ``tty`` is false
client, later        ``{"signal": n}`` for the program's process group
init                 ``{"started": pid}``, with the terminal's master when ``tty`` is true
init                 ``{"exited": status}``: 0..255, or minus the signal that ended it
init                 ``{"error": errno, "message": sentence}``: it was never started
===================  =====================================================================

Closing the connection ends the program: hang-up first, kill after ``HANGUP_GRACE_S``.
"""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass, field
from typing import Any

from mic_emu.wire import Message

VERSION = 1
HANGUP_GRACE_S = 2.0
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LIMITS = {
    name: getattr(resource, f"RLIMIT_{name.upper()}")
    for name in ("as", "core", "cpu", "data", "fsize", "memlock", "nofile", "nproc", "stack")
}

# What a caller's session is about and the card's is not.
_NOT_PASSED = frozenset(
    {
        "HOSTNAME",
        "OLDPWD",
        "XDG_RUNTIME_DIR",
        "DBUS_SESSION_BUS_ADDRESS",
        "SSH_AUTH_SOCK",
        "SSH_TTY",
        "NOTIFY_SOCKET",
    }
)
_MAX_DIMENSION = 0xFFFF


class BadRequest(ValueError):
    """A request that is no request; the sentence goes back to the client."""


@dataclass(frozen=True)
class RunRequest:
    """A program to start.

    rows, cols:  characters, 0 when not known
    limits:      soft resource limits by name of ``LIMITS``, -1 for none
    """

    argv: list[str]
    cwd: str
    env: dict[str, str] = field(default_factory=dict)
    tty: bool = False
    rows: int = 0
    cols: int = 0
    umask: int = 0o022
    limits: dict[str, int] = field(default_factory=dict)

    def message(self) -> Message:
        """As it goes over the wire."""
        return {
            "run": VERSION,
            "argv": self.argv,
            "env": self.env,
            "cwd": self.cwd,
            "tty": self.tty,
            "rows": self.rows,
            "cols": self.cols,
            "umask": self.umask,
            "limits": self.limits,
        }


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise BadRequest(f"{what} is not a string without zero bytes")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise BadRequest(f"{what} cannot be encoded") from None
    return value


def parse_run(msg: Message, nfds: int) -> RunRequest:
    """Check a client's first message. Raises BadRequest."""
    if msg.get("run") != VERSION:
        raise BadRequest(
            f"the request has version {msg.get('run')!r:.20}, this card speaks version {VERSION}: "
            "micemu stop, then micemu boot"
        )
    argv, env, tty = msg.get("argv"), msg.get("env", {}), msg.get("tty", False)
    if not isinstance(argv, list) or not argv:
        raise BadRequest("no program is named")
    if not isinstance(env, dict) or not isinstance(tty, bool):
        raise BadRequest("the environment or the terminal flag has the wrong type")
    if nfds != (0 if tty else 3):
        raise BadRequest(f"{nfds} descriptors came with the request, {0 if tty else 3} belong to it")
    sizes = [msg.get(k, 0) for k in ("rows", "cols")]
    if not all(type(n) is int and 0 <= n <= _MAX_DIMENSION for n in sizes):
        raise BadRequest("the terminal's size is not two numbers of 0..65535")
    umask = msg.get("umask", 0o022)
    if type(umask) is not int or not 0 <= umask <= 0o777:
        raise BadRequest("the umask is not a number of 0..511")
    limits = msg.get("limits", {})
    if not isinstance(limits, dict) or not limits.keys() <= LIMITS.keys():
        raise BadRequest("the limits are not those of getrlimit")
    if not all(type(n) is int and -1 <= n < 1 << 63 for n in limits.values()):
        raise BadRequest("a limit is not a number")
    for name in env:
        if "=" in _text(name, "an environment name") or not name:
            raise BadRequest("an environment name is empty or has '=' in it")
    return RunRequest(
        argv=[_text(a, "an argument") for a in argv],
        cwd=_text(msg.get("cwd", "/"), "the working directory"),
        env={k: _text(v, f"the environment's {k}") for k, v in env.items()},
        tty=tty,
        rows=sizes[0],
        cols=sizes[1],
        umask=umask,
        limits=limits,
    )


def soft_limits() -> dict[str, int]:
    """This process's own, for a request."""
    return {name: resource.getrlimit(which)[0] for name, which in LIMITS.items()}


def card_environment(caller: dict[str, str], card: dict[str, str]) -> dict[str, str]:
    """Environment of a program: the caller's without its session's own, and what the card says."""
    env = {k: v for k, v in caller.items() if k not in _NOT_PASSED and not k.startswith("MICEMU_")}
    env.setdefault("PATH", DEFAULT_PATH)
    env.setdefault("HOME", "/")
    if "MICEMU_BIN" in card:  # the card's own poweroff, halt and reboot come first
        env["PATH"] = f"{card['MICEMU_BIN']}:{env['PATH']}"
    return {**env, **card}


def start_error(number: int, program: str, cwd: str, stage: str) -> str:
    """One sentence for a program that could not be started.

    stage: "root", "cwd" or "exec": what the child was at when it failed.
    """
    why = os.strerror(number)
    if stage == "root":
        return f"cannot set up the card's file system for {program}: {why}"
    if stage == "cwd":
        return (
            f"the working directory {cwd} cannot be used on the card: {why}; call it from another directory"
        )
    if number == errno.ENOENT:
        return f"{program}: not found on the card"
    if number == errno.ENOEXEC:
        return f"{program}: the card cannot execute this format (a script needs a #! line)"
    return f"{program}: cannot be executed on the card: {why}"


def exit_code(number: int, stage: str = "exec") -> int:
    """Exit status of ``micemu run`` for a start error at ``stage``, as shells have it."""
    return 127 if stage == "exec" and number == errno.ENOENT else 126
