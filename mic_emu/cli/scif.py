"""micemu scif: nodes, live tables, netcat, a speed test, compiler flags"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mic_emu.cli import client
from mic_emu.cli.bench import line
from mic_emu.cli.flags import compiler_flags
from mic_emu.errors import MicemuError, NoSuchCard

if TYPE_CHECKING:
    from mic_emu.scif.api import Endpoint

CHUNK = 65536
POLLIN, POLLOUT = 1, 4


def _socket(node: str) -> Path:
    """The socket for programs of ``host`` or a card of this instance; our environment's when set."""
    if node == "host" and os.environ.get("MICEMU_SCIF_SOCKET"):
        return Path(os.environ["MICEMU_SCIF_SOCKET"])
    base = Path(client.rundir().path)
    return base / "scif.sock" if node == "host" else base / node / "scif.sock"


def _name(node: str) -> str:
    """``host``, ``mic0``, ... also when it is given by its number, as ``scif nodes`` shows it."""
    return node if not node.isdecimal() else "host" if int(node) == 0 else f"mic{int(node) - 1}"


def _check_node(word: str) -> None:
    """Raises NoSuchCard, in the words in which it was asked for."""
    if _name(word) == "host" or os.environ.get("MICEMU_SCIF_SOCKET"):
        return
    if word.isdecimal():
        nodes = len(client.cards([])) + 1
        if int(word) >= nodes:
            raise NoSuchCard(f"there is no SCIF node {word}; nodes: {', '.join(map(str, range(nodes)))}")
    else:
        client.cards([word])


def _tables(word: str) -> dict[str, Any]:
    """What a node says of itself; ``word``: its name or number. Raises MicemuError."""
    from mic_emu.scif.inspect import ask_tables

    _check_node(word)
    node = _name(word)
    try:
        return ask_tables(_socket(node))
    except OSError as e:
        if not os.environ.get("MICEMU_SCIF_SOCKET"):
            if node == "host":
                client.connect().close()  # raises when nothing runs
            else:
                client.ask("run", card=node)  # raises with the card's state
        raise MicemuError(f"the SCIF node of {node} does not answer: {e.strerror or e}", e.errno or 0) from e


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cflags", is_flag=True, help="Compiler flags for programs that include <scif.h>.")
@click.option("--libs", is_flag=True, help="Linker flags for libscif; the program finds it where it is now.")
@click.pass_context
def command(ctx: click.Context, cflags: bool, libs: bool) -> None:
    """SCIF: build programs, see who is there and what is open, netcat, a speed test.

    \b
    Examples:
      gcc $(micemu scif --cflags) prog.c -o prog $(micemu scif --libs)
      micemu scif endpoints mic0
      micemu scif cat -l 3000                 on the host, and on a card
      echo hello | micemu scif cat host 3000
    """
    words = compiler_flags("scif", cflags, libs)
    if words:
        click.echo(" ".join(words))
    elif ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@command.command()
@client.json_option
def nodes(as_json: bool) -> None:
    """List the online nodes as this process sees them.

    \b
    Examples:
      micemu scif nodes
      micemu run mic0 -- micemu scif nodes
    """
    table = _tables("host")
    rows = [
        {"node": n, "name": "host" if n == 0 else f"mic{n - 1}", "self": n == table["node"]}
        for n in table["online"]
    ]
    if as_json:
        client.emit(rows)
        return
    for row in rows:
        click.echo(f"{row['node']:4d}  {row['name']}{'  (here)' if row['self'] else ''}")


def _peer(ep: dict[str, Any]) -> str:
    return "{}:{}".format(*ep["peer"]) if ep["peer"] else "-"


@command.command()
@click.argument("node", default="host")
@client.json_option
def endpoints(node: str, as_json: bool) -> None:
    """Show the endpoints of a node (host, mic0, ..., or its number) with their owners; pid 0 is the node itself.

    \b
    Examples:
      micemu scif endpoints
      micemu scif endpoints mic0
      micemu scif endpoints 1 --json
    """
    table = _tables(node)
    if as_json:
        client.emit(table)
        return
    click.echo(f"{'PID':>8} {'PORT':>5} {'STATE':<16} {'PEER':<11} WINDOWS")
    for ep in table["endpoints"]:
        click.echo(f"{ep['pid']:8d} {ep['port']:5d} {ep['state']:<16} {_peer(ep):<11} {len(ep['windows'])}")


@command.command()
@click.argument("node", default="host")
@client.json_option
def windows(node: str, as_json: bool) -> None:
    """Show the registered windows of a node (host, mic0, ..., or its number).

    \b
    Examples:
      micemu scif windows mic0
    """
    table = _tables(node)
    rows = [{"pid": ep["pid"], "port": ep["port"], **w} for ep in table["endpoints"] for w in ep["windows"]]
    if as_json:
        client.emit({"registered_bytes": table["registered_bytes"], "windows": rows})
        return
    click.echo(f"{'PID':>8} {'PORT':>5} {'OFFSET':>18} {'BYTES':>12} PROT STATE")
    for w in rows:
        click.echo(
            f"{w['pid']:8d} {w['port']:5d} {w['offset']:#18x} {w['length']:12d} {w['prot']:<4} {w['state']}"
        )


def _number(word: str, what: str) -> int:
    """A port, or the number of a node. Raises click.UsageError."""
    if not word.isdecimal() or int(word) > 0xFFFF:
        raise click.UsageError(f"{word!r} is no {what}")
    return int(word)


