"""``micemu log`` and ``micemu dump log``: what cards said is shown as text."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from mic_emu.cli.dump import kernel_log
from mic_emu.cli.log import Filter, follow, text


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


ODD = [
    "7",
    "[1]",
    "[" * 100000,
    '{"level": "info"}',
    '{"level": "loud", "time": 0, "message": "x"}',
    '{"level": ["info"], "time": 0, "message": "x"}',
    '{"level": "info", "time": "noon", "message": "x"}',
    '{"level": "info", "time": 0, "message": "x", "traceback": 7}',
]


@pytest.mark.parametrize("odd", ODD)
def test_a_line_that_is_no_record(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The code of a card has the log's descriptor: what it writes there is no record, and ends no ``micemu log``."""
    Filter(False, 0, "").show(odd)
    assert capsys.readouterr().out == ""
    assert text(odd) == odd


def test_a_record_of_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    """A number that no clock shows is shown as it is."""
    for number in ("1e300", "NaN"):
        Filter(False, 0, "").show(f'{{"level": "info", "time": {number}, "message": "kept"}}')
    assert capsys.readouterr().out.count("kept") == 2


def test_bytes_that_are_no_text_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is appended is shown from where the first look ended, whatever bytes are there."""
    path = tmp_path / "log"
    path.write_bytes(b"\xff\n")

    def write() -> None:
        with path.open("ab") as f:
            f.write(b'{"level": "info", "time": 0, "message": "a\xffb"}\n')
        time.sleep(0.5)
        os.unlink(path)

    writer = threading.Timer(0.3, write)
    writer.start()
    follow(path, 2, Filter(False, 0, ""))
    writer.join()
    assert "a\N{REPLACEMENT CHARACTER}b" in capsys.readouterr().out
