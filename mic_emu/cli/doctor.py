"""micemu doctor"""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from mic_emu.cli import client
from mic_emu.sizes import format_size


@dataclass
class Finding:
    """One check: ``ok``, ``degraded`` (works, but less) or ``broken``."""

    name: str
    verdict: str
    detail: str
    fix: str = ""


def python() -> Finding:
    return Finding("python", "ok", ".".join(map(str, sys.version_info[:3])))


def shared_memory() -> Finding:
    try:
        st = os.statvfs("/dev/shm")
    except OSError as e:
        return Finding("shared memory", "broken", f"/dev/shm: {e.strerror}", "mount a tmpfs at /dev/shm")
    room = st.f_bavail * st.f_frsize
    detail = f"/dev/shm has {format_size(room // (1 << 20) * (1 << 20))} free"
    if room < 64 << 20:
        return Finding(
            "shared memory",
            "broken",
            detail,
            "a card needs about 40M: make /dev/shm larger (docker run --shm-size=1g)",
        )
    if room < 512 << 20:
        return Finding(
            "shared memory", "degraded", detail, "large SCIF windows will get ENOMEM: make /dev/shm larger"
        )
    return Finding("shared memory", "ok", detail)


def run_directory() -> Finding:
    from mic_emu.errors import MicemuError
    from mic_emu.rundir import named_dir

    variable = "MICEMU_RUNDIR" if named_dir() else "XDG_RUNTIME_DIR"
    try:
        where = client.rundir()
        where.check_owner()
        if not os.access(where.control, os.W_OK):  # else it is in use, by us or by one who shares it with us
            where.check_startable()
    except MicemuError as e:
        return Finding("run directory", "broken", str(e), f"set {variable} to a directory of your own")
    return Finding("run directory", "ok", str(where.path))


def namespaces() -> Finding:
    from mic_emu.namespaces import refusals

    refused = refusals()
    if refused:
        return Finding(
            "namespaces", "degraded", "; ".join(refused),
            "cards run as plain processes; allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, or a container "
            "profile that permits unshare)",
        )  # fmt: skip
    return Finding("namespaces", "ok", "user, mnt, uts, ipc, net, pid")


def network() -> Finding:
    from mic_emu import netns

    found = netns.probe()
    if found.mode == "ns":
        return Finding("network", "ok", "TAPs in namespaces of our own")
    return Finding("network", "degraded", "user-space responder", found.reason)


def fuse() -> Finding:
    from mic_emu.cosm.mounting import DEVICE_FIX, mount_helper, open_device

    try:
        os.close(open_device())
    except OSError as e:
        return Finding(
            "sysfs mount", "degraded", f"/dev/fuse: {e.strerror}",
            f"only micemu sysfs ls, cat and write work; for the mount: {DEVICE_FIX}",
        )  # fmt: skip
    if os.geteuid() != 0 and mount_helper() is None:
        return Finding(
            "sysfs mount", "degraded", "no fusermount3",
            "micemu run host --sysfs and micemu sysfs exec work; for micemu sysfs mount: install fuse3",
        )  # fmt: skip
    return Finding("sysfs mount", "ok", "/dev/fuse")


def userfaultfd() -> Finding:
    from mic_emu._native import lib

    rc = lib.mic_proc_userfaultfd()
    if rc < 0:
        return Finding(
            "userfaultfd", "degraded", os.strerror(-rc),
            "scif_register protects pages with mprotect and a handler for SIGSEGV; for userfaultfd: Linux 6.4, and in a "
            "container a seccomp profile that permits it",
        )  # fmt: skip
    return Finding("userfaultfd", "ok", "write protection")


def cpus() -> Finding:
    n = len(os.sched_getaffinity(0))
    if n < 2:
        return Finding(
            "processors",
            "degraded",
            f"{n}",
            "nothing can spin: latencies are those of sleeping peers; use 2 or more",
        )
    return Finding("processors", "ok", f"{n}")


def descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return Finding(
            "descriptors",
            "degraded",
            f"limit {soft} (hard {hard})",
            "four cards need about 600: ulimit -n 4096",
        )
    return Finding("descriptors", "ok", f"limit {soft}")


def peers() -> Finding:
    wanted = ("nbdinfo", "nbdcopy", "qemu-img", "fio", "mkfs.ext4", "ping", "iperf3", "tshark", "lspci")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [p for p in wanted if shutil.which(p, path=path) is None]
    if missing:
        return Finding(
            "tools for tests",
            "degraded",
            f"missing: {', '.join(missing)}",
            "their tests are skipped; nothing else needs them",
        )
    return Finding("tools for tests", "ok", "all there")


def leftovers() -> Finding:
    from mic_emu.cli.clean import leftovers as stray
    from mic_emu.cosm.mount import abandoned
    from mic_emu.testing import homes

    where = client.rundir()
    if os.path.exists(where.path) and not where.read_pids():
        return Finding(
            "leftovers",
            "degraded",
            f"{where.path} of a dead instance, processes {stray(where) or 'none'}",
            "micemu clean",
        )
    if machines := homes.abandoned():
        running = sum(len(homes.processes(home)) for home in machines)
        return Finding(
            "leftovers",
            "degraded",
            f"machines of a test run that was killed: {', '.join(map(str, machines))}, with {running} processes",
            "micemu clean",
        )
    if mounts := abandoned():
        return Finding(
            "leftovers",
            "degraded",
            f"sysfs trees that nobody serves any more: {', '.join(mounts)}",
            "micemu clean",
        )
    names = [p.name for p in Path("/dev/shm").glob(f"micemu-{os.getuid()}-*")]
    if names:
        return Finding("leftovers", "degraded", f"in /dev/shm: {', '.join(names)}", "remove them")
    return Finding("leftovers", "ok", "none")


CHECKS: tuple[Callable[[], Finding], ...] = (
    python, shared_memory, run_directory, namespaces, network, fuse, userfaultfd, cpus, descriptors, peers, leftovers,
)  # fmt: skip


def examine() -> Iterator[Finding]:
    """Every finding; a check that fails is one too."""
    for check in CHECKS:
        try:
            yield check()
        except OSError as e:
            yield Finding(check.__name__, "broken", str(e))


@click.command()
@client.json_option
def command(as_json: bool) -> None:
    """Check what this machine offers, with the fix for what is missing. Exit status 1 when something is broken.

    \b
    Example:
      micemu doctor
    """
    findings = list(examine())
    if as_json:
        client.emit([asdict(f) for f in findings])
    else:
        for f in findings:
            click.echo(
                f"{f.verdict:<9} {f.name}: {f.detail}" + (f"\n          fix: {f.fix}" if f.fix else "")
            )
    if any(f.verdict == "broken" for f in findings):
        raise click.exceptions.Exit(1)
