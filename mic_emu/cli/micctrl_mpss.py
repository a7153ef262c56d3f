"""The ``micctrl`` command of MPSS 3: its words, output lines and exit codes (COSM 11.4 to 11.6)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from mic_emu.cli import client
from mic_emu.cli.micctrl_script import ENDED, Card, boot_strings, cards, read, write
from mic_emu.errors import MicemuError, NotRunning, WaitTimeout
from mic_emu.timing import PROFILES

HELP = """\
micctrl [-s|-b|-r|-S|-w] [micN]           as the script of the mainline kernel
micctrl [-v] <command> [-w] [-t seconds] [micN ...]   as MPSS 3:
  -b, --boot        boot cards
  -r, --reset [-f]  reset cards
  -S, --shutdown    shut cards down
  -R, --reboot      shut cards down and boot them again
  -s, --status      show the cards' states
  -w, --wait        wait until nothing changes any more
  --config          show the configuration
  --autoboot        show whether cards boot at start
  --network         show the cards' network
  --initdefaults    nothing to do here: the defaults are built in
Other commands of MPSS 3 (users, bridges, NFS roots) are refused. See also: micemu --help"""
EPERM, EAGAIN, BAD_OPTION, BAD_CARD, BAD_TIMEOUT = 1, 11, 0x80 | 22, 2, 3
MAX_TIMEOUT_S = 30 * 60
# MPSS 3 has other words for two states, and "lost" for a crash (COSM 13.7).
_WORDS = {"shutting_down": "shutdown", "reset_failed": "reset failed"}
# What these set is a key of the one configuration file, which is the administrator's to edit.
_IN_THE_FILE = {"--autoboot": "autoboot = true or false", "--network": "net"}
_REFUSED = (
    "--resetdefaults", "--resetconfig", "--cleanconfig", "--addbridge", "--modbridge", "--delbridge",
    "--mac", "--hostkeys", "--sshkeys", "--useradd", "--adduser", "--userdel", "--deluser",
    "--userupdate", "--passwd", "--groupadd", "--addgroup", "--groupdel", "--delgroup", "--ldap",
    "--nis", "--rootdev", "--updateramfs", "--updatenfs", "--updateusr", "--addnfs", "--remnfs",
    "--base", "--commondir", "--micdir", "--overlay", "--rpmdir", "--osimage", "--pm", "--cgroup",
    "--syslog", "--service",
)  # fmt: skip


def _table(lines: dict[str, str], indent: int) -> None:
    """Rows of ``--config``."""
    for name, value in lines.items():
        print(f"{' ' * indent}{name + ':':<20} {value}")


class Refused(Exception):
    """Ends the command: ``text`` for people, ``code`` for the shell."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Mpss:
    """One command line in the manner of MPSS 3."""

    def __init__(self, argv: list[str]) -> None:
        self.command = ""
        self.names: list[str] = []
        self.wait = self.force = False
        self.timeout_s: float | None = None
        self.commands: dict[str, Callable[[list[Card]], int]] = {
            "--boot": self.boot, "--reset": self.reset, "--shutdown": self.shutdown, "--reboot": self.reboot,
            "--status": self.status, "--wait": self.wait_only, "--config": self.config, "--autoboot": self.autoboot,
            "--network": self.network, "--initdefaults": lambda _: 0,
        }  # fmt: skip
        self._parse(argv)

    def _parse(self, argv: list[str]) -> None:
        short = {"-b": "--boot", "-r": "--reset", "-S": "--shutdown", "-R": "--reboot", "-s": "--status"}
        words = iter(argv)
        for word in words:
            name, _, value = short.get(word, word).partition("=")
            if name in ("-w", "--wait"):
                self.wait = True
            elif name in ("-t", "--timeout"):
                self.timeout_s = self._seconds(value or next(words, ""))
            elif name in ("-f", "--force"):
                self.force = True
            elif name in ("-v", "-vv", "-vvv", "-i"):
                continue
            elif name in ("-c", "--configdir", "-d", "--destdir"):
                raise Refused(
                    "  [Error] the configuration is the emulator's: see micemu config show", BAD_OPTION
                )
            elif name in _IN_THE_FILE and value:
                raise Refused(
                    f"  [Error] {name} shows and does not set: write {_IN_THE_FILE[name]} into the card's [[card]] table "
                    "of the configuration (micemu config show)",
                    EPERM,
                )
            elif name in _REFUSED:
                raise Refused(f"  [Error] {name} cannot be emulated; see micemu --help for what can", EPERM)
            elif name in self.commands and not self.command:
                self.command = name
            elif word.startswith("-"):
                raise Refused(f"  [Error] unknown or second option {word}\n{HELP}", BAD_OPTION)
            else:
                self.names.append(self._name(word))
        self.command = self.command or ("--wait" if self.wait else "")
        if not self.command:
            raise Refused(f"  [Error] no command\n{HELP}", BAD_OPTION)

    def _name(self, word: str) -> str:
        if re.fullmatch(r"mic(0|[1-9][0-9]{0,2})", word) and int(word[3:]) < 256:
            return word
        raise Refused(f"  [Error] Invalid card name '{word}'\n  [Error] cards are mic0 to mic255", BAD_CARD)

    def _seconds(self, text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            raise Refused(f"  [Error] {text!r} is no number of seconds\n{HELP}", BAD_OPTION) from None
        if not 0 <= seconds <= MAX_TIMEOUT_S:
            raise Refused("  [Error] the timeout must be 0 to 1800 seconds", BAD_TIMEOUT)
        return seconds

    def run(self) -> int:
        """Exit status: the number of cards that failed."""
        try:
            known = {c["name"]: c for c in cards()}
        except NotRunning:
            if self.command == "--boot":
                raise Refused("  [Error] Cannot boot cards - mpssd daemon is not running", 1) from None
            known = {}
        if not known and not self.names:
            print("[Warning] No Mic cards found or specified on command line")
            return 0
        rows = (
            [known.get(n) or {"name": n, "state": None} for n in self.names]
            if self.names
            else list(known.values())
        )
        failed = self.commands[self.command](rows)
        if self.wait and not failed and self.command in ("--boot", "--reset", "--shutdown", "--reboot"):
            return self.wait_only(rows)
        return failed

    def _each(self, rows: list[Card], verb: str, act: Callable[[str], str]) -> int:
        """``act`` returns the line of a card that went well."""
        failed = self._missing(rows)
        for row in self._existing(rows, f"{verb} aborted"):
            name = row["name"]
            try:
                print(f"{name}: {act(name)}")
            except MicemuError as e:
                text = (
                    f"{name} {verb} failed - card state {self._word(name)}"
                    if e.code == 4
                    else f"{name}: {verb} aborted - {e}"
                )
                print(f"  [Error] {text}")
                failed += 1
        return failed

    @staticmethod
    def _existing(rows: list[Card], verdict: str) -> Iterator[Card]:
        """The cards that exist, in order; in place of each other one a line."""
        for row in rows:
            if row["state"] is None:
                print(f"  [Error] {row['name']}: {verdict} - non existent MIC device")
            else:
                yield row

    @staticmethod
    def _missing(rows: list[Card]) -> int:
        return sum(row["state"] is None for row in rows)

    def _word(self, card: str) -> str:
        state, status = read(card, "state"), read(card, "shutdown_status")
        lost = state == "shutting_down" and status == "crashed"  # a reset keeps the status until its end
        return "lost" if lost else _WORDS.get(state, state)

    def boot(self, rows: list[Card]) -> int:
        def act(card: str) -> str:
            boot_strings(card)
            write(card, "state", "boot")
            return f"booting {read(card, 'firmware')}"

        return self._each(rows, "Boot", act)

    def reset(self, rows: list[Card]) -> int:
        def act(card: str) -> str:
            if self.force:
                client.ask("force_reset", cards=[card])
            else:
                write(card, "state", "reset")
            return "resetting"

        return self._each(rows, "Reset", act)

    def shutdown(self, rows: list[Card]) -> int:
        def act(card: str) -> str:
            write(card, "state", "shutdown")
            return "Shutting down"

        return self._each(rows, "Shutdown", act)

    def reboot(self, rows: list[Card]) -> int:
        def down(card: str) -> str:
            write(card, "state", "shutdown")
            return "shutting down"

        def ready(card: str) -> str:
            client.ask("wait", states=["ready", "reset_failed"], cards=[card], timeout=self._limit(rows))
            write(card, "state", "boot")
            return f"booting {read(card, 'firmware')}"

        return self._each(rows, "Reset", down) or self._each(rows, "Boot", ready)

    def status(self, rows: list[Card]) -> int:
        for row in self._existing(rows, "State failed"):
            name, running = row["name"], row["state"] in ("online", "booting")
            detail = f" (mode: {read(name, 'bootmode')} image: {read(name, 'firmware')})" if running else ""
            print(f"{name}: {self._word(name)}{detail}")
        return self._missing(rows)

    def _limit(self, rows: list[Card]) -> float:
        """90 s, 60 more per further card, between 300 and 600."""
        return min(max(90 + 60 * (len(rows) - 1), 300), 600) if self.timeout_s is None else self.timeout_s

    def _boots_yet(self, names: list[str]) -> None:
        """A card that is ready may be about to boot: look again 2 s later (scaled as all pauses are)."""
        profile = PROFILES[client.ask("status")["status"]["host"]["timing"]]
        for name in names:
            if read(name, "state") == "ready":
                try:
                    client.ask(
                        "wait", states=["booting", "online"], cards=[name], timeout=2.0 * profile.delay
                    )
                except WaitTimeout:
                    return

    def wait_only(self, rows: list[Card]) -> int:
        names = [r["name"] for r in self._existing(rows, "Wait aborted")]
        end = time.monotonic() + self._limit(rows)

        def until(states: list[str], cards: list[str]) -> None:
            if cards:
                client.ask("wait", states=states, cards=cards, timeout=max(end - time.monotonic(), 0.0))

        try:
            # What is being reset shows what it crashed of until it is ready.
            until([*ENDED], [name for name in names if read(name, "state") == "resetting"])
            until([*ENDED, "crashed"], names)
            self._boots_yet(names)
            until([*ENDED, "crashed"], names)
        except WaitTimeout:
            print("Timeout booting MIC, check your installation")
            return EAGAIN
        words = {name: self._word(name) for name in names}
        for name, word in words.items():
            print(f"{name}: {word}")
        return sum(word not in ("ready", "online") for word in words.values()) + len(rows) - len(names)

    # --- configuration --------------------------------------------------------------------------------

    def _configs(self, rows: list[Card]) -> Iterator[tuple[Card, dict[str, Any]]]:
        """Each card that exists with its configuration."""
        known: list[dict[str, Any]] = (
            client.ask("config")["config"]["card"] if len(rows) > self._missing(rows) else []
        )
        for row in self._existing(rows, "Config aborted"):
            yield row, known[int(row["name"][3:])]

    def config(self, rows: list[Card]) -> int:
        for row, config in self._configs(rows):
            address = row["addresses"]
            title = f"{row['name']}:"
            print(f"\n{title}\n{'=' * 61}")
            lines = {
                "Config Version": "1.1", "Linux Kernel": config["image"] or "built-in micos", "Map File": "Not configured",
                "Family": "x100", "MPSSVersion": "3.x", "BootOnStart": "Enabled" if config["autoboot"] else "Disabled",
                "Shutdowntimeout": "300 seconds", "ExtraCommandLine": config["cmdline"] or "Not configured",
                "PowerManagment": "Not configured", "Root Device": "Dynamic Ram Filesystem",
            }  # fmt: skip
            network = {
                "Hostname": row["name"], "MIC IP": address["card"], "Host IP": address["host"], "Net Bits": "24",
                "NetMask": "255.255.255.0", "MtuSize": "1500", "MIC MAC": address["card_mac"],
                "Host MAC": address["host_mac"],
            }  # fmt: skip
            rest = {
                "LDAP": "Not configured", "NIS": "Not configured", "Cgroup Memory": "Disabled", "Console": "hvc0",
                "VerboseLogging": "Disabled", "CrashDump": "Not configured",
            }  # fmt: skip
            _table(lines, 4)
            has_network = config["net"] != "none"
            _table({"Network": "Static Pair" if has_network else "Not configured"}, 4)
            _table(network if has_network else {}, 8)
            _table(rest, 4)
        return self._missing(rows)

    def autoboot(self, rows: list[Card]) -> int:
        for row, config in self._configs(rows):
            print(f"{row['name']}:\tBootOnStart: {'enabled' if config['autoboot'] else 'disabled'}")
        return self._missing(rows)

    def network(self, rows: list[Card]) -> int:
        for row, config in self._configs(rows):
            if config["net"] == "none":
                print(f"{row['name']}: Not configured")
                continue
            at = row["addresses"]
            print(
                f"{row['name']}: StaticPair\n    Hostname: {row['name']}\n"
                f"    Mic ({at['card_mac']} {at['card']})\n    Host ({at['host_mac']} {at['host']})"
            )
        return self._missing(rows)
