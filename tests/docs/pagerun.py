"""Pages of docs/ that run: their console blocks are typed into a shell, their named files are written first.

* A block of language ``console``: lines with ``$`` are typed (``>`` continues one), the others are what the page
  promises to see. Runs of digits, and hexadecimal numbers, stand for any; ``...`` stands for anything, also for lines.
* A block behind a line that ends with "`NAME`:" is the content of the file NAME.
* A command whose comment says ``Ctrl-]`` or ``press q`` runs on a terminal, where that key is pressed.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.M | re.S)
NAMED = re.compile(r"`([\w./-]+)`:\s*$")
END = "--end-of-command--"
TTY = Path(__file__).with_name("on_tty.py")


@dataclass
class Step:
    command: str
    expected: list[str] = field(default_factory=list)


@dataclass
class File:
    name: str
    content: str


def steps(page: str) -> Iterator[Step | File]:
    for block in BLOCK.finditer(page):
        language, content = block.groups()
        before = page[: block.start()].rstrip().rsplit("\n", 1)[-1]
        if named := NAMED.search(before):
            yield File(named[1], content)
        elif language == "console":
            yield from _commands(content)


def _commands(content: str) -> Iterator[Step]:
    step: Step | None = None
    for line in content.splitlines():
        if line.startswith("$ "):
            if step:
                yield step
            step = Step(line[2:])
        elif step and line.startswith("> "):
            step.command += "\n" + line[2:]
        elif step:
            step.expected.append(line)
    if step:
        yield step


def _pattern(line: str) -> str:
    words = re.sub(r"\s+", " ", line.strip())
    words = re.sub(r"0x[0-9a-f]+|\d+", "0", words)
    return ".*".join(re.escape(part) for part in words.split("..."))


def missing(expected: list[str], output: str) -> str | None:
    """The first promised line that the output does not have, in order; None when all are there."""
    seen = [
        re.sub(r"0x[0-9a-f]+|\d+", "0", re.sub(r"\s+", " ", line.strip())) for line in output.splitlines()
    ]
    at = 0
    for line in expected:
        pattern = _pattern(line)
        if pattern in ("", ".*"):
            continue
        while at < len(seen) and not re.fullmatch(pattern, seen[at]):
            at += 1
        if at == len(seen):
            return line
        at += 1
    return None


def on_terminal(command: str) -> str:
    key = "\\x1d" if "Ctrl-]" in command else "q" if "press q" in command else ""
    return f"{sys.executable} {TTY} '{key}' {command}" if key else command


class Shell:
    """One bash for a page: what is exported, started in the background or changed into stays."""

    def __init__(self, home: Path) -> None:
        self.home = home
        work = home / "work"
        work.mkdir()
        runtime = home / "run"
        runtime.mkdir(mode=0o700)
        keep = {k: v for k, v in os.environ.items() if not k.startswith("MICEMU_")}
        self.env = {
            **keep,
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(runtime),
            "XDG_STATE_HOME": str(home / "state"),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "COLUMNS": "120",
            "PYTHONUNBUFFERED": "1",
        }
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=work,
            env=self.env,
            start_new_session=True,
        )
        self.work = work

    def run(self, command: str, timeout: float = 120) -> tuple[int, str]:
        """Exit status and output; the command reads nothing."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        typed = f"{{ {on_terminal(command)}\n}} </dev/null\n_status=$?; echo; echo {END} $_status\n"
        self.process.stdin.write(typed.encode())
        self.process.stdin.flush()
        output, deadline = b"", time.monotonic() + timeout
        end = re.compile(rf"^{END} (\d+)\n".encode(), re.M)
        while not (match := end.search(output)):
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(left, 0))
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not chunk:
                raise AssertionError(
                    f"$ {command}\ndid not end within {timeout:g} s:\n{output.decode(errors='replace')}"
                )
            output += chunk
        return int(match[1]), output[: match.start()].decode(errors="replace")

    def close(self) -> None:
        """End every emulator of the page, also when it failed before it stopped them, and the shell."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for instance in sorted((self.home / "run/micemu").glob("[!.]*")):
            micemu = [sys.executable, "-m", "mic_emu.cli", "--instance", instance.name]
            subprocess.run([*micemu, "stop", "--force"], env=self.env, capture_output=True, timeout=60)
