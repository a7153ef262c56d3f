"""The ``micemu`` command: one file per command, imported when it is used."""

from __future__ import annotations

import importlib
import io
import os
import sys

import click

from mic_emu.errors import MicemuError

# command -> (module, short help); the module is imported only when the command runs or shows help.
COMMANDS: dict[str, tuple[str, str]] = {
    "boot": ("boot", "Boot cards and show them."),
    "status": ("status", "Show the cards, their devices and processes."),
    "wait": ("wait", "Wait until cards reach a state."),
    "console": ("console", "Attach to a card's console."),
    "run": ("run", "Run a program on a card, or beside the host."),
    "shutdown": ("shutdown", "Power cards off in order."),
    "reset": ("reset", "Reset cards."),
    "reboot": ("reboot", "Shut cards down and boot them again."),
    "suspend": ("suspend", "Shut cards down before the host sleeps."),
    "resume": ("resume", "Boot the cards that a suspend took down."),
    "host": ("host", "Run the emulator as a service."),
    "stop": ("stop", "Stop the whole emulator."),
    "clean": ("clean", "Remove what a crash left behind."),
    "log": ("log", "Show the log."),
    "events": ("events", "Follow events as JSON lines."),
    "info": ("info", "Show the inventory of host and cards, like micinfo."),
    "smc": ("smc", "Live data and settings of cards, like micsmc."),
    "check": ("check", "Check the health of host and cards, like miccheck."),
    "cp": ("cp", "Copy files to and from a card."),
    "shell": ("shell", "Log in to a card."),
    "top": ("top", "Watch cards live: states, rates, rings, DMA channels, heartbeats."),
    "metrics": ("metrics", "Print Prometheus metrics."),
    "sysfs": ("sysfs", "The cards' sysfs files: read, write, mount."),
    "vop": ("vop", "List, add and remove virtio devices."),
    "fault": ("fault", "Make a card's hardware, OS, disk or network misbehave."),
    "lspci": ("lspci", "Print PCI configuration space for the real lspci."),
    "dma": ("dma", "Show what each DMA channel has done."),
    "scif": ("scif", "Build SCIF programs, look at SCIF nodes."),
    "ping": ("ping", "Ping a card, or the host from a card."),
    "pcap": ("pcap", "Capture a card's network traffic."),
    "dump": ("dump", "Show registers, the device page, vrings, the card's log."),
    "doctor": ("doctor", "Check what this machine offers."),
    "config": ("config", "Show the configuration in force."),
    "bench": ("bench", "Measure speed against limits of this machine."),
    "completion": ("completion", "Print a shell completion script."),
}


class LazyGroup(click.Group):
    """Loads a command's module on first use: ``micemu status`` imports no other command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mic_emu.cli.{COMMANDS[name][0]}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint} See micemu --help.", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--instance",
    metavar="NAME",
    help="Which emulator, when several run (default: $MICEMU_INSTANCE or 'default').",
)
@click.version_option(package_name="micemu", prog_name="micemu")
@click.pass_context
def cli(ctx: click.Context, instance: str | None) -> None:
    """A MIC X100 (Xeon Phi) card and its host software as ordinary processes.

    \b
    Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 no emulator runs,
    4 the card's state forbids it, 5 time-out, 6 no such card.
    """
    ctx.obj = instance


def _occupy_standard() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr, so that no socket of ours gets its number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _complain(said: str) -> None:
    """An error for people: one may quote a card's last words, which are no commands to a terminal."""
    from mic_emu.cli.log import harmless

    print("micemu: " + harmless(said, "\n\t"), file=sys.stderr)


def main() -> None:
    """Entry point: errors are one sentence and an exit status, never a traceback."""
    _occupy_standard()
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a file's name may be no text, and a locale has not every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = cli.main(prog_name="micemu", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except click.Abort:
        sys.exit(130)
    except MicemuError as e:
        _complain(str(e))
        sys.exit(e.code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        _complain(f"{where}{e.strerror or e}")
        sys.exit(1)
