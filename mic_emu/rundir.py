"""The run directory of an instance: sockets, pid file, logs. ARCHITECTURE.md lists every file.

``$XDG_RUNTIME_DIR/micemu/<instance>/``, or ``/tmp/micemu-<uid>/<instance>/`` when there is no runtime
directory; mode 0700, owned by the caller. Two instances never see each other.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mic_emu.errors import MicemuError, UsageError

CRASH_TAIL = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
# A Unix socket's path has 108 bytes; "mic255/console.sock" must fit behind the directory.
MAX_PATH = 108 - len("/mic255/console.sock") - 1


def default_instance() -> str:
    """The instance that commands act on: ``MICEMU_INSTANCE`` or ``default``."""
    return os.environ.get("MICEMU_INSTANCE", "default")


def base_dir() -> Path:
    """Where instances live."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime) and os.access(runtime, os.W_OK):
        return Path(runtime) / "micemu"
    return Path(f"/tmp/micemu-{os.getuid()}")


def _private_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as e:
        raise MicemuError(f"cannot make the run directory {path}: {e.strerror}; set XDG_RUNTIME_DIR") from e
    st = path.lstat()
    if not stat.S_ISDIR(st.st_mode):
        raise MicemuError(f"{path} is in the way of the run directory: remove it or set XDG_RUNTIME_DIR")
    if st.st_uid != os.getuid():
        raise MicemuError(
            f"the run directory {path} belongs to user {st.st_uid}, not to you ({os.getuid()}): "
            "remove it or set XDG_RUNTIME_DIR to a directory of your own"
        )
    if stat.S_IMODE(st.st_mode) & 0o077:
        path.chmod(0o700)


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be confused with a later one of the same number."""

    pid: int
    start: int  # clock ticks since boot, field 22 of /proc/PID/stat
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of a live process, None when there is none (a zombie counts as none)."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        if fields[0] in "ZX":
            return None
        return cls(pid, int(fields[19]), Path("/proc/sys/kernel/random/boot_id").read_text().strip())

    def alive(self) -> bool:
        """Is that very process running?"""
        return ProcessId.of(self.pid) == self


class RunDir:
    """Paths of one instance."""

    def __init__(self, instance: str | None = None) -> None:
        self.instance = default_instance() if instance is None else instance
        if not NAME.fullmatch(self.instance):
            raise UsageError(
                f"instance name {self.instance!r}: use up to 32 letters, digits, '-', '_' and '.'"
            )
        self.path = base_dir() / self.instance
        if len(str(self.path)) > MAX_PATH:
            raise MicemuError(
                f"{self.path} is too long for Unix sockets: set XDG_RUNTIME_DIR to a shorter path"
            )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def control(self) -> Path:
        """The host process's control socket."""
        return self.path / "control.sock"

    @property
    def pid_file(self) -> Path:
        return self.path / "host.pid"

    @property
    def log(self) -> Path:
        """Structured log of all processes, JSON lines."""
        return self.path / "log.jsonl"

    def card(self, name: str) -> Path:
        return self.path / name

    def create(self) -> None:
        """Make the directory, private to the caller. Raises MicemuError naming what is in the way."""
        _private_dir(base_dir())
        _private_dir(self.path)

    def check_owner(self) -> None:
        """Refuse a directory of somebody else (it may be a trap)."""
        for p in (base_dir(), self.path):
            if p.exists():
                _private_dir(p)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Serialise starting and cleaning. The lock file goes with the instance."""
        path = base_dir() / f".{self.instance}.lock"
        while True:
            _private_dir(base_dir())
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # the last instance took the directory away in between
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                if os.fstat(fd).st_ino == os.stat(path).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(fd)  # its last holder removed it: take the new one
        try:
            yield
        finally:
            if not self.path.exists():
                path.unlink(missing_ok=True)
                with suppress(OSError):
                    base_dir().rmdir()  # other instances may be there
            os.close(fd)

    @property
    def crash_log(self) -> Path:
        """Where init keeps the logs of an instance whose host process died; outside the directory, which
        goes with the instance."""
        state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
        return Path(state) / "micemu" / f"{self.instance}-crash.log"

    def save_logs(self) -> None:
        """Keep the ends of the logs (at most 1 MiB each) as ``crash_log``."""
        with suppress(OSError):
            self.crash_log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            parts = [p.read_bytes()[-CRASH_TAIL:] for p in (self.log, self.path / "stderr.log") if p.exists()]
            self.crash_log.write_bytes(b"\n".join(parts))

    def write_pids(self, processes: dict[str, int]) -> None:
        """Record who runs: ``{"host": pid, "init": pid}`` with start times and the boot id."""
        rows = {}
        for role, pid in processes.items():
            ident = ProcessId.of(pid)
            if ident:
                rows[role] = {"pid": ident.pid, "start": ident.start, "boot_id": ident.boot_id}
        tmp = self.pid_file.with_suffix(".tmp")
        tmp.write_text(json.dumps(rows) + "\n")
        tmp.rename(self.pid_file)

    def read_pids(self) -> dict[str, ProcessId]:
        """Who is recorded and still alive."""
        try:
            rows = json.loads(self.pid_file.read_text())
            found = {role: ProcessId(r["pid"], r["start"], r["boot_id"]) for role, r in rows.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {role: p for role, p in found.items() if p.alive()}

    def remove(self) -> None:
        """Delete the directory with all it holds; the caller holds the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
