"""on_tty.py KEYS COMMAND...: run a command on a terminal, press KEYS when it has printed something, end with its status."""

from __future__ import annotations

import os
import pty
import select
import sys
import time


def main() -> int:
    keys, command = sys.argv[1].encode().decode("unicode_escape").encode(), sys.argv[2:]
    pid, terminal = pty.fork()
    if not pid:
        os.execvp(command[0], command)
    said, quiet_since, deadline = False, time.monotonic(), time.monotonic() + 50
    while time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], 0.3)
        if ready:
            try:
                data = os.read(terminal, 65536)
            except OSError:
                break
            if not data:
                break
            os.write(1, data)
            said, quiet_since = True, time.monotonic()
        elif said and time.monotonic() - quiet_since > 0.3:
            os.write(terminal, keys)  # it has said what it had to say; again when it did not listen yet
            quiet_since = time.monotonic() + 1
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