def _address(listen: bool, words: tuple[str, ...]) -> tuple[int, int]:
    """(node, port) of PORT with -l, else of NODE PORT. Raises click.UsageError."""
    if len(words) != (1 if listen else 2):
        raise click.UsageError("give PORT with -l, else NODE PORT")
    node, port = words[0], _number(words[-1], "port: 0 to 65535")
    if listen:
        return 0, port
    card = node.removeprefix("mic")
    if card != node and card.isdecimal():
        node = str(int(card) + 1)
    return _number("0" if node == "host" else node, "node: host, mic0, mic1, ..., or its number"), port


def _open(listen: bool, node: int, port: int) -> Endpoint:
    """Connect, or wait for one connection. ScifError becomes a sentence."""
    from mic_emu import scif

    if not os.environ.get("MICEMU_SCIF_SOCKET"):
        client.connect().close()  # raises when nothing runs
        os.environ["MICEMU_SCIF_SOCKET"] = str(_socket("host"))
    try:
        ep = scif.Endpoint()
        if not listen:
            ep.connect((node, port))
            return ep
        with ep:
            ep.bind(port)
            ep.listen(1)
            return ep.accept()[0]
    except scif.ScifError as e:
        what = f"listen on port {port}" if listen else f"connect to {node}:{port}"
        why = os.strerror(e.errno or 0)
        if listen and e.errno == errno.EINVAL:
            why = "somebody listens there (micemu scif endpoints)"
        elif listen and e.errno == errno.EACCES:
            why += "; ports below 1024 are root's"
        elif e.errno == errno.ECONNREFUSED:
            why += ": nobody listens there"
        elif e.errno == errno.ENODEV:
            why += ": the node is not online (micemu scif nodes)"
        elif e.errno == errno.ENOENT:
            why += ": nobody answers at MICEMU_SCIF_SOCKET, {}".format(os.environ["MICEMU_SCIF_SOCKET"])
        raise MicemuError(f"cannot {what}: {why}", e.errno or 0) from e


def _pump(ep: Endpoint) -> None:
    """Both directions at once, until our input has ended or the peer has closed.

    An input with nothing in it (/dev/null, as a shell gives its background jobs) is no end: we only receive.
    """
    from mic_emu import scif

    source: int | None = sys.stdin.buffer.fileno()
    out, empty = memoryview(b""), True
    with ep:
        while True:
            watching: list[tuple[Endpoint | int, int]] = [(ep, POLLIN | POLLOUT if out else POLLIN)]
            if source is not None and not out:
                watching.append((source, POLLIN))
            bits = scif.poll(watching)
            if bits[0] & ~POLLOUT:
                try:
                    data = ep.recv(CHUNK, block=False)
                except scif.ScifError as e:
                    if e.errno != errno.ECONNRESET:
                        raise
                    if out:
                        raise MicemuError(
                            f"the peer closed with {len(out)} bytes of the input not sent", errno.ECONNRESET
                        ) from e
                    return
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            elif bits[0]:
                try:
                    out = out[ep.send(out, block=False) :]
                except scif.ScifError as e:
                    if (
                        e.errno != errno.ECONNRESET
                    ):  # else the next poll says so, and what came before is read first
                        raise
            if len(bits) > 1 and bits[1] and source is not None:
                out = memoryview(os.read(source, CHUNK))
                if not out and not empty:
                    return
                if not out:
                    source = None
                empty = False


@command.command()
@click.option("-l", "--listen", is_flag=True, help="Wait for one connection instead of connecting.")
@click.argument("address", nargs=-1, required=True)
def cat(listen: bool, address: tuple[str, ...]) -> None:
    """Netcat for SCIF: NODE PORT, or -l PORT. Standard input goes out, what comes in goes to standard output.

    Ends when the input ends or the peer closes: with status 1 if input is left over. With nothing on its
    input (/dev/null) it only receives.

    \b
    Examples:
      micemu scif cat -l 3000 > received           on the host, and on a card
      micemu scif cat host 3000 < file             or: 0 3000
    """
    _pump(_open(listen, *_address(listen, address)))


@command.command()
@click.option("-l", "--listen", is_flag=True, help="Be the serving side, for one client.")
@click.option(
    "--scale", type=float, default=1.0, show_default=True, help="Longer (2) or shorter (0.5) measurements."
)
@client.json_option
@click.argument("address", nargs=-1, required=True)
def perf(listen: bool, scale: float, as_json: bool, address: tuple[str, ...]) -> None:
    """Measure SCIF beside the limits of this machine, and UCX where it is installed: NODE PORT, or -l PORT.

    One process serves (-l), the other measures, each on a CPU of its own. In parentheses: the limit.

    \b
    Examples:
      micemu run mic0 -- micemu scif perf -l 3000         on the card, and on the host
      micemu scif perf mic0 3000
    """
    node, port = _address(listen, address)
    from mic_emu.bench import scif as scif_bench
    from mic_emu.bench.scif_peer import Client, serve
    from mic_emu.bench.scif_rows import Bench, cpus

    with _open(listen, node, port) as ep:
        if listen:
            serve(ep)
            return
        rows = []
        try:
            for row in Bench(Client(ep, cpus()), node, scale).rows():
                rows.append(row)
                if not as_json:
                    click.echo(line(row))
        except OSError as e:
            raise MicemuError(f"scif perf: {e.strerror or e}", e.errno or 0) from e
    remarks = scif_bench.notes()
    if as_json:
        client.emit({"rows": rows, "notes": remarks})
        return
    for remark in remarks:
        click.echo(remark, err=True)
