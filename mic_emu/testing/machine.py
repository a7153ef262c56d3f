"""A whole emulator for a test: own instance, own run directory, everything gone afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mic_emu.testing import homes
from mic_emu.testing.faults import ActiveFault, fault
from mic_emu.testing.leftovers import SESSION, Leftovers

MICEMU = [sys.executable, "-m", "mic_emu.cli"]
TAIL = 6000  # bytes of a log that a report shows
DUMP_S = 10.0


def eventually(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """Wait until ``condition()`` is true and return its value; AssertionError names what was awaited."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what}: not within {within_s:g} s")
        # A pause between two looks at another process's state, where no descriptor tells of a change.
        time.sleep(0.01)


class Machine:
    """Runs ``micemu`` commands against an instance of its own. Context manager; checks for leaks."""

    def __init__(
        self, environment: Mapping[str, str] | None = None, program: Sequence[str] = tuple(MICEMU)
    ) -> None:
        self.program = list(program)
        self.home = homes.make(os.environ.get(SESSION, ""))
        runtime = homes.runtime_dir(self.home)
        runtime.mkdir(mode=0o700)
        self.run_dir = runtime / "micemu" / "default"
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MICEMU_")},
            "XDG_RUNTIME_DIR": str(runtime),
            "XDG_STATE_HOME": str(self.home / "state"),
            "XDG_CACHE_HOME": cache,
            **(environment or {}),
        }
        self._before = Leftovers.now(self.home)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- commands -------------------------------------------------------------------------------

    def micemu(
        self,
        *args: str,
        check: bool = True,
        timeout: float = 120,
        cwd: str | Path | None = None,
        stdin: Any = subprocess.DEVNULL,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. ``check``: AssertionError with all output when it fails."""
        done = subprocess.run(
            [*self.program, *args], env=self.env, stdin=stdin, capture_output=True, text=True, timeout=timeout, check=False,
            cwd=cwd or self.home, errors="replace",
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(
                f"micemu {' '.join(args)}: exit status {done.returncode}\n{done.stdout}{done.stderr}\n{self.report()}"
            )
        return done

    def popen(self, *args: str, **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a command; the caller ends it."""
        return subprocess.Popen(
            [*self.program, *args], env=self.env, cwd=kwargs.pop("cwd", self.home), **kwargs
        )

    def json(self, *args: str, **kwargs: Any) -> Any:
        """A command's ``--json`` output."""
        return json.loads(self.micemu(*args, "--json", **kwargs).stdout)

    def boot(self, *args: str) -> dict[str, Any]:
        """``micemu boot``; returns the status."""
        status: dict[str, Any] = self.json("boot", *args)
        return status

    def status(self) -> dict[str, Any]:
        """``status --json``; an empty one when nothing runs."""
        out = self.micemu("status", "--json", check=False)
        plain: dict[str, Any] = json.loads(out.stdout)
        return plain

    def card(self, name: str = "mic0") -> dict[str, Any]:
        """One card of the status."""
        return next(c for c in self.status()["cards"] if c["name"] == name)

    def device(self, kind: str, name: str = "mic0") -> dict[str, Any]:
        """One device of a card."""
        return next(d for d in self.card(name)["devices"] if d["type"] == kind)

    def on_card(self, *argv: str, card: str = "mic0", **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """A program on the card."""
        return self.micemu("run", card, "--", *argv, **kwargs)

    def shell(self, script: str, card: str = "mic0", **kwargs: Any) -> str:
        """A shell script on the card; its output."""
        return self.on_card("sh", "-c", script, card=card, **kwargs).stdout

    def fault(self, kind: str, card: str = "mic0", **words: object) -> AbstractContextManager[ActiveFault]:
        """``with machine.fault("packet-loss", rate=0.1) as f:`` a fault while the block lasts (docs/faults.md)."""
        return fault(self, kind, card, **words)

    # --- the end --------------------------------------------------------------------------------

    def processes(self) -> list[str]:
        """Command lines of processes that belong to this instance."""
        mark = str(self.home).encode()
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in environ.read_bytes():
                    found.append(
                        (environ.parent / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")[:200]
                    )
            except OSError:
                continue
        return found

    def logs(self) -> list[tuple[str, str]]:
        """Name and end of every log: the instance's, those of a crash, the cards' consoles."""
        found = []
        for path in [
            *self.run_dir.glob("log.jsonl"),
            *self.run_dir.glob("*.log"),
            *self.home.glob("state/micemu/*"),
            *self.run_dir.glob("*/*.log"),
        ]:
            try:
                with path.open("rb") as f:
                    f.seek(max(0, path.stat().st_size - TAIL))
                    text = f.read().decode(errors="replace")
            except OSError:
                continue
            own = path.parent == self.run_dir or not path.is_relative_to(self.run_dir)
            name = path.name if own else f"{path.parent.name}/{path.name}"
            if text:
                found.append((name, text))
        return found

    def report(self) -> str:
        """Logs for a failed test."""
        return "\n".join(f"--- {name}\n{text}" for name, text in self.logs())

    def failure_sections(self) -> list[tuple[str, str]]:
        """Title and text of what a failing test shows: logs, and of every card its kernel log, registers, device
        page and vrings. Bounded in time: a host process that does not answer is left out."""
        found = [(f"micemu {name}", text) for name, text in self.logs()]
        for card in sorted(p.name for p in self.run_dir.glob("mic[0-9]*")):
            for what in ("log", "registers", "page", "vring"):
                try:
                    done = self.micemu("dump", what, card, check=False, timeout=DUMP_S)
                except subprocess.TimeoutExpired:
                    return [*found, (f"micemu dump {what} {card}", "no answer: the host process hangs")]
                if done.stdout and done.returncode == 0:
                    found.append((f"micemu dump {what} {card}", done.stdout[-2 * TAIL :]))
        return found

    def keep(self, where: Path) -> None:
        """Copy the run directory's files, sockets and pipes left out, to ``where``."""
        for path in [*self.run_dir.rglob("*"), *self.home.glob("state/micemu/*")]:
            if path.is_file():
                base = self.run_dir if path.is_relative_to(self.run_dir) else self.home
                target = where / path.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    def check_clean(self) -> None:
        """Nothing is left: processes, shared memory, mounts, interfaces, run directory."""
        eventually(lambda: not self.processes(), 30, f"the end of all processes, now {self.processes()}")
        stays = self._before.stay(self.home)
        assert not stays, f"left on the machine: {', '.join(stays)}"
        left = [str(p) for p in (self.home / "run").rglob("*")]
        assert not left, f"left in the run directory: {left}"

    def close(self, stop: Sequence[str] = ("stop", "--force")) -> None:
        """Stop the instance, check that nothing is left, remove the directories."""
        try:
            self.micemu(*stop, check=False)
            self.check_clean()
        finally:
            for pid in [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/environ") if self._ours(p)]:
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    pass
            shutil.rmtree(self.home, ignore_errors=True)

    def _ours(self, environ: Path) -> bool:
        try:
            return str(self.home).encode() in environ.read_bytes()
        except OSError:
            return False
