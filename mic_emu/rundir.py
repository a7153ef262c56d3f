"""The run directory of an instance: sockets, pid file, logs. ARCHITECTURE.md lists every file.

``$MICEMU_RUNDIR/<instance>/`` if that is set, else ``$XDG_RUNTIME_DIR/micemu/<instance>/``, or
``/tmp/micemu-<uid>/<instance>/`` when there is no runtime directory; mode 0700, owned by the caller. Two
instances never see each other.

An instance with a group has mode 2750 and files that its members may read; it must lie in ``$MICEMU_RUNDIR``,
which is the one place where an instance of another user is believed to be one.
"""

from __future__ import annotations

import fcntl
import grp
import json
import os
import re
import select
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mic_emu.errors import MicemuError, UsageError, WaitTimeout
from mic_emu.proc import stat_words

CRASH_TAIL = 1 << 20
LOCK_LIMIT_S = 90.0  # whoever starts an instance gives up before
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
# A Unix socket's path has 108 bytes; "mic255/console.sock" must fit behind the directory.
MAX_PATH = 108 - len("/mic255/console.sock") - 1


def default_instance() -> str:
    """The instance that commands act on: ``MICEMU_INSTANCE`` or, when it is not set or empty, ``default``."""
    return os.environ.get("MICEMU_INSTANCE") or "default"


def named_dir() -> Path | None:
    """``$MICEMU_RUNDIR``, which its user made and named: it stays, and may be somebody else's."""
    named = os.environ.get("MICEMU_RUNDIR")
    return Path(os.path.abspath(named)) if named else None


def base_dir() -> Path:
    """Where instances live."""
    if named := named_dir():
        return named
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
    allowed = 0o2750 if st.st_mode & stat.S_ISGID else 0o700  # set-group-ID: shared, see ``_share``
    if stat.S_IMODE(st.st_mode) & ~allowed:
        path.chmod(allowed)


def _make_base() -> None:
    """The folder of all instances. Raises MicemuError."""
    if (named := named_dir()) is None:
        _private_dir(base_dir())
    elif not os.path.isdir(named):
        raise MicemuError(f"MICEMU_RUNDIR is {named}: make that directory first")


