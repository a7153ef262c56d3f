"""``micemu log`` and ``micemu dump log``: what cards said is shown as text."""

from __future__ import annotations

import json

from mic_emu.cli.dump import kernel_log
from mic_emu.cli.log import text


def test_a_card_cannot_command_the_terminal() -> None:
    """Escape sequences, forged lines and NULs of a card or its driver are shown, not obeyed; tracebacks keep their lines."""
    record = {
        "time": 0.0,
        "level": "info",
        "process": "micos",
        "message": "\x1b[2J\x9b1m\0one\n00:00:00 forged\ttab",
    }
    line = text(json.dumps(record))
    assert line.endswith(r"micos: \x1b[2J\x9b1m\x00one\x0a00:00:00 forged" + "\ttab")
    assert text(json.dumps({**record, "message": "ended", "traceback": "a\n\x1bb\n"})).splitlines()[1:] == [
        "    a",
        r"    \x1bb",
    ]
    assert text("half a \x1bline\n") == r"half a \x1bline"
    assert kernel_log("info: \x1bc\nnext\n") == "info: \\x1bc\nnext\n"
