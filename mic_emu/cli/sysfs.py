"""micemu sysfs"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import click

from mic_emu.cli import client
from mic_emu.errors import MicemuError


@click.group()
def command() -> None:
    """The files of /sys/class/mic and debugfs: list, read, write, mount.

    Paths count from the mount: class/mic/mic0/state, kernel/debug/mic_cosm/mic0/log_buf; micN/NAME alone
    means class/mic/micN/NAME.

    \b
    Examples:
      micemu sysfs cat mic0/state
      micemu sysfs write mic0/state shutdown
      micemu sysfs mount /tmp/sys
    """


def full(path: str) -> str:
    """``mic0/state`` is short for ``class/mic/mic0/state``."""
    path = path.strip("/").removeprefix("sys/")
    return f"class/mic/{path}" if path.startswith("mic") else path


@command.command()
@click.argument("path", default="")
def ls(path: str) -> None:
    """List the files below PATH, or all, each with its mode.

    \b
    Examples:
      micemu sysfs ls
      micemu sysfs ls mic0
      micemu sysfs ls kernel/debug
    """
    top = full(path)
    files = {
        p: mode
        for p, (mode, _) in sorted(client.ask("sysfs_list")["files"].items())
        if not path or p == top or p.startswith(f"{top}/")
    }
    if not files:
        client.ask("sysfs_read", path=top)  # raises, and says why there is none
    for path, mode in files.items():
        target = f" -> {client.ask('sysfs_read', path=path)['data']}" if stat.S_ISLNK(mode) else ""
        click.echo(f"{stat.S_IMODE(mode):04o} {path}{target}")


@command.command()
@click.argument("path")
def cat(path: str) -> None:
    """Print a file as it is.

    \b
    Examples:
      micemu sysfs cat mic0/state
      micemu sysfs cat kernel/debug/mic_cosm/mic0/log_buf
    """
    data = client.ask("sysfs_read", path=full(path))["data"].encode("latin-1")
    sys.stdout.buffer.write(data)


@command.command()
@click.argument("path")
@click.argument("text", required=False)
def write(path: str, text: str | None) -> None:
    """Write TEXT (or standard input) to a file; fails as the kernel would.

    \b
    Examples:
      micemu sysfs write mic0/bootmode linux
      micemu sysfs write mic0/firmware mic/uos.img
      micemu sysfs write mic0/state boot
    """
    data = sys.stdin.buffer.read() if text is None else text.encode(errors="surrogateescape")
    client.ask("sysfs_write", path=full(path), data=data.decode("latin-1"))


def mount_point(directory: str) -> str:
    """Absolute and real. A mount of ours is not touched on the way: its server may hang."""
    from mic_emu.cosm.mount import is_mounted

    parent, name = os.path.split(os.path.abspath(directory))
    place = os.path.join(os.path.realpath(parent), name)
    return place if is_mounted(place) else os.path.realpath(directory)


class MountPoint(click.Path):
    """A directory where nothing of ours is mounted; what nobody serves any more is taken away, for even ``stat`` fails there."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from mic_emu.cosm.mount import clear, is_mounted

        place = mount_point(value)
        clear(place)
        if is_mounted(place):
            raise MicemuError(
                f"{place}: a tree of micemu is mounted there already (micemu sysfs umount {place} takes it away)",
                errno.EBUSY,
            )
        return super().convert(value, param, ctx)


@command.command()
@click.argument("directory", type=MountPoint(exists=True, file_okay=False, resolve_path=True))
@click.option("--foreground", is_flag=True, help="Serve until interrupted instead of in the background.")
def mount(directory: str, foreground: bool) -> None:
    """Mount the tree at DIRECTORY: class/mic as under /sys, kernel/debug as debugfs.

    Needs /dev/fuse, and either root or fusermount3 (Debian's fuse3). The mount goes when the emulator ends. What
    fusermount3 mounts, only its user may enter: not even root.

    \b
    Examples:
      micemu sysfs mount /tmp/sys
      cat /tmp/sys/class/mic/mic0/state
      echo boot > /tmp/sys/class/mic/mic0/state
    """
    from mic_emu.cosm import mount as server

    where = client.rundir()
    client.connect(where).close()
    try:
        server.run(directory, where.control, foreground)
    except OSError as e:
        raise MicemuError(f"cannot mount: {e.strerror or e}", e.errno or errno.EIO) from e


@command.command()
@click.argument("directory")
def umount(directory: str) -> None:
    """Take the mount at DIRECTORY away. An error when no tree of ours is mounted there.

    \b
    Examples:
      micemu sysfs umount /tmp/sys
    """
    from mic_emu.cosm.mount import is_mounted
    from mic_emu.cosm.mounting import unmount

    directory = mount_point(directory)
    if not is_mounted(directory):
        raise MicemuError(
            f"{directory}: no tree of micemu is mounted there (micemu sysfs mount {directory} mounts it)",
            errno.EINVAL,
        )
    unmount(directory)
    if is_mounted(directory):
        raise MicemuError(f"{directory}: the mount cannot be taken away: it is another user's", errno.EPERM)


@command.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM [ARG]...")
def execute(program: tuple[str, ...]) -> None:
    """Run a program that finds the tree at its real places, /sys/class/mic and /sys/kernel/debug.

    In a mount namespace of its own; nobody else sees the mount, and it goes with the program.

    \b
    Examples:
      micemu sysfs exec -- cat /sys/class/mic/mic0/state
      micemu run host -- micemu sysfs exec -- ./daemon
    """
    from mic_emu.cosm import mount as server

    argv = list(program[1:] if program[0] == "--" else program)
    if not argv:
        raise click.UsageError("name a program behind --")
    where = client.rundir()
    client.connect(where).close()
    try:
        server.become(argv, where.control)
    except OSError as e:
        raise MicemuError(f"cannot run {argv[0]}: {e.strerror or e}", e.errno or errno.EIO) from e
