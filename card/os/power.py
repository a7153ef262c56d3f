"""``poweroff``, ``halt``, ``reboot`` and ``shutdown`` for programs on the card.

Small scripts in a folder that comes first in every program's PATH. They signal the card OS, with the
numbers that systemd's init knows. They reach nothing but the card, with and without namespaces; the
host's programs of these names would, on a card of plain processes, reach the host.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from mic_emu.cosm.states import Status

SIGNALS: Mapping[int, Status] = {
    signal.SIGRTMIN + 3: Status.HALTED,
    signal.SIGRTMIN + 4: Status.POWEROFF,
    signal.SIGRTMIN + 5: Status.RESTART,
}
_HALT, _POWEROFF, _REBOOT = SIGNALS
COMMANDS = {"halt": _HALT, "poweroff": _POWEROFF, "reboot": _REBOOT, "shutdown": _POWEROFF}
_FOLDERS = ("", "/bin", "/sbin", "/usr/bin", "/usr/sbin")

_SCRIPT = """\
#!/bin/sh
# {name} of this card: signals its kernel, process {pid}.
trap '' TERM HUP
signal={signal}
for word; do
    case "$word" in
    -p | -P | --poweroff) signal={poweroff} ;;
    -r | --reboot) signal={reboot} ;;
    -H | --halt) signal={halt} ;;
    -h | -f | --force | now | 0 | +0) ;;
    *)
        echo "usage: {name} [-p | -r | -H] [-f] [now]" >&2
        exit 2
        ;;
    esac
done
kill -$signal {pid}
"""


def install(folder: Path) -> None:
    """Write the scripts; they signal the calling process."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, number in COMMANDS.items():
        text = _SCRIPT.format(
            name=name, signal=number, pid=os.getpid(), poweroff=_POWEROFF, reboot=_REBOOT, halt=_HALT
        )
        path = folder / name
        path.write_text(text)
        path.chmod(0o700)


def own_command(argv: Sequence[str], folder: str) -> list[str]:
    """``argv`` with the card's own script in place of one of the host's commands, by name or full path.

    Started through the shell, so that it also works where the folder cannot be executed from.
    """
    where, name = os.path.split(argv[0])
    if folder and name in COMMANDS and where in _FOLDERS:
        return ["/bin/sh", f"{folder}/{name}", *argv[1:]]
    return list(argv)
