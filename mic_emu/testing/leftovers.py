"""What an emulator could leave on the machine, and what a test or a test run did leave.

Other emulators run on the same machine at the same time: other test runs, other workers of this one. Theirs
come and go, so only what is new *and stays* counts; a FUSE mount that is served belongs to somebody alive.
"""

from __future__ import annotations

import errno
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from mic_emu.testing import homes

SESSION = "PYTEST_MICEMU_SESSION"
"""Environment: a word that folders and processes of one test run have in common."""
STAYS_S = 20.0
_OWN_SOURCES = ("micemu", "card", "init", "ramdisk", "scratch")  # of mounts that cards have among themselves


@dataclass(frozen=True)
class Leftovers:
    """What must be the same before and after: names of shared memory, mounts of ours, interfaces of cards."""

    shm: frozenset[str]
    mounts: frozenset[str]
    interfaces: frozenset[str]

    @classmethod
    def now(cls, home: Path | None = None) -> Leftovers:
        """``home``: whatever is mounted below is ours."""
        return cls(
            frozenset(n for n in os.listdir("/dev/shm") if n.startswith("micemu-")),
            frozenset(_mounts(home)),
            frozenset(n for n in os.listdir("/sys/class/net") if re.fullmatch(r"mic\d+", n)),
        )

    def stay(self, home: Path | None = None, within_s: float = STAYS_S) -> list[str]:
        """What was not there when ``self`` was taken, and still is after so long: a line each."""
        left: set[str] | None = None
        deadline = time.monotonic() + within_s
        while True:
            after = Leftovers.now(home)
            found = {f"shared memory {n}" for n in after.shm - self.shm}
            found |= {f"mount {n}" for n in after.mounts - self.mounts}
            found |= {f"interface {n}" for n in after.interfaces - self.interfaces}
            left = found if left is None else left & found
            if not left or time.monotonic() >= deadline:
                return sorted(left)
            time.sleep(0.01)  # no descriptor tells when any of them goes


def _mounts(home: Path | None) -> list[str]:
    """Mounts in our namespace that no living emulator has: below ``home``, of a card's own tree, or FUSE
    mounts whose server is dead."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        place, _, kind = line.partition(" - ")
        at = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), place.split()[4])
        fstype, source = kind.split()[:2]
        below = home is not None and Path(at).is_relative_to(home)
        private = source in _OWN_SOURCES and not fstype.startswith("fuse")
        if below or private or (fstype.startswith("fuse") and _dead(at)):
            found.append(f"{at} ({fstype} {source}, {place.split()[0]})")
    return found


def _dead(at: str) -> bool:
    try:
        os.stat(at)
    except OSError as e:
        return e.errno == errno.ENOTCONN
    return False


def left_behind(mark: str, before: Leftovers) -> list[str]:
    """What the test run with ``mark`` in its environment (SESSION) left: a line each."""
    found = before.stay(within_s=0)
    found += [f"folder {path}" for path in homes.PLACE.glob(f"{homes.PREFIX}{mark}*")]
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            name = (environ.parent / "comm").read_text(errors="replace").strip()
            if re.match(r"micemu|mic\d+-", name) and f"{SESSION}={mark}".encode() in environ.read_bytes():
                found.append(f"process {environ.parent.name} {name}")
        except OSError:
            continue
    return found
