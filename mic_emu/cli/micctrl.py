"""``micctrl``: the words, lines and exit codes that scripts of the real stacks expect.

One short option with at most one card is the script of the mainline kernel (``micctrl_script``); everything
else is the command of MPSS 3 (``micctrl_mpss``). The emulator is the one that $MICEMU_INSTANCE names.
"""

from __future__ import annotations

import sys

from mic_emu.cli.micctrl_mpss import HELP, Mpss, Refused
from mic_emu.cli.micctrl_script import SCRIPT, script
from mic_emu.errors import MicemuError

USAGE = "usage: micctrl -s|-b|-r|-S|-w [micN], or micctrl --help"


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
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        print(f"  [Error] {where}{e.strerror or e}")
        status = MicemuError.code
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
