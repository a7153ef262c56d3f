"""Unit files for systemd: ``micemu host --unit``."""

from __future__ import annotations

import os
import sys

from mic_emu.errors import UsageError

COMMON = """\
[Service]
Type=notify
ExecStart={program} --instance {instance} host --foreground --config {config}{group}
ExecReload=kill -HUP $MAINPID
{place}KillMode=mixed
TimeoutStopSec=90
Restart=on-failure
WatchdogSec=60
"""

USER = """\
# ~/.config/systemd/user/micemu{suffix}.service; systemctl --user enable --now micemu{suffix}
[Unit]
Description=micemu, emulated MIC X100 cards ({instance})

{service}
[Install]
WantedBy=default.target
"""

SYSTEM = """\
# /etc/systemd/system/micemu{suffix}.service; systemctl enable --now micemu{suffix}
# Once: groupadd mic; useradd --system --groups mic --create-home micemu
# Members of the group: export MICEMU_RUNDIR=/run/micemu{suffix}
[Unit]
Description=micemu, emulated MIC X100 cards ({instance})

{service}
[Install]
WantedBy=multi-user.target
"""

SHARED = """\
User=micemu
RuntimeDirectory=micemu{suffix}
RuntimeDirectoryMode=0755
Environment=MICEMU_RUNDIR=%t/micemu{suffix}
"""


def program() -> str:
    """How a unit calls this command. Raises UsageError when its path is none that a unit can name."""
    module = os.path.basename(sys.argv[0]) == "__main__.py"
    path = sys.executable if module else os.path.abspath(sys.argv[0])
    if not os.access(path, os.X_OK) or any(c in path for c in " \t%\"'\\"):
        raise UsageError(f"{path} cannot stand in a unit file: call micemu by its installed path")
    return f"{path} -m mic_emu.cli" if module else path


def unit(kind: str, instance: str, group: str | None) -> str:
    """The unit file of an instance: ``user`` for one's own service manager, ``system`` for a shared emulator."""
    suffix = "" if instance == "default" else f"-{instance}"
    shared = kind == "system"
    service = COMMON.format(
        program=program(),
        instance=instance,
        config=f"/etc/micemu{suffix}.toml" if shared else f"%h/.config/micemu{suffix}.toml",
        group=f" --group {group or 'mic'}" if shared else "",
        place=SHARED.format(suffix=suffix) if shared else "",
    )
    return (SYSTEM if shared else USER).format(suffix=suffix, instance=instance, service=service)
