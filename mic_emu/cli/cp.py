"""micemu cp"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click

from mic_emu.cli import client
from mic_emu.errors import MicemuError, UsageError

# Unpack into the target when it is a folder, else as the target: the rule of cp and scp. Who copies owns
# the copy: a card's root may not give files away.
_RECEIVE = """
set -e
target=$1 name=$2
if [ -d "$target" ]; then exec tar --no-same-owner -xf - -C "$target"; fi
folder=$(dirname -- "$target")
if ! [ -d "$folder" ]; then echo "there is no folder $folder" >&2; exit 1; fi
if ! stage=$(mktemp -d -- "$folder/.micemu-cp.XXXXXX" 2>/dev/null); then
    echo "nothing can be made in $folder" >&2
    exit 1
fi
trap 'rm -rf -- "$stage"' EXIT
tar --no-same-owner -xf - -C "$stage"
mv -T -- "$stage/$name" "$target"
"""


def split(word: str) -> tuple[str, str]:
    """(card or "", path): ``mic0:/tmp/x``, ``./a:b`` is a path."""
    head, colon, path = word.partition(":")
    if colon and re.fullmatch(r"mic[0-9]+", head):
        return head, path or "."
    return "", word


def _on(card: str, argv: list[str]) -> list[str]:
    """The command line that runs ``argv`` on the card, or here."""
    if not card:
        return argv
    ctx = click.get_current_context()
    instance = ["--instance", ctx.find_root().obj] if ctx.find_root().obj else []
    return [sys.executable, "-m", "mic_emu.cli", *instance, "run", "--no-tty", card, "--", *argv]


def copy(source: str, target: str) -> None:
    """One file or folder. Raises MicemuError."""
    from_card, from_path = split(source)
    to_card, to_path = split(target)
    clean = from_path.rstrip("/") or "/"
    folder, name = os.path.split(clean)
    send = ["tar", "-cf", "-", "-C", folder or ".", "--", name or "."]
    receive = ["sh", "-c", _RECEIVE, "micemu-cp", to_path, name or "."]
    with subprocess.Popen(_on(from_card, send), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sender:
        done = subprocess.run(_on(to_card, receive), stdin=sender.stdout, stderr=subprocess.PIPE, check=False)
        assert sender.stdout
        assert sender.stderr
        sender.stdout.close()
        why = sender.stderr.read().decode(errors="replace").strip()
    if sender.returncode != 0:
        raise MicemuError(f"cannot read {source}: {why.splitlines()[0] if why else sender.returncode}")
    if done.returncode != 0:
        why = done.stderr.decode(errors="replace").strip()
        raise MicemuError(f"cannot write {target}: {why.splitlines()[0] if why else done.returncode}")


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="SOURCE... TARGET")
@click.option("-r", "recursive", is_flag=True, help="Accepted for scp's sake: folders are always copied.")
def command(words: tuple[str, ...], recursive: bool) -> None:
    """Copy files and folders to, from and between cards; CARD:PATH names a place on a card.

    Relative paths on a card count from the working directory, which a card shares with its caller; /tmp on
    a card is the card's own.

    \b
    Examples:
      micemu cp program input.dat mic0:/tmp
      micemu cp mic0:/tmp/result.dat .
      micemu cp mic0:/tmp/data mic1:/tmp
    """
    if len(words) < 2:
        raise UsageError("name a source and a target: micemu cp FILE mic0:/tmp")
    *sources, target = words
    for name in {split(w)[0] for w in words} - {""}:
        client.ask("run", card=name)  # online, or a sentence that says what to do
    for source in sources:
        card, path = split(source)
        if not card and not Path(path).exists():
            raise MicemuError(f"cannot read {shlex.quote(path)}: no such file")
        copy(source, target)