def _flock(fd: int, limit_s: float) -> bool:
    """Have the lock of the open file ``fd`` within so many seconds; else False, and ``fd`` is closed.

    flock knows no time-out: the wait is a thread's. One that nobody waits for any more gives back what it gets.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        pass
    turn, state = threading.Lock(), {"held": False, "given_up": False}

    def wait() -> None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with turn:
            state["held"] = True
            if state["given_up"]:
                os.close(fd)

    waiter = threading.Thread(target=wait, name="lock", daemon=True)
    waiter.start()
    waiter.join(limit_s)
    with turn:
        state["given_up"] = not state["held"]
        return state["held"]


def group_number(group: str) -> int:
    """The number of a group given by name or number. Raises UsageError."""
    if group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"there is no group {group!r} on this machine") from None


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
            fields = stat_words(pid)
        except OSError:
            return None
        if fields[0] in "ZX":
            return None
        return cls(pid, int(fields[19]), Path("/proc/sys/kernel/random/boot_id").read_text().strip())

    def alive(self) -> bool:
        """Is that very process running?"""
        return ProcessId.of(self.pid) == self

    def await_end(self, limit_s: float) -> None:
        """Until it has ended or the time is over."""
        try:
            watch = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            select.select([watch], [], [], max(limit_s, 0))
        finally:
            os.close(watch)


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

    def create(self, group: str = "") -> None:
        """Make the directory, private to the caller and to the members of ``group``. Raises MicemuError naming
        what is in the way."""
        self.check_owner()
        _make_base()
        _private_dir(self.path)
        if group:
            self._share(group)

    def _share(self, group: str) -> None:
        number, base = group_number(group), named_dir()
        if base is None:
            raise UsageError(
                f"group {group!r}: set MICEMU_RUNDIR, for you and for its members, to a directory that they can reach"
            )
        st = base.stat()
        if not (st.st_mode & stat.S_IXOTH or (st.st_mode & stat.S_IXGRP and st.st_gid == number)):
            raise MicemuError(f"group {group!r} cannot reach {base}: chgrp {group} {base}; chmod g+x {base}")
        try:
            os.chown(self.path, -1, number)
            # Set-group-ID: what is made inside belongs to the group. The umask of init says what it may do with it.
            self.path.chmod(0o2750)
        except OSError as e:
            raise MicemuError(f"cannot share the run directory with group {group!r}: {e.strerror}") from e

    def check_owner(self) -> None:
        """Refuse a directory of somebody else (it may be a trap), unless MICEMU_RUNDIR names it, and one in which
        anybody may lay a trap."""
        if named := named_dir():
            if os.path.isdir(named) and named.stat().st_mode & stat.S_IWOTH:
                raise MicemuError(f"MICEMU_RUNDIR is {named}, and anybody can write to it: chmod o-w {named}")
            return
        for p in (base_dir(), self.path):
            if p.exists():
                _private_dir(p)

    @property
    def _lock(self) -> Path:
        """The lock file. It goes with the instance."""
        return base_dir() / f".{self.instance}.lock"

    def _open_lock(self) -> int:
        """The open lock file, made with its folder. Raises MicemuError."""
        while True:
            _make_base()
            try:
                return os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except PermissionError as e:
                raise MicemuError(
                    f"the instance {self.instance} in {base_dir()} is not yours to start, kill or clean",
                    e.errno or 0,
                ) from e
            except OSError as e:
                if isinstance(e, FileNotFoundError) and not named_dir():
                    continue  # the last instance took the directory away in between
                raise MicemuError(
                    f"no instance can be made in {base_dir()}: {e.strerror}", e.errno or 0
                ) from e

    def _holds(self, fd: int) -> bool:
        """Is this the lock file still? Its last holder may have removed it."""
        try:
            return os.fstat(fd).st_ino == os.stat(self._lock).st_ino
        except FileNotFoundError:
            return False

    def _unlock(self, fd: int) -> None:
        """The holder leaves nothing of an instance that is not there."""
        if not self.path.exists():
            self._lock.unlink(missing_ok=True)
            if not named_dir():
                with suppress(OSError):
                    base_dir().rmdir()  # other instances may be there
        os.close(fd)

    @contextmanager
    def locked(self, patient: bool = False) -> Iterator[None]:
        """Serialise starting and cleaning. Raises WaitTimeout when somebody else is at it for LOCK_LIMIT_S, unless
        ``patient``: init has nothing else to do."""
        while True:
            fd = self._open_lock()
            if patient:
                fcntl.flock(fd, fcntl.LOCK_EX)
            elif not _flock(fd, LOCK_LIMIT_S):
                raise self._taken()
            if self._holds(fd):
                break
            os.close(fd)
        try:
            yield
        finally:
            self._unlock(fd)

    def _taken(self) -> WaitTimeout:
        inode = self._lock.stat().st_ino
        rows = map(str.split, Path("/proc/locks").read_text().splitlines())
        pids = [r[4] for r in rows if r[1] == "FLOCK" and r[5].endswith(f":{inode}")]
        who, fix = (
            (f"process {pids[0]}", f"kill {pids[0]}") if pids else ("a process that we cannot see", "end it")
        )
        return WaitTimeout(
            f"{who} has been starting or cleaning the instance {self.instance} for {LOCK_LIMIT_S:g} s: "
            f"wait for it, or {fix}"
        )

    def check_startable(self) -> None:
        """Raise the MicemuError that keeps an instance from being started here. Never waits, leaves nothing."""
        self.check_owner()
        fd = self._open_lock()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = self._holds(fd)
        except BlockingIOError:
            mine = False  # somebody starts or cleans: so it can be done
        if mine:
            self._unlock(fd)
        else:
            os.close(fd)

    @property
    def crash_log(self) -> Path:
        """Where init keeps the logs of an instance whose host process died; outside the directory, which
        goes with the instance."""
        state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
        return Path(state) / "micemu" / f"{self.instance}-crash.log"

    def crash_mark(self) -> tuple[int, int] | None:
        """Something that is another after each crash whose logs were kept."""
        try:
            st = self.crash_log.stat()
        except OSError:
            return None
        return st.st_mtime_ns, st.st_ino

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
        tmp.chmod(tmp.stat().st_mode & 0o640)  # the group must not tell us whom to kill
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
