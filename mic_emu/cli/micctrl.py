"""``micctrl``: the words, lines and exit codes that scripts of the real stacks expect.

One short option with at most one card is the script of the mainline kernel (COSM 10.4); everything else is
the command of MPSS 3 (COSM 11.4 to 11.6). The emulator is the one that $MICEMU_INSTANCE names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from mic_emu.cli import client
from mic_emu.errors import MicemuError, NotRunning, WaitTimeout

Card = dict[str, Any]
USAGE = "usage: micctrl -s|-b|-r|-S|-w [micN], or micctrl --help"
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
_ENDED = ("ready", "online", "reset_failed")
_REFUSED = (
    "--resetdefaults", "--resetconfig", "--cleanconfig", "--addbridge", "--modbridge", "--delbridge",
    "--mac", "--hostkeys", "--sshkeys", "--useradd", "--adduser", "--userdel", "--deluser",
    "--userupdate", "--passwd", "--groupadd", "--addgroup", "--groupdel", "--delgroup", "--ldap",
    "--nis", "--rootdev", "--updateramfs", "--updatenfs", "--updateusr", "--addnfs", "--remnfs",
    "--base", "--commondir", "--micdir", "--overlay", "--rpmdir", "--osimage", "--pm", "--cgroup",
    "--syslog", "--service",
)  # fmt: skip


def cards() -> list[Card]:
    """All cards in class order. Raises NotRunning."""
    rows: list[Card] = client.ask("status")["status"]["cards"]
    return rows


def write(card: str, name: str, text: str) -> None:
    """A write to a sysfs attribute. Raises MicemuError with the errno."""
    client.ask("sysfs_write", path=f"class/mic/{card}/{name}", data=text)


def read(card: str, name: str) -> str:
    """A sysfs attribute without its newline."""
    data: str = client.ask("sysfs_read", path=f"class/mic/{card}/{name}")["data"]
    return data.rstrip("\n")


def boot_strings(card: str) -> None:
    """What the mainline script stores before it boots; a boot image that was chosen with ``micemu boot``
    stays."""
    write(card, "bootmode", "linux")
    if not read(card, "firmware").startswith("/"):
        write(card, "firmware", "mic/uos.img")
        write(card, "ramdisk", f"mic/{card}.image")


# --- the mainline script ------------------------------------------------------------------------------


def _echo(card: str, name: str, text: str) -> int:
    """``echo text > name``: 0, or 1 with the shell's message."""
    try:
        write(card, name, text)
    except NotRunning:
        raise
    except MicemuError as e:
        print(f"micctrl: /sys/class/mic/{card}/{name}: {os.strerror(e.errno)}", file=sys.stderr)
        return 1
    return 0


def _script_status(card: str) -> int:
    print(f"{card} state: {read(card, 'state')} shutdown_status: {read(card, 'shutdown_status')}")
    return 0


def _script_boot(card: str) -> int:
    try:
        boot_strings(card)
    except NotRunning:
        raise
    except MicemuError as e:
        print(f"micctrl: /sys/class/mic/{card}: {os.strerror(e.errno)}", file=sys.stderr)
        return 1
    return _echo(card, "state", "boot")


def _script_wait(card: str) -> int:
    """Ends on ready, online and reset_failed, not on the vanished ``offline`` (COSM-69)."""
    while True:
        try:
            client.ask("wait", states=list(_ENDED), cards=[card], timeout=1.0)
            return 0
        except WaitTimeout:
            print(f"Waiting for {card} to go offline", flush=True)


SCRIPT: dict[str, Callable[[str], int]] = {
    "-s": _script_status,
    "-b": _script_boot,
    "-r": lambda card: _echo(card, "state", "reset"),
    "-S": lambda card: _echo(card, "state", "shutdown"),
    "-w": _script_wait,
}


def script(option: str, names: list[str]) -> int:
    """One option for one card or all; the first failing card ends it."""
    try:
        for name in names or [c["name"] for c in cards()]:
            status = SCRIPT[option](name)
            if status:
                return status
    except NotRunning:
        print("Module unloaded ")
        return 3
    return 0


