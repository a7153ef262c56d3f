"""micemu console"""

from __future__ import annotations

import click

from mic_emu.cli import client, console_client
from mic_emu.cosm.states import State
from mic_emu.errors import StateError
from mic_emu.version import PROTOCOL, VERSION
from mic_emu.wire import PeerClosed, connect_unix

CRASHED_STATE = State.SHUTTING_DOWN.word


@click.command()
@click.argument("card", default="mic0", metavar="[CARD]", shell_complete=client.complete_cards)
@click.option(
    "--detach-key",
    default="^]",
    show_default=True,
    metavar="KEY",
    help="Leaves the console; 'none' for no key.",
)
def command(card: str, detach_key: str) -> None:
    """Attach to a card's console: an interactive shell on the card.

    Everything the card prints is also in the card's console.log. When the card has crashed, or crashes
    meanwhile, the command says so and ends with exit status 4.

    \b
    Examples:
      micemu console
      micemu console mic1 --detach-key ^A
    """
    key = console_client.parse_key(detach_key)
    devices = client.ask("vop", cards=[card])["cards"][card]
    console = next((d for d in devices if d["type"] == "console"), None)
    if console is None or console["state"] != "running":
        if text := crashed(card):
            raise StateError(text)
        raise StateError(f"{card} has no running console: boot it first (micemu boot {card})")
    with CardWatch(card) as watch:
        console_client.attach(connect_unix(console["socket"]), card, key, watch)


def crashed(card: str) -> str:
    """What to say when ``card`` has crashed; "" when it has not."""
    rows = {row["name"]: row for row in client.ask("status")["status"]["cards"]}
    if rows.get(card, {}).get("shutdown_status") != "crashed":
        return ""
    return (
        f"{card} has crashed, its console is dead: micemu dump log {card} shows its last words, "
        f"{rows[card]['run_dir']}/console.log what it printed; micemu boot {card} resets and boots it"
    )


class CardWatch:
    """Hears of the card's states while a console is attached. Context manager."""

    def __init__(self, card: str) -> None:
        self.card = card
        self.channel = client.connect()
        self.channel.send({"op": "sysfs_watch", "protocol": PROTOCOL, "version": VERSION})

    def __enter__(self) -> CardWatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()

    def fileno(self) -> int:
        """Readable when there may be news; -1: there will be none."""
        return self.channel.fileno()

    def look(self) -> None:
        """Raises StateError when the card has crashed."""
        try:
            while got := self.channel.try_recv():
                if (
                    got[0].get("card") == self.card
                    and got[0]["state"] == CRASHED_STATE
                    and (text := crashed(self.card))
                ):
                    raise StateError(text)
        except PeerClosed:  # the emulator ends, and with it the console
            self.channel.close()
