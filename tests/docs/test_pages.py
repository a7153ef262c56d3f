"""What the pages tell people to type works, and shows what the pages promise."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pagerun import File, Shell, Step, missing, steps

from mic_emu.cli import cli

DOCS = Path(__file__).parents[2] / "docs"
# Pages whose console blocks are complete sessions, from nothing to nothing.
RUN = [
    "tutorial",
    "commands",
    "howto-scif",
    "howto-cards",
    "howto-crash",
    "howto-rootless",
    "howto-ci",
    "faults",
    "backend",
    "hardware",
    "vsock",
]
PEERS = {"vsock": "socat"}


@pytest.fixture
def home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="md-", dir="/tmp"))  # short: sockets have at most 107 characters
    yield home
    shutil.rmtree(home)


@pytest.fixture
def shell(home: Path) -> Iterator[Shell]:
    shell = Shell(home)
    try:
        yield shell
    finally:
        shell.close()


@pytest.mark.system
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.peer(PEERS[n])) if n in PEERS else n for n in RUN]
)
def test_page_runs(name: str, shell: Shell):
    for step in steps((DOCS / f"{name}.md").read_text()):
        if isinstance(step, File):
            path = shell.work / step.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.content)
            continue
        status, output = shell.run(step.command)
        said = f"$ {step.command}\n{output}"
        assert status == 0, f"{name}.md: exit status {status}\n{said}"
        assert (line := missing(step.expected, output)) is None, f"{name}.md promises {line!r}\n{said}"
    status, output = shell.run("micemu status")
    assert status == 3, f"{name}.md leaves an emulator behind\n{output}"


def commands(group: click.Group, name: str = "") -> Iterator[str]:
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        if isinstance(command, click.Group) and not command.invoke_without_command:
            yield from commands(command, f"{name} {word}")
        elif isinstance(command, click.Group):
            yield f"{name} {word}"
            yield from commands(command, f"{name} {word}")
        elif command:
            yield f"{name} {word}"


@pytest.mark.parametrize("command", list(commands(cli)))
def test_every_command_has_an_example_that_runs(command: str):
    typed = [
        step.command
        for name in RUN
        for step in steps((DOCS / f"{name}.md").read_text())
        if isinstance(step, Step)
    ]
    words = r"\s+".join(command.split())
    assert any(re.search(rf"\bmicemu\s+(--\w+ \S+ )?{words}\b", line) for line in typed), (
        f"no example of micemu{command}"
    )


MICCTRL = (
    "-s",
    "-b",
    "-r",
    "-S",
    "-w",
    "-R",
    "--boot",
    "--reset",
    "--status",
    "--wait",
    "--config",
    "--autoboot",
    "--network",
)


@pytest.mark.parametrize("option", MICCTRL)
def test_every_option_of_micctrl_has_an_example_that_runs(option: str):
    typed = [s.command for s in steps((DOCS / "commands.md").read_text()) if isinstance(s, Step)]
    assert any(re.search(rf"\bmicctrl\b[^&]* {option}\b", line) for line in typed)


def examples(command: str) -> list[str]:
    """The lines below ``Examples:`` in its help."""
    context, group = click.Context(cli), cli
    for word in command.split():
        found = group.get_command(context, word)
        assert found
        group = found  # type: ignore[assignment]
    _, _, text = (group.help or "").partition("Example")
    return [line.strip() for line in text.splitlines()[1:] if line.strip()]


MICEMU = re.compile(r"(?:^|[ (])micemu (.*?)(?: [|<>&] | && |\)|  |$)")


def parse(words: list[str]) -> None:
    """What click makes of an example, without doing it. Raises click.UsageError."""
    command: click.Command = cli
    context, name = None, "micemu"
    while True:
        context = command.make_context(name, list(words), parent=context)
        words = [*getattr(context, "_protected_args", []), *context.args]  # of a group: its command
        if not isinstance(command, click.Group) or not words:
            return
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found, f"no command {name}"
        command = found


@pytest.mark.parametrize("command", list(commands(cli)))
def test_every_help_has_examples_that_parse(command: str, monkeypatch: pytest.MonkeyPatch):
    """They are on the site, and people copy them. Files and folders are the reader's."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: value)
    lines = examples(command)
    assert lines
    for line in lines:
        for typed in MICEMU.findall(line):
            parse(shlex.split(typed))


def test_backend_with_its_test_takes_fewer_than_fifty_lines():
    files = [step for step in steps((DOCS / "backend.md").read_text()) if isinstance(step, File)]
    assert [f.name for f in files[:2]] == ["echo.py", "test_echo.py"]
    assert sum(f.content.count("\n") for f in files[:2]) < 50


def test_every_page_is_in_the_table_of_contents():
    """`make docs` refuses a page that nothing leads to."""
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.S)
    listed = {line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")}
    generated = {"cli-help", "man"}  # made by conf.py
    assert {p.stem for p in DOCS.glob("*.md")} - {"index", *generated} == listed - generated


def test_promises_are_compared():
    assert missing(["mic0 online", "...", "end 17"], "mic0  online\nx\nend 4\n") is None
    assert missing(["mic0 online"], "mic0 booting\n") == "mic0 online"
    assert missing(["b", "a"], "a\nb\n") == "a"


@pytest.mark.system
@pytest.mark.timeout(300)
def test_a_page_that_fails_half_way_leaves_no_emulator(home: Path):
    shell = Shell(home)
    assert shell.run("micemu boot && micemu --instance other boot")[0] == 0
    shell.close()
    for name in ("default", "other"):
        assert not (shell.home / "run/micemu" / name).exists()