# --- MPSS 3 -------------------------------------------------------------------------------------------


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
            elif name in _REFUSED or (name in ("--autoboot", "--network") and value):
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
        if (
            word.startswith("mic")
            and word[3:].isdigit()
            and int(word[3:]) < 256
            and word == f"mic{int(word[3:])}"
        ):
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
        failed = 0
        for row in rows:
            name = row["name"]
            if row["state"] is None:
                print(f"{name}: {verb} aborted - non existent MIC device")
                failed += 1
                continue
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

    def _word(self, card: str) -> str:
        state, status = read(card, "state"), read(card, "shutdown_status")
        return "lost" if status == "crashed" else _WORDS.get(state, state)

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
        failed = 0
        for row in rows:
            name = row["name"]
            if row["state"] is None:
                print(f"{name}: State failed - non existent MIC device")
                failed += 1
                continue
            running = row["state"] in ("online", "booting")
            detail = f" (mode: {read(name, 'bootmode')} image: {read(name, 'firmware')})" if running else ""
            print(f"{name}: {self._word(name)}{detail}")
        return failed

    def _limit(self, rows: list[Card]) -> float:
        """90 s, 60 more per further card, between 300 and 600."""
        return self.timeout_s or min(max(90 + 60 * (len(rows) - 1), 300), 600)

    def wait_only(self, rows: list[Card]) -> int:
        names = [r["name"] for r in rows if r["state"] is not None]
        try:
            client.ask("wait", states=[*_ENDED, "crashed"], cards=names, timeout=self._limit(rows))
        except WaitTimeout:
            print("Timeout booting MIC, check your installation")
            return EAGAIN
        words = {name: self._word(name) for name in names}
        for name, word in words.items():
            print(f"{name}: {word}")
        return sum(word not in ("ready", "online") for word in words.values()) + len(rows) - len(names)

    # --- configuration --------------------------------------------------------------------------------

    def _configs(self, rows: list[Card]) -> list[tuple[Card, dict[str, Any]]]:
        """Each card with its configuration, and None as its state when there is no such card."""
        known: list[dict[str, Any]] = client.ask("config")["config"]["card"]
        return [(r, known[int(r["name"][3:])]) for r in rows if r["state"] is not None]

    def config(self, rows: list[Card]) -> int:
        for row, config in self._configs(rows):
            address = row["addresses"]
            title = f"{row['name']}:"
            print(f"\n{title}\n{'=' * 61}")
            lines = {
                "Config Version": "1.1", "Linux Kernel": config["image"] or "built-in micos", "Map File": "Not configured",
                "Family": "x100", "MPSSVersion": "3.x", "BootOnStart": "Enabled" if config["autoboot"] else "Disabled",
                "Shutdowntimeout": "300 seconds", "ExtraCommandLine": config["cmdline"] or "Not configured",
                "PowerManagment": "Not configured", "Root Device": "Dynamic Ram Filesystem", "Network": "Static Pair",
                "Hostname": row["name"], "MIC IP": address["card"], "Host IP": address["host"], "Net Bits": "24",
                "NetMask": "255.255.255.0", "Cgroup Memory": "Disabled", "Console": "hvc0", "VerboseLogging": "Disabled",
                "CrashDump": "Not configured",
            }  # fmt: skip
            for name, value in lines.items():
                pad = (
                    "        " if name in ("Hostname", "MIC IP", "Host IP", "Net Bits", "NetMask") else "    "
                )
                print(f"{pad}{name + ':':<20} {value}")
        return len(rows) - len(self._configs(rows))

    def autoboot(self, rows: list[Card]) -> int:
        for row, config in self._configs(rows):
            print(f"{row['name']}:\tBootOnStart: {'enabled' if config['autoboot'] else 'disabled'}")
        return 0

    def network(self, rows: list[Card]) -> int:
        for row, _ in self._configs(rows):
            address = row["addresses"]
            print(
                f"{row['name']}: StaticPair\n    Hostname: {row['name']}\n"
                f"    Mic ({address['card']})\n    Host ({address['host']})"
            )
        return 0


def run(argv: list[str]) -> int:
    """The exit status of ``micctrl argv``."""
    if argv in (["-h"], ["--help"]):
        print(HELP)
        return 0
    if argv and argv[0] in SCRIPT and len(argv) <= 2 and all(a.startswith("mic") for a in argv[1:]):
        return script(argv[0], argv[1:])
    if not any(a.startswith("-") and len(a) > 1 for a in argv) or (
        len(argv) == 1 and len(argv[0]) == 2 and argv[0] not in ("-R",)
    ):
        print(USAGE)
        return 2
    try:
        return Mpss(argv).run()
    except Refused as e:
        print(e)
        return e.code


def main() -> None:
    """Entry point: errors are one sentence, never a traceback."""
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except MicemuError as e:
        print(f"  [Error] {e}")
        status = e.code
    except BrokenPipeError:
        status = 141
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
